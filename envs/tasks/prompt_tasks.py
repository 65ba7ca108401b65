"""Labelled tasks for prompts: their examples, verbalizers and manual instructions, by split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...llm_backends import request_seed
from ...llm_backends.errors import InputError
from ...llm_backends.prompting import fill, load_prompts, one_line
from ...rewards.task_prompt import BLOCK, TEMPLATE, Demonstration, LabelledExample, TaskPrompt
from .instructions import SPLITS
from .nlu_data import load_rows
from .nlu_tasks import get_task


@dataclass(frozen=True)
class PromptTask:
    """A labelled task to find prompts for."""

    name: str
    labels: tuple[str, ...]
    """Names of the labels, by index."""
    verbalizers: tuple[str, ...]
    """The words that stand for them in prompts, unless a prompt says otherwise."""
    instructions: tuple[str, ...]
    """Instructions written by people."""
    train: tuple[LabelledExample, ...] = field(default=(), repr=False)
    validation: tuple[LabelledExample, ...] = field(default=(), repr=False)
    test: tuple[LabelledExample, ...] = field(default=(), repr=False)
    template: str = TEMPLATE
    block: str = BLOCK

    def examples(self, split: str) -> tuple[LabelledExample, ...]:
        """The examples of ``train``, ``validation`` or ``test``.

        Raises:
            InputError: for an unknown split, and one that was not loaded.
        """
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}: use {', '.join(SPLITS)}")
        found: tuple[LabelledExample, ...] = getattr(self, split)
        if not found:
            raise InputError(f"the split {split!r} of {self.name} was not loaded: name it in load_prompt_task")
        return found

    def prompt(self, instruction: str, demonstrations: Sequence[Demonstration] = ()) -> TaskPrompt:
        """A prompt of this task with its verbalizers and its form."""
        return TaskPrompt(instruction, tuple(demonstrations), self.verbalizers, self.template, self.block)


def load_prompt_task(
    name: str | Path,
    split: str | Sequence[str] = SPLITS,
    limit: int | None = None,
    seed: int = 0,
    data_dir: str | Path = "",
) -> PromptTask:
    """A task of :data:`~.nlu_tasks.TASKS`, or one of a file.

    Args:
        name: a task's name.
        split: the splits to load.
        limit: examples per split at most, drawn by ``seed``; all where None.
        seed: of that choice.
        data_dir: as of :func:`~.nlu_data.load_rows`.

    Raises:
        InputError: for an unknown task or split, a task without labels, and as :func:`~.nlu_data.load_rows`.
    """
    task = get_task(str(name))
    wanted = (split,) if isinstance(split, str) else tuple(split)
    if task.kind != "label" or not task.labelled:
        raise InputError(f"{task.name} has no labels to predict: use a task with labels")
    examples: dict[str, Any] = {}
    for part in wanted:
        rows = load_rows(task, part, data_dir, limit, seed)
        examples[part] = tuple(
            LabelledExample(
                f"{task.name}/{row['id']}", _text(task, row), task.words.index(str(task.answer(row["label"])))
            )
            for row in rows
        )
    written = load_prompts("envs.tasks", "prompt_tasks").get(task.wording, {}).get("instructions", [])
    return PromptTask(
        task.name, task.words, task.words, (task.description, *written), block=f"{{text}}\n{task.cue}:", **examples
    )


def _text(task: Any, row: Any) -> str:
    return fill(task.template, {name: one_line(str(row[name])) for name in task.fields})


def minibatch(task: PromptTask, split: str, size: int, seed: int) -> tuple[LabelledExample, ...]:
    """Examples drawn without replacement, the same ones for the same seed.

    Args:
        task: the task.
        split: the split to draw from.
        size: number of examples.
        seed: of the draw.

    Raises:
        InputError: for a size below 1 or beyond the split, and a split that was not loaded.
    """
    examples = task.examples(split)
    if not 1 <= size <= len(examples):
        raise InputError(f"a minibatch of {size} examples cannot be drawn from {len(examples)} of {split}: change size")
    rng = np.random.default_rng(request_seed(seed, "minibatch", split))
    return tuple(examples[i] for i in rng.choice(len(examples), size, replace=False))
