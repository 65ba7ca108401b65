"""Losses that train a policy on ranked candidate responses: one value per list, lists of any length.

:data:`LOSSES` names them. :class:`~instructgym.agents.preferences.trainer.RankingTrainer` steps one on lists that exist
already, :class:`~instructgym.agents.preferences.agent.RankingAgent` on samples that it ranks itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

UNRANKED = -1
"""Rank of a reference response, which is not part of the ranking."""

Pairing = Literal["all", "best_worst", "reference"]
"""Pairs of a list that a loss compares: candidates by their ranks (all, or the best with the worst), or the reference
response with the candidates."""


@dataclass
class RankedListBatch:
    """A batch of m lists with n candidates altogether, stored list after list without padding."""

    logprobs: Tensor
    """float, shape (n,): log-probs of whole candidates under the policy, summed over their tokens, in nats."""
    lengths: Tensor
    """int64, shape (n,): number of tokens of each candidate, at least 1."""
    counts: Tensor
    """int64, shape (m,): number of candidates of each list."""
    ranks: Tensor
    """int64, shape (n,): number of better candidates in the list, 0 for the best; equal ranks are ties. A reference
    response, which is not ranked, has -1."""
    reference_logprobs: Tensor | None = None
    """float, shape (n,): like ``logprobs``, but under the reference policy; None for losses that need none."""
    scores: Tensor | None = None
    """float, shape (n,): score of each candidate, larger is better (LiPO's psi); 0 for a reference response."""
    win_rates: Tensor | None = None
    """float, shape (n,): mean probability in [0, 1] that a candidate is preferred to those of its list (SPPO)."""
    reference_kls: Tensor | None = None
    """Shape (n,), dtype of ``logprobs``, differentiable: KL(reference || policy) over the whole vocabulary, summed over
    the tokens of each candidate, in nats (TDPO's sequential KL divergence)."""

    @property
    def owners(self) -> Tensor:
        """int64, shape (n,): index of the list that each candidate belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.counts), device=self.counts.device), self.counts)

    def mean_logprobs(self) -> Tensor:
        """Returns the mean log-prob per token of each candidate, shape (n,), in nats."""
        return self.logprobs / self.lengths

    def log_ratios(self) -> Tensor:
        """Returns log-probs of whole candidates, policy minus reference policy, shape (n,), in nats.

        Raises:
            ValueError: if there are no reference log-probs.
        """
        return self.logprobs - _require(self.reference_logprobs, "reference log-probs")

    def pairs(self, pairing: Pairing = "all") -> tuple[Tensor, Tensor]:
        """Returns the rows of the better and of the worse candidate of each pair; ties form no pairs.

        Args:
            pairing: ``all``: all candidates of different rank; ``best_worst``: those of the best rank of a list with
                those of the worst; ``reference``: the reference response of a list, as the better one, with each ranked
                candidate.

        Returns:
            Two int64 tensors of shape (pairs,), ordered by the better row, then by the worse one.
        """
        owners, ranks = self.owners, self.ranks
        same = owners[:, None] == owners[None, :]
        if pairing == "reference":
            better = same & (ranks == UNRANKED)[:, None] & (ranks != UNRANKED)[None, :]
        else:
            better = same & (ranks != UNRANKED)[:, None] & (ranks[:, None] < ranks[None, :])
            if pairing == "best_worst":
                # The initial zeros take part in the maximum, so the -1 of a reference response never is the worst rank.
                worst = ranks.new_zeros(len(self.counts)).scatter_reduce(0, owners, ranks, "amax")
                better &= (ranks == 0)[:, None] & (ranks == worst[owners])[None, :]
        winners, losers = better.nonzero(as_tuple=True)
        return winners, losers

    def total(self, values: Tensor, rows: Tensor) -> Tensor:
        """Returns the sum per list, shape (m,), of values whose lists are those of the candidates in ``rows``."""
        return values.new_zeros(len(self.counts)).index_add(0, self.owners[rows], values)

    def mean(self, values: Tensor, rows: Tensor) -> Tensor:
        """Returns the mean per list, shape (m,), of values whose lists are those of ``rows``; 0 without any value."""
        # At least 1: a list without values gives 0 / 1, not NaN.
        return self.total(values, rows) / self.total(torch.ones_like(values), rows).clamp(min=1.0)


def tuna(lists: RankedListBatch, margin: float = 0.1) -> Tensor:
    """Computes Tuna's ranking loss as the paper states it (Li et al. 2023, arXiv 2310.13385).

    It is the sum over pairs of max(0, v(worse) - v(better) + margin (difference of ranks)), with v the mean log-prob
    per token. The default margin is that of the published code.

    Args:
        lists: m lists; reference log-probs are not needed.
        margin: margin per rank, in nats per token.

    Returns:
        Shape (m,), dtype of the log-probs, in nats per token; 0 for a list without pairs.
    """
    winners, _, hinges = _hinges(lists, margin)
    return lists.total(hinges, winners)


def tuna_released(lists: RankedListBatch, margin: float = 0.1) -> Tensor:
    """Computes Tuna's ranking loss as its released code does (microsoft/LMOps, ``tuna/src/custom.py``).

    The hinges are those of :func:`tuna`, but averaged over the pairs with the same difference of ranks; the averages
    are summed: with four candidates each pair of neighbours has weight 1/3, the pair of the best and the worst 1. Ties,
    which that code separates by their order, are not compared here.

    Args:
        lists: m lists; reference log-probs are not needed.
        margin: margin per rank, in nats per token.

    Returns:
        Shape (m,), dtype of the log-probs, in nats per token; 0 for a list without pairs. Over lists of equal length
            without ties, the mean is the released code's loss.
    """
    winners, losers, hinges = _hinges(lists, margin)
    gaps = lists.ranks[losers] - lists.ranks[winners]
    # One key per list and difference of ranks: a difference is smaller than the factor.
    keys = lists.owners[winners] * (len(lists.ranks) + 1) + gaps
    _, kinds, sizes = keys.unique(return_inverse=True, return_counts=True)
    return lists.total(hinges / sizes[kinds], winners)


def dpo(lists: RankedListBatch, beta: float = 0.1, label_smoothing: float = 0.0, pairs: Pairing = "all") -> Tensor:
    """Computes the loss of DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    It is -log sigmoid(beta (r(better) - r(worse))), r the log-ratio; for a list with several pairs, the mean over them.

    Args:
        lists: m lists with reference log-probs.
        beta: strength of the pull towards the reference policy.
        label_smoothing: probability p in [0, 0.5) that a preference is wrong, an option of the published code: the loss
            is then 1 - p times that of the pair plus p times that of the swapped pair.
        pairs: pairs that are compared, ``all`` or ``best_worst``.

    Returns:
        Shape (m,), dtype of the log-probs, in nats; 0 for a list without pairs.

    Raises:
        ValueError: without reference log-probs.
    """
    winners, difference = _differences(lists, pairs)
    logits = beta * difference
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return lists.mean(losses, winners)


def ipo(lists: RankedListBatch, beta: float = 0.1, pairs: Pairing = "all") -> Tensor:
    """Computes the loss of IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    It is (r(better) - r(worse) - 1 / (2 beta))^2, r the log-ratio of a whole response, as in DPO's published code.

    Args:
        lists: m lists with reference log-probs.
        beta: tau of the paper.
        pairs: pairs that are compared, ``all`` or ``best_worst``.

    Returns:
        Shape (m,), dtype of the log-probs, in nats squared: the mean over pairs; 0 for a list without pairs.

    Raises:
        ValueError: without reference log-probs.
    """
    winners, difference = _differences(lists, pairs)
    return lists.mean((difference - 1 / (2 * beta)).square(), winners)


def spin(lists: RankedListBatch, beta: float = 0.1) -> Tensor:
    """Computes the loss of SPIN (Chen et al. 2024, arXiv 2401.01335).

    It is -log sigmoid(beta (r(reference) - r(candidate))), r the log-ratio. The reference response is the
    demonstration; the candidates are samples of the previous iterate, which is the reference policy. The ranks of the
    candidates are not used.

    Args:
        lists: m lists with reference log-probs and a reference response (rank -1) each.
        beta: lambda of the paper.

    Returns:
        Shape (m,), dtype of the log-probs, in nats: the mean over candidates; 0 for a list without a reference
            response.

    Raises:
        ValueError: without reference log-probs.
    """
    return dpo(lists, beta, pairs="reference")


def sppo(lists: RankedListBatch, beta: float = 0.001, pairs: Pairing = "best_worst") -> Tensor:
    """Computes the loss of SPPO (Wu et al. 2024, arXiv 2405.00675).

    It is (r - (P - 1/2) / beta)^2, r the log-ratio and P the win rate, averaged over the two candidates of a pair; the
    paper's pair is that of the best and the worst candidate. This is a regression: unlike in the other losses, each
    log-ratio has a target of its own, not only their difference.

    Args:
        lists: m lists with reference log-probs and win rates.
        beta: 1 / eta of the paper.
        pairs: pairs that are used, ``all`` or ``best_worst``.

    Returns:
        Shape (m,), dtype of the log-probs, in nats squared: the mean over pairs; 0 for a list without pairs.

    Raises:
        ValueError: without reference log-probs or win rates.
    """
    winners, losers = lists.pairs(pairs)
    wins = _require(lists.win_rates, "win rates").to(lists.logprobs.dtype)
    squares = (lists.log_ratios() - (wins - 0.5) / beta).square()
    return lists.mean((squares[winners] + squares[losers]) / 2, winners)


def lipo_lambda(lists: RankedListBatch, beta: float = 0.1) -> Tensor:
    """Computes the loss of LiPO-lambda (Liu et al. 2024, arXiv 2402.01878), a lambda loss over a list.

    It is the sum over pairs of weight log(1 + exp(-(s(better) - s(worse)))), s = beta times the log-ratio, weight =
    abs(2^psi(better) - 2^psi(worse)) abs(1 / log(1 + p(better)) - 1 / log(1 + p(worse))), psi the score and p the
    position, from 1, in the order of s, largest first. Where s is equal, as in the first step, the better candidate
    comes first. The weights carry no gradient.

    Args:
        lists: m lists with reference log-probs and scores.
        beta: factor of the log-ratios.

    Returns:
        Shape (m,), dtype of the log-probs; 0 for a list without pairs.

    Raises:
        ValueError: without reference log-probs or scores.
    """
    winners, losers = lists.pairs()
    strengths = beta * lists.log_ratios()
    gains = torch.exp2(_require(lists.scores, "scores").to(strengths.dtype))
    with torch.no_grad():
        same, ranks = lists.owners[:, None] == lists.owners[None, :], lists.ranks
        tied = (strengths[:, None] == strengths[None, :]) & (ranks[:, None] < ranks[None, :])
        ahead = same & (ranks != UNRANKED)[:, None] & ((strengths[:, None] > strengths[None, :]) | tied)
        # The sum counts the candidates ahead of each, so 2 + the sum is 1 + p with positions p from 1.
        discounts = 1 / torch.log(2.0 + ahead.sum(dim=0).to(strengths.dtype))
        weights = (gains[winners] - gains[losers]).abs() * (discounts[winners] - discounts[losers]).abs()
    return lists.total(weights * softplus(strengths[losers] - strengths[winners]), winners)


def tdpo1(lists: RankedListBatch, beta: float = 0.1, pairs: Pairing = "all") -> Tensor:
    """Computes the loss of TDPO1 (Zeng et al. 2024, arXiv 2404.11999).

    It is -log sigmoid(beta (v(better) - v(worse))), v the log-ratio plus the KL divergence KL(reference || policy)
    summed over the positions of a response. As in the published code, a gradient flows through the KL divergences of
    both candidates.

    Args:
        lists: m lists with reference log-probs and KL divergences.
        beta: strength of the pull towards the reference policy.
        pairs: pairs that are compared, ``all`` or ``best_worst``.

    Returns:
        Shape (m,), dtype of the log-probs, in nats: the mean over pairs; 0 for a list without pairs.

    Raises:
        ValueError: without reference log-probs or KL divergences.
    """
    winners, losers = lists.pairs(pairs)
    values = lists.log_ratios() + _require(lists.reference_kls, "KL divergences to the reference policy")
    return lists.mean(-logsigmoid(beta * (values[winners] - values[losers])), winners)


def tdpo2(lists: RankedListBatch, beta: float = 0.1, alpha: float = 0.5, pairs: Pairing = "all") -> Tensor:
    """Computes the loss of TDPO2 (Zeng et al. 2024, arXiv 2404.11999).

    It is -log sigmoid(beta (r(better) - r(worse) - alpha (KL(worse) - KL(better)))), r the log-ratio and KL the
    divergence of :func:`tdpo1`. That of the better candidate carries no gradient: only the policy's drift on the worse
    one is penalised.

    Args:
        lists: m lists with reference log-probs and KL divergences.
        beta: strength of the pull towards the reference policy.
        alpha: weight of the KL divergences, at least 0; at 0 the loss is :func:`dpo`.
        pairs: pairs that are compared, ``all`` or ``best_worst``.

    Returns:
        Shape (m,), dtype of the log-probs, in nats: the mean over pairs; 0 for a list without pairs.

    Raises:
        ValueError: without reference log-probs or KL divergences.
    """
    winners, losers = lists.pairs(pairs)
    ratios = lists.log_ratios()
    kls = _require(lists.reference_kls, "KL divergences to the reference policy")
    difference = ratios[winners] - ratios[losers] - alpha * (kls[losers] - kls.detach()[winners])
    return lists.mean(-logsigmoid(beta * difference), winners)


def nll(lists: RankedListBatch, imitated: Tensor) -> Tensor:
    """Computes the negative log-likelihood of the candidates to imitate, summed over their tokens.

    The MLE term of Tuna divides the sum over a batch by the number of these tokens, as the released code does. That
    code imitates all candidates, the paper the reference response alone.

    Args:
        lists: m lists.
        imitated: bool, shape (n,): True for the candidates to imitate.

    Returns:
        Shape (m,), dtype of the log-probs, in nats; 0 for a list without a candidate to imitate.
    """
    rows = imitated.nonzero().squeeze(1)
    return -lists.total(lists.logprobs[rows], rows)


def _hinges(lists: RankedListBatch, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the rows of the better and the worse candidates of all pairs, and Tuna's hinge of each pair."""
    winners, losers = lists.pairs()
    values, gaps = lists.mean_logprobs(), lists.ranks[losers] - lists.ranks[winners]
    return winners, losers, torch.relu(values[losers] - values[winners] + margin * gaps)


def _differences(lists: RankedListBatch, pairing: Pairing) -> tuple[Tensor, Tensor]:
    """Returns the rows of the better candidates of all pairs, and each pair's log-ratio, better minus worse."""
    winners, losers = lists.pairs(pairing)
    ratios = lists.log_ratios()
    return winners, ratios[winners] - ratios[losers]


def _require(values: Tensor | None, name: str) -> Tensor:
    """Returns the values, or raises a ValueError if they are missing."""
    if values is None:
        raise ValueError(f"this loss needs {name}")
    return values


class RankingLoss(NamedTuple):
    """A ranking loss and the inputs that it needs."""

    function: Callable[..., Tensor]
    """Takes a :class:`RankedListBatch` and the options of the loss; returns one value per list."""
    mle_weight: float = 0.0
    """Published weight of the MLE term (the negative log-likelihood of imitated responses)."""
    needs_reference_policy: bool = True
    """Whether candidates are compared by log-ratios to a reference policy; if not, by log-probs per token."""
    needs_scores: bool = False
    """Whether the loss needs scores; if not, ranks are enough."""
    needs_reference_kl: bool = False
    """Whether the loss also needs the KL divergences to the reference policy."""

    @property
    def defaults(self) -> dict[str, Any]:
        """The options of the loss and their default values."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def pairing(self, options: dict[str, Any]) -> Pairing:
        """Returns the pairs that the loss compares under the given options."""
        return "reference" if self.function is spin else options.get("pairs", self.defaults.get("pairs", "all"))

    def values(self, lists: RankedListBatch) -> Tensor:
        """Returns the values by which the policy ranks candidates, shape (n,), in nats."""
        return lists.log_ratios() if self.needs_reference_policy else lists.mean_logprobs()


LOSSES = {
    "tuna": RankingLoss(tuna, mle_weight=1.0, needs_reference_policy=False),
    "tuna_released": RankingLoss(tuna_released, mle_weight=1.0, needs_reference_policy=False),
    "dpo": RankingLoss(dpo),
    "ipo": RankingLoss(ipo),
    "spin": RankingLoss(spin),
    "sppo": RankingLoss(sppo),
    "lipo_lambda": RankingLoss(lipo_lambda, needs_scores=True),
    "tdpo1": RankingLoss(tdpo1, needs_reference_kl=True),
    "tdpo2": RankingLoss(tdpo2, needs_reference_kl=True),
}
"""The ranking losses by name."""
