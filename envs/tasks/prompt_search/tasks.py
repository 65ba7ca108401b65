"""Labelled tasks for prompts: their examples, verbalizers and manual instructions, by split."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ....llm_backends import request_seed
from ....llm_backends.errors import InputError, check_known
from ....llm_backends.prompting import fill, load_prompts, one_line
from ....llm_backends.records import read_user_rows, read_user_text, user_text
from ....rewards.prompt_scoring.scorer import CONTENT_FREE
from ....rewards.prompt_scoring.task_prompt import BLOCK, TEMPLATE, Demonstration, LabelledExample, TaskPrompt
from ....rewards.texts.sentiment import text_hash
from ..instruction.seeds import SPLITS, check_limit
from ..nlu.data import UnlabelledError, leave_out_unlabelled, load_rows, questions
from ..nlu.tasks import NLUTask, get_task, is_hidden

FIELDS = ("name", "labels", "verbalizers", "instructions", "template", "block", "data", *SPLITS)


def read_prompt_task(path: Path) -> tuple[dict[str, Any], dict[str, list[LabelledExample]]]:
    """Reads a task and its examples from a TOML file.

    The file has ``labels`` (a list of names), ``instructions`` (a list, not empty), and optionally ``name`` (default:
    the file's name), ``verbalizers`` (one per label; default: the labels), ``template`` and ``block``. Examples are
    JSONL files, named relative to the TOML file: ``train``, ``validation`` and ``test``, or one file ``data``, which is
    split 80 / 10 / 10 % by a hash of the texts. A row has ``text``, ``label`` (a name or, if no name is a number, its
    number from 0), and optionally ``id``.

    Returns:
        The fields of the task, defaults filled in, and the examples by split.

    Raises:
        InputError: if the file is not such a description or has no instruction, a row has no text or an unknown label,
            or a text occurs in two splits.
    """
    try:
        task = tomllib.loads(read_user_text(path))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is no TOML file: {error}") from error
    if unknown := sorted(set(task) - set(FIELDS)):
        raise InputError(f"{path} has the unknown field {unknown[0]!r}: use {', '.join(FIELDS)}")
    # Check the fields and fill in their defaults.
    for name, default in (("labels", []), ("verbalizers", task.get("labels", [])), ("instructions", [])):
        value = task.setdefault(name, default)
        if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
            raise InputError(f"{path}: the field {name!r} must be a list of texts, got {value!r}")
        task[name] = [text.strip() for text in value]
    for name, default in (("name", path.stem), ("template", TEMPLATE), ("block", BLOCK)):
        if not isinstance(task.setdefault(name, default), str):
            raise InputError(f"{path}: the field {name!r} must be a text, got {task[name]!r}")
    if len(set(task["labels"])) < max(2, len(task["labels"])):
        raise InputError(f"{path}: a task needs at least 2 different labels, got {task['labels']}")
    if len(task["verbalizers"]) != len(task["labels"]):
        raise InputError(
            f"{path} has {len(task['verbalizers'])} verbalizers for {len(task['labels'])} labels: match them"
        )
    if not task["instructions"]:
        raise InputError(f"{path}: the field 'instructions' must have at least one text, what a person would write")
    sources = [name for name in ("data", *SPLITS) if name in task]
    if not sources or ("data" in sources and len(sources) > 1):
        raise InputError(f"{path} must name its examples: either 'data', or files by split: {', '.join(SPLITS)}")
    # Read the examples; a text in two splits would let a prompt be tested on what it was fitted to.
    splits: dict[str, list[LabelledExample]] = {name: [] for name in SPLITS}
    seen: dict[str, str] = {}
    for name in sources:
        for example, where in _file_examples(path.parent / str(task.pop(name)), task):
            split = name if name != "data" else _file_split(example.text)
            if seen.setdefault(example.text, split) != split:
                raise InputError(f"{where}: the text is in the split {seen[example.text]!r} as well: keep one")
            splits[split].append(example)
    return task, splits


def _file_split(text: str) -> str:
    """Returns the split of a text by its hash."""
    return next(name for name, part in SPLITS.items() if int(text_hash(text) * 10) in part)


def _file_examples(path: Path, task: dict[str, Any]) -> list[tuple[LabelledExample, str]]:
    """Reads the examples of a JSONL file, each with its location for error messages."""
    labels = task["labels"]
    numbered = not any(name.lstrip("-").isdigit() for name in labels)  # a digit that is a name is not a number

    def read(numbered_row: tuple[int, tuple[str, dict[str, Any]]]) -> tuple[LabelledExample, str]:
        number, (where, row) = numbered_row
        label = row.get("label")
        if str(label) in labels and isinstance(label, str | int):
            label = labels.index(str(label))
        elif not numbered or isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(labels):
            kind = UnlabelledError if "label" in row and is_hidden(label) else InputError
            raise kind(f"{where}: the label {row.get('label')!r} is none of {', '.join(labels)}: use one of them")
        example_id = f"{task['name']}/{path.stem}-{row.get('id', number)}"
        return LabelledExample(example_id, user_text(where, row, "text").strip(), label), where

    return leave_out_unlabelled(read, enumerate(read_user_rows(path)), str(path))


ALL_SPLITS = tuple(SPLITS)


@dataclass(frozen=True)
class PromptTask:
    """A labelled task to find prompts for."""

    name: str
    labels: tuple[str, ...]
    """Names of the labels, by index."""
    verbalizers: tuple[str, ...]
    """The words for the labels in prompts, one per label, unless a prompt has its own."""
    instructions: tuple[str, ...]
    """Instructions written by people."""
    train: tuple[LabelledExample, ...] = field(default=(), repr=False)
    validation: tuple[LabelledExample, ...] = field(default=(), repr=False)
    test: tuple[LabelledExample, ...] = field(default=(), repr=False)
    """Examples by split; empty if the split was not loaded."""
    template: str = TEMPLATE
    block: str = BLOCK
    content_free: tuple[str, ...] = CONTENT_FREE
    """Inputs without content, in the form of the examples, by which
    :class:`~instructgym.rewards.prompt_scoring.scorer.TaskScorer` calibrates."""

    def examples(self, split: str) -> tuple[LabelledExample, ...]:
        """Returns the examples of ``train``, ``validation`` or ``test``.

        Raises:
            InputError: if the split is unknown or was not loaded.
        """
        check_known("split", split, SPLITS)
        examples: tuple[LabelledExample, ...] = getattr(self, split)
        if not examples:
            raise InputError(f"the split {split!r} of {self.name} was not loaded: name it in load_prompt_task")
        return examples

    def prompt(self, instruction: str, demonstrations: Sequence[Demonstration] = ()) -> TaskPrompt:
        """Returns a prompt with this task's verbalizers, template and block.

        Args:
            instruction: the instruction of the prompt.
            demonstrations: solved inputs that the prompt shows.
        """
        return TaskPrompt(instruction, tuple(demonstrations), self.verbalizers, self.template, self.block)


def load_prompt_task(
    name: str | Path,
    split: str | Sequence[str] = ALL_SPLITS,
    limit: int | None = None,
    seed: int = 0,
    data_dir: str | Path = "",
) -> PromptTask:
    """Loads a task of :data:`~instructgym.envs.tasks.nlu.tasks.TASKS`, or one from a file.

    Args:
        name: a task's name, or the path of a TOML file for :func:`read_prompt_task`.
        split: the split or splits to load.
        limit: number of rows per split to draw at random; those of a smaller limit are a subset of those of a larger
            one. None: all rows.
        seed: seed of that draw, and of the candidates of ReCoRD's training rows.
        data_dir: folder with the data of the named tasks, as in :func:`~instructgym.envs.tasks.nlu.data.load_rows`;
            empty: load from the hub.

    Raises:
        InputError: if the task or split is unknown, the task has no labels, a split has no examples, or
            :func:`~instructgym.envs.tasks.nlu.data.load_rows` or :func:`read_prompt_task` raises it.
    """
    splits = (split,) if isinstance(split, str) else tuple(split)
    for part in splits:
        check_known("split", part, SPLITS)
    if str(name).endswith(".toml"):
        return _from_file(Path(name), splits, limit, seed)
    task = get_task(str(name))
    if task.kind != "label" or not task.labelled:
        raise InputError(f"{task.name} has no labels to predict: use a task with labels")
    examples: dict[str, Any] = {
        part: _nlu_examples(task, load_rows(task, part, data_dir, limit, seed), part, seed) for part in splits
    }
    written = load_prompts(__package__, "prompt_tasks").get(task.wording, {}).get("instructions", [])
    instructions = (task.description, *written)
    # The name of a single field is part of the block, so that content-free inputs get it as well. With several fields
    # it is part of each example's text, so the content-free inputs are filled into the task's template.
    single = len(task.fields) == 1
    shape = task.template.replace(f"{{{task.fields[0]}}}", "{text}") if single else "{text}"
    filled = tuple(fill(task.template, dict.fromkeys(task.fields, text)) for text in CONTENT_FREE)
    return PromptTask(
        task.name,
        task.words,
        task.words,
        instructions,
        block=f"{shape}\n{task.cue}:",
        content_free=CONTENT_FREE if single else filled,
        **examples,
    )


def _nlu_examples(task: NLUTask, rows: Sequence[dict[str, Any]], split: str, seed: int) -> tuple[LabelledExample, ...]:
    """Returns the labelled examples of rows; for training, ReCoRD gives one right and one wrong candidate per row."""
    examples = []
    for row in rows:
        for filled in questions(task, row, seed if split == "train" else None):
            word = task.answer(filled["label"])
            if word is None:
                raise InputError(f"{task.name} hides the label of {filled['id']}: use a split or a copy with labels")
            fields = {name: one_line(str(filled[name])) for name in task.fields}
            text = fill(task.template, fields) if len(fields) > 1 else fields[task.fields[0]]
            examples.append(LabelledExample(f"{task.name}/{filled['id']}", text, task.words.index(word)))
    return tuple(examples)


def _from_file(path: Path, split_names: Sequence[str], limit: int | None, seed: int) -> PromptTask:
    check_limit(limit)
    task, splits = read_prompt_task(path)
    for part in split_names:
        if not splits[part]:
            raise InputError(f"{path} has no examples for the split {part!r}: add some, or load other splits")
        # The shuffle does not depend on the limit, so a smaller limit gives a subset of a larger one.
        random.Random(f"{seed}/limit").shuffle(splits[part])
    labels, words, instructions = (tuple(task[name]) for name in ("labels", "verbalizers", "instructions"))
    form = PromptTask(task["name"], labels, words, instructions, template=task["template"], block=task["block"])
    subsets: dict[str, Any] = {part: tuple(splits[part][:limit]) for part in split_names}
    return replace(form, **subsets)


def minibatch(task: PromptTask, split: str, size: int, seed: int) -> tuple[LabelledExample, ...]:
    """Draws examples without replacement; the same seed gives the same examples.

    Args:
        task: the task.
        split: the split to draw from.
        size: number of examples.
        seed: seed of the draw.

    Raises:
        InputError: if the size is below 1 or above that of the split, or the split is unknown or was not loaded.
    """
    examples = task.examples(split)
    if not 1 <= size <= len(examples):
        raise InputError(f"a minibatch of {size} examples cannot be drawn from {len(examples)} of {split}: change size")
    # The split is part of the seed, so that draws from different splits are independent.
    rng = np.random.default_rng(request_seed(seed, "minibatch", split))
    return tuple(examples[i] for i in rng.choice(len(examples), size, replace=False))
