"""Files that are replaced whole, and JSONL files: a run's own, which survive a kill, and those that a user passes.

A run appends whole rows, and drops a torn last line when it resumes. A user's rows are never dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError


class RecordError(InputError):
    """The error of a JSONL file with a line that is not a JSON object, other than a torn last line."""


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Yields the path of a file to write beside ``path``, which it replaces at the end of the block; creates folders.

    A kill, or an error in the block, leaves the earlier file as it was: no reader sees half a file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    yield scratch
    scratch.replace(path)


def read_records(path: str | Path, repair: bool = False) -> list[dict[str, Any]]:
    """Returns the rows of a JSONL file; none if the file does not exist.

    Args:
        path: the file.
        repair: whether to cut a torn last line off the file, so that rows can be appended after the last whole one.

    Raises:
        RecordError: if a line that is not the last is broken; the message names file and line.
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
                # Only the last line can be torn by a kill; a broken line before others is damage.
                if file.read(1):
                    raise RecordError(f"{path} line {number} is not a JSON object: {error}") from error
                break
            good += len(line)
    if repair and good < path.stat().st_size:
        os.truncate(path, good)
    return rows


def append_lines(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Appends rows in one unbuffered write; creates missing folders."""
    if not rows:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        view = memoryview(_lines(rows))
        # An unbuffered write may write less than it was given.
        while len(view):
            view = view[file.write(view) :]


def write_lines(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a file of rows, replacing an existing one atomically: no reader sees a partial file."""
    with replaced(path) as scratch:
        scratch.write_bytes(_lines(rows))


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns rows as the lines of a JSONL file."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return text.encode("utf-8", "surrogatepass")  # servers send lone surrogates in JSON escapes


def read_user_text(path: str | Path, option: str = "") -> str:
    """Returns the text of a user's UTF-8 file, with or without a byte order mark.

    Args:
        path: the file.
        option: command-line option that the path was given to, e.g. ``"--data"``, for error messages.

    Raises:
        InputError: if the file cannot be read or is not UTF-8.
    """
    named_path = f"{option} {path}".strip()
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {named_path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{named_path} is not UTF-8: {error.reason} at byte {error.start}; convert it") from error


def read_user_rows(path: str | Path, option: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Returns the rows of a user's JSONL file, each with its place for error messages, e.g. ``"FILE row 3"``.

    The number in the place is that of the line. Blank lines are skipped, and the last line needs no line end.

    Args:
        path: the file.
        option: command-line option that the path was given to, e.g. ``"--data"``, for error messages.

    Returns:
        (place, row) pairs in the order of the file.

    Raises:
        InputError: if the file cannot be read or is not UTF-8, or a line is not a JSON object.
    """
    rows = []
    # Not splitlines(): a JSON string may hold other line ends, e.g. U+2028.
    lines = read_user_text(path, option).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} row {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is broken JSON: {error}; mend or delete the row") from error
        if not isinstance(row, dict):
            raise InputError(f"{where} is a {type(row).__name__}: make it a JSON object")
        rows.append((where, row))
    return rows


def user_text(where: str, row: Mapping[str, Any], field: str) -> str:
    """Returns the text in a field of a user's row.

    Args:
        where: place of the row, as returned by :func:`read_user_rows`, for error messages.
        row: the row.
        field: name of the field.

    Raises:
        InputError: if the field is missing, not a string, blank, or cannot be encoded in UTF-8.
    """
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        fault = "it is missing" if field not in row else f"got {json.dumps(value)[:60]}"
        raise InputError(f"{where}: field {field!r} must be a text that is not empty, {fault}")
    check_encodable(f"{where}: field {field!r}", value)
    return value


def check_distinct_ids(ids: Iterable[tuple[str, str]]) -> None:
    """Raises an InputError if two rows have the same id.

    Args:
        ids: place in the file and id of each row; rows without an id have the hash of their text.
    """
    seen: dict[str, str] = {}
    for where, row_id in ids:
        if row_id in seen:
            raise InputError(
                f"{where}: field 'id' {row_id!r} is that of {seen[row_id]} (without ids: the hash of the text): give "
                "each row an id of its own, or delete one"
            )
        seen[row_id] = where


def check_encodable(where: str, text: str) -> None:
    """Raises an InputError if a text holds a lone surrogate, which JSON can escape, but UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = ascii(error.object[error.start])
        raise InputError(f"{where} holds a lone surrogate ({surrogate}), which UTF-8 cannot encode") from error
