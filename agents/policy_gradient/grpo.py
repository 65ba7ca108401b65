"""GRPO and RLOO: policy gradients whose baseline is the other samples of the same prompt, without a value function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from ...llm_backends.errors import check_choice
from ..policy.language_model import TokenScores
from ..rollouts.batch import TokenBatch
from .on_policy import MicroBatch, OnPolicyAgent, OnPolicySettings, clipped_policy_loss


def k3_penalty(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The differentiable k3 estimate of KL(policy || reference), per token: q/p - 1 - log(q/p)."""
    difference = reference - logprobs
    return difference.expm1() - difference


def group_advantages(returns: np.ndarray, groups: Sequence[str], scale: bool = True) -> np.ndarray:
    """GRPO's advantages: return less the mean of its group, over the group's deviation (Shao et al. 2024, section 4.1).

    Args:
        returns: shape (episodes,).
        groups: a group id per episode; a group of one gets 0.
        scale: False leaves the deviation out, as Dr. GRPO (Liu et al. 2025) does.
    """
    advantages = np.zeros(len(returns), dtype=np.float32)
    for members in _members(groups):
        mine = np.asarray(returns, dtype=np.float64)[members]
        centred = mine - mine.mean()
        if scale and len(members) > 1:
            centred = centred / (mine.std(ddof=1) + 1e-6)
        advantages[members] = centred
    return advantages


def leave_one_out_advantages(returns: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """RLOO's advantages: return less the mean of the *other* samples of its group (Ahmadian et al. 2024, eq. 9).

    Args:
        returns: shape (episodes,).
        groups: a group id per episode; a group of one gets 0.
    """
    advantages = np.zeros(len(returns), dtype=np.float32)
    for members in _members(groups):
        if len(members) > 1:
            mine = np.asarray(returns, dtype=np.float64)[members]
            advantages[members] = mine - (mine.sum() - mine) / (len(members) - 1)
    return advantages


def _members(groups: Sequence[str]) -> list[np.ndarray]:
    _, inverse = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return [np.flatnonzero(inverse == k) for k in range(int(inverse.max(initial=-1)) + 1)]


@dataclass(frozen=True)
class GRPOSettings(OnPolicySettings):
    """Settings of GRPO."""

    epochs: int = 1
    """Passes over the episodes of an update."""
    scale_advantages: bool = True
    """Divide by the deviation of the group's returns; False is Dr. GRPO's."""
    loss_mean: Literal["sequence", "token"] = "sequence"
    """Mean over each response and then over responses (the paper's), or over all tokens of an update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "loss_mean", ("sequence", "token"))


class _GroupAgent(OnPolicyAgent):
    """What the two have in common."""

    needs_groups: ClassVar[bool] = True

    def _spread(self, batch: TokenBatch, advantages: np.ndarray) -> None:
        batch.advantages = np.where(batch.loss_mask, np.repeat(advantages, batch.lengths), 0.0).astype(np.float32)
        without, count = self.processes.total(np.array([(advantages == 0).sum(), len(batch)]))
        self.logger.record("train/no_signal_share", float(without / max(count, 1)))

    def _loss(self, scores: TokenScores, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, clipped = clipped_policy_loss(scores.logprobs, micro.old_logprobs, micro.advantages, self.settings.clip)
        return loss, {"policy_loss": loss, "clip_fraction": clipped}


class GRPO(_GroupAgent):
    """Group relative policy optimisation (Shao et al. 2024): advantages within groups, the KL penalty in the loss (k3).

    The env needs ``group_size`` above 1. Options are the fields of :class:`GRPOSettings`.
    """

    settings_class: ClassVar[type[OnPolicySettings]] = GRPOSettings
    name: ClassVar[str] = "grpo"

    def _prepare(self, batch: TokenBatch) -> None:
        self._kl_penalty(batch)
        returns = batch.per_episode(batch.own_rewards)
        self._spread(batch, group_advantages(returns, batch.groups, self.settings.scale_advantages))

    def _token_scale(self, batch: TokenBatch) -> np.ndarray:
        if self.settings.loss_mean == "token":
            return super()._token_scale(batch)
        return np.repeat(1.0 / np.maximum(batch.per_episode(batch.loss_mask), 1), batch.lengths).astype(np.float32)

    def _loss(self, scores: TokenScores, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = super()._loss(scores, micro)
        if self._uses_reference:
            loss = loss + self.kl.coefficient * k3_penalty(scores.logprobs, micro.reference_logprobs)
        return loss, metrics


@dataclass(frozen=True)
class RLOOSettings(OnPolicySettings):
    """Settings of RLOO."""

    epochs: int = 1
    """Passes over the episodes of an update."""


class RLOO(_GroupAgent):
    """REINFORCE with the mean of the other samples as baseline (Ahmadian et al. 2024), the KL penalty in the return.

    The env needs ``group_size`` above 1. Options are the fields of :class:`RLOOSettings`.
    """

    settings_class: ClassVar[type[OnPolicySettings]] = RLOOSettings
    name: ClassVar[str] = "rloo"

    def _prepare(self, batch: TokenBatch) -> None:
        returns = batch.per_episode(batch.own_rewards - np.float32(self.kl.coefficient) * self._kl_penalty(batch))
        self._spread(batch, leave_one_out_advantages(returns, batch.groups))
