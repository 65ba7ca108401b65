"""Labelled pairs for measuring a judge, from a JSONL file that the user gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..llm_backends.errors import InputError

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
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read --data {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--data {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # a JSON string may hold other line ends, e.g. U+2028
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path} row {number} is broken JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{path} row {number} is a {type(row).__name__}: it must be a JSON object")
            rows.append((f"{path} row {number}", row))
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
        value = row.get(field)
        if not isinstance(value, str) or not value.strip():
            has = "it is missing" if field not in row else f"got {json.dumps(value)[:60]}"
            raise InputError(f"{where}: field '{field}' must be a text that is not empty, {has}")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can say it, UTF-8 and tokenizers cannot
            half = ascii(error.object[error.start])
            raise InputError(f"{where}: field '{field}' holds half a character (surrogate {half})") from error
    if row[column] not in LABELS[kind]:
        allowed = ", ".join(map(repr, LABELS[kind]))
        raise InputError(f"{where}: field '{column}' must be one of {allowed}, got {row[column]!r}")
    return LabelledPair(row["first"], row["second"], row[column], row["prompt"] if kind == "pairwise" else "")
