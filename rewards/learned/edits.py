"""Pairs of a response and its minimal edit, and labels for the tokens that the edit removes and adds.

A minimal edit marks the wrong tokens of a response. Fine-grained supervision (Xu et al. 2024, arXiv 2406.02756) learns
a reward per token from these marks, FIGA (Guo et al. 2023, arXiv 2311.04072) a weight per token. The reward model is in
:mod:`instructgym.rewards.learned.reward_model`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from ...llm_backends import Tokenizer
from ...llm_backends.errors import InputError
from ...llm_backends.records import check_encodable, read_user_rows, replaced

UNCHANGED, DELETED, ADDED, SUBSTITUTED = "U", "D", "A", "S"

WHOLE_TABLE = 2**23
"""Largest number of cells of an edit-distance table that is kept whole, at two bits per cell."""

COLUMNS = {
    "prompt": ("prompt",),
    "original": ("original", "original_output"),
    "edited": ("edited", "revised_output"),
}
"""Texts of a pair and the fields that hold them in a file; the second names are those of FIGA's data set SPA."""


@dataclass(frozen=True)
class EditedPair:
    """A less preferred response and its minimal edit."""

    prompt: str
    """The prompt that both texts answer, as the model reads it."""
    original: str
    """The less preferred response."""
    edited: str
    """The same response, improved with few changes."""
    id: str = ""
    """Stable id of the pair."""
    finished: bool = True
    """Whether both texts end where their writer ended them, so that an EOS token follows; False if a token limit cut
    the original off."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Further JSON-serialisable values."""
    markup: bool = False
    """Whether ``prompt`` is a chat as ``Tokenizer.chat_text`` writes it: its control tokens are the template's."""


class Pairs(list[EditedPair]):
    """A list of pairs with counts of the rows that were left out when they were read.

    Args:
        pairs: the pairs.
        dropped: maps a reason to the number of rows left out for it; None: no row was left out.
    """

    def __init__(self, pairs: Iterable[EditedPair] = (), dropped: Mapping[str, int] | None = None) -> None:
        super().__init__(pairs)
        self.dropped = dict(dropped or {})


@dataclass(frozen=True)
class EditLabels:
    """Edit operation of each token of a pair, one letter per token."""

    original: str
    """Labels of the original's tokens: ``U`` unchanged, ``D`` deleted, ``S`` substituted."""
    edited: str
    """Labels of the edited text's tokens: ``U`` unchanged, ``A`` added, ``S`` written in place of another token."""

    @property
    def removed(self) -> np.ndarray:
        """Mask of the removed tokens, bool, shape (tokens of the original,)."""
        return _changed(self.original)

    @property
    def written(self) -> np.ndarray:
        """Mask of the new tokens, bool, shape (tokens of the edited text,)."""
        return _changed(self.edited)

    @property
    def distance(self) -> int:
        """Levenshtein distance: number of tokens deleted, added or substituted."""
        return len(self.original) - self.original.count(UNCHANGED) + self.edited.count(ADDED)

    @property
    def edits(self) -> int:
        """Number of edited places, i.e. runs of changes between two unchanged tokens."""
        # The k-th unchanged token of one side is the k-th of the other, so the gaps between them correspond.
        gaps = zip(self.original.split(UNCHANGED), self.edited.split(UNCHANGED), strict=True)
        return sum(bool(removed or added) for removed, added in gaps)


def edit_labels(original: Sequence[Hashable], edited: Sequence[Hashable]) -> EditLabels:
    """Labels every token of a pair by a shortest edit script: deletions, additions and substitutions cost 1 each.

    Of all shortest scripts the result is the one that a backtrace from the ends of both texts finds: equal tokens are
    always matched; otherwise, among the steps on a shortest path, a deletion is preferred to an addition, and an
    addition to a substitution (the order of TLCR, Yoon et al. 2024, arXiv 2407.16574). So ABCD -> AXCDE is
    ``USUU | USUUA``. AB -> BA is ``UD | AU``: of the two scripts with one deletion and one addition, the one that
    deletes the last token. A -> AA adds the first A, because equal tokens are matched from the end.

    The table is computed bit-parallel (Myers 1999, JACM 46(3); Hyyrö 2003): the n tokens of the original are the n bits
    of one Python integer, so each token of the edited text takes O(n / 64). For tables of more than
    :data:`WHOLE_TABLE` cells only every sqrt(m)-th column is kept and the backtrace computes those in between again,
    so 5,000 by 5,000 tokens take a few MB.

    Args:
        original: n token ids of the response, without special tokens; other hashable items, such as words, also work.
        edited: m token ids of its minimal edit.

    Returns:
        The labels of both sides, one letter per token.
    """
    rows, columns = list(original), list(edited)
    original_labels, edited_labels = [UNCHANGED] * len(rows), [UNCHANGED] * len(columns)
    i, j = len(rows), len(columns)
    # Skip the common suffix: the backtrace would match it without reading the table, which gets smaller.
    while i and j and rows[i - 1] == columns[j - 1]:
        i, j = i - 1, j - 1
    table = _Table(rows[:i], columns[:j])
    # Backtrace block by block. The order of the branches is the tie order: match, delete, add, substitute.
    while i and j:
        start, down, right = table.block(j)
        while i and j > start:
            if rows[i - 1] == columns[j - 1]:
                i, j = i - 1, j - 1
            elif down[j - start - 1] >> (i - 1) & 1:
                i -= 1
                original_labels[i] = DELETED
            elif right[j - start - 1] >> (i - 1) & 1:
                j -= 1
                edited_labels[j] = ADDED
            else:
                i, j = i - 1, j - 1
                original_labels[i] = edited_labels[j] = SUBSTITUTED
    # At an edge of the table only deletions (first column) or additions (first row) are left.
    original_labels[:i], edited_labels[:j] = DELETED * i, ADDED * j
    return EditLabels("".join(original_labels), "".join(edited_labels))


class _Table:
    """Table of the distances D[i, j] between prefixes, as bits: where D grows by one along i, and where along j.

    Args:
        rows: tokens of the original, one bit each.
        columns: tokens of the edited text.
    """

    def __init__(self, rows: list[Hashable], columns: list[Hashable]) -> None:
        self.full = (1 << len(rows)) - 1
        self.width = len(columns) if len(rows) * len(columns) <= WHOLE_TABLE else isqrt(len(columns))
        positions: dict[Hashable, int] = dict.fromkeys(columns, 0)
        for i, token in enumerate(rows):
            if token in positions:
                positions[token] |= 1 << i
        self.equal = [positions[token] for token in columns]
        self.states = [(self.full, 0)]  # bits of the columns 0, width, 2 width, ...
        self.last: tuple[list[int], list[int]] = ([], [])
        for start in range(0, len(columns), max(self.width, 1)):
            down, right, state = self._run(start)
            self.states.append(state)
            self.last = down, right

    def block(self, j: int) -> tuple[int, list[int], list[int]]:
        """Returns the block of columns that contains column ``j``, counted from 1.

        Returns:
            The block's start, and for each of its columns ``start + 1, ...`` two bit sets of rows: those whose distance
            is one above that of the row before, and those whose distance is one above that of the column before.
        """
        number = (j - 1) // self.width
        start = number * self.width
        # The last block, which the backtrace reads first, is still in memory.
        if start + self.width >= len(self.equal):
            return start, *self.last
        return start, *self._run(start)[:2]

    def _run(self, start: int) -> tuple[list[int], list[int], tuple[int, int]]:
        """Computes one block from its saved first column: the two bit sets of each column, and the next state."""
        full = self.full
        plus, minus = self.states[start // max(self.width, 1)]  # D[i, j] - D[i - 1, j] is +1, is -1
        down, right = [], []
        # Hyyrö (2003): one column per step; the carry of the addition passes matches down the rows.
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


def read_pairs(path: str | Path) -> Pairs:
    """Reads pairs from a JSONL file.

    A row has the texts ``prompt``, ``original`` (or ``original_output``) and ``edited`` (or ``revised_output``), and
    may have ``id`` (default: a hash of the texts), ``finished`` (default: true), ``metadata`` (default: empty) and
    ``markup`` (default: false).

    Args:
        path: the file.

    Returns:
        The pairs in file order. Rows with an ``empty original``, an ``empty edit`` or texts that are ``unchanged``
        except for surrounding white space are left out and counted under these reasons.

    Raises:
        InputError: if the file cannot be read, is not UTF-8 or holds no usable pair; if a line is not a JSON object, or
            if a field is missing, has a wrong type or holds a lone surrogate; the message names line and field.
    """
    pairs: list[EditedPair] = []
    dropped: Counter[str] = Counter()
    for where, row in read_user_rows(path, "the pairs"):
        pair = _pair(where, row)
        reason = _drop_reason(pair)
        dropped.update([reason] if reason else [])
        pairs.extend([] if reason else [pair])
    if not pairs:
        left_out = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "it is empty"
        raise InputError(f"{path} holds no pair to learn from ({left_out}): add rows whose edit changes the original")
    return Pairs(pairs, dropped)


def write_pairs(path: str | Path, pairs: Iterable[EditedPair]) -> None:
    """Writes pairs as JSONL for :func:`read_pairs`, atomically: the file is either complete or not written."""
    with replaced(path) as scratch, scratch.open("w", encoding="utf-8", newline="\n") as file:
        for pair in pairs:
            row = vars(pair) | {"metadata": dict(pair.metadata)}
            if not pair.markup:
                del row["markup"]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def edit_statistics(pairs: Sequence[EditedPair], tokenizer: Tokenizer) -> dict[str, float]:
    """Returns statistics of the edits of a data set, in tokens.

    Args:
        pairs: at least one pair.
        tokenizer: tokenizer that splits the texts; special tokens are not counted.

    Returns:
        ``pairs``, their number; ``original_tokens`` and ``edited_tokens``, means per pair; ``removed_share``, the share
        of all original tokens that were removed; ``written_share``, the share of all edited tokens that are new;
        ``edits`` (places) and ``distance`` (Levenshtein), means per pair; ``insertions_only``, ``deletions_only``,
        ``first_changed`` (the first edited token is new) and ``finished`` (the writer ended the text), shares of pairs.

    Raises:
        InputError: if there are no pairs.
    """
    if not pairs:
        raise InputError("there are no pairs to describe: pass at least one")
    labels = [
        edit_labels(tokenizer.encode_continuation(pair.original), tokenizer.encode_continuation(pair.edited))
        for pair in pairs
    ]
    removed, written = [label.removed for label in labels], [label.written for label in labels]
    return {
        "pairs": float(len(pairs)),
        "original_tokens": float(np.mean([mask.size for mask in removed])),
        "edited_tokens": float(np.mean([mask.size for mask in written])),
        "removed_share": float(np.concatenate(removed).mean()),
        "written_share": float(np.concatenate(written).mean()),
        "edits": float(np.mean([label.edits for label in labels])),
        "distance": float(np.mean([label.distance for label in labels])),
        "insertions_only": float(np.mean([not mask.any() for mask in removed])),
        "deletions_only": float(np.mean([not mask.any() for mask in written])),
        "first_changed": float(np.mean([mask[:1].any() for mask in written])),
        "finished": float(np.mean([pair.finished for pair in pairs])),
    }


def _pair(where: str, row: Mapping[str, Any]) -> EditedPair:
    texts = {}
    for name, columns in COLUMNS.items():
        column = next((column for column in columns if column in row), None)
        if column is None:
            present = ", ".join(map(repr, row)) or "nothing"
            raise InputError(f"{where} needs the text field {' or '.join(map(repr, columns))}; it has {present}")
        texts[name] = _typed(where, row, column, str, "a text")
        check_encodable(f"{where}: the field {column!r}", texts[name])
    pair_id = str(row.get("id") or hashlib.sha1("\x1f".join(texts.values()).encode()).hexdigest()[:12])
    finished = _typed(where, row, "finished", bool, "true or false") if "finished" in row else True
    metadata = _typed(where, row, "metadata", dict, "an object") if "metadata" in row else {}
    markup = _typed(where, row, "markup", bool, "true or false") if "markup" in row else False
    return EditedPair(**texts, id=pair_id, finished=finished, metadata=metadata, markup=markup)


def _typed(where: str, row: Mapping[str, Any], column: str, kind: type, words: str) -> Any:
    if not isinstance(row[column], kind):
        raise InputError(f"{where}: the field {column!r} is a {type(row[column]).__name__}: make it {words}")
    return row[column]


def _drop_reason(pair: EditedPair) -> str:
    """Returns why a pair cannot be learned from; empty if it can."""
    original, edited = pair.original.strip(), pair.edited.strip()
    return "empty original" if not original else "empty edit" if not edited else "unchanged" * (original == edited)
