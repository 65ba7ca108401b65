"""Append-only JSONL files that survive a kill: rows appear whole, and a torn last line is dropped on resume."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import InputError


class RecordError(InputError):
    """A JSONL file holds a line that is no JSON object, and not because its end was cut off."""


def read_records(path: str | Path, repair: bool = False) -> list[dict[str, Any]]:
    """The rows of a JSONL file; an absent file has none.

    Args:
        path: the file.
        repair: cut a torn last line off the file, so that rows can be appended behind it.

    Raises:
        RecordError: for a broken line that is not the last, naming file and line.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    good = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("line has no end")
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"it holds a {type(row).__name__}")
                rows.append(row)
            except ValueError as error:
                if file.read(1):
                    raise RecordError(f"{path} line {number} is not a JSON object: {error}") from error
                break
            good += len(line)
    if repair and good < path.stat().st_size:
        os.truncate(path, good)
    return rows


def append_lines(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Appends rows in one write and flushes them to the operating system; makes the folders that are missing."""
    if not rows:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = text.encode("utf-8", "surrogatepass")  # servers send lone surrogates in JSON escapes
    with path.open("ab", buffering=0) as file:
        view = memoryview(data)
        while len(view):
            view = view[file.write(view) :]
