"""Token-level PPO for causal language models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ...llm_backends.errors import InputError, check_at_least_zero, check_choice
from ..policy.language_model import TokenScores
from ..rollouts.batch import TokenBatch
from .on_policy import (
    KLController,
    KLEstimator,
    MicroBatch,
    OnPolicyAgent,
    OnPolicySettings,
    Total,
    clipped_policy_loss,
    whiten,
)


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error of the value function, the larger of plain and clipped (as in OpenAI's PPO2 code).

    Args:
        values: in training, shape (tokens,), with a graph.
        old_values: at the time of the rollout.
        returns: the targets.
        clip: largest change of a value that counts; 0 turns clipping off.

    Returns:
        The loss of each token, and whether clipping took its gradient (bool).
    """
    plain = (values - returns).square()
    if not clip:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    bounded = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    return 0.5 * torch.maximum(plain, bounded), bounded > plain


def discounted_gae(
    rewards: np.ndarray,
    values: np.ndarray,
    lengths: Sequence[int],
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation over episodes of unequal lengths (Schulman et al. 2016, eq. 16).

    Args:
        rewards: float32, shape (tokens,).
        values: float32, shape (tokens,): V of the state in which each token was chosen.
        lengths: tokens of each episode; their sum is ``tokens``.
        gamma: discount.
        lam: lambda.
        bootstrap: shape (episodes,): V of the state after the last token, for truncated episodes; zeros by default.

    Returns:
        advantages and returns (advantages + values), float32, shape (tokens,).
    """
    advantages = np.zeros_like(rewards, dtype=np.float64)
    sizes = np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    next_value = np.zeros(len(sizes)) if bootstrap is None else np.asarray(bootstrap, dtype=np.float64).copy()
    running = np.zeros(len(sizes))
    for back in range(1, int(sizes.max(initial=0)) + 1):  # all episodes at once, from their ends
        live = np.flatnonzero(ends - back >= starts)
        at = ends[live] - back
        delta = rewards[at] + gamma * next_value[live] - values[at]
        running[live] = delta + gamma * lam * running[live]
        advantages[at] = running[live]
        next_value[live] = values[at]
    return advantages.astype(np.float32), (advantages + values).astype(np.float32)


def explained_variance(values: np.ndarray, returns: np.ndarray, total: Total = lambda sums: sums) -> float:
    """1 - Var(returns - values) / Var(returns); NaN where the returns do not vary, or there are none.

    Args:
        values: shape (tokens,).
        returns: shape (tokens,).
        total: sums the moments over processes.
    """
    returns = np.asarray(returns, dtype=np.float64)
    errors = returns - values
    count, *moments = total(np.array([len(returns), *(m for x in (returns, errors) for m in (x.sum(), (x * x).sum()))]))
    spread, unexplained = (s / max(count, 1) - (f / max(count, 1)) ** 2 for f, s in (moments[:2], moments[2:]))
    return float("nan") if spread <= 1e-12 else float(1.0 - unexplained / spread)


@dataclass(frozen=True)
class PPOSettings(OnPolicySettings):
    """Settings of token-level PPO."""

    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    value_clip: float = 0.2
    """Clip range of the value function; 0 turns it off."""
    value_coefficient: float = 0.1
    """Weight of the value loss."""
    whiten_advantages: bool = True
    """Advantages of an update have mean 0 and deviation 1 over the tokens that the policy wrote."""
    whiten_rewards: bool = False
    """Rewards are divided by their deviation, with the mean left as it is."""
    kl_estimator: KLEstimator = "k1"
    """Estimator of the KL penalty in the reward: k1 or k3."""
    kl_target: float = 0.0
    """Mean KL per episode, in nats, to which the coefficient adapts; 0 keeps the coefficient."""
    kl_horizon: int = 10_000
    """Episodes over which the coefficient adapts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gamma <= 1 or not 0 <= self.lam <= 1:
            raise InputError(f"gamma must be in (0, 1] and lam in [0, 1], got {self.gamma} and {self.lam}")
        check_choice(self, "kl_estimator", ("k1", "k3"))
        check_at_least_zero(self, "value_clip", "value_coefficient", "kl_target")
        if self.kl_horizon < 1:
            raise InputError(f"kl_horizon must be at least 1, got {self.kl_horizon}")


class TokenPPO(OnPolicyAgent):
    """PPO whose actions are tokens: KL penalty in the reward, GAE over tokens, clipped policy and value losses.

    Arguments and methods are those of :class:`OnPolicyAgent`; its options are the fields of :class:`PPOSettings`.
    """

    settings_class: ClassVar[type[OnPolicySettings]] = PPOSettings
    needs_values: ClassVar[bool] = True
    name: ClassVar[str] = "ppo"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kl = KLController(self.settings.kl_coefficient, self.settings.kl_target or None, self.settings.kl_horizon)

    def _prepare(self, batch: TokenBatch) -> None:
        settings, total = self.settings, self.processes.total
        rewards, kept = batch.own_rewards, batch.loss_mask
        if settings.whiten_rewards:
            rewards = whiten(rewards, kept, shift_mean=False, total=total)
        shaped = rewards - np.float32(self.kl.coefficient) * self._kl_penalty(batch, settings.kl_estimator)
        # Episodes end in `terminated`; the value of what would follow is 0. Tokens of others are part of a transition.
        advantages, batch.returns = np.zeros_like(rewards), np.zeros_like(rewards)
        advantages[kept], batch.returns[kept] = discounted_gae(
            shaped[kept], batch.values[kept], batch.per_episode(kept).tolist(), settings.gamma, settings.lam
        )
        batch.advantages = whiten(advantages, kept, total=total) if settings.whiten_advantages else advantages
        values, count = batch.values[kept], total(np.array([batch.values[kept].sum(), kept.sum()]))
        self.logger.record("train/explained_variance", explained_variance(values, batch.returns[kept], total))
        self.logger.record("train/value_mean", float(count[0] / max(count[1], 1)))

    def _loss(self, scores: TokenScores, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        policy_loss, clipped = clipped_policy_loss(
            scores.logprobs, micro.old_logprobs, micro.advantages, self.settings.clip
        )
        assert scores.values is not None
        value_loss, value_clipped = clipped_value_loss(
            scores.values, micro.old_values, micro.returns, self.settings.value_clip
        )
        metrics = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "clip_fraction": clipped,
            "value_clip_fraction": value_clipped,
        }
        return policy_loss + self.settings.value_coefficient * value_loss, metrics
