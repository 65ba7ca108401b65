"""Held-out tasks on which fine-tuned models are compared: instructions with inputs and reference outputs.

Formats: Super-NaturalInstructions (Wang et al. 2022, arXiv 2204.07705), the 252 user-oriented instructions of
Self-Instruct (Wang et al., arXiv 2212.10560), and Self-Instruct's seed tasks, of which only those are used that
bootstrapping keeps out of its prompts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....llm_backends.errors import InputError
from ....llm_backends.records import read_user_text, user_text
from .data import input_text, instances_of, read_rows
from .pool import DEMONSTRATIONS, Task, evaluation_split, load_tasks

HELD_OUT = 40
"""Number of seed tasks to evaluate on by default; a quarter of all tasks at most."""

USER_ORIENTED = "motivation_app"
"""The field that rows of the user-oriented instructions have and seed tasks have not."""


@dataclass(frozen=True)
class EvaluationTask:
    """An instruction with inputs and reference outputs."""

    name: str
    instruction: str
    instances: tuple[tuple[str, tuple[str, ...]], ...]
    """Pairs of an input, empty if the task needs none, and its references, at least one."""


def load_evaluation_tasks(
    path: str | Path | None = None, held_out_count: int = HELD_OUT, names: str | Path | None = None
) -> list[EvaluationTask]:
    """Loads held-out tasks from local files.

    Args:
        path: a task of Super-NaturalInstructions (``taskNNN_*.json``) or a folder of them, the user-oriented
            instructions (JSONL with ``motivation_app``), or seed tasks in Self-Instruct's format; None for the
            package's own seed tasks.
        held_out_count: number of seed tasks to select with
            :func:`~instructgym.envs.tasks.instruction.pool.evaluation_split`: these are the tasks that ``refine-af
            bootstrap`` never shows, a quarter of all tasks at most. 0: all tasks. Other formats ignore it.
        names: a file with one task name per line, for instance Super-NaturalInstructions' list of test tasks: only
            these tasks are returned, in this order; None: all.

    Returns:
        Tasks with distinct names; those of a folder sorted by name.

    Raises:
        InputError: if a file cannot be read, a task has no instances or lacks a reference (the message names file and
            field), two tasks have the same name, or a listed name is that of no task.
    """
    tasks = _read(None if path is None else Path(path), held_out_count)
    name, count = Counter(task.name for task in tasks).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path} has {count} tasks called {name!r}: give each a name of its own")
    if names is None:
        return tasks
    listed = dict.fromkeys(name.strip() for name in read_user_text(names).splitlines() if name.strip())
    by_name = {task.name: task for task in tasks}
    missing = [name for name in listed if name not in by_name]
    if missing or not listed:
        problem = f"{len(missing)} tasks that {path} has not, the first is {missing[0]!r}" if missing else "no task"
        raise InputError(f"{names} names {problem}")
    return [by_name[name] for name in listed]


def _read(path: Path | None, held_out_count: int) -> list[EvaluationTask]:
    """Reads the tasks of a file or folder in any of the formats."""
    if path is None:
        return _seed_tasks(load_tasks(None), held_out_count, "the package's seed tasks")
    if path.is_dir():
        files = sorted(path.glob("task*.json"))
        if not files:
            raise InputError(f"{path} holds no task*.json, as Super-NaturalInstructions calls its files")
        return [_natural_instructions_task(file) for file in files]
    # A JSON file with one object is a task of Super-NaturalInstructions; seed tasks are a list, or lines.
    if path.suffix == ".json" and read_user_text(path).lstrip().startswith("{"):
        return [_natural_instructions_task(path)]
    rows = read_rows(path)
    if rows and USER_ORIENTED in rows[0][1]:
        return [_user_oriented(where, row) for where, row in rows]
    return _seed_tasks(load_tasks(path), held_out_count, str(path))


def _seed_tasks(tasks: Sequence[Task], held_out_count: int, where: str) -> list[EvaluationTask]:
    """Returns the held-out ones of seed tasks, or all of them if ``held_out_count`` is 0."""
    if held_out_count and len(tasks) <= DEMONSTRATIONS:
        raise InputError(f"{where} holds {len(tasks)} tasks, too few to hold any out: take all, with --held-out 0")
    # `held_out` refuses to leave fewer tasks than a bootstrapping prompt shows.
    selected = evaluation_split(tasks, min(held_out_count, len(tasks) - DEMONSTRATIONS))[1] if held_out_count else tasks
    for task in selected:
        if not task.instances or not all(instance.output.strip() for instance in task.instances):
            raise InputError(f"{where}: task {task.id!r} needs 'instances' with an 'output' each that is not empty")
    return [
        EvaluationTask(task.id, task.instruction, tuple((i.input.strip(), (i.output.strip(),)) for i in task.instances))
        for task in selected
    ]


def _user_oriented(where: str, row: Mapping[str, Any]) -> EvaluationTask:
    return EvaluationTask(
        user_text(where, row, "id").strip(),
        user_text(where, row, "instruction").strip(),
        tuple(
            (input_text(place, instance), (user_text(place, instance, "output").strip(),))
            for place, instance in instances_of(where, row)
        ),
    )


def _natural_instructions_task(path: Path) -> EvaluationTask:
    """Reads a task of Super-NaturalInstructions; its name is that of its file."""
    try:
        content = json.loads(read_user_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is broken JSON: {error}; mend it or fetch it again") from error
    if not isinstance(content, dict) or "Definition" not in content or not isinstance(content.get("Instances"), list):
        raise InputError(
            f"{path} is no task of Super-NaturalInstructions: it needs 'Definition' and a list 'Instances'"
        )
    parts = _texts(str(path), content, "Definition")
    instances = [_natural_instance(f"{path} instance {k}", row) for k, row in enumerate(content["Instances"], start=1)]
    if not instances:
        raise InputError(f"{path}: field 'Instances' is empty")
    return EvaluationTask(path.stem, "\n".join(parts), tuple(instances))


def _natural_instance(where: str, row: Any) -> tuple[str, tuple[str, ...]]:
    """Returns the input of an instance and its distinct references."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is a {type(row).__name__}: make it an object with 'input' and 'output'")
    return input_text(where, row), tuple(dict.fromkeys(_texts(where, row, "output")))


def _texts(where: str, row: Mapping[str, Any], name: str) -> list[str]:
    """Returns the texts of a field that holds one or a list of them."""
    value = row.get(name)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise InputError(f"{where}: field {name!r} must be a text or a list of texts, not empty")
    return [user_text(where, {name: text}, name).strip() for text in texts]
