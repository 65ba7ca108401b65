"""Holds OnPolicyAgent, the base class of policy-gradient agents, and the mathematics that they share.

An update calls ``OnPolicyAgent._improve`` with the episodes of the rollout: a scoring pass (``_score``), advantages
(``_prepare``, of the subclass), then epochs of minibatches in micro-batches (``_train``) on the subclass's ``_loss``.
:class:`~instructgym.agents.policy_gradient.ppo.TokenPPO` is the main subclass.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt
from torch import Tensor

from ...llm_backends.errors import check_fields
from ..policy.language_model import TokenScores
from ..rollouts.agent import RolloutAgent, RolloutSettings
from ..rollouts.batch import TokenBatch

NotNegative = Annotated[float, Ge(0)]
KLEstimator = Literal["k1", "k3"]

LARGEST_LOG_RATIO = 20.0
"""Limit of log-ratios, in nats, whose exponential is taken, as in verl: that of 88 is infinite in float32, and infinity
times a mask, an advantage or a gradient of 0 is NaN, which would cost the whole optimiser step."""

Total = Callable[[np.ndarray], np.ndarray]
"""Function that returns the sum of a small array over all processes; the identity in a single process."""


def kl_estimate(logprobs: np.ndarray, reference: np.ndarray, estimator: KLEstimator = "k1") -> np.ndarray:
    """Estimates KL(policy || reference) at each token from tokens of the policy (Schulman 2020, "Approximating KL").

    Args:
        logprobs: log p by the policy that wrote the tokens, float, any shape, in nats.
        reference: log q by the reference policy, same shape.
        estimator: ``k1``: log p - log q, unbiased, may be negative; ``k3``: q/p - 1 - log(q/p), never negative.

    Returns:
        The estimates in nats, same shape.

    Raises:
        ValueError: for another estimator.
    """
    difference = reference - logprobs
    if estimator == "k1":
        return -difference
    # expm1 keeps the digits of q/p - 1 where q is close to p.
    if estimator == "k3":
        difference = np.minimum(difference, LARGEST_LOG_RATIO)
        return np.expm1(difference) - difference
    raise ValueError(f"kl estimator must be 'k1' or 'k3', got {estimator!r}")


def whiten(
    values: np.ndarray, mask: np.ndarray, shift_mean: bool = True, total: Total = lambda sums: sums
) -> np.ndarray:
    """Scales values to mean 0 and (sample) standard deviation 1 over the entries that a mask selects.

    Args:
        values: float32, shape (tokens,).
        mask: entries to scale, bool, shape (tokens,).
        shift_mean: False: only divide by the deviation, and leave the mean as it is.
        total: function that sums the moments over processes.

    Returns:
        float32, shape (tokens,); 0 where the mask is False.
    """
    kept = values[mask].astype(np.float64)
    count, first, second = total(np.array([len(kept), kept.sum(), (kept * kept).sum()]))
    mean = first / max(count, 1)
    # Rounding can make the variance of equal values slightly negative.
    variance = max(second - count * mean * mean, 0.0) / max(count - 1, 1)
    # 1e-8 inside of the root, as in TRL and verl: values that differ by rounding alone are not blown up to 1.
    whitened = (values - mean) / np.sqrt(variance + 1e-8) + (0.0 if shift_mean else mean)
    return np.where(mask, whitened, 0.0).astype(np.float32)


def effective_sample_size(weights: np.ndarray, total: Total = lambda sums: sums) -> float:
    """Returns Kish's effective share of samples, (sum w)^2 / (n sum w^2).

    Args:
        weights: importance weights, shape (tokens,).
        total: function that sums the moments over processes.

    Returns:
        A share in (0, 1], 1 if all weights are equal; NaN if there are none.
    """
    weights = np.asarray(weights, dtype=np.float64)
    count, first, second = total(np.array([len(weights), weights.sum(), (weights**2).sum()]))
    return float(first**2 / (count * second)) if count * second else float("nan")


@dataclass
class KLController:
    """A controller of the KL coefficient: constant, or adapted to a target (Ziegler et al. 2019, section 2.2).

    Args:
        coefficient: initial KL coefficient.
        target: mean KL per episode, in nats, to reach; None: the coefficient is constant.
        horizon: number of episodes over which the coefficient adapts.
    """

    coefficient: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, episodes: int) -> None:
        """Adapts the coefficient after an update.

        Args:
            kl: mean KL per episode in the update, in nats.
            episodes: number of episodes in the update.
        """
        # A KL above the target raises the coefficient. The clipped error bounds the change in a single update.
        if self.target is not None:
            error = float(np.clip(kl / self.target - 1.0, -0.2, 0.2))
            self.coefficient *= 1.0 + error * episodes / self.horizon


@dataclass(frozen=True)
class OnPolicySettings(RolloutSettings):
    """Settings that all token-level policy-gradient agents have.

    With ``top_k`` the gradient is no longer exact, as tokens are sampled from another distribution than the policy's.
    """

    clip: Annotated[float, Gt(0)] = 0.2
    """Half the width of the clip range of the probability ratio, [1 - clip, 1 + clip]."""
    kl_coefficient: NotNegative = 0.05
    """Weight of the KL penalty for distance from the reference policy; 0: the reference policy is not used."""
    entropy_coefficient: NotNegative = 0.0
    """Weight of the entropy bonus in the loss."""
    target_kl: NotNegative = 0.0
    """Early stopping: no further epoch of an update starts once the mean KL per token from the policy before the update
    exceeds 1.5 times this, in nats; 0: all epochs are run."""
    importance_cap: NotNegative = 2.0
    """Upper limit of the importance weights, which correct for the gap between the log-probs of sampler and training;
    0: no weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)


@dataclass
class MicroBatch:
    """The tensors of the episodes in a micro-batch, each of shape (tokens,), on the model's device."""

    old_logprobs: Tensor
    """Log-probs by the policy before the update."""
    advantages: Tensor
    returns: Tensor
    """Targets of the value function."""
    old_values: Tensor
    """Values before the update."""
    reference_logprobs: Tensor
    """Log-probs by the reference policy."""
    scale: Tensor
    """Weight of each token in the loss, importance weight included; float32, 0 where masked out."""
    mask: Tensor
    """True for tokens that the policy wrote; bool."""


class OnPolicyAgent(RolloutAgent):
    """An agent with an advantage and a loss per token of its own episodes.

    A subclass has ``_prepare``, which fills in advantages, and ``_loss``. Arguments are those of
    :class:`~instructgym.agents.rollouts.agent.RolloutAgent`.
    """

    settings_class: ClassVar[type[OnPolicySettings]] = OnPolicySettings
    name: ClassVar[str] = "on-policy"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kl = KLController(self.settings.kl_coefficient)
        self._kl_observed = (0.0, 0)
        """Mean KL per episode of this update, in nats, and its number of episodes."""

    def _improve(self, batch: TokenBatch) -> None:
        """Scores the episodes, estimates advantages, trains, and records the durations."""
        started = time.perf_counter()
        self.score_batch(batch)
        self.prepare(batch)
        training = time.perf_counter()
        self.train(batch)
        self.kl.update(*self._kl_observed)  # after training, whose loss has used the coefficient of this update
        self.logger.record("time/score", training - started)
        self.logger.record("time/train", time.perf_counter() - training)

    @torch.no_grad()
    def score_batch(self, batch: TokenBatch) -> None:
        """Fills in log-probs, values, reference log-probs and importance weights, from the training kernels."""
        # 1. Score the episodes in micro-batches. The sampler has returned log-probs, but with other rounding (key-value
        # cache, other batches, or a server). In the kernels of training the probability ratio is 1 before the first
        # optimiser step, so that a change of it is a change of the policy.
        size = batch.tokens
        batch.logprobs, batch.values, batch.reference_logprobs = (np.zeros(size, np.float32) for _ in range(3))
        entropies = np.zeros(size, np.float32)
        for episodes in batch.micro_batches(np.arange(len(batch)), self.settings.token_budget):
            rows, arguments = batch.rows(episodes), _score_arguments(batch, episodes)
            scores = self.policy.score(*arguments, values=self.needs_values)
            batch.logprobs[rows] = scores.logprobs.float().cpu().numpy()
            entropies[rows] = scores.entropies.float().cpu().numpy()
            if scores.values is not None:
                batch.values[rows] = scores.values.float().cpu().numpy()
            if self._uses_reference:
                batch.reference_logprobs[rows] = self.policy.reference_logprobs(*arguments).float().cpu().numpy()
        # Without a reference the KL is 0.
        if not self._uses_reference:
            batch.reference_logprobs = batch.logprobs.copy()
        # 2. Importance weights, as the distribution of the sampler differs a little from that of training. The ratio is
        # truncated, so that no single token dominates the gradient.
        gap = batch.logprobs - batch.sampler_logprobs
        cap = self.settings.importance_cap
        batch.weights = np.ones(size, np.float32)
        if cap:
            batch.weights = np.minimum(np.exp(np.minimum(gap, LARGEST_LOG_RATIO)), cap).astype(np.float32)
        # 3. Record how far sampler and training are apart, over the policy's tokens of all processes.
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
        """Whether there is a reference policy and a KL penalty, without which a pass over the episodes is saved."""
        return self.policy.reference != "none" and (self.settings.kl_coefficient > 0)

    def _kl_penalty(self, batch: TokenBatch, estimator: KLEstimator = "k1") -> np.ndarray:
        """Returns the KL of each token, without the coefficient; float32, shape (tokens,), 0 where masked out.

        Records the mean per episode, by which the coefficient is adapted at the end of the update.
        """
        kl = np.where(batch.loss_mask, kl_estimate(batch.logprobs, batch.reference_logprobs, estimator), 0.0)
        # The mean that is recorded and adapted to is unbiased, whatever estimates the penalty.
        unbiased = np.where(batch.loss_mask, kl_estimate(batch.logprobs, batch.reference_logprobs), 0.0)
        total, episodes = self.processes.total(np.array([unbiased.sum(), len(batch)], dtype=np.float64))
        mean = float(total / max(episodes, 1))
        if self._uses_reference:
            self.logger.record("train/kl", mean)
            self.logger.record("train/kl_coefficient", self.kl.coefficient)
        self._kl_observed = (mean, int(episodes))
        return kl.astype(np.float32)

    @abstractmethod
    def prepare(self, batch: TokenBatch) -> None:
        """Fills in the batch's advantages, and returns if the agent has a value function."""

    @abstractmethod
    def _loss(self, scores: TokenScores, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of each token, shape (tokens,), and per-token metrics, whose means are recorded.

        Args:
            scores: scores of the tokens by the policy in training, in the autograd graph.
            micro: the same tokens as scored before the update, and their advantages.
        """

    def _token_scale(self, batch: TokenBatch) -> np.ndarray:
        """Returns the weight of each token in the loss, which is divided by their sum; equal weights: a plain mean."""
        return np.ones(batch.tokens, np.float32)

    def train(self, batch: TokenBatch) -> None:
        """Runs the epochs of an update and records the means of the metrics."""
        sums: dict[str, float] = {}
        count, steps, skipped, norms = 0.0, 0, self.optimizer.skipped, 0.0
        scale = self._token_scale(batch) * batch.loss_mask
        for epoch, minibatches in self._epochs(len(batch), places=batch.places):
            epochs = epoch + 1
            epoch_kl = np.zeros(2)
            for episodes in minibatches:
                # The loss is a mean over the minibatch in all processes. Each micro-batch divides by the minibatch's
                # total weight and adds its gradient: results depend on no split into micro-batches or processes.
                total = float(self.processes.total(np.array([scale[batch.rows(episodes)].sum()]))[0])
                if not total:
                    continue
                for members in batch.micro_batches(episodes, self.settings.token_budget):
                    rows = batch.rows(members)
                    micro = self._micro_batch(batch, rows, scale[rows] / total)
                    scores = self.policy.score(
                        *_score_arguments(batch, members),
                        values=self.needs_values,
                        entropy_gradient=self.settings.entropy_coefficient > 0,
                    )
                    losses, metrics = self._loss(scores, micro)
                    if self.settings.entropy_coefficient:
                        losses = losses - self.settings.entropy_coefficient * scores.entropies
                    (losses * micro.scale).sum().backward()
                    # approx_kl: the k3 estimate of KL(old policy || policy), how far the update has moved so far.
                    with torch.no_grad():
                        change = (scores.logprobs - micro.old_logprobs).clamp(max=LARGEST_LOG_RATIO)
                        metrics["approx_kl"] = change.expm1() - change
                        metrics["loss"] = losses
                        for name, values in metrics.items():
                            sums[name] = sums.get(name, 0.0) + float((values.float() * micro.mask).sum())
                        count += float(micro.mask.sum())
                        epoch_kl += [float((metrics["approx_kl"] * micro.mask).sum()), float(micro.mask.sum())]
                # A step per minibatch in every process, even one without episodes: gradients are summed over all.
                norms += self._optimizer_step()
                steps += 1
            # Early stopping, on the drift over all processes, so that all of them stop after the same epoch.
            drift = self.processes.total(epoch_kl)
            if self.settings.target_kl and drift[0] > 1.5 * self.settings.target_kl * max(drift[1], 1):
                break
        self._end_training(steps, skipped)
        # Means of the metrics over the tokens of all processes.
        gathered = self.processes.gather(sums | {"count": count})
        tokens = max(sum(part["count"] for part in gathered), 1.0)
        for name in sorted(set().union(*gathered) - {"count"}):
            self.logger.record(f"train/{name}", sum(part.get(name, 0.0) for part in gathered) / tokens)
        self.logger.record("train/grad_norm", norms / steps)
        self.logger.record("train/epochs", epochs)

    def _micro_batch(self, batch: TokenBatch, rows: np.ndarray, scale: np.ndarray) -> MicroBatch:
        """Returns the tensors of some tokens.

        Args:
            batch: all episodes of this process.
            rows: positions of the tokens, shape (n,).
            scale: their weights in the loss, shape (n,), without importance weights.
        """

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(self.policy.lm.device)

        # Agents without a value function have no returns, and do not read these.
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


def _score_arguments(batch: TokenBatch, episodes: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray], list[Any]]:
    """Returns prompts, responses and allowed tokens of some episodes, the first arguments of the policy's ``score``."""
    return (
        [batch.prompts[i] for i in episodes],
        [batch.responses[i] for i in episodes],
        [batch.allowed[i] for i in episodes],
    )


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Returns PPO's clipped surrogate objective, negated (Schulman et al. 2017, eq. 7).

    Args:
        logprobs: log-probs by the policy in training, shape (tokens,), in nats, in the autograd graph.
        old_logprobs: log-probs by the policy that wrote the tokens, shape (tokens,), in nats.
        advantages: shape (tokens,).
        clip: epsilon, half the width of the clip range.

    Returns:
        The loss of each token, and whether clipping removed its gradient (bool), each of shape (tokens,).
    """
    ratio = (logprobs - old_logprobs).clamp(max=LARGEST_LOG_RATIO).exp()
    # The minimum is a lower bound of the objective: clipping removes the gradient of a token whose ratio has moved far
    # enough in the direction of its advantage, but not of one that has moved against it.
    free, bounded = ratio * advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages
    return -torch.minimum(free, bounded), bounded < free
