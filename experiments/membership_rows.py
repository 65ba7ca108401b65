"""Rows for membership inference: members and non-members from files, and the texts a fine-tuned model saw of them."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

from ..agents.sft import Demonstration
from ..llm_backends.errors import InputError
from ..llm_backends.prompting import fill, load_prompts
from ..llm_backends.records import read_user_rows, user_text
from ..llm_backends.tokenization import Tokenizer


@dataclass(frozen=True)
class Row:
    """One row of either side."""

    member: bool
    number: int
    """Of the row in its file, from 0."""
    instruction: str
    input: str
    output: str

    @property
    def id(self) -> str:
        """Equal for equal texts."""
        return hashlib.sha256("\0".join((self.instruction, self.input, self.output)).encode()).hexdigest()[:12]


def read_sides(members: str, nonmembers: str, limit: int = 0, seed: int = 0) -> list[Row]:
    """The rows of both files, members first.

    Args:
        members: JSONL with ``instruction``, perhaps ``input``, and ``output``.
        nonmembers: likewise.
        limit: rows of either side at most, drawn at random; 0 for all.
        seed: of the draw.

    Raises:
        InputError: for a file that is missing, empty or broken, and a row that is on both sides.
    """
    rows = {True: _read(Path(members), True), False: _read(Path(nonmembers), False)}
    seen = {row.id: row.number for row in rows[True]}
    for row in rows[False]:
        if row.id in seen:
            raise InputError(
                f"row {row.number + 1} of {nonmembers} is row {seen[row.id] + 1} of {members}: a row cannot be both "
                "trained on and held out, delete one of the two"
            )
    for side, found in rows.items():
        if limit and len(found) > limit:
            kept = sorted(random.Random(f"{seed}/{side}").sample(range(len(found)), limit))
            rows[side] = [found[i] for i in kept]
    return [*rows[True], *rows[False]]


def _read(path: Path, member: bool) -> list[Row]:
    option = "--members" if member else "--nonmembers"
    rows = []
    for number, (where, row) in enumerate(read_user_rows(path, option)):
        given = row.get("input")
        given = (
            "" if given is None or (isinstance(given, str) and not given.strip()) else user_text(where, row, "input")
        )
        instruction, output = (user_text(where, row, name) for name in ("instruction", "output"))
        rows.append(Row(member, number, instruction.strip(), given.strip(), output.strip()))
    if not rows:
        raise InputError(f"{option} {path} has no rows: has the fine-tuning kept some (--holdout)?")
    return rows


def demonstration(row: Row, layout: str, tokenizer: Tokenizer) -> Demonstration:
    """The tokens of a row as fine-tuning shows them: prompt, and response with the token that ends it.

    Raises:
        InputError: for an unknown layout, and a tokenizer without an EOS token or the chat template that is asked for.
    """
    if layout not in ("plain", "chat"):
        raise InputError(f"unknown layout {layout!r}: use plain or chat")
    if not tokenizer.eos_ids:
        raise InputError(f"the tokenizer {tokenizer.name} has no EOS token, by which responses end")
    form = load_prompts("envs.tasks", "responses")["instruction_with_input" if row.input else "instruction"]
    request = fill(form[layout], {"instruction": row.instruction, "input": row.input})
    prompt = request if layout == "plain" else tokenizer.chat_text([{"role": "user", "content": request}])
    blank = "" if layout == "chat" else " "  # a chat template ends where the answer begins
    response = tokenizer.encode_continuation(f"{blank}{row.output}")
    return Demonstration(tokenizer.encode(prompt), [*response, min(tokenizer.eos_ids)])
