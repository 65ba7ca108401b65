"""Losses of policies on ranked candidate responses: one value per list, lists of any length."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.functional import logsigmoid, softplus

UNRANKED = -1
"""The rank of a reference response, which takes no part in the ranking."""

Pairing = Literal["all", "best_worst", "reference"]
PAIRINGS = ("all", "best_worst")
"""Pairings by rank."""


@dataclass
class RankedListBatch:
    """m lists with n candidates in all, list after list; nothing is padded."""

    logprobs: torch.Tensor
    """float, shape (n,): log-probs of whole candidates under the policy, sums over their tokens, in nats."""
    lengths: torch.Tensor
    """int64, shape (n,): tokens of each candidate, at least 1."""
    counts: torch.Tensor
    """int64, shape (m,): candidates of each list."""
    ranks: torch.Tensor
    """int64, shape (n,): how many candidates of the list are better, 0 for the best; equal ranks are ties. A reference
    that is not ranked has -1."""
    reference_logprobs: torch.Tensor | None = None
    """Like ``logprobs`` under the reference policy; for losses that need one."""
    scores: torch.Tensor | None = None
    """float, shape (n,): how good each candidate is, larger is better (LiPO's psi); 0 for a reference."""
    win_rates: torch.Tensor | None = None
    """float, shape (n,): each candidate's mean probability in [0, 1] of being preferred to those of its list (SPPO)."""
    reference_kls: torch.Tensor | None = None
    """Shape (n,), dtype of ``logprobs``, differentiable: KL(reference || policy) over the whole vocabulary, sums over
    the tokens of each candidate, in nats (TDPO's sequential KL divergence)."""

    @property
    def owners(self) -> torch.Tensor:
        """int64, shape (n,): the list of each candidate."""
        return torch.repeat_interleave(torch.arange(len(self.counts), device=self.counts.device), self.counts)

    def mean_logprobs(self) -> torch.Tensor:
        """Log-probs per token, shape (n,), in nats."""
        return self.logprobs / self.lengths

    def log_ratios(self) -> torch.Tensor:
        """Log-probs of whole candidates, policy minus reference policy, shape (n,), in nats."""
        return self.logprobs - _given(self.reference_logprobs, "reference log-probs")

    def pairs(self, pairing: Pairing = "all") -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the better and of the worse candidates of all pairs; ties are no pairs.

        Args:
            pairing: ``all`` pairs of different rank; ``best_worst``: those of the best and the worst rank of a list;
                ``reference``: the unranked response of a list over each ranked one.

        Returns:
            int64, two of shape (pairs,), ordered by the better row and then the worse one.
        """
        owners, ranks = self.owners, self.ranks
        same = owners[:, None] == owners[None, :]
        if pairing == "reference":
            better = same & (ranks == UNRANKED)[:, None] & (ranks != UNRANKED)[None, :]
        else:
            better = same & (ranks != UNRANKED)[:, None] & (ranks[:, None] < ranks[None, :])
            if pairing == "best_worst":
                worst = ranks.new_zeros(len(self.counts)).scatter_reduce(0, owners, ranks, "amax")
                better &= (ranks == 0)[:, None] & (ranks == worst[owners])[None, :]
        winners, losers = better.nonzero(as_tuple=True)
        return winners, losers

    def total(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Sums per list, shape (m,), of values that belong to the lists of the given rows."""
        return values.new_zeros(len(self.counts)).index_add(0, self.owners[rows], values)

    def mean(self, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Means per list, likewise; of no value it is 0."""
        return self.total(values, rows) / self.total(torch.ones_like(values), rows).clamp(min=1.0)


def tuna(lists: RankedListBatch, margin: float = 0.1) -> torch.Tensor:
    """Tuna's ranking loss as the paper states it (Li et al. 2023, arXiv 2310.13385).

    The sum over pairs of max(0, v(worse) - v(better) + margin (difference of ranks)), with v the mean log-prob per
    token. The default margin is the published code's.

    Args:
        lists: m lists; no reference policy is needed.
        margin: per rank, in nats per token.

    Returns:
        shape (m,), dtype of the log-probs, in nats per token; 0 for a list without pairs.
    """
    winners, _, hinges = _hinges(lists, margin)
    return lists.total(hinges, winners)


def tuna_released(lists: RankedListBatch, margin: float = 0.1) -> torch.Tensor:
    """Tuna's ranking loss as its released code computes it (microsoft/LMOps, ``tuna/src/custom.py``).

    The hinges of :func:`tuna`, but averaged among pairs of the same difference of ranks, and the averages summed: of
    four candidates neighbours weigh 1/3 each, the best and the worst 1. Ties, which that code pushes apart by their
    order, are left alone here.

    Args:
        lists: as of :func:`tuna`.
        margin: likewise.

    Returns:
        Likewise; over lists of one length without ties, the mean is the released code's loss.
    """
    winners, losers, hinges = _hinges(lists, margin)
    gaps = lists.ranks[losers] - lists.ranks[winners]
    keys = lists.owners[winners] * (len(lists.ranks) + 1) + gaps
    _, kinds, sizes = keys.unique(return_inverse=True, return_counts=True)
    return lists.total(hinges / sizes[kinds], winners)


def dpo(
    lists: RankedListBatch, beta: float = 0.1, label_smoothing: float = 0.0, pairs: Pairing = "all"
) -> torch.Tensor:
    """-log sigmoid(beta (r(better) - r(worse))), r the log-ratio (DPO, Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    A list of more than two gives the mean over its pairs.

    Args:
        lists: m lists with reference log-probs.
        beta: strength of the pull towards the reference policy.
        label_smoothing: probability in [0, 0.5) that a preference is wrong, the published code's option: the loss is
            then (1 - it) times the above plus it times that of the swapped pair.
        pairs: which count, ``all`` or ``best_worst``.

    Returns:
        shape (m,), dtype of the log-probs, in nats; 0 for a list without pairs.

    Raises:
        ValueError: without reference log-probs.
    """
    winners, difference = _differences(lists, pairs)
    logits = beta * difference
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return lists.mean(losses, winners)


def ipo(lists: RankedListBatch, beta: float = 0.1, pairs: Pairing = "all") -> torch.Tensor:
    """(r(better) - r(worse) - 1 / (2 beta))^2, r the log-ratio (IPO, Azar et al. 2023, arXiv 2310.12036, eq. 17).

    Log-ratios are of whole responses, as in DPO's published code.

    Args:
        lists: m lists with reference log-probs.
        beta: tau of the paper.
        pairs: as of :func:`dpo`.

    Returns:
        shape (m,), dtype of the log-probs, in nats squared; the mean over pairs, 0 without any.

    Raises:
        ValueError: without reference log-probs.
    """
    winners, difference = _differences(lists, pairs)
    return lists.mean((difference - 1 / (2 * beta)).square(), winners)


def spin(lists: RankedListBatch, beta: float = 0.1) -> torch.Tensor:
    """-log sigmoid(beta (r(reference) - r(own))), r the log-ratio (SPIN, Chen et al. 2024, arXiv 2401.01335).

    The reference response is the demonstration, the candidates were drawn from the previous iterate, which is the
    reference policy. Ranks of candidates do not count.

    Args:
        lists: m lists with reference log-probs and an unranked response each.
        beta: lambda of the paper.

    Returns:
        shape (m,), dtype of the log-probs, in nats: the mean over candidates; 0 for a list without a reference.

    Raises:
        ValueError: without reference log-probs.
    """
    return dpo(lists, beta, pairs="reference")


def sppo(lists: RankedListBatch, beta: float = 0.001, pairs: Pairing = "best_worst") -> torch.Tensor:
    """(r - (P - 1/2) / beta)^2, r the log-ratio and P the win rate (SPPO, Wu et al. 2024, arXiv 2405.00675).

    The mean of both sides of a pair; the paper's pair is that of the best and the worst candidate. A regression: unlike
    the other losses it is not the difference of the two sides that counts.

    Args:
        lists: m lists with reference log-probs and win rates.
        beta: 1 / eta of the paper.
        pairs: as of :func:`dpo`.

    Returns:
        shape (m,), dtype of the log-probs, in nats squared; the mean over pairs, 0 without any.

    Raises:
        ValueError: without reference log-probs or win rates.
    """
    winners, losers = lists.pairs(pairs)
    wins = _given(lists.win_rates, "win rates").to(lists.logprobs.dtype)
    squares = (lists.log_ratios() - (wins - 0.5) / beta).square()
    return lists.mean((squares[winners] + squares[losers]) / 2, winners)


def lipo_lambda(lists: RankedListBatch, beta: float = 0.1) -> torch.Tensor:
    """LiPO-lambda (Liu et al. 2024, arXiv 2402.01878): a lambda loss over a list.

    The sum over pairs of weight log(1 + exp(-(s(better) - s(worse)))), s = beta times the log-ratio, weight =
    abs(2^psi(better) - 2^psi(worse)) abs(1 / log(1 + p(better)) - 1 / log(1 + p(worse))), psi the score and p the
    position, from 1, in the order of s. Where s is equal, as in the first step, the better candidate comes first;
    weights carry no gradient.

    Args:
        lists: m lists with reference log-probs and scores.
        beta: as of :func:`dpo`.

    Returns:
        shape (m,), dtype of the log-probs; 0 for a list without pairs.

    Raises:
        ValueError: without reference log-probs or scores.
    """
    winners, losers = lists.pairs()
    strengths = beta * lists.log_ratios()
    gains = torch.exp2(_given(lists.scores, "scores").to(strengths.dtype))
    with torch.no_grad():
        same, ranks = lists.owners[:, None] == lists.owners[None, :], lists.ranks
        tied = (strengths[:, None] == strengths[None, :]) & (ranks[:, None] < ranks[None, :])
        ahead = same & (ranks != UNRANKED)[:, None] & ((strengths[:, None] > strengths[None, :]) | tied)
        discounts = 1 / torch.log(2.0 + ahead.sum(dim=0).to(strengths.dtype))
        weights = (gains[winners] - gains[losers]).abs() * (discounts[winners] - discounts[losers]).abs()
    return lists.total(weights * softplus(strengths[losers] - strengths[winners]), winners)


def tdpo1(lists: RankedListBatch, beta: float = 0.1, pairs: Pairing = "all") -> torch.Tensor:
    """-log sigmoid(beta (v(better) - v(worse))), v the log-ratio plus the KL (TDPO1, arXiv 2404.11999).

    Zeng et al. 2024. The KL is KL(reference || policy), summed over the positions of a response; as in the published
    code, a gradient flows through that of both sides.

    Args:
        lists: m lists with reference log-probs and KL divergences.
        beta: as of :func:`dpo`.
        pairs: likewise.

    Returns:
        shape (m,), dtype of the log-probs, in nats; the mean over pairs, 0 without any.

    Raises:
        ValueError: without reference log-probs or KL divergences.
    """
    winners, losers = lists.pairs(pairs)
    values = lists.log_ratios() + _given(lists.reference_kls, "KL divergences to the reference policy")
    return lists.mean(-logsigmoid(beta * (values[winners] - values[losers])), winners)


def tdpo2(lists: RankedListBatch, beta: float = 0.1, alpha: float = 0.5, pairs: Pairing = "all") -> torch.Tensor:
    """-log sigmoid(beta (r(better) - r(worse) - alpha (KL(worse) - KL(better)))) (TDPO2, arXiv 2404.11999).

    r is the log-ratio, the KL as of :func:`tdpo1`; that of the better candidate carries no gradient: only the policy's
    drift on the worse one is held down.

    Args:
        lists: as of :func:`tdpo1`.
        beta: likewise.
        alpha: weight of the KL divergences, at least 0; at 0 the loss is :func:`dpo`.
        pairs: likewise.

    Returns:
        Likewise.

    Raises:
        ValueError: likewise.
    """
    winners, losers = lists.pairs(pairs)
    ratios = lists.log_ratios()
    kls = _given(lists.reference_kls, "KL divergences to the reference policy")
    difference = ratios[winners] - ratios[losers] - alpha * (kls[losers] - kls.detach()[winners])
    return lists.mean(-logsigmoid(beta * difference), winners)


def nll(lists: RankedListBatch, imitated: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of the candidates to imitate, summed over their tokens.

    The MLE term of Tuna divides the sum over a batch by the number of these tokens, as the released code does. That
    code imitates all candidates, the paper the reference response alone.

    Args:
        lists: m lists.
        imitated: bool, shape (n,): which candidates.

    Returns:
        shape (m,), dtype of the log-probs, in nats; 0 for a list without any.
    """
    rows = imitated.nonzero().squeeze(1)
    return -lists.total(lists.logprobs[rows], rows)


def _hinges(lists: RankedListBatch, margin: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    winners, losers = lists.pairs()
    values, gaps = lists.mean_logprobs(), lists.ranks[losers] - lists.ranks[winners]
    return winners, losers, torch.relu(values[losers] - values[winners] + margin * gaps)


def _differences(lists: RankedListBatch, pairing: Pairing) -> tuple[torch.Tensor, torch.Tensor]:
    winners, losers = lists.pairs(pairing)
    ratios = lists.log_ratios()
    return winners, ratios[winners] - ratios[losers]


def _given(values: torch.Tensor | None, what: str) -> torch.Tensor:
    if values is None:
        raise ValueError(f"this loss needs {what}")
    return values


class RankingLoss(NamedTuple):
    """A loss, and what it needs."""

    function: Callable[..., torch.Tensor]
    mle_weight: float = 0.0
    """Published weight of the MLE term."""
    needs_reference_policy: bool = True
    """Whether candidates are compared by log-ratios to a reference policy; otherwise by log-probs per token."""
    needs_scores: bool = False
    """Whether ranks alone are not enough."""
    needs_reference_kl: bool = False
    """Whether it takes the KL divergences to the reference policy besides."""

    @property
    def defaults(self) -> dict[str, Any]:
        """Its options and what they are by default."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def pairing(self, options: dict[str, Any]) -> Pairing:
        """The pairs that it compares under the given options."""
        return "reference" if self.function is spin else options.get("pairs", self.defaults.get("pairs", "all"))

    def values(self, lists: RankedListBatch) -> torch.Tensor:
        """What it ranks candidates by, shape (n,), in nats."""
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
"""By name."""
