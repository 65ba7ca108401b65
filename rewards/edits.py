"""Minimal edits: pairs of a response and its correction, and which tokens a correction removed and wrote.

A correction says where a response is wrong, token by token: fine-grained supervision (Xu et al. 2024, arXiv 2406.02756)
learns a reward per token from it, FIGA (Guo et al. 2023, arXiv 2311.04072) a weight per token.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import numpy as np

UNCHANGED, DELETED, ADDED, SUBSTITUTED = "U", "D", "A", "S"

WHOLE_TABLE = 2**23
"""Cells of an edit-distance table up to which it is kept whole, at two bits a cell."""


@dataclass(frozen=True)
class EditedPair:
    """A less preferred response and its minimal edit."""

    prompt: str
    """What both answer, as the model reads it."""
    original: str
    """The less preferred response."""
    edited: str
    """The same response, made better by changing little of it."""
    id: str = ""
    """Stable id of the pair."""
    finished: bool = True
    """Both texts end where their writer ended them, so that an EOS token belongs behind them; False where a token limit
    cut the original off."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able."""


@dataclass(frozen=True)
class EditLabels:
    """What happened to each token of a pair: one letter per token."""

    original: str
    """``U`` unchanged, ``D`` deleted, ``S`` substituted."""
    edited: str
    """``U`` unchanged, ``A`` added, ``S`` put in another's place."""

    @property
    def removed(self) -> np.ndarray:
        """bool, shape (tokens of the original,): the tokens that are gone."""
        return _changed(self.original)

    @property
    def written(self) -> np.ndarray:
        """bool, shape (tokens of the edited text,): the tokens that are new."""
        return _changed(self.edited)

    @property
    def distance(self) -> int:
        """Levenshtein distance: tokens deleted, added and substituted."""
        return len(self.original) - self.original.count(UNCHANGED) + self.edited.count(ADDED)

    @property
    def edits(self) -> int:
        """Places that were edited: runs of changes between two unchanged tokens."""
        # The k-th unchanged token of one side is the k-th of the other, so the gaps between them correspond.
        gaps = zip(self.original.split(UNCHANGED), self.edited.split(UNCHANGED), strict=True)
        return sum(bool(gone or new) for gone, new in gaps)


def edit_labels(original: Sequence[Hashable], edited: Sequence[Hashable]) -> EditLabels:
    """Labels every token of a pair by a shortest edit script: deletions, additions and substitutions cost 1 each.

    Of all shortest scripts it is the one that a backtrace finds from the ends of both texts: equal tokens are always
    matched; else, among the steps that lie on a shortest path, a deletion goes before an addition, and that before a
    substitution (the order of TLCR, Yoon et al. 2024, arXiv 2407.16574). So ABCD -> AXCDE is ``USUU | USUUA``; AB -> BA
    is ``UD | AU``: of the two scripts with a deletion and an addition, the one that deletes the last token. And as
    equal tokens are matched from the end, A -> AA adds the first A.

    The table's rows are bit-parallel (Myers 1999, JACM 46(3); Hyyrö 2003): n tokens of the original are n bits of one
    Python integer, whence O(n / 64) per token of the edited text. Larger tables are kept at every sqrt(m)-th column
    only and computed again in between during the backtrace, so 5,000 by 5,000 tokens take a few MB.

    Args:
        original: n token ids of the response, without special tokens; any hashable items do, words for instance.
        edited: m token ids of its correction.
    """
    rows, columns = list(original), list(edited)
    before, after = [UNCHANGED] * len(rows), [UNCHANGED] * len(columns)
    i, j = len(rows), len(columns)
    while i and j and rows[i - 1] == columns[j - 1]:  # the backtrace would match them without a look at the table
        i, j = i - 1, j - 1
    table = _Table(rows[:i], columns[:j])
    while i and j:
        start, down, right = table.block(j)
        while i and j > start:
            if rows[i - 1] == columns[j - 1]:
                i, j = i - 1, j - 1
            elif down[j - start - 1] >> (i - 1) & 1:
                i -= 1
                before[i] = DELETED
            elif right[j - start - 1] >> (i - 1) & 1:
                j -= 1
                after[j] = ADDED
            else:
                i, j = i - 1, j - 1
                before[i] = after[j] = SUBSTITUTED
    before[:i], after[:j] = DELETED * i, ADDED * j
    return EditLabels("".join(before), "".join(after))


class _Table:
    """The distances D[i, j] between prefixes as bits: where they grow by one along i, and where along j."""

    def __init__(self, rows: list[Hashable], columns: list[Hashable]) -> None:
        self.full = (1 << len(rows)) - 1
        self.width = len(columns) if len(rows) * len(columns) <= WHOLE_TABLE else isqrt(len(columns))
        where: dict[Hashable, int] = dict.fromkeys(columns, 0)
        for i, token in enumerate(rows):
            if token in where:
                where[token] |= 1 << i
        self.equal = [where[token] for token in columns]
        self.states = [(self.full, 0)]  # of the columns 0, width, 2 width, ...
        self.last: tuple[list[int], list[int]] = ([], [])
        for start in range(0, len(columns), max(self.width, 1)):
            down, right, state = self._run(start)
            self.states.append(state)
            self.last = down, right

    def block(self, j: int) -> tuple[int, list[int], list[int]]:
        """The block with column ``j`` (from 1) in it.

        Returns:
            Its start, and for each of its columns ``start + 1, ...`` the rows, as bits, whose distance is one above
            that of the row before, and those where it is one above that of the column before.
        """
        number = (j - 1) // self.width
        start = number * self.width
        if start + self.width >= len(self.equal):
            return start, *self.last
        return start, *self._run(start)[:2]

    def _run(self, start: int) -> tuple[list[int], list[int], tuple[int, int]]:
        full = self.full
        plus, minus = self.states[start // max(self.width, 1)]  # D[i, j] - D[i - 1, j] is +1, is -1
        down, right = [], []
        for equal in self.equal[start : start + self.width]:
            diagonal = ((equal & plus) + plus ^ plus) | equal | minus  # D[i, j] is D[i - 1, j - 1]
            grows = minus | full & ~(diagonal | plus)  # D[i, j] - D[i, j - 1] is +1
            shrinks = diagonal & plus  # ... is -1
            carried = grows << 1 | 1  # D[0, j] is j
            plus, minus = (shrinks << 1 | ~(diagonal | carried)) & full, carried & diagonal & full
            down.append(plus)
            right.append(grows)
        return down, right, (plus, minus)


def _changed(labels: str) -> np.ndarray:
    return np.frombuffer(labels.encode("ascii"), np.uint8) != ord(UNCHANGED)
