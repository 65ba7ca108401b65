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
from ....llm_backends.errors import InputError
from ....llm_backends.prompting import fill, load_prompts, one_line
from ....llm_backends.records import read_user_rows, read_user_text, user_text
from ....rewards.prompt_scoring.scorer import CONTENT_FREE
from ....rewards.prompt_scoring.task_prompt import BLOCK, TEMPLATE, Demonstration, LabelledExample, TaskPrompt
from ....rewards.texts.sentiment import text_hash
from ..instruction.seeds import SPLITS
from ..nlu.data import load_rows, record_candidates
from ..nlu.tasks import NLUTask, get_task

FIELDS = {"name", "labels", "verbalizers", "instructions", "template", "block", "data", *SPLITS}


def read_prompt_task(path: Path) -> tuple[dict[str, Any], dict[str, list[LabelledExample]]]:
    """A task and its examples by split.

    The file has ``labels`` (a list of names), ``instructions`` (a list, not empty), and where they differ from the
    defaults ``name``, ``verbalizers`` (one per label), ``template`` and ``block``. Examples are JSONL files, named
    relative to the TOML file: ``train``, ``validation`` and ``test``, or one file ``data``, which is split
    80 / 10 / 10 % by a hash of the texts. A row has ``text``, ``label`` (a name, or, where no name is a number, its
    number from 0), and perhaps ``id``.

    Raises:
        InputError: for a file that is no such description or has no instruction, rows without text or with an unknown
            label, and a text that stands in two splits.
    """
    try:
        task = tomllib.loads(read_user_text(path))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is no TOML file: {error}") from error
    if unknown := sorted(set(task) - FIELDS):
        raise InputError(f"{path} has the unknown field {unknown[0]!r}: use {', '.join(sorted(FIELDS))}")
    for name, default in (("labels", []), ("verbalizers", task.get("labels", [])), ("instructions", [])):
        value = task.setdefault(name, default)
        if not isinstance(value, list) or not all(isinstance(one, str) and one.strip() for one in value):
            raise InputError(f"{path}: the field {name!r} must be a list of texts, got {value!r}")
        task[name] = [one.strip() for one in value]
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
    given = [name for name in ("data", *SPLITS) if name in task]
    if not given or ("data" in given and len(given) > 1):
        raise InputError(f"{path} must name its examples: either 'data', or files by split: {', '.join(SPLITS)}")
    splits: dict[str, list[LabelledExample]] = {name: [] for name in SPLITS}
    seen: dict[str, str] = {}
    for name in given:
        for example, where in _file_examples(path.parent / str(task.pop(name)), task):
            split = name if name != "data" else _file_split(example.text)
            if seen.setdefault(example.text, split) != split:
                raise InputError(f"{where}: the text stands in the split {seen[example.text]!r} as well: keep one")
            splits[split].append(example)
    return task, splits


def _file_split(text: str) -> str:
    return next(name for name, part in SPLITS.items() if int(text_hash(text) * 10) in part)


def _file_examples(path: Path, task: dict[str, Any]) -> list[tuple[LabelledExample, str]]:
    labels, found = task["labels"], []
    numbered = not any(name.lstrip("-").isdigit() for name in labels)  # a digit that is a name is not a number
    for number, (where, row) in enumerate(read_user_rows(path)):
        label = row.get("label")
        if str(label) in labels and isinstance(label, str | int):
            label = labels.index(str(label))
        elif not numbered or isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(labels):
            raise InputError(f"{where}: the label {row.get('label')!r} is none of {', '.join(labels)}: use one of them")
        example_id = f"{task['name']}/{path.stem}-{row.get('id', number)}"
        found.append((LabelledExample(example_id, user_text(where, row, "text").strip(), label), where))
    return found


ALL_SPLITS = tuple(SPLITS)


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
    content_free: tuple[str, ...] = CONTENT_FREE
    """Inputs in the form of the examples that say nothing, for :class:`TaskScorer`."""

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
    split: str | Sequence[str] = ALL_SPLITS,
    limit: int | None = None,
    seed: int = 0,
    data_dir: str | Path = "",
) -> PromptTask:
    """A task of :data:`~.nlu_tasks.TASKS`, or one of a file.

    Args:
        name: a task's name, or the path of a TOML file as :func:`~.prompt_task_file.read_prompt_task` reads it.
        split: the splits to load.
        limit: examples per split at most, drawn by ``seed``, a smaller limit taking a part of a larger one's; all where
            None.
        seed: of that choice.
        data_dir: of the named tasks, as of :func:`~.nlu_data.load_rows`.

    Raises:
        InputError: for an unknown task or split, a task without labels, a split without examples, and as
            :func:`~.nlu_data.load_rows` or :func:`~.prompt_task_file.read_prompt_task`.
    """
    wanted = (split,) if isinstance(split, str) else tuple(split)
    for part in wanted:
        if part not in SPLITS:
            raise InputError(f"unknown split {part!r}: use {', '.join(SPLITS)}")
    if str(name).endswith(".toml"):
        return _from_file(Path(name), wanted, limit, seed)
    task = get_task(str(name))
    if task.kind != "label" or not task.labelled:
        raise InputError(f"{task.name} has no labels to predict: use a task with labels")
    examples: dict[str, Any] = {
        part: _nlu_examples(task, load_rows(task, part, data_dir, limit, seed), part, seed) for part in wanted
    }
    written = load_prompts(__package__, "prompt_tasks").get(task.wording, {}).get("instructions", [])
    instructions = (task.description, *written)
    # The name of a single field belongs to the block: an input that says nothing then stands behind it as well.
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
    examples = []
    for row in rows:
        rng = random.Random(f"{seed}/{row['id']}") if split == "train" else None
        for filled in record_candidates(row, rng) if task.name == "ReCoRD" else [row]:
            word = task.answer(filled["label"])
            if word is None:
                raise InputError(f"{task.name} hides the label of {filled['id']}: use a split or a copy with labels")
            fields = {name: one_line(str(filled[name])) for name in task.fields}
            text = fill(task.template, fields) if len(fields) > 1 else fields[task.fields[0]]
            examples.append(LabelledExample(f"{task.name}/{filled['id']}", text, task.words.index(word)))
    return tuple(examples)


def _from_file(path: Path, wanted: Sequence[str], limit: int | None, seed: int) -> PromptTask:
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} rows leaves none: use at least 1")
    task, splits = read_prompt_task(path)
    for part in wanted:
        if not splits[part]:
            raise InputError(f"{path} has no examples for the split {part!r}: add some, or load other splits")
        random.Random(f"{seed}/limit").shuffle(splits[part])
    labels, words, instructions = (tuple(task[name]) for name in ("labels", "verbalizers", "instructions"))
    form = PromptTask(task["name"], labels, words, instructions, template=task["template"], block=task["block"])
    chosen: dict[str, Any] = {part: tuple(splits[part][:limit]) for part in wanted}
    return replace(form, **chosen)


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
