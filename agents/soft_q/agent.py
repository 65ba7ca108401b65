"""Soft Q-learning on a language model (Guo et al. 2021, arXiv 2106.07704), as in RLPrompt (arXiv 2205.12548).

The logits of the language model are action values Q, their logsumexp is the state value V, and A = Q - V is the
log-prob. The losses :func:`single_step` and :func:`multi_step` ask for path consistency between A, V and the reward,
which is given with the last token. :class:`SoftQ` is the agent; its target network is in
:mod:`~instructgym.agents.soft_q.target_policy`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from safetensors import SafetensorError
from torch import Tensor

from ...llm_backends import request_seed
from ...llm_backends.errors import InputError, check_fields
from ..policy.checkpoints import POLICY_FOLDER
from ..rollouts.agent import RolloutAgent, RolloutSettings
from ..rollouts.batch import TokenBatch
from .target_policy import TargetPolicy, policy_logits, reference_logits


class StoredEpisode(NamedTuple):
    """A finished episode."""

    prompt: Sequence[int]
    """Token ids."""
    response: Sequence[int]
    """Token ids, not empty."""
    value: float
    """The return of the env, neither z-scored nor mapped."""
    group: str
    """Id of the example; episodes of one group have the same prompt."""


class ReplayBuffer:
    """A buffer of the most recent episodes, drawn with equal probability.

    Args:
        capacity: maximum number of episodes; the oldest ones are dropped first.
    """

    def __init__(self, capacity: int) -> None:
        self._episodes: deque[StoredEpisode] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._episodes)

    def add(self, episodes: Iterable[StoredEpisode]) -> None:
        """Adds episodes, written by the agent or by others."""
        self._episodes.extend(episodes)

    def draw(self, count: int, generator: np.random.Generator) -> list[StoredEpisode]:
        """Returns ``count`` different episodes, or all in random order if there are fewer."""
        indices = generator.choice(len(self), size=min(count, len(self)), replace=False)
        return [self._episodes[i] for i in indices]

    def state(self) -> list[list[Any]]:
        """Returns the episodes in a JSON-able form."""
        return [list(episode) for episode in self._episodes]

    def load_state(self, state: Iterable[Sequence[Any]]) -> None:
        """Replaces the episodes by those that :meth:`state` returned."""
        self._episodes.clear()
        self.add(StoredEpisode(*row) for row in state)


Consistency = Literal["single", "multi", "both"]
"""Path consistency that a loss asks for. ``single``: between a token and the next; ``multi``: between a token and the
end of the episode; ``both``: the mean of the two losses."""


def single_step(advantages: Tensor, values: Tensor, rewards: Tensor, lengths: Sequence[int]) -> Tensor:
    """Computes the single-step path-consistency loss of Guo et al. (2021).

    It is (A_t - (V_{t+1} - V_t))^2, and (A_T - (r - V_T))^2 at the last token.

    Args:
        advantages: A of each token, shape (tokens,), episode after episode.
        values: V of the state in which each token was chosen, by the target network; shape (tokens,).
        rewards: shaped return of each episode, shape (episodes,).
        lengths: number of tokens of each episode, none 0.

    Returns:
        The loss of each token, shape (tokens,).
    """
    # Behind the last token of an episode the reward takes the place of the next state's value.
    ends = torch.tensor(lengths, device=values.device).cumsum(0) - 1
    following = values.roll(-1).index_copy(0, ends, rewards.to(values.dtype))
    return (advantages - (following - values)) ** 2


def multi_step(advantages: Tensor, values: Tensor, rewards: Tensor, lengths: Sequence[int]) -> Tensor:
    """Computes the multi-step path-consistency loss of Guo et al. (2021), (sum_{l >= t} A_l - (r - V_t))^2.

    Takes the arguments of :func:`single_step`, and also returns the loss of each token, shape (tokens,).
    """
    # The sum of A from each token to the end of its episode is a cumulative sum in reverse order.
    rest = torch.cat([part.flip(0).cumsum(0).flip(0) for part in advantages.split(list(lengths))])
    token_rewards = rewards.to(values.dtype).repeat_interleave(torch.tensor(lengths, device=values.device))
    return (rest - (token_rewards - values)) ** 2


def path_consistency(
    kind: Consistency, advantages: Tensor, values: Tensor, rewards: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Computes the loss of each token by :func:`single_step`, :func:`multi_step` or their mean.

    Args:
        kind: which of the losses.
        advantages: A of each token, shape (tokens,), episode after episode.
        values: V of the state in which each token was chosen, shape (tokens,).
        rewards: shaped return of each episode, shape (episodes,).
        lengths: number of tokens of each episode, none 0.

    Returns:
        The loss of each token, shape (tokens,).
    """
    inputs = (advantages, values, rewards, lengths)
    if kind == "single":
        return single_step(*inputs)
    if kind == "multi":
        return multi_step(*inputs)
    return (single_step(*inputs) + multi_step(*inputs)) / 2


ZSCORE_EPSILON = 1e-4
"""Number added to the deviation that z-scores are divided by, as in RLPrompt's code."""


@dataclass(frozen=True)
class SoftQSettings(RolloutSettings):
    """Settings of soft Q-learning; defaults are RLPrompt's, for the settings that it has."""

    learning_rate: float = 5e-5
    """Peak learning rate."""
    epochs: int = 1
    """Number of passes over the episodes of an update."""
    top_k: int = 256
    """Episodes are sampled from the k most likely tokens; 0: from the policy's whole distribution."""
    loss: Consistency = "both"
    """Path-consistency loss: ``single`` (a token and the next), ``multi`` (a token and the end of the episode) or
    ``both`` (the mean of the two)."""
    prior: Literal["reference", "none"] = "reference"
    """``reference``: the reference policy's log-probs and values are subtracted, so that A = log pi / pi_ref, V is 0 at
    the start, and the optimum is pi_ref x exp(shaped return). ``none``: the raw logits, as published. The published
    logits are those of a small new network; those of a language model have an offset of some 20 nats, which outweighs
    the rewards."""
    reversed_weight: Annotated[float, Ge(0), Le(1)] = 0.0
    """Weight, in [0, 1], of the losses with exchanged networks: V is the policy's, A the target's. At 0 only A takes a
    gradient, and nothing keeps V in the range of the rewards."""
    target_rate: Annotated[float, Gt(0), Le(1)] = 1e-3
    """Polyak averaging of the target network: share, in (0, 1], of the distance to the policy that its weights move
    after every optimiser step."""
    zscore: Literal["none", "batch", "group"] = "batch"
    """Z-scores of the returns: ``batch``: over all episodes of an update, replayed ones included; ``group``: over those
    of the same prompt among them, as in RLPrompt (the same as ``batch`` if there is only one prompt); ``none``: the
    returns themselves."""
    reward_low: float = 0.0
    """Return (or z-score) that is mapped to ``shaped_low``; the map is linear, also outside the range."""
    reward_high: float = 1.0
    """Return (or z-score) that is mapped to ``shaped_high``."""
    shaped_low: float = 0.0
    """Shaped return that ``reward_low`` is mapped to."""
    shaped_high: float = 5.0
    """Shaped return that ``reward_high`` is mapped to."""
    replay_ratio: Annotated[float, Ge(0)] = 0.0
    """Number of past episodes per new one that an update also learns from; 0: on-policy learning."""
    replay_capacity: Annotated[int, Ge(1)] = 1000
    """Maximum number of past episodes in the replay buffer; it is used if ``replay_ratio`` is above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        if not self.reward_low < self.reward_high or not self.shaped_low < self.shaped_high:
            raise InputError(
                "reward_low must be below reward_high and shaped_low below shaped_high, got "
                f"{self.reward_low}, {self.reward_high}, {self.shaped_low} and {self.shaped_high}"
            )


class SoftQ(RolloutAgent):
    """A soft Q-learning agent: logits are action values, their logsumexp is the state value, their softmax the policy.

    The loss of each token asks for consistency with the next state (:func:`single_step`), or with the rest of the
    episode (:func:`multi_step`), where V is that of a target network that follows the policy slowly. Losses are summed
    over the tokens of an episode and averaged over episodes. The optimum is consistent on every episode, whoever wrote
    it: the policy under ``top_k`` sampling, an earlier policy, or others. If ``replay_ratio`` is above 0,
    :attr:`replay` holds past episodes; episodes of others can be added to it.

    The return of an episode, z-scored and mapped linearly, is given with its last token. The learned policy balances it
    against the KL divergence to the reference policy, or against the entropy if there is no ``prior``: it is
    proportional to the exponential of the shaped return, so a wider range makes it greedier.

    Logs, in addition to what every agent logs: means per episode of ``train/loss``, of both losses as published
    (``train/single_step``, ``train/multi_step``), of ``train/shaped_reward`` and of ``train/advantage`` (the sum of A,
    which on new episodes and before the first optimiser step is the KL to the reference policy); means per token of
    ``train/logprob``, and of ``train/q``, ``train/value`` and ``train/target_value``, from which the prior's are
    subtracted; and the number of replayed episodes, ``train/replayed``.

    Args:
        env, policy, seed, engine, settings: see :class:`~instructgym.agents.rollouts.agent.RolloutAgent`.
        **options: fields of :class:`SoftQSettings`.

    Raises:
        InputError: as :class:`~instructgym.agents.rollouts.agent.RolloutAgent`; also for an env with constrained
            decoding, because values are over the whole vocabulary, and for a policy without the reference policy that
            ``prior`` needs.
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
        # The first process has just sent its weights to all others: copy them into the target as well.
        if fresh:
            self.target.follow(1.0)

    # --- an update ---------------------------------------------------------------------------------------------------

    def _improve(self, batch: TokenBatch) -> None:
        begun = time.perf_counter()
        if any(allowed is not None for allowed in batch.allowed):
            raise InputError("soft_q's values are over the whole vocabulary: episodes were written under constraints")
        episodes, places, replayed = self._episodes(batch)
        returns = self.shaped_returns(episodes)
        self.logger.record("train/replayed", replayed)
        self._train(_batch(episodes), returns, places)
        self.logger.record("time/train", time.perf_counter() - begun)

    def _episodes(self, batch: TokenBatch) -> tuple[list[StoredEpisode], list[tuple[int, int]], int]:
        """Returns this process's episodes, their places among those of all processes, and the number of replayed ones.

        The number is over all processes.
        """
        returns = batch.per_episode(batch.own_rewards.astype(np.float64))
        names = [str(info.get("episode_id", group)) for info, group in zip(batch.infos, batch.groups, strict=True)]
        local_episodes = [
            StoredEpisode(batch.prompts[i].tolist(), batch.responses[i].tolist(), float(returns[i]), names[i])
            for i in range(len(batch))
        ]
        places = batch.places
        if not self.settings.replay_ratio:
            return local_episodes, places, 0
        # All processes hold all episodes: they draw the same ones, and any of them could write a checkpoint.
        parts = self.processes.gather(list(zip(places, local_episodes, strict=True)))
        fresh = [episode for _, episode in sorted(pair for part in parts for pair in part)]
        generator = np.random.default_rng(request_seed(self.seed, "replay", self.updates))
        # Past episodes are drawn before the new ones are added, which are learned from anyway.
        past = self.replay.draw(round(self.settings.replay_ratio * len(fresh)), generator)
        self.replay.add(fresh)
        share = range(self.processes.index, len(past), self.processes.count)  # of this process
        places = places + [(self.settings.rollout_batches, i) for i in share]  # after all new ones
        return local_episodes + [past[i] for i in share], places, len(past)

    def shaped_returns(self, episodes: Sequence[StoredEpisode]) -> np.ndarray:
        """Returns the shaped returns of episodes, z-scored and mapped linearly; float64, shape (episodes,)."""
        settings = self.settings
        values = np.array([episode.value for episode in episodes], dtype=np.float64)
        if settings.zscore != "none":
            keys = [episode.group if settings.zscore == "group" else "" for episode in episodes]
            # Mean and deviation are those over the episodes of all processes.
            by_key: dict[str, list[float]] = {}
            for part in self.processes.gather(list(zip(keys, values.tolist(), strict=True))):
                for key, value in part:
                    by_key.setdefault(key, []).append(value)
            means, spreads = ({key: f(group) for key, group in by_key.items()} for f in (np.mean, np.std))
            values = np.array(
                [
                    (value - means[key]) / (spreads[key] + ZSCORE_EPSILON)
                    for key, value in zip(keys, values, strict=True)
                ]
            )
        share = (values - settings.reward_low) / (settings.reward_high - settings.reward_low)
        return settings.shaped_low + share * (settings.shaped_high - settings.shaped_low)

    def _train(self, batch: TokenBatch, returns: np.ndarray, places: Sequence[tuple[int, int]]) -> None:
        """Runs the epochs of an update and logs their means; ``returns`` are the shaped ones, shape (episodes,)."""
        sums = np.zeros(len(_PER_EPISODE) + len(_PER_TOKEN) + 2)
        norms, steps, skipped, prior = 0.0, 0, self.optimizer.skipped, self.prior_logits(batch)
        for _, minibatches in self._epochs(len(batch), places=places):
            for minibatch in minibatches:
                # Episodes of the minibatch over all processes: gradients are summed over them, losses are means.
                total = float(self.processes.total(np.array([len(minibatch)], dtype=np.float64))[0])
                if not total:
                    continue
                for members in batch.micro_batches(minibatch, self.settings.token_budget):
                    sums += self.backward(batch, members, returns[members], prior, total)
                norms += self._optimizer_step()
                self.target.follow(self.settings.target_rate)
                steps += 1
        self._end_training(steps, skipped)
        *totals, count, tokens = self.processes.total(sums)
        for name, value in zip((*_PER_EPISODE, *_PER_TOKEN), totals, strict=True):
            self.logger.record(f"train/{name}", float(value / (tokens if name in _PER_TOKEN else count)))
        self.logger.record("train/grad_norm", norms / steps)

    def prior_logits(self, batch: TokenBatch) -> Tensor:
        """Returns the prior's log-probs and values, float32, shape (2, tokens); 0 if there is no prior."""
        prior = torch.zeros((2, batch.tokens), device=self.policy.lm.device)
        if self.settings.prior == "reference":
            for members in batch.micro_batches(np.arange(len(batch)), self.settings.token_budget):
                prompts, responses = [batch.prompts[i] for i in members], [batch.responses[i] for i in members]
                rows = torch.from_numpy(batch.rows(members)).to(prior.device)
                prior[:, rows] = torch.stack(reference_logits(self.policy, prompts, responses))
        return prior

    def backward(
        self, batch: TokenBatch, members: np.ndarray, returns: np.ndarray, prior: Tensor, total: float
    ) -> np.ndarray:
        """Adds the gradient of a micro-batch to the parameters.

        Args:
            batch: all episodes of this process.
            members: indices of the micro-batch's episodes.
            returns: shaped returns of these episodes.
            prior: see :meth:`prior_logits`.
            total: number of episodes of the minibatch, over all processes.

        Returns:
            float64: the sums of what is logged per episode and per token, and the numbers of episodes and tokens.
        """
        prompts, responses = [batch.prompts[i] for i in members], [batch.responses[i] for i in members]
        lengths = [len(response) for response in responses]
        prior_logprobs, prior_values = prior[:, torch.from_numpy(batch.rows(members)).to(prior.device)]
        target = self.target.logits(prompts, responses)
        current = policy_logits(self.policy, prompts, responses)
        advantages, values = current.logprobs - prior_logprobs, current.logsumexps - prior_values
        target_advantages, target_values = target.logprobs - prior_logprobs, target.logsumexps - prior_values
        rewards = torch.from_numpy(returns).to(values)
        weight, kind = self.settings.reversed_weight, self.settings.loss
        losses = path_consistency(kind, advantages, target_values, rewards, lengths)
        if weight:
            exchanged = path_consistency(kind, target_advantages, values, rewards, lengths)
            losses = (1 - weight) * losses + weight * exchanged
        (losses.sum() / total).backward()
        with torch.no_grad():
            # In the order of _PER_EPISODE and _PER_TOKEN; Q = A + V.
            inputs = (advantages, target_values, rewards, lengths)
            rows = [rewards, losses, single_step(*inputs), multi_step(*inputs), advantages]
            rows += [current.logprobs, advantages + values, values, target_values]
            return np.array([float(row.sum()) for row in rows] + [len(members), sum(lengths)], dtype=np.float64)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        # Before super().save, whose last file marks the checkpoint as complete.
        if self.processes.is_main:
            self.target.save(Path(folder) / POLICY_FOLDER)
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


_PER_EPISODE = ("shaped_reward", "loss", "single_step", "multi_step", "advantage")
_PER_TOKEN = ("logprob", "q", "value", "target_value")
"""What an update logs: sums over its tokens, as means per episode and per token."""


def _batch(episodes: Sequence[StoredEpisode]) -> TokenBatch:
    """Returns episodes as a batch without rewards, because their shaped returns are passed on separately."""
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
