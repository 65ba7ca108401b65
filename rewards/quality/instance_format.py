"""Strict parser of the text of one instance: an input and the output that an instruction asks for.

The fields have one of two orders, as in REFINE-AF (Roy et al., arXiv 2505.06548, stage 3): *input first*,
``Input: ...`` and ``Output: ...``, and for classification tasks *output first*, ``Class label: ...`` and
``Input: ...``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ...llm_backends.errors import check_known
from ...llm_backends.prompting import one_line

Order = Literal["input_first", "output_first"]

FIELDS: dict[Order, tuple[str, str]] = {"input_first": ("input", "output"), "output_first": ("class label", "input")}
"""Names of the fields of each order, as they follow each other; the input may be missing."""

NO_INPUT = frozenset(
    {"none", "n/a", "no input", "not applicable", "not needed", "<noinput>", "<no input>", "noinput", "null", "-"}
)
"""Texts that models and files have as the input of a task without input, in lower case, without a trailing period."""

ECHO_WORDS = 4
"""Minimum words of an instruction that its output may not contain; a shorter one may only not equal the output."""

_FIELD = re.compile(r"[ \t]*(Input|Output|Class label)[ \t]*\d*[ \t]*:[ \t]*", re.IGNORECASE)
_HEADING = re.compile(r"[ \t]*(Example[ \t]*\d*[ \t]*[.:]?[ \t]*$|(Task|Instruction)[ \t]*:)", re.IGNORECASE)
_INSIDE = re.compile(r"\b(Input|Output|Class label|Task):")


@dataclass(frozen=True)
class Instance:
    """One input of an instruction with the output that the instruction asks for."""

    input: str
    """Input of the task; empty if the instruction needs none."""
    output: str
    """Output of the task; never empty if the instance was parsed."""


def without_placeholder(text: str) -> str:
    """Returns an input without surrounding blanks; empty if it says that there is none (:data:`NO_INPUT`)."""
    text = text.strip()
    return "" if text.removesuffix(".").casefold() in NO_INPUT else text


def parse_instance(text: str, order: Order = "input_first", instruction: str = "") -> Instance | None:
    """Parses a text that is one instance.

    Args:
        text: the whole text, including the opening that the prompt ended with.
        order: which field comes first.
        instruction: instruction of the instance, which the output must not repeat; empty: not checked.

    Returns:
        The instance, or None if :func:`parse_instance_or_reason` finds the text malformed.

    Raises:
        InputError: for an unknown order.
    """
    result = parse_instance_or_reason(text, order, instruction)
    return result if isinstance(result, Instance) else None


def parse_instance_or_reason(text: str, order: Order = "input_first", instruction: str = "") -> Instance | str:
    """Parses a text that is one instance, or returns why it is malformed.

    A field name begins a line, in upper or lower case. The input field may be missing or hold a text for no input
    (:data:`NO_INPUT`): the input is then empty. A class label is one line.

    Args:
        text: the whole text, including the opening that the prompt ended with.
        order: which field comes first.
        instruction: instruction of the instance, which the output must not repeat; empty: not checked.

    Returns:
        The instance, or the first reason that applies, in this order: ``heading``, a line begins another example or
        task; ``no_field``, there is text before the first field; ``no_output``, there is no output field; ``fields``, a
        field occurs twice, belongs to the other order or comes in the wrong order; ``field_inside``, a field name with
        a colon occurs inside a value; ``empty_output``; ``long_label``, the class label has several lines;
        ``input_is_output``, both are equal; ``echo``, the output repeats the instruction; ``ends_with_colon``, the
        input or output is unfinished.

    Raises:
        InputError: for an unknown order.
    """
    check_known("order", order, FIELDS)
    # Split the lines into fields; a line without a field name continues the field before it.
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
    instance = Instance(without_placeholder(values.get("input", "")), values[output_name])
    if order == "output_first" and "\n" in instance.output:
        return "long_label"
    return value_defect(instance, instruction) or instance


def value_defect(instance: Instance, instruction: str = "", strict: bool = True) -> str:
    """Returns why the values of an instance are malformed, whatever its format; empty if they are well formed.

    Args:
        instance: the instance, with values without surrounding white space.
        instruction: instruction of the instance, which the output must not repeat; empty: not checked.
        strict: True: an output that differs from the input by white space alone equals it, and one that contains the
            words of the instruction repeats it. False: as in Self-Instruct, whole texts are compared.

    Returns:
        The first of the reasons ``empty_output``, ``input_is_output``, ``echo`` and ``ends_with_colon`` that applies.
    """
    if not instance.output:
        return "empty_output"
    if instance.input == instance.output or (strict and one_line(instance.input) == one_line(instance.output)):
        return "input_is_output"
    repeats = _contains_words if strict else _same_line
    if instruction and repeats(instance.output, instruction):
        return "echo"
    if instance.input.endswith(":") or instance.output.endswith(":"):
        return "ends_with_colon"
    return ""


def _same_line(output: str, instruction: str) -> bool:
    """Returns whether the output is the instruction; case and the kind of white space do not count."""
    return one_line(output).casefold() == one_line(instruction).casefold()


def _contains_words(output: str, instruction: str) -> bool:
    """Returns whether the output repeats the instruction word by word; case and punctuation do not count."""
    output_words, instruction_words = re.findall(r"\w+", output.casefold()), re.findall(r"\w+", instruction.casefold())
    if len(instruction_words) < ECHO_WORDS:
        return bool(instruction_words) and output_words == instruction_words
    # The blanks around both sides keep matches at word boundaries.
    return f" {' '.join(instruction_words)} " in f" {' '.join(output_words)} "
