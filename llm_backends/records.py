"""JSONL files: those of a run, append-only and safe against a kill, and those that a user gives.

Rows of a run appear whole, and a torn last line is dropped on resume. Of a user's rows none is ever dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
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


def write_lines(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a file of rows in one move, in place of one that is there: it is never seen in part."""
    path = Path(path)
    scratch = path.with_name(path.name + ".part")
    scratch.unlink(missing_ok=True)
    scratch.parent.mkdir(parents=True, exist_ok=True)
    scratch.touch()
    append_lines(scratch, rows)
    scratch.replace(path)


def read_user_text(path: str | Path, option: str = "") -> str:
    """A user's text file: UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        option: the command's option that names it, e.g. ``"--data"``, for the error.

    Raises:
        InputError: for a file that cannot be read or is not UTF-8.
    """
    called = f"{option} {path}".strip()
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {called}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{called} is not UTF-8: {error.reason} at byte {error.start}; convert it") from error


def read_user_rows(path: str | Path, option: str = "") -> list[tuple[str, dict[str, Any]]]:
    """The rows of a user's JSONL file, each with the words that say where it stands: ``"FILE row 3"``, by lines.

    The file may end without a line end. Blank lines are passed over.

    Args:
        path: the file.
        option: as of :func:`read_user_text`.

    Raises:
        InputError: for a file that cannot be read or is not UTF-8, and a line that is no JSON object.
    """
    rows = []
    lines = read_user_text(path, option).split("\n")  # a JSON string may hold other line ends, e.g. U+2028
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
    """The text in a field of a user's row.

    Args:
        where: the words that say where the row stands.
        row: the row.
        field: the field's name.

    Raises:
        InputError: if it is missing, no text, blank, or not to be encoded in UTF-8.
    """
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        has = "it is missing" if field not in row else f"got {json.dumps(value)[:60]}"
        raise InputError(f"{where}: field {field!r} must be a text that is not empty, {has}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can say it, UTF-8 and tokenizers cannot
        half = ascii(error.object[error.start])
        raise InputError(f"{where}: field {field!r} holds half a character (surrogate {half})") from error
    return value
