"""Rewards to learning signals: KL shaping, GAE, whitening, group baselines. Plain numpy on flat arrays.

A batch of episodes is one flat array of tokens, episode after episode, with ``lengths`` saying where each ends: there
is no padding that could carry a reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

KLEstimator = Literal["k1", "k3"]

Total = Callable[[np.ndarray], np.ndarray]
"""Sums a small array over all processes; the identity in one."""


def kl_estimate(logprobs: np.ndarray, reference: np.ndarray, estimator: KLEstimator = "k1") -> np.ndarray:
    """Per-token estimate of KL(policy || reference) from tokens of the policy (Schulman 2020, "Approximating KL").

    Args:
        logprobs: float, any shape: by the policy that wrote the tokens, in nats.
        reference: the same shape: by the reference policy.
        estimator: ``k1``: log p - log q, unbiased, may be negative; ``k3``: q/p - 1 - log(q/p), never negative.
    """
    difference = reference - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k3":
        return np.expm1(difference) - difference
    raise ValueError(f"kl estimator must be 'k1' or 'k3', got {estimator!r}")


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


def whiten(
    values: np.ndarray, mask: np.ndarray, shift_mean: bool = True, total: Total = lambda sums: sums
) -> np.ndarray:
    """Values divided by their standard deviation over the masked-in entries, less their mean; masked-out ones are 0.

    Args:
        values: float32, shape (tokens,).
        mask: bool, shape (tokens,).
        shift_mean: False leaves the mean as it is.
        total: sums the moments over processes.
    """
    kept = values[mask].astype(np.float64)
    count, first, second = total(np.array([len(kept), kept.sum(), (kept * kept).sum()]))
    mean = first / max(count, 1)
    deviation = np.sqrt(max(second / max(count, 1) - mean * mean, 0.0))
    whitened = (values - mean) / (deviation + 1e-8) + (0.0 if shift_mean else mean)
    return np.where(mask, whitened, 0.0).astype(np.float32)


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


def effective_sample_size(weights: np.ndarray, total: Total = lambda sums: sums) -> float:
    """Kish's effective share of samples, (sum w)^2 / (n sum w^2): 1 where all weights are equal; NaN without any.

    Args:
        weights: shape (tokens,).
        total: sums the moments over processes.
    """
    weights = np.asarray(weights, dtype=np.float64)
    count, first, second = total(np.array([len(weights), weights.sum(), (weights**2).sum()]))
    return float(first**2 / (count * second)) if count * second else float("nan")


@dataclass
class KLController:
    """The KL coefficient: fixed, or adapted to a target (Ziegler et al. 2019, section 2.2).

    Args:
        coefficient: where it starts.
        target: mean KL per episode in nats to steer to; None keeps the coefficient.
        horizon: episodes over which it adapts.
    """

    coefficient: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, episodes: int) -> None:
        """Takes one update's mean KL per episode and its number of episodes into account."""
        if self.target is not None:
            error = float(np.clip(kl / self.target - 1.0, -0.2, 0.2))
            self.coefficient *= 1.0 + error * episodes / self.horizon
