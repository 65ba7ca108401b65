"""Episodes whose tokens are a prompt for a frozen model: an instruction for a whole task, or a hint for one input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from ....llm_backends import Tokenizer
from ....llm_backends.errors import InputError
from ....llm_backends.prompting import fill, load_prompts
from ....rewards.prompt_scoring.task_prompt import TaskPrompt
from ....rewards.texts.rouge import rouge_l
from ...tokens.episode import PromptExample
from ..responses.openings import LAYOUTS, Layout, Request
from .tasks import PromptTask

Level = Literal["task", "instance"]
LEVELS: tuple[Level, ...] = ("task", "instance")


class Openings:
    """What the policy reads before it writes.

    Args:
        kind: ``task``, ``label`` or ``response``.
        layout: ``plain``: the response continues a text; ``chat``: it answers a message, in the chat template.
        tokenizer: whose template that is.
        opening: the text or message; by default the package's own. Of a ``label`` it must have ``{input}``, of a
            ``response`` ``{request}``.

    Raises:
        InputError: for an unknown layout, an opening without its place, and a tokenizer without chat template.
    """

    def __init__(self, kind: str, layout: Layout, tokenizer: Tokenizer | None, opening: str | None) -> None:
        if layout not in LAYOUTS:
            raise InputError(f"unknown layout {layout!r}: use {' or '.join(LAYOUTS)}")
        if layout == "chat" and tokenizer is None:
            raise InputError("layout 'chat' needs a tokenizer: pass that of the model")
        place = {"label": "input", "response": "request"}.get(kind)
        if opening is not None and place is not None:
            _check_place(opening, "opening", place)
        self.form = _forms(kind)[layout] if opening is None else opening
        self.tokenizer = tokenizer if layout == "chat" else None

    def fill(self, **values: str) -> str:
        """The prompt of an example."""
        text = fill(self.form, values)
        return text if self.tokenizer is None else self.tokenizer.chat_text([{"role": "user", "content": text}])


def task_openings(task: PromptTask, minibatches: int, openings: Openings) -> list[PromptExample]:
    """Openings of an instruction, all the same; each is scored on a minibatch of its own.

    Args:
        task: the labelled task.
        minibatches: how many.
        openings: of kind ``task``.

    Raises:
        InputError: for fewer than one minibatch.
    """
    if minibatches < 1:
        raise InputError(f"minibatches must be at least 1, got {minibatches}")
    text = openings.fill(labels=_labels(task))
    return [
        PromptExample(f"{task.name}/minibatch-{number}", text, metadata={"task": task.name, "minibatch": number})
        for number in range(minibatches)
    ]


def label_hints(task: PromptTask, split: str, openings: Openings) -> list[PromptExample]:
    """Openings of a hint, of kind ``label``, one for each example of a split of a labelled task."""
    return [
        PromptExample(
            one.id,
            openings.fill(input=one.text, labels=_labels(task)),
            metadata={"task": task.name, "example": asdict(one)},
        )
        for one in task.examples(split)
    ]


def response_hints(requests: Sequence[Request], openings: Openings) -> list[PromptExample]:
    """Openings of a hint, of kind ``response``, one for each request whose answer is free text.

    ``metadata`` has the request as the frozen model gets it: ``plain``, a text to continue, and ``request``, a message.

    Raises:
        InputError: for a request without a reference, or with one in which ROUGE finds nothing to compare.
    """
    hints = []
    for one in requests:
        if one.reference is None:
            raise InputError(f"{one.id} has no reference answer, by which hints are scored: give each row a reference")
        if not rouge_l(one.reference, one.reference):
            raise InputError(
                f"{one.id}: the reference {one.reference[:80]!r} has none of the letters a to z and digits that ROUGE "
                "reads: leave the row out"
            )
        metadata = dict(one.metadata) | {"plain": one.plain, "request": one.chat}
        hints.append(PromptExample(one.id, openings.fill(request=one.chat), one.reference, metadata=metadata))
    return hints


def scored_prompt(task: PromptTask, level: Level, instruction: str | None = None) -> TaskPrompt:
    """What the frozen model reads, ``{response}`` standing for what was written.

    Args:
        task: the labelled task.
        level: ``task``: the response is the instruction; ``instance``: it follows one, as a hint.
        instruction: with ``{response}``; by default the response alone, or the task's first manual instruction and the
            hint.

    Raises:
        InputError: for an instruction without ``{response}``.
    """
    if instruction is None:
        hinted = fill(_forms("label")["instruction"], {"instruction": task.instructions[0]})
        instruction = "{response}" if level == "task" else hinted
    _check_place(instruction, "instruction", "response")
    return task.prompt(instruction)


def _forms(kind: str) -> dict[str, str]:
    return load_prompts(__package__, "generated_prompts")[kind]


def _labels(task: PromptTask) -> str:
    return " or ".join(task.verbalizers)


def _check_place(text: str, argument: str, place: str) -> None:
    if f"{{{place}}}" not in text:
        raise InputError(f"{argument} must have {{{place}}}, got {text!r}")
