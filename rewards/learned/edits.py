"""Minimal edits: pairs of a response and its correction, and which tokens a correction removed and wrote.

A correction says where a response is wrong, token by token: fine-grained supervision (Xu et al. 2024, arXiv 2406.02756)
learns a reward per token from it, FIGA (Guo et al. 2023, arXiv 2311.04072) a weight per token.
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
from ...llm_backends.records import read_user_rows

UNCHANGED, DELETED, ADDED, SUBSTITUTED = "U", "D", "A", "S"

WHOLE_TABLE = 2**23
"""Cells of an edit-distance table up to which it is kept whole, at two bits a cell."""

COLUMNS = {
    "prompt": ("prompt",),
    "original": ("original", "original_output"),
    "edited": ("edited", "revised_output"),
}
"""The texts of a pair and the fields they are read from; the second names are those of FIGA's data set SPA."""


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


class Pairs(list[EditedPair]):
    """Pairs, and what was left out on the way to them.

    Args:
        pairs: the pairs.
        dropped: reason to number of rows left out.
    """

    def __init__(self, pairs: Iterable[EditedPair] = (), dropped: Mapping[str, int] | None = None) -> None:
        super().__init__(pairs)
        self.dropped = dict(dropped or {})


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


def read_pairs(path: str | Path) -> Pairs:
    """Reads pairs from a JSONL file.

    A row has the texts ``prompt``, ``original`` (or ``original_output``) and ``edited`` (or ``revised_output``), and
    may have ``id`` (a hash of the texts where there is none), ``finished`` and ``metadata``.

    Args:
        path: the file.

    Returns:
        The pairs in file order. Rows with an ``empty original``, an ``empty edit`` or texts that are ``unchanged``
        but for blanks around them are left out and counted.

    Raises:
        InputError: for a file that cannot be read, is not UTF-8 or leaves no pair; for a line that is no JSON object,
            or whose field is missing, of a wrong type or holds half a character, naming the line and the field.
    """
    pairs: list[EditedPair] = []
    dropped: Counter[str] = Counter()
    for where, row in read_user_rows(path, "the pairs"):
        pair = _pair(where, row)
        reason = _flaw(pair)
        dropped.update([reason] if reason else [])
        pairs.extend([] if reason else [pair])
    if not pairs:
        left_out = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "it is empty"
        raise InputError(f"{path} holds no pair to learn from ({left_out}): add rows whose edit changes the original")
    return Pairs(pairs, dropped)


def write_pairs(path: str | Path, pairs: Iterable[EditedPair]) -> None:
    """Writes pairs as JSONL that :func:`read_pairs` reads, in one move: the file is there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    with scratch.open("w", encoding="utf-8", newline="\n") as file:
        for pair in pairs:
            row = vars(pair) | {"metadata": dict(pair.metadata)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    scratch.replace(path)


def edit_statistics(pairs: Sequence[EditedPair], tokenizer: Tokenizer) -> dict[str, float]:
    """What the edits of a data set look like, in tokens.

    Args:
        pairs: at least one pair.
        tokenizer: counts the tokens; special tokens are left out.

    Returns:
        ``pairs``; mean ``original_tokens`` and ``edited_tokens``; ``removed_share`` of all original tokens and
        ``written_share`` of all edited tokens; mean ``edits`` (places) and ``distance`` (Levenshtein) per pair; the
        share of pairs with ``insertions_only``, ``deletions_only``, a changed first token (``first_changed``) and a
        text that its writer ended (``finished``).

    Raises:
        InputError: where there are no pairs.
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
            has = ", ".join(map(repr, row)) or "nothing"
            raise InputError(f"{where} needs the text field {' or '.join(map(repr, columns))}; it has {has}")
        texts[name] = _typed(where, row, column, str, "a text")
        try:
            texts[name].encode()
        except UnicodeEncodeError as error:  # JSON can say it, UTF-8 and tokenizers cannot
            raise InputError(f"{where}: the field {column!r} holds half a character: mend or delete it") from error
    known = str(row.get("id") or hashlib.sha1("\x1f".join(texts.values()).encode()).hexdigest()[:12])
    finished = _typed(where, row, "finished", bool, "true or false") if "finished" in row else True
    metadata = _typed(where, row, "metadata", dict, "an object") if "metadata" in row else {}
    return EditedPair(**texts, id=known, finished=finished, metadata=metadata)


def _typed(where: str, row: Mapping[str, Any], column: str, kind: type, words: str) -> Any:
    if not isinstance(row[column], kind):
        raise InputError(f"{where}: the field {column!r} is a {type(row[column]).__name__}: make it {words}")
    return row[column]


def _flaw(pair: EditedPair) -> str:
    original, edited = pair.original.strip(), pair.edited.strip()
    return "empty original" if not original else "empty edit" if not edited else "unchanged" * (original == edited)
