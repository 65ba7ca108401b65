"""Rollouts: episodes that the policy wrote, as one flat batch of tokens, and the micro-batches it is trained in."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...envs.tokens.env import FastPathEnv
from ...llm_backends import Sampling, request_seed
from ...llm_backends.local.causal_lm import token_budget_chunks
from ...llm_backends.training.teacher_forcing import common_prefix
from ..policy.language_model import LanguageModelPolicy
from .engine import RolloutEngine

OPENING, ALIKE = 16, 4
"""Tokens by which prompts are told apart, and episodes of one kind that are worth micro-batches of their own."""


@dataclass
class TokenBatch:
    """n episodes. Arrays over tokens are flat, episode after episode; nothing is padded.

    An episode without tokens is no part of a batch: it has nothing that could carry a reward or a gradient.
    """

    prompts: list[np.ndarray]
    """n int32 arrays."""
    responses: list[np.ndarray]
    """n int32 arrays, none empty."""
    allowed: list[list[np.ndarray] | None]
    """Under constrained decoding the allowed tokens at each position, else None."""
    rewards: np.ndarray
    """float32, shape (tokens,): from the env, aligned to the token that earned it."""
    sampler_logprobs: np.ndarray
    """float32, shape (tokens,): by the engine that drew the tokens."""
    loss_mask: np.ndarray
    """bool, shape (tokens,): what the policy wrote; other tokens carry no gradient, and no KL penalty."""
    terminated: np.ndarray
    """bool, shape (n,)."""
    groups: list[str]
    """Group id of each episode."""
    infos: list[dict[str, Any]] = field(default_factory=list)
    resets: list[int] = field(default_factory=list)
    """Of each episode: which of the env's resets it followed, from 0; episodes of one were scored together."""
    on_policy: bool = True
    """False for episodes that another policy wrote."""
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """float32, shape (tokens,): by the policy that wrote them, from the training kernels."""
    reference_logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """float32, shape (tokens,)."""
    values: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """float32, shape (tokens,)."""
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """float32, shape (tokens,): truncated importance weights for the gap between sampler and training kernels."""
    advantages: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """float32, shape (tokens,)."""
    returns: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """float32, shape (tokens,): targets of the value function."""

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def lengths(self) -> np.ndarray:
        """int64, shape (n,): response tokens of each episode."""
        return np.array([len(r) for r in self.responses], dtype=np.int64)

    @property
    def tokens(self) -> int:
        """Response tokens in all."""
        return int(self.lengths.sum())

    @property
    def own_rewards(self) -> np.ndarray:
        """float32, shape (tokens,): the rewards, 0 for tokens that the policy did not write."""
        return np.where(self.loss_mask, self.rewards, np.float32(0.0))

    def rows(self, episodes: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64: positions of the tokens of the given episodes, in their order."""
        ends = np.cumsum(self.lengths)
        starts = ends - self.lengths
        return np.concatenate([np.arange(starts[i], ends[i]) for i in episodes]) if len(episodes) else np.zeros(0, int)

    def per_episode(self, values: np.ndarray) -> np.ndarray:
        """Sums of per-token values, shape (n,); of a bool array, counts."""
        return np.add.reduceat(values, np.cumsum(self.lengths) - self.lengths) if len(self) else np.zeros(0)

    def micro_batches(self, episodes: np.ndarray, budget: int) -> Iterator[np.ndarray]:
        """Splits episodes into micro-batches of at most ``budget`` tokens, padding included, of like lengths.

        Episodes whose prompts begin alike come together: a prefix that all of a micro-batch share is computed once, and
        does not count.
        """
        for members in self._by_opening(episodes):
            shared = common_prefix([self.prompts[i] for i in members]) if len(members) > 1 else 0
            sizes = np.array([len(self.prompts[i]) + len(self.responses[i]) - shared for i in members])
            order = np.argsort(sizes, kind="stable")
            for chunk in token_budget_chunks([int(sizes[k]) for k in order], budget):
                yield members[order[chunk]]

    def _by_opening(self, episodes: np.ndarray) -> list[np.ndarray]:
        """Episodes by the first tokens of their prompts; those with few of their kind in one group."""
        found: dict[bytes, list[int]] = {}
        for i in episodes:
            found.setdefault(self.prompts[i][:OPENING].tobytes(), []).append(int(i))
        alike = [members for members in found.values() if len(members) >= ALIKE]
        others = [i for members in found.values() if len(members) < ALIKE for i in members]
        return [np.array(members) for members in [*alike, others] if members]


@dataclass
class RolloutStatistics:
    """What a rollout gave, invalid and empty episodes included; sums, so that processes can add them up."""

    episodes: int = 0
    invalid: int = 0
    empty: int = 0
    reward: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    """Generation and play."""
    waited: float = 0.0
    """Of these, play: taking tokens and waiting for scores."""
    terms: dict[str, float] = field(default_factory=dict)
    """Sums of the reward's terms."""
    term_counts: dict[str, float] = field(default_factory=dict)
    """Episodes that have them: a term without a verdict is left out."""
    finish: dict[str, float] = field(default_factory=dict)
    """Episodes by finish reason."""


def collect(
    writer: LanguageModelPolicy | RolloutEngine,
    env: FastPathEnv,
    batches: int,
    sampling: Sampling,
    seed: int,
    local_envs: np.ndarray,
    env_seed: int | None = None,
) -> tuple[TokenBatch, RolloutStatistics]:
    """Has episodes written: ``batches`` times one per copy of the env.

    Scoring of one batch overlaps with the generation of the next.

    Args:
        writer: the policy, or an engine that has its weights.
        env: a vector env with the fast path, in autoreset mode ``DISABLED``.
        batches: resets of the env.
        sampling: its seed is replaced by one per episode.
        seed: from which the episodes' seeds are derived.
        local_envs: bool, shape (copies,): the copies that this process plays.
        env_seed: of the first reset; None goes on.

    Returns:
        The valid, non-empty episodes, and counts of all.
    """
    statistics = RolloutStatistics()
    kept: list[dict[str, Any]] = []
    pending: list[dict[str, Any]] | None = None
    begun = time.perf_counter()
    for number in range(batches):
        env.start(seed=env_seed if number == 0 else None)
        drafts = _write(writer, env, sampling, request_seed(seed, number), local_envs, number)
        if pending is not None:
            statistics.waited += _finish(env, pending, kept, statistics)
        pending = drafts
        started = time.perf_counter()
        env.play_async([draft["response"] if draft else [] for draft in drafts], local_envs)
        statistics.waited += time.perf_counter() - started
    if pending is not None:
        statistics.waited += _finish(env, pending, kept, statistics)
    statistics.seconds = time.perf_counter() - begun
    return _batch(kept), statistics


def _write(
    writer: LanguageModelPolicy | RolloutEngine,
    env: FastPathEnv,
    sampling: Sampling,
    seed: int,
    local_envs: np.ndarray,
    number: int,
) -> list[dict[str, Any]]:
    prompts = env.prompts()
    constraints = env.constraints()
    copies = np.flatnonzero(local_envs)
    completions = writer.generate(
        [prompts[i] for i in copies],
        [replace(sampling, seed=request_seed(seed, int(i))) for i in copies],
        [constraints[i] for i in copies],
        env.generation.eos_ids,
    )
    drafts: list[dict[str, Any]] = [{} for _ in prompts]
    for i, [completion] in zip(copies, completions, strict=True):
        tokens = np.array(completion.token_ids, dtype=np.int32)
        choices = constraints[i]
        drafts[i] = {
            "prompt": prompts[i],
            "response": tokens,
            "logprobs": np.array(completion.logprobs, dtype=np.float32),
            "allowed": None if choices is None else [choices.allowed(tokens[:t].tolist()) for t in range(len(tokens))],
            "reset": number,
        }
    return drafts


def _finish(
    env: FastPathEnv, drafts: list[dict[str, Any]], kept: list[dict[str, Any]], statistics: RolloutStatistics
) -> float:
    """Takes the outcome of a play; returns the seconds spent waiting for it."""
    started = time.perf_counter()
    played = env.play_wait()
    waited = time.perf_counter() - started
    for i, draft in enumerate(drafts):
        if not draft:
            continue
        count, info = int(played.n_consumed[i]), played.infos[i]
        statistics.episodes += 1
        statistics.tokens += count
        statistics.empty += not count
        statistics.invalid += not played.valid[i]
        if count and played.valid[i]:
            split = played.credit[i] if played.credit is not None else played.rewards[i]
            statistics.reward += float(played.rewards[i].sum())
            for name, value in info.get("reward_terms", {}).items():
                statistics.terms[name] = statistics.terms.get(name, 0.0) + float(value)
                statistics.term_counts[name] = statistics.term_counts.get(name, 0.0) + 1
            reason = info.get("finish_reason", "")
            statistics.finish[reason] = statistics.finish.get(reason, 0.0) + 1
            kept.append(
                {
                    "prompt": draft["prompt"],
                    "response": draft["response"][:count],
                    "logprobs": draft["logprobs"][:count],
                    "allowed": None if draft["allowed"] is None else draft["allowed"][:count],
                    "rewards": np.asarray(split, dtype=np.float32),
                    "terminated": bool(played.terminated[i]),
                    "info": info,
                    "reset": draft["reset"],
                }
            )
    return waited


def _batch(kept: Sequence[dict[str, Any]]) -> TokenBatch:
    def flat(key: str) -> np.ndarray:
        return np.concatenate([row[key] for row in kept]) if kept else np.zeros(0, np.float32)

    rewards = flat("rewards")
    return TokenBatch(
        prompts=[row["prompt"] for row in kept],
        responses=[row["response"] for row in kept],
        allowed=[row["allowed"] for row in kept],
        rewards=rewards,
        sampler_logprobs=flat("logprobs"),
        loss_mask=np.ones(len(rewards), dtype=bool),
        terminated=np.array([row["terminated"] for row in kept], dtype=bool),
        groups=[str(row["info"].get("episode_id", i)) for i, row in enumerate(kept)],
        infos=[row["info"] for row in kept],
        resets=[row["reset"] for row in kept],
    )
