"""GRPO and RLOO: policy gradients whose baseline is the other samples of the same prompt, without a value function.

Both estimate one advantage per response and give it to all tokens of the response. They differ in the baseline and in
the place of the KL penalty, in the loss (GRPO) or in the return (RLOO). The training loop is in
:mod:`~instructgym.agents.policy_gradient.on_policy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from ..policy.language_model import TokenScores
from ..rollouts.batch import TokenBatch
from .on_policy import LARGEST_LOG_RATIO, MicroBatch, OnPolicyAgent, OnPolicySettings, clipped_policy_loss


def k3_penalty(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Returns the k3 estimate of KL(policy || reference) per token, q/p - 1 - log(q/p), differentiable.

    Args:
        logprobs: log p by the policy in training, shape (tokens,), in nats, in the autograd graph.
        reference: log q by the reference policy, shape (tokens,), in nats.
    """
    # expm1 keeps the digits of q/p - 1 where q is close to p.
    difference = (reference - logprobs).clamp(max=LARGEST_LOG_RATIO)
    return difference.expm1() - difference


def group_advantages(returns: np.ndarray, groups: Sequence[str], scale: bool = True) -> np.ndarray:
    """Returns GRPO's advantages: return less the group's mean, over the group's deviation.

    The source is Shao et al. (2024), section 4.1.

    Args:
        returns: return of each episode, shape (episodes,).
        groups: group id of each episode; the advantage in a group of one is 0.
        scale: whether to divide by the deviation; Dr. GRPO (Liu et al. 2025) does not.

    Returns:
        float32, shape (episodes,).
    """
    advantages = np.zeros(len(returns), dtype=np.float32)
    for members in _group_indices(groups):
        group_returns = np.asarray(returns, dtype=np.float64)[members]
        centred = group_returns - group_returns.mean()
        # 1e-6: equal returns have deviation 0, and advantages of 0.
        if scale and len(members) > 1:
            centred = centred / (group_returns.std(ddof=1) + 1e-6)
        advantages[members] = centred
    return advantages


def leave_one_out_advantages(returns: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Returns RLOO's advantages: return less the mean of the *other* samples in its group.

    The source is Ahmadian et al. (2024), eq. 9. No sample is part of its own baseline, which so adds no bias.

    Args:
        returns: return of each episode, shape (episodes,).
        groups: group id of each episode; the advantage in a group of one is 0.

    Returns:
        float32, shape (episodes,).
    """
    advantages = np.zeros(len(returns), dtype=np.float32)
    for members in _group_indices(groups):
        if len(members) > 1:
            group_returns = np.asarray(returns, dtype=np.float64)[members]
            advantages[members] = group_returns - (group_returns.sum() - group_returns) / (len(members) - 1)
    return advantages


def _group_indices(groups: Sequence[str]) -> list[np.ndarray]:
    """Returns the indices of the episodes of each group."""
    _, inverse = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return [np.flatnonzero(inverse == k) for k in range(int(inverse.max(initial=-1)) + 1)]


@dataclass(frozen=True)
class GRPOSettings(OnPolicySettings):
    """Settings of GRPO."""

    epochs: int = 1
    """Number of passes over the episodes of an update."""
    scale_advantages: bool = True
    """Whether advantages are divided by the deviation of the group's returns; Dr. GRPO does not."""
    loss_mean: Literal["sequence", "token"] = "sequence"
    """Mean of the token losses: ``sequence``: over each response, then over responses, as in the paper; ``token``: over
    all tokens of a minibatch, in which long responses count more."""


class _GroupAgent(OnPolicyAgent):
    """A base of GRPO and RLOO: advantages within groups, one per response, and the clipped policy loss."""

    needs_groups: ClassVar[bool] = True

    def _set_advantages(self, batch: TokenBatch, advantages: np.ndarray) -> None:
        """Gives each token the advantage of its response; ``advantages`` has shape (episodes,)."""
        batch.advantages = np.where(batch.loss_mask, np.repeat(advantages, batch.lengths), 0.0).astype(np.float32)
        # A group whose returns are all equal teaches nothing: log how many episodes are wasted on such groups.
        zeros, count = self.processes.total(np.array([(advantages == 0).sum(), len(batch)]))
        self.logger.record("train/no_signal_share", float(zeros / max(count, 1)))

    def _loss(self, scores: TokenScores, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, clipped = clipped_policy_loss(scores.logprobs, micro.old_logprobs, micro.advantages, self.settings.clip)
        return loss, {"policy_loss": loss, "clip_fraction": clipped}


class GRPO(_GroupAgent):
    """A GRPO agent (group relative policy optimisation, Shao et al. 2024): the KL penalty is in the loss (k3).

    Args:
        env: see :class:`~instructgym.agents.rollouts.agent.RolloutAgent`; its ``group_size`` must be above 1.
        policy, seed, engine, settings: see :class:`~instructgym.agents.rollouts.agent.RolloutAgent`.
        **options: fields of :class:`GRPOSettings`.
    """

    settings_class: ClassVar[type[OnPolicySettings]] = GRPOSettings
    name: ClassVar[str] = "grpo"

    def prepare(self, batch: TokenBatch) -> None:
        self._kl_penalty(batch)  # recorded, but not part of the rewards: the penalty is in the loss
        returns = batch.per_episode(batch.own_rewards)
        self._set_advantages(batch, group_advantages(returns, batch.groups, self.settings.scale_advantages))

    def _token_scale(self, batch: TokenBatch) -> np.ndarray:
        if self.settings.loss_mean == "token":
            return super()._token_scale(batch)
        # 1 / tokens of the response: the weights of a response sum to 1, so the loss is a mean over responses.
        return np.repeat(1.0 / np.maximum(batch.per_episode(batch.loss_mask), 1), batch.lengths).astype(np.float32)

    def _loss(self, scores: TokenScores, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super()._loss(scores, micro)
        # From the log-probs of the policy in training, so its gradient changes with every step; it is not clipped.
        if self._uses_reference:
            loss = loss + self.kl.coefficient * k3_penalty(scores.logprobs, micro.reference_logprobs)
        return loss, metrics


@dataclass(frozen=True)
class RLOOSettings(OnPolicySettings):
    """Settings of RLOO."""

    epochs: int = 1
    """Number of passes over the episodes of an update."""


class RLOO(_GroupAgent):
    """An RLOO agent: REINFORCE with the mean of the other samples as baseline (Ahmadian et al. 2024).

    The KL penalty is in the return.

    Args:
        env: see :class:`~instructgym.agents.rollouts.agent.RolloutAgent`; its ``group_size`` must be above 1.
        policy, seed, engine, settings: see :class:`~instructgym.agents.rollouts.agent.RolloutAgent`.
        **options: fields of :class:`RLOOSettings`.
    """

    settings_class: ClassVar[type[OnPolicySettings]] = RLOOSettings
    name: ClassVar[str] = "rloo"

    def prepare(self, batch: TokenBatch) -> None:
        returns = batch.per_episode(batch.own_rewards - np.float32(self.kl.coefficient) * self._kl_penalty(batch))
        self._set_advantages(batch, leave_one_out_advantages(returns, batch.groups))
