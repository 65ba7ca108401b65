"""The core of policy-gradient agents: one scoring pass, epochs of micro-batches, KL to a reference policy."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from ...llm_backends.errors import InputError, check_at_least_zero
from ..policy.language_model import TokenScores
from ..rollouts.agent import RolloutAgent, RolloutSettings
from ..rollouts.batch import TokenBatch

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


@dataclass(frozen=True)
class OnPolicySettings(RolloutSettings):
    """What token-level policy-gradient agents have in common; with top_k their gradient is no longer exact."""

    clip: float = 0.2
    """Clip range of the probability ratio."""
    kl_coefficient: float = 0.05
    """Weight of the KL penalty against the reference policy; 0 leaves the reference out."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    target_kl: float = 0.0
    """An update ends early when the mean KL from its start exceeds 1.5 times this; 0 turns it off."""
    importance_cap: float = 2.0
    """Cap of the importance weights between sampler and training kernels; 0 leaves the weights out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.clip > 0:
            raise InputError(f"clip must be above 0, got {self.clip}")
        check_at_least_zero(self, "kl_coefficient", "entropy_coefficient", "target_kl", "importance_cap")


@dataclass
class MicroBatch:
    """The tensors of some episodes, flat over their tokens, on the model's device."""

    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    old_values: torch.Tensor
    reference_logprobs: torch.Tensor
    scale: torch.Tensor
    """float32: the share of each token in the loss, importance weight included; 0 where masked out."""
    mask: torch.Tensor


class OnPolicyAgent(RolloutAgent):
    """An agent with an advantage and a loss per token of its own episodes; arguments as of :class:`RolloutAgent`."""

    settings_class: ClassVar[type[OnPolicySettings]] = OnPolicySettings
    name: ClassVar[str] = "on-policy"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kl = KLController(self.settings.kl_coefficient)

    def _improve(self, batch: TokenBatch) -> None:
        begun = time.perf_counter()
        self._score(batch)
        self._prepare(batch)
        training = time.perf_counter()
        self._train(batch)
        self.logger.record("time/score", training - begun)
        self.logger.record("time/train", time.perf_counter() - training)

    @torch.no_grad()
    def _score(self, batch: TokenBatch) -> None:
        """Fills in log-probs, values, reference log-probs and importance weights, in the kernels of training."""
        size = batch.tokens
        batch.logprobs, batch.values, batch.reference_logprobs = (np.zeros(size, np.float32) for _ in range(3))
        entropies = np.zeros(size, np.float32)
        for episodes in batch.micro_batches(np.arange(len(batch)), self.settings.token_budget):
            rows, arguments = batch.rows(episodes), _arguments(batch, episodes)
            scores = self.policy.score(*arguments, values=self.needs_values)
            batch.logprobs[rows] = scores.logprobs.float().cpu().numpy()
            entropies[rows] = scores.entropies.float().cpu().numpy()
            if scores.values is not None:
                batch.values[rows] = scores.values.float().cpu().numpy()
            if self._uses_reference:
                batch.reference_logprobs[rows] = self.policy.reference_logprobs(*arguments).float().cpu().numpy()
        if not self._uses_reference:
            batch.reference_logprobs = batch.logprobs.copy()
        gap = batch.logprobs - batch.sampler_logprobs
        cap = self.settings.importance_cap
        batch.weights = np.minimum(np.exp(gap), cap).astype(np.float32) if cap else np.ones(size, np.float32)
        kept = batch.loss_mask
        total = self.processes.total
        count, gaps, entropy = total(np.array([kept.sum(), np.abs(gap[kept]).sum(), entropies[kept].sum()]))
        largest = max(self.processes.gather(float(np.abs(gap[kept]).max(initial=0.0))))
        self.logger.record("train/entropy", float(entropy / max(count, 1)))
        self.logger.record("sampler/gap_mean", float(gaps / max(count, 1)))
        self.logger.record("sampler/gap_max", largest)
        self.logger.record("sampler/effective_sample_size", effective_sample_size(batch.weights[kept], total))

    @property
    def _uses_reference(self) -> bool:
        return self.policy.reference != "none" and (self.settings.kl_coefficient > 0)

    def _kl_penalty(self, batch: TokenBatch, estimator: KLEstimator = "k1") -> np.ndarray:
        """Returns the KL penalty of each token, float32, shape (tokens,), 0 where masked out.

        Records the mean per episode, by which the coefficient is adapted once the update is over.
        """
        kl = np.where(batch.loss_mask, kl_estimate(batch.logprobs, batch.reference_logprobs, estimator), 0.0)
        unbiased = np.where(batch.loss_mask, kl_estimate(batch.logprobs, batch.reference_logprobs), 0.0)
        total, episodes = self.processes.total(np.array([unbiased.sum(), len(batch)], dtype=np.float64))
        mean = float(total / max(episodes, 1))
        if self._uses_reference:
            self.logger.record("train/kl", mean)
            self.logger.record("train/kl_coefficient", self.kl.coefficient)
        self._kl_observed = (mean, int(episodes))
        return kl.astype(np.float32)

    @abstractmethod
    def _prepare(self, batch: TokenBatch) -> None:
        """Fills in advantages (and returns)."""

    @abstractmethod
    def _loss(self, scores: TokenScores, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of each token, shape (tokens,), and per-token metrics to log the means of."""

    def _token_scale(self, batch: TokenBatch) -> np.ndarray:
        """The weight of each token in the loss before it is divided by their sum: one mean over all tokens."""
        return np.ones(batch.tokens, np.float32)

    def _train(self, batch: TokenBatch) -> None:
        sums: dict[str, float] = {}
        count, steps, skipped, norms = 0.0, 0, self.optimizer.skipped, 0.0
        scale = self._token_scale(batch) * batch.loss_mask
        for epoch, minibatches in self._epochs(len(batch)):
            epochs = epoch + 1
            epoch_kl = np.zeros(2)
            for episodes in minibatches:
                total = float(self.processes.total(np.array([scale[batch.rows(episodes)].sum()]))[0])
                for members in batch.micro_batches(episodes, self.settings.token_budget):
                    rows = batch.rows(members)
                    micro = self._tensors(batch, rows, scale[rows] / max(total, 1e-12))
                    scores = self.policy.score(
                        *_arguments(batch, members),
                        values=self.needs_values,
                        entropy_gradient=self.settings.entropy_coefficient > 0,
                    )
                    losses, metrics = self._loss(scores, micro)
                    if self.settings.entropy_coefficient:
                        losses = losses - self.settings.entropy_coefficient * scores.entropies
                    (losses * micro.scale).sum().backward()
                    with torch.no_grad():
                        change = scores.logprobs - micro.old_logprobs
                        metrics["approx_kl"] = change.expm1() - change
                        metrics["loss"] = losses
                        for name, values in metrics.items():
                            sums[name] = sums.get(name, 0.0) + float((values.float() * micro.mask).sum())
                        count += float(micro.mask.sum())
                        epoch_kl += [float((metrics["approx_kl"] * micro.mask).sum()), float(micro.mask.sum())]
                norms += self._optimizer_step()
                steps += 1
            drift = self.processes.total(epoch_kl)
            if self.settings.target_kl and drift[0] > 1.5 * self.settings.target_kl * max(drift[1], 1):
                break
        self._end_training(steps, skipped)
        self._log_training(sums, count, steps, norms, epochs)

    def _log_training(self, sums: dict[str, float], count: float, steps: int, norms: float, epochs: int) -> None:
        rows = self.processes.gather(sums | {"count": count})
        tokens = max(sum(row["count"] for row in rows), 1.0)
        for name in sorted(set().union(*rows) - {"count"}):
            self.logger.record(f"train/{name}", sum(row.get(name, 0.0) for row in rows) / tokens)
        self.logger.record("train/grad_norm", norms / steps)
        self.logger.record("train/epochs", epochs)
        self.kl.update(*self._kl_observed)

    def _tensors(self, batch: TokenBatch, rows: np.ndarray, scale: np.ndarray) -> MicroBatch:
        def tensor(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(self.policy.lm.device)

        returns = batch.returns[rows] if len(batch.returns) else batch.advantages[rows]
        return MicroBatch(
            old_logprobs=tensor(batch.logprobs[rows]),
            advantages=tensor(batch.advantages[rows]),
            returns=tensor(returns),
            old_values=tensor(batch.values[rows]),
            reference_logprobs=tensor(batch.reference_logprobs[rows]),
            scale=tensor((scale * batch.weights[rows]).astype(np.float32)),
            mask=tensor(batch.loss_mask[rows]),
        )

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"kl_coefficient": self.kl.coefficient}

    def _take_state(self, state: Mapping[str, Any]) -> None:
        super()._take_state(state)
        self.kl.coefficient = state["kl_coefficient"]


def _arguments(batch: TokenBatch, episodes: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray], list[Any]]:
    return (
        [batch.prompts[i] for i in episodes],
        [batch.responses[i] for i in episodes],
        [batch.allowed[i] for i in episodes],
    )


def clipped_policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate, negated (Schulman et al. 2017, eq. 7).

    Args:
        logprobs: by the policy in training, shape (tokens,), with a graph.
        old_logprobs: by the policy that wrote the tokens.
        advantages: shape (tokens,).
        clip: epsilon.

    Returns:
        The loss of each token, and whether clipping took its gradient (bool).
    """
    ratio = (logprobs - old_logprobs).exp()
    free, bounded = ratio * advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages
    return -torch.minimum(free, bounded), bounded < free
