"""Episodes whose response is a prompt for a frozen model: an instruction for a whole task, or a hint for one input.

The policy reads an *opening* and writes an instruction or hint; :func:`scored_prompt` puts that into the prompt with
which the frozen model is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from ....llm_backends import Tokenizer
from ....llm_backends.errors import InputError, check_at_least
from ....llm_backends.prompting import fill, load_prompts
from ....rewards.prompt_scoring.task_prompt import TaskPrompt
from ....rewards.texts.rouge import rouge_l
from ...tokens.episode import PromptExample
from ..responses.openings import Layout, Request, check_layout
from .tasks import PromptTask

Level = Literal["task", "instance"]


class Openings:
    """The form of the prompts that the policy reads before it writes an instruction or hint.

    Args:
        kind: ``task``: an instruction for a labelled task; ``label``: a hint for an input of a labelled task;
            ``response``: a hint for a request whose answer is free text.
        layout: ``plain``: the response continues a text; ``chat``: it answers a message, in the chat template.
        tokenizer: the tokenizer with the chat template; None for the layout ``plain``.
        opening: the text or message; None: the package's own. For the kind ``label`` it must have the placeholder
            ``{input}``, for ``response`` ``{request}``; for ``task`` and ``label`` it may have ``{labels}``.

    Raises:
        InputError: if the layout is unknown, the opening lacks its placeholder, or ``chat`` has no tokenizer; when
            filling, if the tokenizer has no chat template.
    """

    def __init__(self, kind: str, layout: Layout, tokenizer: Tokenizer | None, opening: str | None) -> None:
        check_layout(layout, tokenizer)
        placeholder = {"label": "input", "response": "request"}.get(kind)
        if opening is not None and placeholder is not None:
            _check_placeholder(opening, "opening", placeholder)
        self.form = _forms(kind)[layout] if opening is None else opening
        self.tokenizer = tokenizer if layout == "chat" else None
        self.markup = layout == "chat"

    def fill(self, **values: str) -> str:
        """Returns the opening with its placeholders replaced by the values, in the chat template if there is one."""
        text = fill(self.form, values)
        return text if self.tokenizer is None else self.tokenizer.chat_text([{"role": "user", "content": text}])


def task_openings(task: PromptTask, minibatches: int, openings: Openings) -> list[PromptExample]:
    """Returns examples for writing an instruction, all with the same prompt; each is scored on its own minibatch.

    Args:
        task: the labelled task.
        minibatches: number of minibatches and of examples.
        openings: openings of kind ``task``.

    Raises:
        InputError: if there is less than one minibatch.
    """
    check_at_least(1, minibatches=minibatches)
    text = openings.fill(labels=_labels(task))
    # The number of the minibatch makes the ids differ, so that each example is a group of its own.
    return [
        PromptExample(
            f"{task.name}/minibatch-{number}",
            text,
            metadata={"task": task.name, "minibatch": number},
            markup=openings.markup,
        )
        for number in range(minibatches)
    ]


def label_hints(task: PromptTask, split: str, openings: Openings) -> list[PromptExample]:
    """Returns examples for writing a hint, one for each example of a split of a labelled task.

    Args:
        task: the labelled task.
        split: ``train``, ``validation`` or ``test``.
        openings: openings of kind ``label``.
    """
    return [
        PromptExample(
            example.id,
            openings.fill(input=example.text, labels=_labels(task)),
            metadata={"task": task.name, "example": asdict(example)},
            markup=openings.markup,
        )
        for example in task.examples(split)
    ]


def response_hints(requests: Sequence[Request], openings: Openings) -> list[PromptExample]:
    """Returns examples for writing a hint, one for each request whose answer is free text.

    ``metadata`` has the request in the forms for the frozen model: ``plain``, a text to continue, and ``request``, a
    message.

    Args:
        requests: the requests, each with a reference.
        openings: openings of kind ``response``.

    Raises:
        InputError: if a request has no reference, or one in which ROUGE finds nothing to compare.
    """
    hints = []
    for request in requests:
        if request.reference is None:
            raise InputError(
                f"{request.id} has no reference answer, by which hints are scored: give each row a reference"
            )
        # 0 for a text compared with itself: ROUGE finds no tokens in it.
        if not rouge_l(request.reference, request.reference):
            raise InputError(
                f"{request.id}: the reference {request.reference[:80]!r} has none of the letters a to z and digits "
                "that ROUGE reads: leave the row out"
            )
        metadata = dict(request.metadata) | {"plain": request.plain, "request": request.chat}
        hints.append(
            PromptExample(
                request.id,
                openings.fill(request=request.chat),
                request.reference,
                metadata=metadata,
                markup=openings.markup,
            )
        )
    return hints


def scored_prompt(task: PromptTask, level: Level, instruction: str | None = None) -> TaskPrompt:
    """Returns the prompt of the frozen model, with the placeholder ``{response}`` for the policy's response.

    Args:
        task: the labelled task.
        level: ``task``: the response is the instruction; ``instance``: the response is a hint after an instruction.
        instruction: a text with ``{response}``; None: for ``task`` the response alone, for ``instance`` the task's
            first manual instruction followed by the hint.

    Raises:
        InputError: if the instruction lacks ``{response}``.
    """
    # `fill` leaves placeholders without a value as they are, so {response} stays in the text.
    if instruction is None:
        with_hint = fill(_forms("label")["instruction"], {"instruction": task.instructions[0]})
        instruction = "{response}" if level == "task" else with_hint
    _check_placeholder(instruction, "instruction", "response")
    return task.prompt(instruction)


def _forms(kind: str) -> dict[str, str]:
    return load_prompts(__package__, "generated_prompts")[kind]


def _labels(task: PromptTask) -> str:
    return " or ".join(task.verbalizers)


def _check_placeholder(text: str, argument: str, placeholder: str) -> None:
    """Raises an InputError if the text lacks a placeholder."""
    if f"{{{placeholder}}}" not in text:
        raise InputError(f"{argument} must have {{{placeholder}}}, got {text!r}")
