"""GRPO and RLOO: policy gradients whose baseline is the other samples of the same prompt, without a value function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from ..policy.language_model import TokenScores
from ..policy.optimization import check_choice
from ..rollouts.batch import TokenBatch
from .advantages import group_advantages, leave_one_out_advantages
from .losses import clipped_policy_loss, k3_penalty
from .on_policy import MicroBatch, OnPolicyAgent, OnPolicySettings


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
        self._kl(batch)
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
        returns = batch.per_episode(batch.own_rewards - np.float32(self.kl.coefficient) * self._kl(batch))
        self._spread(batch, leave_one_out_advantages(returns, batch.groups))
