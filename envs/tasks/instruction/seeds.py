"""Seed instructions: from the package, from a list, or from a file in any of the usual formats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ....llm_backends.errors import InputError

SPLITS = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}
"""Tenths of the hash space: an instruction's split depends on its text alone, not on the file around it."""


class SeedFileError(InputError):
    """A seed file that cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, with the input it came with."""

    text: str
    input: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", hashlib.sha1(f"{self.text}\n{self.input}".encode()).hexdigest()[:12])


def packaged_seeds() -> Path:
    """The file of the package's own seeds."""
    return Path(str(files(__package__).joinpath("seed_data", "instructions.jsonl")))


def load_instructions(
    seeds: str | Path | Sequence[str | Instruction] | None = None, split: str | None = None
) -> list[Instruction]:
    """Seed instructions.

    Args:
        seeds: a file (JSONL or a JSON list of objects with ``instruction``, Alpaca's JSON, Self-Instruct's
            ``seed_tasks.jsonl``, or plain text with one instruction a line), a list of texts, or None for the
            package's own seeds.
        split: ``"train"``, ``"validation"`` or ``"test"`` for a fixed 80 / 10 / 10 % by hash; None for all.

    Raises:
        SeedFileError: for a file that is missing, empty, not UTF-8, torn, or has rows without ``instruction``.
        ValueError: for an unknown split, or one that is empty.
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
    chosen = [i for i in instructions if in_split(i.text, split)]
    if not chosen:
        raise ValueError(f"none of the {len(instructions)} seeds falls into the split {split!r}")
    return chosen


def in_split(text: str, split: str) -> bool:
    """Whether an instruction falls into a split, by the hash of its text.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: use {', '.join(SPLITS)} or none")
    return int(hashlib.sha1(text.encode()).hexdigest(), 16) % 10 in SPLITS[split]


def read_instructions(path: Path) -> list[Instruction]:
    """Reads a seed file; see :func:`load_instructions`."""
    return [seed_instruction(path, where, row) for where, row in read_seed_rows(path)]


def read_seed_rows(path: Path) -> list[tuple[str, Any]]:
    """The rows of a seed file as they stand there, each with its place; a line of plain text is one ``instruction``.

    Raises:
        SeedFileError: see :func:`load_instructions`; what the rows hold is not looked at.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SeedFileError(f"cannot read seed file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SeedFileError(f"seed file {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not text.strip():
        raise SeedFileError(f"seed file {path} is empty")
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
    """The instruction of one row of a seed file.

    Raises:
        SeedFileError: naming file and place, for a row without a usable text field ``instruction``.
    """
    if not isinstance(row, dict) or not isinstance(row.get("instruction"), str):
        has = f"it has {', '.join(map(repr, row))}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
        raise SeedFileError(f"seed file {path} {where} needs a text field 'instruction'; {has}")
    if not row["instruction"].strip():
        raise SeedFileError(f"seed file {path} {where} has an empty instruction")
    instances = row.get("instances")  # Self-Instruct keeps inputs there
    first = instances[0] if isinstance(instances, list) and instances and isinstance(instances[0], dict) else row
    fields = (row["instruction"].strip(), str(first.get("input") or ""), str(row.get("id") or ""))
    try:
        "".join(fields).encode()
    except UnicodeEncodeError as error:  # JSON can say it, UTF-8 and tokenizers cannot
        half = ascii(error.object[error.start])
        raise SeedFileError(f"seed file {path} {where} holds half a character (surrogate {half})") from error
    return Instruction(*fields)
