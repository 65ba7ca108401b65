"""Labelled pairs for measuring a judge, from a JSONL file that the user gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...llm_backends.errors import InputError
from ...llm_backends.records import read_user_rows, user_text

PairKind = Literal["pairwise", "equality"]
"""``pairwise``: which of two responses is better; ``equality``: do two instructions ask for the same."""

LABELS: dict[PairKind, tuple[str, ...]] = {
    "pairwise": ("first", "second", "tie"),
    "equality": ("Not Equal", "Equal"),
}
"""What a pair may be labelled. The first is the one whose probability a judge gives."""

COLUMNS: dict[PairKind, str] = {"pairwise": "better", "equality": "verdict"}
"""The column of the label, which says of which kind a file is."""


@dataclass(frozen=True)
class LabelledPair:
    """Two texts and what is known of them."""

    first: str
    second: str
    label: str
    """One of :data:`LABELS`."""
    prompt: str = ""
    """What both respond to; pairwise only."""


def read_pairs(path: str | Path) -> tuple[PairKind, list[LabelledPair]]:
    """Reads rows ``{"prompt", "first", "second", "better"}`` or ``{"first", "second", "verdict"}``.

    Unlike the rows of a run, a user's file may end without a line end, and none of its rows is ever dropped.

    Raises:
        InputError: for a file that cannot be read or is empty, or a row with a missing or wrong field.
    """
    rows = read_user_rows(path, "--data")
    if not rows:
        raise InputError(f"--data {path} holds no pairs")
    kind = _kind(*rows[0])
    return kind, [_pair(kind, where, row) for where, row in rows]


def _kind(where: str, row: Mapping[str, Any]) -> PairKind:
    kinds = [kind for kind, column in COLUMNS.items() if column in row]
    if len(kinds) != 1:
        raise InputError(
            f"{where} must have either a field 'better' (which of two responses is better) or a field 'verdict' (do "
            f"two instructions ask for the same); it has {', '.join(map(repr, row)) or 'nothing'}"
        )
    return kinds[0]


def _pair(kind: PairKind, where: str, row: Mapping[str, Any]) -> LabelledPair:
    column = COLUMNS[kind]
    for field in (*(("prompt",) if kind == "pairwise" else ()), "first", "second", column):
        user_text(where, row, field)
    if row[column] not in LABELS[kind]:
        allowed = ", ".join(map(repr, LABELS[kind]))
        raise InputError(f"{where}: field '{column}' must be one of {allowed}, got {row[column]!r}")
    return LabelledPair(row["first"], row["second"], row[column], row["prompt"] if kind == "pairwise" else "")
