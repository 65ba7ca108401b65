"""Token-level PPO for causal language models.

An action is a token; the state is the prompt with the tokens before it. Steps 3 and 5 of an update are here, the others
are shared with other agents:

1. The policy generates episodes, and the env gives a reward per token: ``RolloutAgent.update`` in
   :mod:`~instructgym.agents.rollouts.agent` and ``collect`` in :mod:`~instructgym.agents.rollouts.batch`.
2. One pass over the episodes computes log-probs, values and the log-probs of the reference policy:
   ``OnPolicyAgent.score_batch`` in :mod:`~instructgym.agents.policy_gradient.on_policy`.
3. The KL penalty is subtracted from the rewards, and advantages are estimated by GAE (Schulman et al. 2016):
   ``TokenPPO.prepare``.
4. Epochs of minibatches follow, each an optimiser step: ``OnPolicyAgent.train``.
5. The loss of each token is the clipped policy loss (Schulman et al. 2017) and the value loss: ``TokenPPO._loss``.

The model with its value head is in :mod:`~instructgym.agents.policy.language_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from ..policy.language_model import TokenScores
from ..rollouts.batch import TokenBatch
from .on_policy import (
    KLController,
    KLEstimator,
    MicroBatch,
    NotNegative,
    OnPolicyAgent,
    OnPolicySettings,
    Total,
    clipped_policy_loss,
    whiten,
)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Returns half the squared error of the values, the larger of plain and clipped (as in OpenAI's PPO2 code).

    Args:
        values: values by the policy in training, shape (tokens,), in the autograd graph.
        old_values: values before the update, shape (tokens,).
        returns: targets of the values, shape (tokens,).
        clip: largest change of a value that reduces its loss; 0: no clipping.

    Returns:
        The loss of each token, and whether clipping removed its gradient (bool), each of shape (tokens,).
    """
    plain = (values - returns).square()
    if not clip:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    # A value that has moved by more than ``clip`` has a constant error here. The larger loss counts: the gradient of a
    # token is removed only if its value has moved too far towards the target.
    bounded = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return 0.5 * torch.maximum(plain, bounded), bounded > plain


def discounted_gae(
    rewards: np.ndarray,
    values: np.ndarray,
    lengths: Sequence[int],
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Estimates advantages by GAE over episodes of unequal lengths (Schulman et al. 2016, eq. 16).

    Args:
        rewards: reward of each token, float32, shape (tokens,), episode after episode.
        values: V of the state in which each token was chosen, float32, shape (tokens,).
        lengths: number of tokens of each episode; their sum is ``tokens``.
        gamma: discount per token.
        lam: lambda of GAE; 0: one-step errors, 1: returns less values.
        bootstrap: V of the state after the last token, for truncated episodes, shape (episodes,); None: zeros.

    Returns:
        Advantages, and returns (advantages + values), each float32 of shape (tokens,).
    """
    advantages = np.zeros_like(rewards, dtype=np.float64)
    sizes = np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    next_value = np.zeros(len(sizes)) if bootstrap is None else np.asarray(bootstrap, dtype=np.float64).copy()
    running = np.zeros(len(sizes))
    # From the last token of each episode to its first, all episodes that are at least ``back`` tokens long at once.
    for back in range(1, int(sizes.max(initial=0)) + 1):
        live = np.flatnonzero(ends - back >= starts)
        positions = ends[live] - back
        # delta_t = r_t + gamma V(s_t+1) - V(s_t), and A_t = delta_t + gamma lam A_t+1: eq. 16 as a recursion.
        delta = rewards[positions] + gamma * next_value[live] - values[positions]
        running[live] = delta + gamma * lam * running[live]
        advantages[positions] = running[live]
        next_value[live] = values[positions]
    return advantages.astype(np.float32), (advantages + values).astype(np.float32)


def explained_variance(values: np.ndarray, returns: np.ndarray, total: Total = lambda sums: sums) -> float:
    """Returns 1 - Var(returns - values) / Var(returns): 1 for perfect values, 0 for a constant value.

    Args:
        values: values of the states, shape (tokens,).
        returns: targets of the values, shape (tokens,).
        total: function that sums the moments over processes.

    Returns:
        The share of the returns' variance that the values explain; NaN if the returns do not vary or there are none.
    """
    # Variances are computed from sums, as the tokens of an update are spread over processes.
    returns = np.asarray(returns, dtype=np.float64)
    errors = returns - values
    count, *moments = total(np.array([len(returns), *(m for x in (returns, errors) for m in (x.sum(), (x * x).sum()))]))
    spread, unexplained = (s / max(count, 1) - (f / max(count, 1)) ** 2 for f, s in (moments[:2], moments[2:]))
    return float("nan") if spread <= 1e-12 else float(1.0 - unexplained / spread)


@dataclass(frozen=True)
class PPOSettings(OnPolicySettings):
    """Settings of token-level PPO."""

    gamma: Annotated[float, Gt(0), Le(1)] = 1.0
    """Discount per token, in (0, 1]."""
    lam: Annotated[float, Ge(0), Le(1)] = 0.95
    """Lambda of GAE, in [0, 1]: lower values have less variance and more bias."""
    value_clip: NotNegative = 0.2
    """Clip range of the values: changes beyond it do not reduce the value loss; 0: no clipping."""
    value_coefficient: NotNegative = 0.1
    """Weight of the value loss against the policy loss."""
    whiten_advantages: bool = True
    """Whether advantages are whitened to mean 0 and deviation 1 over the policy's tokens of an update."""
    whiten_rewards: bool = False
    """Whether rewards, less the KL penalty, are divided by their deviation; their mean is not shifted."""
    kl_estimator: KLEstimator = "k1"
    """Estimator of the KL penalty in the reward: k1 (unbiased) or k3 (never negative)."""
    kl_target: NotNegative = 0.0
    """Mean KL to the reference policy per episode, in nats, that the KL coefficient is adapted to reach; 0: the
    coefficient is constant."""
    kl_horizon: Annotated[int, Ge(1)] = 10_000
    """Number of episodes over which the KL coefficient adapts."""


class TokenPPO(OnPolicyAgent):
    """A PPO agent whose actions are tokens: KL penalty in the reward, GAE over tokens, clipped policy and value losses.

    Args:
        env, policy, seed, engine, settings: see :class:`~instructgym.agents.rollouts.agent.RolloutAgent`.
        **options: fields of :class:`PPOSettings`.
    """

    settings_class: ClassVar[type[OnPolicySettings]] = PPOSettings
    needs_values: ClassVar[bool] = True
    name: ClassVar[str] = "ppo"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kl = KLController(self.settings.kl_coefficient, self.settings.kl_target or None, self.settings.kl_horizon)

    def prepare(self, batch: TokenBatch) -> None:
        """Shapes the rewards by the KL penalty, and fills in advantages and returns."""
        settings, total = self.settings, self.processes.total
        rewards, kept = batch.own_rewards, batch.loss_mask
        # 1. Shape the rewards: r_t - beta KL_t, which keeps the policy near the reference. As in TRL both are whitened,
        # without a shift of the mean: the tokens without a reward would get one, and long responses more of it.
        shaped = rewards - np.float32(self.kl.coefficient) * self._kl_penalty(batch, settings.kl_estimator)
        if settings.whiten_rewards:
            shaped = whiten(shaped, kept, shift_mean=False, total=total)
        # 2. Estimate advantages and returns. Every episode has terminated, so the value after its last token is 0: no
        # bootstrap. Tokens that the policy did not write are part of the transition between two tokens that it wrote.
        advantages, batch.returns = np.zeros_like(rewards), np.zeros_like(rewards)
        advantages[kept], batch.returns[kept] = discounted_gae(
            shaped[kept], batch.values[kept], batch.per_episode(kept).tolist(), settings.gamma, settings.lam
        )
        # 3. Whiten the advantages, over all processes and over the whole update, not per minibatch.
        batch.advantages = whiten(advantages, kept, total=total) if settings.whiten_advantages else advantages
        values, sums = batch.values[kept], total(np.array([batch.values[kept].sum(), kept.sum()]))
        self.logger.record("train/explained_variance", explained_variance(values, batch.returns[kept], total))
        self.logger.record("train/value_mean", float(sums[0] / max(sums[1], 1)))

    def _loss(self, scores: TokenScores, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns policy loss plus weighted value loss of each token, and metrics."""
        policy_loss, clipped = clipped_policy_loss(
            scores.logprobs, micro.old_logprobs, micro.advantages, self.settings.clip
        )
        # The value function is trained by the same backward pass: its head may share the policy's trunk.
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
