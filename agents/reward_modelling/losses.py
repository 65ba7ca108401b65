"""Losses of reward models on pairs of a response and its minimal edit: one value per pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from ...rewards.learned.reward_model import Level, Transform


@dataclass
class Side:
    """One side of n pairs: the original responses, or the edited ones."""

    logits: torch.Tensor
    """float32, shape (tokens,), response after response: the head's output; at level sequence shape (n,)."""
    lengths: torch.Tensor
    """int64, shape (n,): tokens of each response."""
    changed: torch.Tensor
    """bool, shape (tokens,): in originals what the edit removed, in edited responses what it wrote."""

    def score(self) -> torch.Tensor:
        """R of each response, shape (n,), before any transform; one logit per response is its score or its mean."""
        return self.logits if len(self.logits) == len(self.lengths) else self.mean()

    def mean(self, values: torch.Tensor | None = None, where: torch.Tensor | None = None) -> torch.Tensor:
        """Means per response, shape (n,), of per-token values (the logits) over some tokens (all); of none it is 0."""
        values = self.logits if values is None else values
        if where is None:
            return torch.segment_reduce(values, "mean", lengths=self.lengths)
        counts = torch.segment_reduce(where.to(values.dtype), "sum", lengths=self.lengths)
        return torch.segment_reduce(values.where(where, 0.0), "sum", lengths=self.lengths) / counts.clamp(min=1.0)


def mean_bt(edited: Side, original: Side) -> torch.Tensor:
    """-log sigmoid(R(edited) - R(original)) with R the mean over all tokens (Xu et al. 2024, arXiv 2406.02756).

    Tokens that both share nearly cancel, so that what is learned concentrates on the changed ones. The exact mean is
    taken, not that of the paper's approximation for responses of equal length.

    Args:
        edited: n preferred responses.
        original: what they were made from.

    Returns:
        float32, shape (n,), in nats.
    """
    return -logsigmoid(edited.mean() - original.mean())


def edited_only_bt(edited: Side, original: Side) -> torch.Tensor:
    """The same with means over the changed tokens only; a side without any counts as 0.

    Args:
        edited: as of :func:`mean_bt`.
        original: likewise.

    Returns:
        float32, shape (n,), in nats.
    """
    return -logsigmoid(edited.mean(where=edited.changed) - original.mean(where=original.changed))


def tlcr_ce(edited: Side, original: Side) -> torch.Tensor:
    """Cross-entropy of token labels (TLCR, Yoon et al. 2024, arXiv 2407.16574); sigmoid(logit): a token is good.

    Removed tokens are bad, written ones good, unchanged ones of both sides half of each. The loss is the mean over bad
    tokens plus that over good ones plus that over unchanged ones; a pair without tokens of a kind leaves that term out.
    The paper's two-way head is one logit here, the difference of its two.

    Args:
        edited: as of :func:`mean_bt`.
        original: likewise.

    Returns:
        float32, shape (n,), in nats.
    """
    labels = torch.full_like(edited.logits, 0.5).where(~edited.changed, 1.0)
    good = binary_cross_entropy_with_logits(edited.logits, labels, reduction="none")
    labels = torch.full_like(original.logits, 0.5).where(~original.changed, 0.0)
    bad = binary_cross_entropy_with_logits(original.logits, labels, reduction="none")
    unchanged = _unchanged_mean(edited, original, good, bad)
    return edited.mean(good, edited.changed) + original.mean(bad, original.changed) + unchanged


def sequence_bt(edited: Side, original: Side) -> torch.Tensor:
    """Bradley and Terry's loss on one score per response, -log sigmoid(s(edited) - s(original)).

    Args:
        edited: n preferred responses, whose logits are their scores.
        original: n other responses to the same prompts.

    Returns:
        float32, shape (n,), in nats.
    """
    return -logsigmoid(edited.logits - original.logits)


def unchanged_penalty(edited: Side, original: Side) -> torch.Tensor:
    """The mean square of the head's output over the unchanged tokens of both sides, shape (n,).

    Contexts differ behind the first edit, so rewards of unchanged tokens do not cancel exactly; this keeps them at 0.
    """
    return _unchanged_mean(edited, original, edited.logits.square(), original.logits.square())


def _unchanged_mean(edited: Side, original: Side, after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Of per-token values of both sides, pooled, shape (n,)."""
    total, count = torch.zeros_like(edited.lengths, dtype=after.dtype), torch.zeros_like(edited.lengths)
    for side, values in ((edited, after), (original, before)):
        kept = (~side.changed).to(values.dtype)
        total = total + torch.segment_reduce(values * kept, "sum", lengths=side.lengths)
        count = count + torch.segment_reduce(kept, "sum", lengths=side.lengths)
    return total / count.clamp(min=1.0)


class RewardLoss(NamedTuple):
    """A loss, and what it makes of the model's output."""

    function: Callable[[Side, Side], torch.Tensor]
    level: Level
    """Of the models it trains."""
    transform: Transform
    """From the head's output to rewards."""
    free_level: bool
    """Whether a constant added to all rewards leaves it as it is, at least where both sides have changed tokens."""


LOSSES = {
    "mean_bt": RewardLoss(mean_bt, "token", "identity", True),
    "edited_only_bt": RewardLoss(edited_only_bt, "token", "identity", True),
    "tlcr_ce": RewardLoss(tlcr_ce, "token", "signed-probability", False),
    "sequence_bt": RewardLoss(sequence_bt, "sequence", "identity", True),
}
"""By name."""
