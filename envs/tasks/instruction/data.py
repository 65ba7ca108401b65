"""Instruction data: rows of an instruction, perhaps an input, and an output, from the usual files; their prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ....llm_backends.errors import InputError
from ....llm_backends.local.tokenization import Tokenizer
from ....llm_backends.prompting import fill, load_prompts
from ....llm_backends.records import read_user_rows, read_user_text, user_text

DataLayout = Literal["chat", "plain", "alpaca"]
"""``chat``: a user's message in the tokenizer's chat template; ``plain``: a text that the response continues;
``alpaca``: the text of Stanford Alpaca."""
DATA_LAYOUTS: tuple[DataLayout, ...] = ("chat", "plain", "alpaca")

OPENINGS: dict[DataLayout, str] = {"chat": "", "plain": " ", "alpaca": "\n"}
"""What stands between prompt and response: a prompt ends without a blank, and a chat template where the answer begins.
"""

INSTRUCTIONS = ("instruction", "prompt")
INPUTS = ("input", "context")
OUTPUTS = ("output", "response")
"""Columns of a flat row, the first that is there: Alpaca's, then those of other data sets."""


@dataclass(frozen=True)
class InstructionExample:
    """One row, texts without surrounding blanks."""

    instruction: str
    input: str
    """Empty where the instruction needs none."""
    output: str
    id: str = ""
    """By default the first 12 hex digits of the SHA-1 of request and output: equal in whatever file the row stands."""

    def __post_init__(self) -> None:
        if not self.id:
            text = json.dumps([request_text(self), self.output])
            object.__setattr__(self, "id", hashlib.sha1(text.encode()).hexdigest()[:12])

    def row(self) -> dict[str, str]:
        """The example, JSON-able."""
        return {"id": self.id, "instruction": self.instruction, "input": self.input, "output": self.output}


@dataclass
class InstructionData:
    """What a file holds."""

    examples: list[InstructionExample] = field(default_factory=list)
    """In file order, no two with the same request and output."""
    duplicates: int = 0
    """Rows that were left out for that."""


def request_text(example: InstructionExample) -> str:
    """The user's message: the instruction and, behind a blank line, its input."""
    return instruction_form(example.instruction, example.input, "chat")


def prompt_text(example: InstructionExample, layout: DataLayout, tokenizer: Tokenizer | None = None) -> str:
    """The prompt that the response continues, behind ``OPENINGS[layout]``.

    Args:
        example: its output is not looked at.
        layout: how the request is written.
        tokenizer: whose chat template the layout ``chat`` takes.

    Raises:
        InputError: for an unknown layout, and for ``chat`` without a tokenizer that has a chat template.
    """
    if layout not in DATA_LAYOUTS:
        raise InputError(f"unknown layout {layout!r}: use {', '.join(DATA_LAYOUTS)}")
    if layout != "chat":
        return instruction_form(example.instruction, example.input, layout)
    if tokenizer is None:
        raise InputError("layout 'chat' needs a tokenizer: pass that of the model")
    return tokenizer.chat_text([{"role": "user", "content": request_text(example)}])


def instruction_form(instruction: str, given: str, layout: str) -> str:
    """An instruction and its input (may be empty) as text: ``plain`` to continue, ``chat`` to answer, or ``alpaca``."""
    templates = load_prompts(__package__, "layouts")["instruction_with_input" if given else "instruction"]
    return fill(templates[layout], {"instruction": instruction, "input": given})


def read_instruction_data(path: str | Path, option: str = "") -> InstructionData:
    """Reads a data set.

    Args:
        path: a JSONL file, a JSON file with one list, or a ``.parquet`` file. A row is one of

            * flat, as Alpaca's: ``instruction``, perhaps ``input``, ``output`` (or ``prompt``, ``context``,
              ``response``); the instances of ``refine-af bootstrap`` and the data of ``evolve generate`` are such rows;
            * ``messages``: one of the user, one of the assistant;
            * ``instances``, a list of ``input`` and ``output``, as in Self-Instruct's ``seed_tasks.jsonl``: one
              example per instance.
        option: the command's option that names the file, for errors.

    Raises:
        InputError: for a file that cannot be read or holds no row, and for a row that cannot be used, an empty output
            included, naming row and field.
    """
    path = Path(path)
    found = InstructionData()
    seen: set[str] = set()
    rows = _parquet_rows(path, option) if path.suffix == ".parquet" else read_rows(path, option)
    for where, row in rows:
        for example in _examples(where, row):
            if example.id in seen:
                found.duplicates += 1
            else:
                seen.add(example.id)
                found.examples.append(example)
    if not found.examples:
        raise InputError(f"{f'{option} {path}'.strip()} holds no rows: nothing to learn from")
    return found


def _parquet_rows(path: Path, option: str) -> list[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    called = f"{option} {path}".strip()
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise InputError(f"cannot read {called}: {reason}") from error
    return [(f"{path} row {number}", row) for number, row in enumerate(rows, start=1)]


def read_rows(path: Path, option: str = "") -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file or of a JSON file's list, each with the words that say where it stands.

    Raises:
        InputError: for a file that cannot be read, broken JSON, and an item that is no object.
    """
    text = read_user_text(path, option)
    if not text.lstrip().startswith("["):
        return read_user_rows(path, option)
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is broken JSON: {error}; mend it") from error
    rows = []
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise InputError(f"{path} item {number} is a {type(item).__name__}: make it a JSON object")
        rows.append((f"{path} item {number}", item))
    return rows


def _examples(where: str, row: Mapping[str, Any]) -> list[InstructionExample]:
    if "messages" in row:
        return [_from_messages(where, row["messages"])]
    instruction = user_text(where, row, _column(row, INSTRUCTIONS)).strip()
    if "instances" not in row:
        return [_example(where, instruction, row)]
    return [_example(place, instruction, instance) for place, instance in instances_of(where, row)]


def instances_of(where: str, row: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The instances of a row, each with the words that say where it stands.

    Raises:
        InputError: if they are no list of objects, or there are none.
    """
    instances = row.get("instances")
    if not isinstance(instances, list) or not instances or not all(isinstance(one, dict) for one in instances):
        raise InputError(f"{where}: field 'instances' must be a list of objects with 'input' and 'output', not empty")
    return [(f"{where} instance {number}", instance) for number, instance in enumerate(instances, start=1)]


def _example(where: str, instruction: str, row: Mapping[str, Any]) -> InstructionExample:
    return InstructionExample(
        instruction,
        optional_text(where, row, _column(row, INPUTS)),
        user_text(where, row, _column(row, OUTPUTS)).strip(),
    )


def _from_messages(where: str, messages: Any) -> InstructionExample:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f"{where}: field 'messages' must be a list of objects with 'role' and 'content'")
    roles = [message.get("role") for message in messages]
    if roles != ["user", "assistant"]:
        raise InputError(
            f"{where}: field 'messages' must hold one message of the user and one of the assistant, it has the roles "
            f"{roles}"
        )
    question, answer = (
        user_text(f"{where} message {number}", message, "content").strip()
        for number, message in enumerate(messages, start=1)
    )
    return InstructionExample(question, "", answer)


def _column(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of the columns that the row has; the first of all where it has none."""
    return next((name for name in names if row.get(name) is not None), names[0])


def optional_text(where: str, row: Mapping[str, Any], name: str) -> str:
    """A text that may be missing, null or blank, without surrounding blanks.

    Raises:
        InputError: if it is something else.
    """
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return user_text(where, row, name).strip()
