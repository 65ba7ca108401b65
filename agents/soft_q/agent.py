"""Soft Q-learning on a language model (Guo et al. 2021, arXiv 2106.07704), as in RLPrompt (arXiv 2205.12548)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError

from ...llm_backends import request_seed
from ...llm_backends.errors import InputError, check_at_least_zero, check_choice
from ..policy.checkpoints import POLICY_FOLDER
from ..policy.optimization import TrainingDivergedError
from ..rollouts.agent import RolloutAgent, RolloutSettings
from ..rollouts.batch import TokenBatch
from .target_policy import TargetPolicy, policy_logits, reference_logits


class StoredEpisode(NamedTuple):
    """An episode that is over."""

    prompt: Sequence[int]
    """Token ids."""
    response: Sequence[int]
    """Token ids, not empty."""
    value: float
    """The return, as the env paid it."""
    group: str
    """Episodes of one group are about the same prompt."""


class ReplayBuffer:
    """The last episodes, from which some are drawn, all with the same probability.

    Args:
        capacity: how many are kept; the oldest go first.
    """

    def __init__(self, capacity: int) -> None:
        self._episodes: deque[StoredEpisode] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._episodes)

    def add(self, episodes: Iterable[StoredEpisode]) -> None:
        """Keeps episodes, the agent's own or those of others."""
        self._episodes.extend(episodes)

    def draw(self, count: int, generator: np.random.Generator) -> list[StoredEpisode]:
        """That many different episodes, all of them if there are fewer."""
        chosen = generator.choice(len(self), size=min(count, len(self)), replace=False)
        return [self._episodes[i] for i in chosen]

    def state(self) -> list[list[Any]]:
        """The episodes, JSON-able."""
        return [list(episode) for episode in self._episodes]

    def load_state(self, state: Iterable[Sequence[Any]]) -> None:
        """Continues from :meth:`state`."""
        self._episodes.clear()
        self.add(StoredEpisode(*row) for row in state)


Consistency = Literal["single", "multi", "both"]
"""``single``: between a token and the next; ``multi``: between a token and the end; ``both``: the mean of the two."""


def single_step(
    advantages: torch.Tensor, values: torch.Tensor, rewards: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """(A_t - (V_{t+1} - V_t))^2, at the last token (A_T - (r - V_T))^2 (their single-step PCL).

    Args:
        advantages: A, shape (tokens,), episode after episode.
        values: V of the states in which the tokens were chosen, shape (tokens,), of the target network.
        rewards: of each episode, shape (episodes,).
        lengths: tokens of each episode, none 0.

    Returns:
        the loss of each token, shape (tokens,).
    """
    ends = torch.tensor(lengths, device=values.device).cumsum(0) - 1
    following = values.roll(-1).index_copy(0, ends, rewards.to(values.dtype))
    return (advantages - (following - values)) ** 2


def multi_step(
    advantages: torch.Tensor, values: torch.Tensor, rewards: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """(sum_{l >= t} A_l - (r - V_t))^2 (their multi-step PCL); arguments and result as of :func:`single_step`."""
    rest = torch.cat([part.flip(0).cumsum(0).flip(0) for part in advantages.split(list(lengths))])
    paid = rewards.to(values.dtype).repeat_interleave(torch.tensor(lengths, device=values.device))
    return (rest - (paid - values)) ** 2


def path_consistency(
    kind: Consistency,
    advantages: torch.Tensor,
    values: torch.Tensor,
    rewards: torch.Tensor,
    lengths: Sequence[int],
) -> torch.Tensor:
    """The loss of each token by one of the two or by both, shape (tokens,); arguments as of :func:`single_step`."""
    given = (advantages, values, rewards, lengths)
    if kind == "single":
        return single_step(*given)
    if kind == "multi":
        return multi_step(*given)
    return (single_step(*given) + multi_step(*given)) / 2


ZSCORE_EPSILON = 1e-4
"""Added to the deviation, as in RLPrompt's code."""


@dataclass(frozen=True)
class SoftQSettings(RolloutSettings):
    """Settings of soft Q-learning; the defaults are RLPrompt's where it has them."""

    learning_rate: float = 5e-5
    """Peak learning rate."""
    epochs: int = 1
    """Passes over the episodes of an update."""
    top_k: int = 256
    """Episodes are sampled from the k most likely tokens; 0 samples from the policy itself."""
    loss: Consistency = "both"
    """single, multi or both: which path-consistency losses."""
    prior: Literal["reference", "none"] = "reference"
    """``reference``: logits are measured from those of the reference policy, so that A = log pi / pi_ref, V is 0 at the
    start, and the optimum is pi_ref x exp(shaped return). ``none``, as published: the raw logits. Theirs are of a small
    new network; those of a language model are on a level of their own, some 20 nats, which outweighs the rewards."""
    reversed_weight: float = 0.0
    """Share, in [0, 1], of the losses in which both networks change places: V is the policy's, A the target's. Without
    them only A takes a gradient, and nothing holds V to the size of the rewards."""
    target_rate: float = 1e-3
    """Share of the way that the target network goes towards the policy after every optimiser step."""
    zscore: Literal["none", "batch", "group"] = "batch"
    """Returns are put in units of their deviation from their mean: over all episodes of an update, replayed ones
    included, or over those of the same prompt among them (RLPrompt; the same where there is one prompt only)."""
    reward_low: float = 0.0
    """What a return (or its z-score) of this size is worth: ``shaped_low``. Those beyond go on in a line."""
    reward_high: float = 1.0
    """Likewise: ``shaped_high``."""
    shaped_low: float = 0.0
    """See ``reward_low``."""
    shaped_high: float = 5.0
    """See ``reward_high``."""
    replay_ratio: float = 0.0
    """Past episodes that are learned from again, per new one; 0 is on-policy learning."""
    replay_capacity: int = 1000
    """Past episodes that are kept, where they are used."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "loss", ("single", "multi", "both"))
        check_choice(self, "prior", ("reference", "none"))
        check_choice(self, "zscore", ("none", "batch", "group"))
        check_at_least_zero(self, "replay_ratio")
        if not 0 <= self.reversed_weight <= 1 or not 0 < self.target_rate <= 1:
            raise InputError(
                "reversed_weight must be in [0, 1] and target_rate in (0, 1], got "
                f"{self.reversed_weight} and {self.target_rate}"
            )
        if not self.reward_low < self.reward_high or not self.shaped_low < self.shaped_high:
            raise InputError(
                "reward_low must be below reward_high and shaped_low below shaped_high, got "
                f"{self.reward_low}, {self.reward_high}, {self.shaped_low} and {self.shaped_high}"
            )
        if self.replay_capacity < 1:
            raise InputError(f"replay_capacity must be at least 1, got {self.replay_capacity}")


class SoftQ(RolloutAgent):
    """Soft Q-learning: the logits are action values, their logsumexp is the state's, and softmax of them is the policy.

    Each token's loss asks for consistency with the next state, or with all that follows up to the end
    (:mod:`~instructgym.agents.soft_q.agent`), with V of a target network that follows the policy slowly.
    Sums over the tokens of an episode, means over episodes. The optimum is consistent on every episode, whoever wrote
    it: under ``top_k`` sampling, by an earlier policy, by others. :attr:`replay` keeps past ones, where
    ``replay_ratio`` is above 0, and takes those of others.

    The return of an episode, z-scored and mapped onto a range, is paid with its last token. What is learned balances
    this against the KL divergence to the reference policy, or against the entropy where there is no ``prior``: it is
    proportional to the exponential of the shaped return, so a wider range makes it greedier.

    Logs, besides what every agent does, the means per episode of ``train/loss``, of both losses as they are published
    (``train/single_step``, ``train/multi_step``), of ``train/shaped_reward`` and of ``train/advantage`` (the sum of A:
    of new episodes and before the first step, the KL to the reference policy); the means per token of
    ``train/logprob`` and of ``train/q``, ``train/value`` and ``train/target_value``, measured from the prior's;
    ``train/replayed`` episodes.

    Args:
        env, policy, seed, engine, settings: as of :class:`~instructgym.agents.rollouts.agent.RolloutAgent`.
        **options: fields of :class:`SoftQSettings`.

    Raises:
        InputError: also for an env that constrains what is written: values are those over the whole vocabulary; and for
            a policy without the reference policy that ``prior`` asks for.
    """

    settings_class: ClassVar[type[RolloutSettings]] = SoftQSettings
    name: ClassVar[str] = "soft_q"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.target = TargetPolicy(self.policy)
        self.replay = ReplayBuffer(self.settings.replay_capacity)

    def _check_env(self) -> None:
        super()._check_env()
        process = getattr(self.env, "process", None)
        if process is not None and process.settings.constrained:
            raise InputError("soft_q's values are over the whole vocabulary: make the env without constrained=True")

    def _check_fit(self) -> None:
        super()._check_fit()
        if self.settings.prior == "reference" and self.policy.reference == "none":
            raise InputError(
                "soft_q measures from a reference policy, this policy has none: give it one, or prior='none'"
            )

    def start(self) -> None:
        fresh = not self._started
        super().start()
        if fresh:
            self.target.follow(1.0)

    # --- an update ---------------------------------------------------------------------------------------------------

    def _improve(self, batch: TokenBatch) -> None:
        begun = time.perf_counter()
        if any(allowed is not None for allowed in batch.allowed):
            raise InputError("soft_q's values are over the whole vocabulary: episodes were written under constraints")
        episodes, replayed = self._episodes(batch)
        returns = self._shaped(episodes)
        self.logger.record("train/replayed", replayed)
        self._train(_batch(episodes), returns)
        self.logger.record("time/train", time.perf_counter() - begun)

    def _episodes(self, batch: TokenBatch) -> tuple[list[StoredEpisode], int]:
        """What this process learns from in this update, and how many past episodes all of them replay."""
        returns = batch.per_episode(batch.own_rewards.astype(np.float64))
        mine = [
            StoredEpisode(batch.prompts[i].tolist(), batch.responses[i].tolist(), float(returns[i]), batch.groups[i])
            for i in range(len(batch))
        ]
        if not self.settings.replay_ratio:
            return mine, 0
        # All processes keep all episodes: they draw the same ones, and any of them could write a checkpoint.
        fresh = [episode for part in self.processes.gather(mine) for episode in part]
        generator = np.random.default_rng(request_seed(self.seed, "replay", self.updates))
        past = self.replay.draw(round(self.settings.replay_ratio * len(fresh)), generator)
        self.replay.add(fresh)
        return mine + past[self.processes.index :: self.processes.count], len(past)

    def _shaped(self, episodes: Sequence[StoredEpisode]) -> np.ndarray:
        """float64, shape (episodes,): what the returns of these episodes are worth."""
        settings = self.settings
        values = np.array([episode.value for episode in episodes], dtype=np.float64)
        if settings.zscore != "none":
            keys = [episode.group if settings.zscore == "group" else "" for episode in episodes]
            everyone: dict[str, list[float]] = {}
            for part in self.processes.gather(list(zip(keys, values.tolist(), strict=True))):
                for key, value in part:
                    everyone.setdefault(key, []).append(value)
            means, spreads = ({key: f(found) for key, found in everyone.items()} for f in (np.mean, np.std))
            values = np.array(
                [
                    (value - means[key]) / (spreads[key] + ZSCORE_EPSILON)
                    for key, value in zip(keys, values, strict=True)
                ]
            )
        share = (values - settings.reward_low) / (settings.reward_high - settings.reward_low)
        return settings.shaped_low + share * (settings.shaped_high - settings.shaped_low)

    def _train(self, batch: TokenBatch, returns: np.ndarray) -> None:
        sums = np.zeros(len(_LOGGED) + 2)
        norms, steps, skipped, prior = 0.0, 0, self.optimizer.skipped, self._prior(batch)
        for epoch in range(self.settings.epochs):
            generator = np.random.default_rng(request_seed(self.seed, "minibatches", self.updates, epoch))
            order = generator.permutation(len(batch)) if self.settings.minibatches > 1 else np.arange(len(batch))
            for chosen in np.array_split(order, self.settings.minibatches):
                total = float(self.processes.total(np.array([len(chosen)], dtype=np.float64))[0])
                if not total:
                    continue
                for members in batch.micro_batches(chosen, self.settings.token_budget):
                    sums += self._backward(batch, members, returns[members], prior, total)
                self.processes.add_gradients(self.optimizer.parameters.values())
                norms += self.optimizer.step()
                self.target.follow(self.settings.target_rate)
                steps += 1
        if self.optimizer.skipped - skipped == steps:
            raise TrainingDivergedError(
                f"no optimiser step of update {self.updates} had a finite gradient: lower the learning rate "
                f"({self.optimizer.learning_rate:g}) or train in float32"
            )
        *totals, count, tokens = self.processes.total(sums)
        for (name, per_token), value in zip(_LOGGED.items(), totals, strict=True):
            self.logger.record(f"train/{name}", float(value / (tokens if per_token else count)))
        self.logger.record("train/grad_norm", norms / steps)
        self.logger.record("train/learning_rate", self.optimizer.learning_rate)
        self.logger.record("train/skipped_steps", self.optimizer.skipped)

    def _prior(self, batch: TokenBatch) -> torch.Tensor:
        """float32, shape (2, tokens): log-probs and values by the prior; 0 without one."""
        prior = torch.zeros((2, batch.tokens), device=self.policy.lm.device)
        if self.settings.prior == "reference":
            for members in batch.micro_batches(np.arange(len(batch)), self.settings.token_budget):
                prompts, responses = [batch.prompts[i] for i in members], [batch.responses[i] for i in members]
                rows = torch.from_numpy(batch.rows(members)).to(prior.device)
                prior[:, rows] = torch.stack(reference_logits(self.policy, prompts, responses))
        return prior

    def _backward(
        self, batch: TokenBatch, members: np.ndarray, returns: np.ndarray, prior: torch.Tensor, total: float
    ) -> np.ndarray:
        """Adds the gradient of a micro-batch and returns the sums of what is logged, of episodes and of tokens."""
        prompts, responses = [batch.prompts[i] for i in members], [batch.responses[i] for i in members]
        lengths = [len(response) for response in responses]
        logprobs, levels = prior[:, torch.from_numpy(batch.rows(members)).to(prior.device)]
        target = self.target.logits(prompts, responses)
        mine = policy_logits(self.policy, prompts, responses)
        advantages, values = mine.logprobs - logprobs, mine.logsumexps - levels
        target_advantages, target_values = target.logprobs - logprobs, target.logsumexps - levels
        rewards = torch.from_numpy(returns).to(values)
        weight, kind = self.settings.reversed_weight, self.settings.loss
        losses = path_consistency(kind, advantages, target_values, rewards, lengths)
        if weight:
            other = path_consistency(kind, target_advantages, values, rewards, lengths)
            losses = (1 - weight) * losses + weight * other
        (losses.sum() / total).backward()
        with torch.no_grad():
            given = (advantages, target_values, rewards, lengths)
            rows = [rewards, losses, single_step(*given), multi_step(*given), advantages]
            rows += [mine.logprobs, advantages + values, values, target_values]
            return np.array([float(row.sum()) for row in rows] + [len(members), sum(lengths)], dtype=np.float64)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        if self.processes.is_main:
            self.target.save(Path(folder) / POLICY_FOLDER)  # before what says that the checkpoint is whole
        super().save(folder)

    def restore(self, folder: str | Path) -> None:
        try:
            super().restore(folder)
            self.target.load(Path(folder) / POLICY_FOLDER)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read a checkpoint from {folder}: {' '.join(str(error).split())}") from error

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"replay": self.replay.state()}

    def _take_state(self, state: Mapping[str, Any]) -> None:
        super()._take_state(state)
        self.replay.load_state(state["replay"])


_LOGGED = {
    "shaped_reward": False,
    "loss": False,
    "single_step": False,
    "multi_step": False,
    "advantage": False,
    "logprob": True,
    "q": True,
    "value": True,
    "target_value": True,
}
"""Name of a mean, and whether it is one over tokens, or else over episodes."""


def _batch(episodes: Sequence[StoredEpisode]) -> TokenBatch:
    """Episodes as a batch; returns stand aside."""
    lengths = sum(len(episode.response) for episode in episodes)
    return TokenBatch(
        prompts=[np.array(episode.prompt, np.int32) for episode in episodes],
        responses=[np.array(episode.response, np.int32) for episode in episodes],
        allowed=[None] * len(episodes),
        rewards=np.zeros(lengths, np.float32),
        sampler_logprobs=np.zeros(lengths, np.float32),
        loss_mask=np.ones(lengths, dtype=bool),
        terminated=np.ones(len(episodes), dtype=bool),
        groups=[episode.group for episode in episodes],
        on_policy=False,
    )
