"""Seed instructions from the package, from a list, or from a file in one of the usual formats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ....llm_backends.errors import InputError
from ....rewards.quality.instance_format import without_placeholder

SPLITS = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}
"""Maps a split to its tenths of the hash space: the split of an instruction depends on its text alone."""


class SeedFileError(InputError):
    """A seed file that cannot be used; the message names the place and the reason."""


@dataclass(frozen=True)
class Instruction:
    """One instruction and its input."""

    text: str
    input: str = ""
    """Empty if the instruction has none."""
    id: str = ""
    """By default the first 12 hex digits of the SHA-1 of text and input."""

    def __post_init__(self) -> None:
        if not self.id:
            # The dataclass is frozen.
            object.__setattr__(self, "id", hashlib.sha1(f"{self.text}\n{self.input}".encode()).hexdigest()[:12])


def packaged_seeds() -> Path:
    """Returns the path of the package's own seed file."""
    return Path(str(files(__package__).joinpath("seed_data", "instructions.jsonl")))


def load_instructions(
    seeds: str | Path | Sequence[str | Instruction] | None = None, split: str | None = None
) -> list[Instruction]:
    """Loads seed instructions.

    Args:
        seeds: a file (JSONL or a JSON list of objects with ``instruction``, Alpaca's JSON, Self-Instruct's
            ``seed_tasks.jsonl``, or plain text with one instruction a line), a list of texts, or None for the
            package's own seeds.
        split: ``"train"``, ``"validation"`` or ``"test"`` for a fixed 80 / 10 / 10 % split by hash; None: all.

    Raises:
        SeedFileError: if the file is missing, empty, not UTF-8 or torn, or has rows without ``instruction``.
        InputError: if the split is unknown or empty.
    """
    if seeds is None:
        instructions = read_instructions(packaged_seeds())
    elif isinstance(seeds, str | Path):
        instructions = read_instructions(Path(seeds))
    else:
        instructions = [seed if isinstance(seed, Instruction) else Instruction(str(seed).strip()) for seed in seeds]
        if not instructions or not all(i.text for i in instructions):
            raise SeedFileError("the list of seeds is empty or holds an empty text")
    if split is None:
        return instructions
    matches = [i for i in instructions if in_split(i.text, split)]
    if not matches:
        raise InputError(f"none of the {len(instructions)} seeds falls into the split {split!r}")
    return matches


def in_split(text: str, split: str) -> bool:
    """Returns whether an instruction belongs to a split, by the hash of its text.

    Raises:
        InputError: if the split is unknown.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: use {', '.join(SPLITS)} or none")
    return int(hashlib.sha1(text.encode()).hexdigest(), 16) % 10 in SPLITS[split]


def read_instructions(path: Path) -> list[Instruction]:
    """Reads the instructions of a seed file in one of the formats of :func:`load_instructions`."""
    return [seed_instruction(path, where, row) for where, row in read_seed_rows(path)]


def read_seed_rows(path: Path) -> list[tuple[str, Any]]:
    """Reads the rows of a seed file unchanged, without checking their contents.

    Returns:
        For each row its place (``"line 3"`` or ``"item 3"``, from 1) and the row; a line of plain text becomes
        ``{"instruction": line}``.

    Raises:
        SeedFileError: if the file is missing, empty, not UTF-8, torn, or holds no rows.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SeedFileError(f"cannot read seed file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SeedFileError(f"seed file {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not text.strip():
        raise SeedFileError(f"seed file {path} is empty")
    # Without a known suffix, the first character decides between JSON and plain text.
    first = text.lstrip()[0]
    if path.suffix in (".json", ".jsonl") or (path.suffix != ".txt" and first in "[{"):
        rows = _json_rows(path, text)
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = [(f"line {number}", {"instruction": line}) for number, line in lines if line.strip()]
    if not rows:
        raise SeedFileError(f"seed file {path} holds no instruction")
    return rows


def _json_rows(path: Path, text: str) -> list[tuple[str, Any]]:
    """Reads the items of a JSON list, or else the lines of JSONL, each with its place."""
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            where = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise SeedFileError(f"seed file {path}{where} is broken JSON: {error}") from error
        return [(f"item {number}", row) for number, row in enumerate(rows, start=1)]
    numbered = []
    for number, line in enumerate(text.split("\n"), start=1):  # a JSON string may hold other line ends, e.g. U+2028
        if line.strip():
            try:
                numbered.append((f"line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise SeedFileError(f"seed file {path} line {number} is broken JSON: {error}") from error
    return numbered


def seed_instruction(path: Path, where: str, row: Any) -> Instruction:
    """Returns the instruction of one row of a seed file.

    Args:
        path: the seed file, for error messages.
        where: the row's place in the file, for error messages.
        row: the row, as :func:`read_seed_rows` returns it.

    Raises:
        SeedFileError: if the row has no usable text field ``instruction``; the message names file and place.
    """
    if not isinstance(row, dict) or not isinstance(row.get("instruction"), str):
        has = f"it has {', '.join(map(repr, row))}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
        raise SeedFileError(f"seed file {path} {where} needs a text field 'instruction'; {has}")
    if not row["instruction"].strip():
        raise SeedFileError(f"seed file {path} {where} has an empty instruction")
    instances = row.get("instances")  # Self-Instruct's rows have their inputs here
    first = instances[0] if isinstance(instances, list) and instances and isinstance(instances[0], dict) else row
    fields = (row["instruction"].strip(), without_placeholder(str(first.get("input") or "")), str(row.get("id") or ""))
    try:
        "".join(fields).encode()
    except UnicodeEncodeError as error:  # JSON escapes can hold a lone surrogate
        surrogate = ascii(error.object[error.start])
        raise SeedFileError(f"seed file {path} {where} holds a lone surrogate ({surrogate})") from error
    return Instruction(*fields)
