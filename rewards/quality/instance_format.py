"""The text of one instance: an input and the output that an instruction calls for, read strictly.

Two orders, as of REFINE-AF (Roy et al., arXiv 2505.06548, stage 3): *input first*, ``Input: ...`` and ``Output: ...``,
and for classification tasks *output first*, ``Class label: ...`` and ``Input: ...``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ...llm_backends.errors import InputError
from ...llm_backends.prompting import one_line

Order = Literal["input_first", "output_first"]

FIELDS: dict[Order, tuple[str, str]] = {"input_first": ("input", "output"), "output_first": ("class label", "input")}
"""The fields of each order, in that order; the input may be missing."""

NO_INPUT = frozenset({"none", "n/a", "no input", "not applicable", "not needed", "<noinput>", "-"})
"""What models write for an input that a task does not need, without case and a trailing period."""

ECHO_WORDS = 4
"""An instruction of so many words may not stand anywhere in its output; a shorter one may not be the output."""

_FIELD = re.compile(r"[ \t]*(Input|Output|Class label)[ \t]*\d*[ \t]*:[ \t]*", re.IGNORECASE)
_HEADING = re.compile(r"[ \t]*(Example[ \t]*\d*[ \t]*[.:]?[ \t]*$|(Task|Instruction)[ \t]*:)", re.IGNORECASE)
_INSIDE = re.compile(r"\b(Input|Output|Class label|Task):")


@dataclass(frozen=True)
class Instance:
    """One input of an instruction with the output that it calls for."""

    input: str
    """Empty where the instruction needs none."""
    output: str
    """Never empty, where a parser made it."""


def parse_pair(text: str, order: Order = "input_first", instruction: str = "") -> Instance | None:
    """Reads a text that is one instance; None where :func:`read_pair` finds it malformed.

    Args:
        text: the whole text, what the prompt opened it with included.
        order: which field comes first.
        instruction: what the instance is of, which its output must not repeat; empty for no such check.

    Raises:
        InputError: for an unknown order.
    """
    found = read_pair(text, order, instruction)
    return found if isinstance(found, Instance) else None


def read_pair(text: str, order: Order = "input_first", instruction: str = "") -> Instance | str:
    """Likewise, but says what is wrong with a malformed text.

    Fields begin a line, in any case. The field of the input may be missing, or name none (``None``, ``N/A``): the input
    is then empty. A class label is one line. Reasons, in the order in which they are looked for: ``heading``, a line
    that begins another example or task; ``no_field``, text before the first field; ``no_output``; ``fields``, two of
    one kind, one of the other order, or in the wrong order; ``field_inside``, the name of a field with a colon within a
    line; ``empty_output``; ``long_label``; ``input_is_output``; ``echo``, an output that repeats the instruction;
    ``ends_with_colon``, an input or output that is unfinished.

    Args:
        text: as of :func:`parse_pair`.
        order: likewise.
        instruction: likewise.

    Raises:
        InputError: for an unknown order.
    """
    if order not in FIELDS:
        raise InputError(f"order must be input_first or output_first, got {order!r}")
    fields: list[tuple[str, str]] = []
    for line in text.strip().splitlines():
        if _HEADING.match(line):
            return "heading"
        if label := _FIELD.match(line):
            fields.append((label[1].casefold(), line[label.end() :]))
        elif fields:
            name, value = fields[-1]
            fields[-1] = (name, f"{value}\n{line}")
        elif line.strip():
            return "no_field"
    output_name = "output" if order == "input_first" else "class label"
    names = [name for name, _ in fields]
    if output_name not in names:
        return "no_output"
    if names not in ([output_name], list(FIELDS[order])):
        return "fields"
    if any(_INSIDE.search(value) for _, value in fields):
        return "field_inside"
    values = {name: value.strip() for name, value in fields}
    written = values.get("input", "")
    absent = written.removesuffix(".").casefold() in NO_INPUT
    instance = Instance("" if absent else written, values[output_name])
    return _defect(instance, order, instruction) or instance


def _defect(instance: Instance, order: Order, instruction: str) -> str:
    if not instance.output:
        return "empty_output"
    if order == "output_first" and "\n" in instance.output:
        return "long_label"
    if one_line(instance.input) == one_line(instance.output):
        return "input_is_output"
    if _repeats(instance.output, instruction):
        return "echo"
    if instance.input.endswith(":") or instance.output.endswith(":"):
        return "ends_with_colon"
    return ""


def _repeats(output: str, instruction: str) -> bool:
    said, asked = re.findall(r"\w+", output.casefold()), re.findall(r"\w+", instruction.casefold())
    if len(asked) < ECHO_WORDS:
        return bool(asked) and said == asked
    return f" {' '.join(asked)} " in f" {' '.join(said)} "
