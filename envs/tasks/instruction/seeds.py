"""Seed instructions from the package, from a list, or from a file in one of the usual formats."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from ....llm_backends.errors import InputError, check_known
from ....llm_backends.records import check_encodable, read_user_text
from ....rewards.quality.instance_format import without_placeholder
from .data import read_rows

SPLITS = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}
"""Maps a split to its tenths of the hash space: the split of an instruction depends on its text alone."""


RowT = TypeVar("RowT")


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
    check_known("split", split, SPLITS)
    return int(hashlib.sha1(text.encode()).hexdigest(), 16) % 10 in SPLITS[split]


def check_limit(limit: int | None) -> None:
    """Raises an InputError for a limit that leaves no row."""
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} rows leaves none: use at least 1")


def limited(rows: Sequence[RowT], limit: int | None, seed: int) -> list[RowT]:
    """Returns at most ``limit`` rows, drawn by the seed; None: all of them, in their order.

    Raises:
        InputError: for a limit that leaves none.
    """
    check_limit(limit)
    rows = list(rows)
    # The shuffle does not depend on the limit, so a smaller limit gives a subset of a larger one.
    if limit is not None:
        random.Random(f"{seed}/limit").shuffle(rows)
    return rows[:limit]


def read_instructions(path: Path) -> list[Instruction]:
    """Reads the instructions of a seed file in one of the formats of :func:`load_instructions`."""
    return [seed_instruction(where, row) for where, row in read_seed_rows(path)]


def read_seed_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Reads the rows of a seed file unchanged, without checking their contents.

    Returns:
        For each row its place (``"FILE row 3"`` or ``"FILE item 3"``, from 1) and the row; a line of plain text becomes
        ``{"instruction": line}``.

    Raises:
        SeedFileError: if the file is missing, empty, not UTF-8, torn, or holds no rows.
    """
    with _seed_errors():
        text = read_user_text(path, "seed file")
        # Without a known suffix, the first character decides between JSON and plain text.
        if path.suffix in (".json", ".jsonl") or (path.suffix != ".txt" and text.lstrip().startswith(("[", "{"))):
            rows = read_rows(path, "seed file")
        else:
            lines = enumerate(text.split("\n"), start=1)
            rows = [(f"{path} row {number}", {"instruction": line}) for number, line in lines if line.strip()]
    if not rows:
        raise SeedFileError(f"seed file {path} is empty: it holds no instruction")
    return rows


@contextmanager
def _seed_errors() -> Iterator[None]:
    """Raises what is wrong with a seed file as a :class:`SeedFileError`."""
    try:
        yield
    except InputError as error:
        raise SeedFileError(str(error)) from error


def seed_instruction(where: str, row: Mapping[str, Any]) -> Instruction:
    """Returns the instruction of one row of a seed file.

    Args:
        where: the row's file and place, for error messages.
        row: the row, as :func:`read_seed_rows` returns it.

    Raises:
        SeedFileError: if the row has no usable text field ``instruction``; the message names file and place.
    """
    if not isinstance(row.get("instruction"), str):
        raise SeedFileError(f"{where} needs a text field 'instruction'; it has {', '.join(map(repr, row))}")
    if not row["instruction"].strip():
        raise SeedFileError(f"{where} has an empty instruction")
    instances = row.get("instances")  # Self-Instruct's rows have their inputs here
    first = instances[0] if isinstance(instances, list) and instances and isinstance(instances[0], dict) else row
    fields = (row["instruction"].strip(), without_placeholder(str(first.get("input") or "")), str(row.get("id") or ""))
    with _seed_errors():
        check_encodable(where, "".join(fields))
    return Instruction(*fields)
