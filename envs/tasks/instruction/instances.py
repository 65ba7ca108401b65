"""Instances of an instruction: prompts that ask a model for inputs with outputs, strict parsers, and cleaning.

There are two orders, as in Self-Instruct (Wang et al., arXiv 2212.10560) and REFINE-AF (arXiv 2505.06548, stage 3):
*input first*, and for classification tasks *output first*: the label comes before an input that fits it, so that not
all inputs get the same label.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ....llm_backends.base import Prompt, PromptStyle
from ....llm_backends.prompting import build_prompt, fill, load_prompts, one_line
from ....rewards.quality.instance_format import Instance, Order, value_defect, without_placeholder

MAX_INSTANCES = 5
STOPS = (f"Example {MAX_INSTANCES + 1}", "Task:")
"""Stop strings of a reply: the heading of one example too many, or a new task."""

_EXAMPLE = re.compile(r"\s*Example\s*\d*\s*[.:]?\s*$", re.IGNORECASE)
_FIELD = re.compile(r"\s*(Input|Output|Class label)\s*\d*\s*:[ \t]*", re.IGNORECASE)


Piece: TypeAlias = Instance | str
"""What a parser returns for one block of a reply: an instance, or the text of a block that breaks the format."""


@dataclass
class CleanedInstances:
    """The instances that are kept from a reply, and the pieces that are dropped."""

    kept: list[Instance] = field(default_factory=list)
    dropped: list[tuple[Piece, str]] = field(default_factory=list)
    """Pairs of a piece and the reason why it is dropped."""

    @property
    def reasons(self) -> Counter[str]:
        """Number of dropped pieces by reason."""
        return Counter(reason for _, reason in self.dropped)


def order_for(is_classification: bool) -> Order:
    """Returns the order of fields for a type of task."""
    return "output_first" if is_classification else "input_first"


def instance_prompt(style: PromptStyle, instruction: str, order: Order) -> Prompt:
    """Returns the prompt that asks for instances of an instruction, in the form that a backend needs."""
    table = load_prompts(__package__, "refine_af")[order]
    chat = fill(table["chat"], {"instruction": instruction, "limit": str(MAX_INSTANCES)})
    shots = [
        f"Task: {one_line(task['instruction'])}\n{_demonstration_text(task['instances'], order)}"
        for task in table["tasks"]
    ]
    # For input first nothing follows the task: the reply may begin with `Example 1` or, without input, with `Output:`.
    query = f"Task: {one_line(instruction)}\n{'Class label:' if order == 'output_first' else ''}"
    return build_prompt(style, chat, "\n\n".join([table["header"], *shots, query]))


def _demonstration_text(instances: Sequence[Mapping[str, Any]], order: Order) -> str:
    """Returns demonstrations in the format that the parsers read."""
    if order == "output_first":
        return "\n".join(f"Class label: {shot['output']}\nInput: {shot['input']}" for shot in instances)
    if len(instances) == 1 and not instances[0]["input"]:
        return f"Output: {instances[0]['output']}"
    return "\n".join(
        f"Example {number}\nInput: {shot['input']}\nOutput: {shot['output']}"
        for number, shot in enumerate(instances, start=1)
    )


def parse_instances(reply: str, order: Order, continues: bool = False) -> list[Piece]:
    """Reads a reply to :func:`instance_prompt`.

    Args:
        reply: the model's reply.
        order: the order of the prompt.
        continues: whether the prompt was in the few-shot form, which for output first ends with ``Class label:``.

    Returns:
        The pieces of the reply in order: instances, and the texts of malformed blocks.
    """
    if order == "output_first":
        return parse_output_first(f"Class label: {reply.lstrip()}" if continues else reply)
    return parse_input_first(reply)


def parse_input_first(reply: str) -> list[Piece]:
    """Parses ``Example N / Input: ... / Output: ...`` blocks.

    The heading and the input may be missing; text before the output without a field name is the input. A block is
    malformed if it has no output field, two output fields, a class label, or another field after its output.
    """
    pieces: list[Piece] = []
    for block in _blocks(reply):
        names = [name for name, _ in block]
        if names.count("output") != 1 or names[-1] != "output" or "class label" in names:
            pieces.append(
                "\n".join(f"{name.capitalize()}: {value}" if name else value for name, value in block).strip()
            )
        else:
            written = "\n".join(value for _, value in block[:-1])
            pieces.append(Instance(without_placeholder(written), block[-1][1].strip()))
    return pieces


def _blocks(reply: str) -> list[list[tuple[str, str]]]:
    """Splits a reply into blocks of (field, value): a heading starts a new block, as does an input after an output.

    Text before the first field of a block has the field name ``""``.
    """
    blocks: list[list[tuple[str, str]]] = [[]]
    for line in reply.splitlines():
        if _EXAMPLE.match(line):
            blocks.append([])
        elif label := _FIELD.match(line):
            name = label[1].casefold()
            if name == "input" and blocks[-1] and blocks[-1][-1][0] == "output":
                blocks.append([])
            blocks[-1].append((name, line[label.end() :]))
        elif blocks[-1]:  # a further line of the last field
            name, value = blocks[-1][-1]
            blocks[-1][-1] = (name, f"{value}\n{line}")
        else:
            blocks[-1].append(("", line))
    return [block for block in blocks if any(name or value.strip() for name, value in block)]


def parse_output_first(reply: str) -> list[Piece]:
    """Parses ``Class label: ... / Input: ...`` blocks.

    The input may be missing. Text before the first label is malformed; so is a block with an output field, with two
    inputs, or with text between the line of its label and its input.
    """
    before, *blocks = re.split(r"^\s*Class label\s*\d*\s*:", reply, flags=re.IGNORECASE | re.MULTILINE)
    pieces: list[Piece] = [before.strip()] if before.strip() else []
    for block in blocks:
        label, _, rest = block.partition("\n")
        fields = [match[1].casefold() for line in rest.splitlines() if (match := _FIELD.match(line))]
        if fields not in ([], ["input"]) or (rest.strip() and not _FIELD.match(rest.lstrip())):
            pieces.append(f"Class label:{block}".strip())
        else:
            pieces.append(Instance(without_placeholder(_FIELD.sub("", rest.lstrip(), count=1)), label.strip()))
    return pieces


def clean(
    pieces: Sequence[Piece], cut: bool = False, limit: int = MAX_INSTANCES, instruction: str = ""
) -> CleanedInstances:
    """Drops the instances of one instruction that the rules of Self-Instruct reject.

    Reasons, in the order in which they are checked: ``cut``, the last piece of a reply that was cut by length;
    ``malformed``; ``too_many``, instances after the first ``limit``; ``empty_output``; ``input_is_output``; ``echo``,
    an output that repeats the instruction (not a rule of Self-Instruct; small models do this); ``ends_with_colon``, an
    unfinished input or output; ``contradiction``, *all* remaining instances, if one non-empty input has two different
    outputs; ``duplicate``, an instance with the input and output of an earlier one.

    Args:
        pieces: the pieces parsed from the reply for one instruction.
        cut: whether the reply ended at the token limit.
        limit: number of instances to read at most.
        instruction: the instruction of the instances; empty: do not check for ``echo``.
    """
    cleaned, pieces = CleanedInstances(), list(pieces)
    if cut and pieces:
        cleaned.dropped.append((pieces.pop(), "cut"))
    cleaned.dropped += [(piece, "malformed") for piece in pieces if isinstance(piece, str)]
    instances = [piece for piece in pieces if isinstance(piece, Instance)]
    cleaned.dropped += [(instance, "too_many") for instance in instances[limit:]]
    # Defects of single instances.
    remaining: list[Instance] = []
    for instance in instances[:limit]:
        reason = value_defect(instance, instruction, strict=False)
        if reason:
            cleaned.dropped.append((instance, reason))
        else:
            remaining.append(instance)
    # `setdefault` returns the first output of an input: a different one contradicts it.
    outputs: dict[str, str] = {}
    if any(i.input and outputs.setdefault(i.input, i.output) != i.output for i in remaining):
        cleaned.dropped += [(instance, "contradiction") for instance in remaining]
        return cleaned
    cleaned.kept = list(dict.fromkeys(remaining))
    duplicates = Counter(remaining) - Counter(cleaned.kept)
    cleaned.dropped += [(instance, "duplicate") for instance in duplicates.elements()]
    return cleaned
