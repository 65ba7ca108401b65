"""Rollouts: :func:`collect` generates episodes and has them scored; :class:`TokenBatch` holds their tokens.

A batch is flat: per-token arrays hold episode after episode. :meth:`TokenBatch.micro_batches` splits it for training.
"""

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

OPENING_TOKENS, SMALLEST_GROUP = 16, 4
"""Number of leading tokens by which prompts are grouped, and the smallest group that gets micro-batches to itself."""


@dataclass
class TokenBatch:
    """A batch of n episodes. Per-token arrays are flat, episode after episode, without padding.

    Episodes without tokens are left out: they have nothing that could carry a reward or a gradient.
    """

    prompts: list[np.ndarray]
    """Token ids of the prompts, n int32 arrays."""
    responses: list[np.ndarray]
    """Token ids of the responses, n int32 arrays, none empty."""
    allowed: list[list[np.ndarray] | None]
    """For each episode: under constrained decoding the allowed tokens at each position, else None."""
    rewards: np.ndarray
    """Rewards of the env, each at the token that earned it; float32, shape (tokens,)."""
    sampler_logprobs: np.ndarray
    """Log-probs by the engine that sampled the tokens, in nats; float32, shape (tokens,)."""
    loss_mask: np.ndarray
    """True for tokens that the policy wrote; others carry no gradient and no KL penalty; bool, shape (tokens,)."""
    terminated: np.ndarray
    """True for episodes that have ended; bool, shape (n,)."""
    groups: list[str]
    """Group id of each episode; episodes of one group answer one prompt after one reset, and are compared."""
    infos: list[dict[str, Any]] = field(default_factory=list)
    """The env's info of the last step of each episode."""
    resets: list[int] = field(default_factory=list)
    """For each episode the number of the env's reset before it, from 0; episodes of one reset were scored together."""
    copies: list[int] = field(default_factory=list)
    """For each episode the env copy that played it; with the reset, its place among those of all processes."""
    on_policy: bool = True
    """False for episodes that another policy wrote."""
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """Log-probs by the policy that wrote the tokens, from the training kernels, in nats; float32, shape (tokens,)."""
    reference_logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """Log-probs by the reference policy, in nats; float32, shape (tokens,)."""
    values: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """V of the states in which the tokens were chosen; float32, shape (tokens,)."""
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """Truncated importance weights, for the gap between sampler and training kernels; float32, shape (tokens,)."""
    advantages: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """Advantages of the tokens; float32, shape (tokens,)."""
    returns: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """Targets of the value function; float32, shape (tokens,)."""

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def places(self) -> list[tuple[int, int]]:
        """For each episode the env's reset and the copy, in whose order one process alone would hold all episodes."""
        return list(zip(self.resets, self.copies, strict=True))

    @property
    def lengths(self) -> np.ndarray:
        """Number of response tokens of each episode; int64, shape (n,)."""
        return np.array([len(r) for r in self.responses], dtype=np.int64)

    @property
    def tokens(self) -> int:
        """Number of response tokens of all episodes."""
        return int(self.lengths.sum())

    @property
    def own_rewards(self) -> np.ndarray:
        """The rewards, with 0 at tokens that the policy did not write; float32, shape (tokens,)."""
        return np.where(self.loss_mask, self.rewards, np.float32(0.0))

    def rows(self, episodes: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the positions of the tokens of some episodes in the per-token arrays, in the order of the episodes.

        Args:
            episodes: indices of the episodes.

        Returns:
            int64, shape (tokens of these episodes,).
        """
        ends = np.cumsum(self.lengths)
        starts = ends - self.lengths
        return np.concatenate([np.arange(starts[i], ends[i]) for i in episodes]) if len(episodes) else np.zeros(0, int)

    def per_episode(self, values: np.ndarray) -> np.ndarray:
        """Returns the sum of per-token values over each episode, shape (n,); for a bool array, counts."""
        # reduceat has the sum of an empty range wrong, but no episode is empty.
        return np.add.reduceat(values, np.cumsum(self.lengths) - self.lengths) if len(self) else np.zeros(0)

    def micro_batches(self, episodes: np.ndarray, budget: int) -> Iterator[np.ndarray]:
        """Splits episodes into micro-batches of similar lengths, each of at most ``budget`` tokens, padding included.

        Episodes whose prompts begin alike share a micro-batch: a prefix that all its prompts share is computed once,
        and does not count. An episode longer than the budget is a micro-batch by itself.

        Args:
            episodes: indices of the episodes to split.
            budget: largest number of tokens in a micro-batch.

        Yields:
            Indices of the episodes of each micro-batch, int64.
        """
        for members in self._by_opening(episodes):
            shared = common_prefix([self.prompts[i] for i in members]) if len(members) > 1 else 0
            sizes = np.array([len(self.prompts[i]) + len(self.responses[i]) - shared for i in members])
            # Similar sizes together: little padding. Stable, so that ties keep their order.
            order = np.argsort(sizes, kind="stable")
            for chunk in token_budget_chunks([int(sizes[k]) for k in order], budget):
                yield members[order[chunk]]

    def _by_opening(self, episodes: np.ndarray) -> list[np.ndarray]:
        """Groups episodes by the first tokens of their prompts; those of small groups form one group together."""
        by_opening: dict[bytes, list[int]] = {}
        for i in episodes:
            by_opening.setdefault(self.prompts[i][:OPENING_TOKENS].tobytes(), []).append(int(i))
        alike = [members for members in by_opening.values() if len(members) >= SMALLEST_GROUP]
        # A few episodes are not worth passes of their own, even though their prefix is then not shared.
        others = [i for members in by_opening.values() if len(members) < SMALLEST_GROUP for i in members]
        return [np.array(members) for members in [*alike, others] if members]


@dataclass
class RolloutStatistics:
    """Counts and sums of a rollout, which can be added up over processes."""

    episodes: int = 0
    """Number of all episodes."""
    invalid: int = 0
    """Number of episodes without a valid score."""
    empty: int = 0
    """Number of episodes without tokens."""
    reward: float = 0.0
    """Sum of the returns of the episodes in the batch."""
    tokens: int = 0
    """Number of tokens that the env consumed, those of invalid episodes included."""
    seconds: float = 0.0
    """Duration of the rollout in seconds: generation and scoring."""
    waited: float = 0.0
    """The part of it, in seconds, in which nothing was generated: writing tokens to the env and waiting for scores."""
    terms: dict[str, float] = field(default_factory=dict)
    """Sum of each of the reward's terms over the episodes in the batch."""
    term_counts: dict[str, float] = field(default_factory=dict)
    """Number of episodes that have each term; a term without a valid score is left out."""
    finish: dict[str, float] = field(default_factory=dict)
    """Number of episodes in the batch by finish reason."""


def collect(
    writer: LanguageModelPolicy | RolloutEngine,
    env: FastPathEnv,
    batches: int,
    sampling: Sampling,
    seed: int,
    local_envs: np.ndarray,
    env_seed: int | None = None,
) -> tuple[TokenBatch, RolloutStatistics]:
    """Generates ``batches`` episodes per env copy and has them scored.

    One batch is scored while the next one is generated.

    Args:
        writer: generator of the responses: the policy, or an engine that has its weights.
        env: a vector env with the fast path, in autoreset mode ``DISABLED``.
        batches: number of episodes per copy, each after a reset of the env.
        sampling: sampling parameters; the seed is replaced by one per episode.
        seed: seed that the episodes' seeds are derived from.
        local_envs: copies that this process steps; bool, shape (copies,).
        env_seed: seed of the first reset; None: the env continues in its data.

    Returns:
        The valid episodes that have tokens, and statistics of all.
    """
    statistics = RolloutStatistics()
    episodes: list[dict[str, Any]] = []
    pending: list[dict[str, Any]] | None = None
    started = time.perf_counter()
    for reset in range(batches):
        # 1. New prompts, and responses to them. Meanwhile the env scores the previous batch in another thread, as a
        # reward may have to wait for a judge on a server.
        env.start(seed=env_seed if reset == 0 else None)
        drafts = _write(writer, env, sampling, request_seed(seed, reset), local_envs, reset)
        # 2. The scores of the previous batch: the env scores only one batch at a time.
        if pending is not None:
            statistics.waited += _finish(env, pending, episodes, statistics)
        # 3. Write the responses to the env, which ends the episodes, and start scoring them.
        pending = drafts
        before = time.perf_counter()
        env.play_async([draft["response"] if draft else [] for draft in drafts], local_envs)
        statistics.waited += time.perf_counter() - before
    # The last batch has no generation to overlap with.
    if pending is not None:
        statistics.waited += _finish(env, pending, episodes, statistics)
    statistics.seconds = time.perf_counter() - started
    return _batch(episodes, env.group_size), statistics


def _write(
    writer: LanguageModelPolicy | RolloutEngine,
    env: FastPathEnv,
    sampling: Sampling,
    seed: int,
    local_envs: np.ndarray,
    reset: int,
) -> list[dict[str, Any]]:
    """Generates a response per env copy of this process.

    Returns:
        A dict per copy of the env; empty for copies of other processes.
    """
    prompts = env.prompts()
    constraints = env.constraints()
    # A seed per copy, not per position in this process's batch: the number of processes does not change the episodes.
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
            # Needed again in training, where probabilities are those among the allowed tokens, too.
            "allowed": None if choices is None else [choices.allowed(tokens[:t].tolist()) for t in range(len(tokens))],
            "reset": reset,
        }
    return drafts


def _finish(
    env: FastPathEnv, drafts: list[dict[str, Any]], episodes: list[dict[str, Any]], statistics: RolloutStatistics
) -> float:
    """Waits for the scores of a play, appends its valid episodes and counts all; returns the seconds of waiting."""
    started = time.perf_counter()
    played = env.play_wait()
    waited = time.perf_counter() - started
    for i, draft in enumerate(drafts):
        if not draft:
            continue
        # The env drops tokens after the end of an episode.
        count, info = int(played.n_consumed[i]), played.infos[i]
        statistics.episodes += 1
        statistics.tokens += count
        statistics.empty += not count
        statistics.invalid += not played.valid[i]
        # An episode without a valid score has an imputed reward: it is counted, but not trained on.
        if count and played.valid[i]:
            # A reward of timing "whole" comes with its split over the tokens, which assigns the credit.
            split = played.credit[i] if played.credit is not None else played.rewards[i]
            statistics.reward += float(played.rewards[i].sum())
            for name, value in info.get("reward_terms", {}).items():
                statistics.terms[name] = statistics.terms.get(name, 0.0) + float(value)
                statistics.term_counts[name] = statistics.term_counts.get(name, 0.0) + 1
            reason = info.get("finish_reason", "")
            statistics.finish[reason] = statistics.finish.get(reason, 0.0) + 1
            episodes.append(
                {
                    "prompt": draft["prompt"],
                    "response": draft["response"][:count],
                    "logprobs": draft["logprobs"][:count],
                    "allowed": None if draft["allowed"] is None else draft["allowed"][:count],
                    "rewards": np.asarray(split, dtype=np.float32),
                    "terminated": bool(played.terminated[i]),
                    "info": info,
                    "reset": draft["reset"],
                    "copy": i,
                }
            )
    return waited


def _batch(episodes: Sequence[dict[str, Any]], group_size: int) -> TokenBatch:
    """Returns finished episodes as a batch."""

    def flat(key: str) -> np.ndarray:
        return np.concatenate([row[key] for row in episodes]) if episodes else np.zeros(0, np.float32)

    rewards = flat("rewards")
    return TokenBatch(
        prompts=[row["prompt"] for row in episodes],
        responses=[row["response"] for row in episodes],
        allowed=[row["allowed"] for row in episodes],
        rewards=rewards,
        sampler_logprobs=flat("logprobs"),
        loss_mask=np.ones(len(rewards), dtype=bool),
        terminated=np.array([row["terminated"] for row in episodes], dtype=bool),
        # Not by example: two groups may draw the same one, and would be one group only if one process plays both.
        groups=[f"{row['reset']}/{row['copy'] // group_size}" for row in episodes],
        infos=[row["info"] for row in episodes],
        resets=[row["reset"] for row in episodes],
        copies=[row["copy"] for row in episodes],
    )
