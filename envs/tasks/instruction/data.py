"""Instruction data: rows with an instruction, an optional input and an output, from the usual files; their prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ....llm_backends.errors import InputError, check_known
from ....llm_backends.local.tokenization import Tokenizer
from ....llm_backends.prompting import fill, load_prompts
from ....llm_backends.records import read_user_rows, read_user_text, user_text
from ....rewards.quality.instance_format import without_placeholder

DataLayout = Literal["chat", "plain", "alpaca"]
"""``chat``: a user's message in the tokenizer's chat template; ``plain``: a text that the response continues;
``alpaca``: the prompt text of Stanford Alpaca."""
DATA_LAYOUTS: tuple[DataLayout, ...] = ("chat", "plain", "alpaca")

OPENINGS: dict[DataLayout, str] = {"chat": "", "plain": " ", "alpaca": "\n"}
"""Maps a layout to the text between prompt and response: prompts end without a blank, and a chat template ends where
the answer begins."""

INSTRUCTIONS = ("instruction", "prompt")
INPUTS = ("input", "context")
OUTPUTS = ("output", "response")
"""Columns of a flat row, Alpaca's first, then those of other data sets; the first that a row has is read."""


@dataclass(frozen=True)
class InstructionExample:
    """One row; its texts have no surrounding blanks."""

    instruction: str
    input: str
    """Empty if the instruction needs none."""
    output: str
    id: str = ""
    """By default the first 12 hex digits of the SHA-1 of request and output, the same in every file with this row."""

    def __post_init__(self) -> None:
        if not self.id:
            # Request and output are hashed as a list, so that no two different pairs give the same text.
            text = json.dumps([request_text(self), self.output])
            object.__setattr__(self, "id", hashlib.sha1(text.encode()).hexdigest()[:12])

    def row(self) -> dict[str, str]:
        """Returns the example as a JSON-able row."""
        return {"id": self.id, "instruction": self.instruction, "input": self.input, "output": self.output}


@dataclass
class InstructionData:
    """The contents of a file."""

    examples: list[InstructionExample] = field(default_factory=list)
    """The examples in file order, no two with the same request and output."""
    duplicates: int = 0
    """Number of rows that were left out because an earlier one has the same request and output."""


def request_text(example: InstructionExample) -> str:
    """Returns the user's message: the instruction and, after a blank line, its input."""
    return instruction_form(example.instruction, example.input, "chat")


def prompt_text(example: InstructionExample, layout: DataLayout, tokenizer: Tokenizer | None = None) -> str:
    """Returns the prompt; the response follows it after ``OPENINGS[layout]``.

    Args:
        example: the example; its output is ignored.
        layout: how the request is written.
        tokenizer: the tokenizer whose chat template the layout ``chat`` uses; None for the other layouts.

    Raises:
        InputError: if the layout is unknown, or ``chat`` has no tokenizer with a chat template.
    """
    check_known("layout", layout, DATA_LAYOUTS)
    if layout != "chat":
        return instruction_form(example.instruction, example.input, layout)
    if tokenizer is None:
        raise InputError("layout 'chat' needs a tokenizer: pass that of the model")
    return tokenizer.chat_text([{"role": "user", "content": request_text(example)}])


def instruction_form(instruction: str, input_text: str, layout: str) -> str:
    """Writes an instruction and its input as one text.

    Args:
        instruction: the instruction.
        input_text: its input; empty if it has none.
        layout: ``plain``: a text to continue; ``chat``: a message to answer; ``alpaca``: the text of Stanford Alpaca.
    """
    templates = load_prompts(__package__, "layouts")["instruction_with_input" if input_text else "instruction"]
    return fill(templates[layout], {"instruction": instruction, "input": input_text})


def read_instruction_data(path: str | Path, option: str = "") -> InstructionData:
    """Reads a data set.

    Args:
        path: a JSONL file, a JSON file with one list, or a ``.parquet`` file. A row is one of

            * flat, as in Alpaca: ``instruction``, optionally ``input``, and ``output`` (or ``prompt``, ``context``,
              ``response``); the instances of ``refine-af bootstrap`` and the data of ``evolve generate`` are such rows;
            * ``messages``: one message of the user, one of the assistant;
            * ``instances``, a list of objects with ``input`` and ``output``, as in Self-Instruct's
              ``seed_tasks.jsonl``: one example per instance.
        option: the command-line option that names the file, for error messages.

    Raises:
        InputError: if the file cannot be read or holds no rows, or a row cannot be used (an empty output included);
            the message names row and field.
    """
    path = Path(path)
    data = InstructionData()
    # The id is a hash of request and output, so equal examples have equal ids.
    seen: set[str] = set()
    rows = _parquet_rows(path, option) if path.suffix == ".parquet" else read_rows(path, option)
    for where, row in rows:
        for example in _examples(where, row):
            if example.id in seen:
                data.duplicates += 1
            else:
                seen.add(example.id)
                data.examples.append(example)
    if not data.examples:
        raise InputError(f"{f'{option} {path}'.strip()} holds no rows: nothing to learn from")
    return data


def _parquet_rows(path: Path, option: str) -> list[tuple[str, dict[str, Any]]]:
    """Reads the rows of a Parquet file, each with its location."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = f"{option} {path}".strip()
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise InputError(f"cannot read {name}: {reason}") from error
    return [(f"{path} row {number}", row) for number, row in enumerate(rows, start=1)]


def read_rows(path: Path, option: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Reads the objects of a JSONL file or of a JSON file with one list.

    Args:
        path: the file.
        option: the command-line option that names the file, for error messages.

    Returns:
        For each object its location, for error messages (``"FILE row 3"`` or ``"FILE item 3"``), and the object.

    Raises:
        InputError: if the file cannot be read, is broken JSON, or has an item that is not an object.
    """
    text = read_user_text(path, option)
    # The rows of JSONL are objects, so a text that begins with a bracket is one JSON list.
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
    """Returns the examples of one row in any of the three formats."""
    if "messages" in row:
        return [_from_messages(where, row["messages"])]
    instruction = user_text(where, row, _column(row, INSTRUCTIONS)).strip()
    if "instances" not in row:
        return [_example(where, instruction, row)]
    return [_example(place, instruction, instance) for place, instance in instances_of(where, row)]


def instances_of(where: str, row: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the instances of a row, each with its location for error messages.

    Args:
        where: the location of the row.
        row: the row.

    Raises:
        InputError: if the field ``instances`` is not a list of objects, or is empty.
    """
    instances = row.get("instances")
    if not isinstance(instances, list) or not instances or not all(isinstance(item, dict) for item in instances):
        raise InputError(f"{where}: field 'instances' must be a list of objects with 'input' and 'output', not empty")
    return [(f"{where} instance {number}", instance) for number, instance in enumerate(instances, start=1)]


def _example(where: str, instruction: str, row: Mapping[str, Any]) -> InstructionExample:
    return InstructionExample(
        instruction,
        input_text(where, row, _column(row, INPUTS)),
        user_text(where, row, _column(row, OUTPUTS)).strip(),
    )


def _from_messages(where: str, messages: Any) -> InstructionExample:
    """Returns the example of a chat with one message of the user and one of the assistant."""
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
    """Returns the first of the columns that the row has; if it has none, the first, for the error message to name."""
    return next((name for name in names if row.get(name) is not None), names[0])


def optional_text(where: str, row: Mapping[str, Any], name: str) -> str:
    """Returns a text without surrounding blanks; empty if it is missing, null or blank.

    Raises:
        InputError: if the value is not a text, or holds a lone surrogate, which UTF-8 cannot encode.
    """
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return user_text(where, row, name).strip()


def input_text(where: str, row: Mapping[str, Any], name: str = "input") -> str:
    """Returns an input; empty also for a text that says that there is none, such as Self-Instruct's ``<noinput>``.

    Raises:
        InputError: as :func:`optional_text`.
    """
    return without_placeholder(optional_text(where, row, name))
