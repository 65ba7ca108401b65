"""Held-out tasks on which fine-tuned models are compared: instructions with inputs and reference outputs.

Formats: Super-NaturalInstructions (Wang et al. 2022, arXiv 2204.07705), the 252 user-oriented instructions of
Self-Instruct (Wang et al., arXiv 2212.10560), and Self-Instruct's seed tasks, of which those that bootstrapping keeps
out of its prompts.
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
from .data import instances_of, optional_text, read_rows
from .pool import DEMONSTRATIONS, Task, evaluation_split, load_tasks

HELD_OUT = 40

USER_ORIENTED = "motivation_app"
"""The field by which rows of the user-oriented instructions are told from seed tasks."""


@dataclass(frozen=True)
class EvaluationTask:
    """A task with its instances."""

    name: str
    instruction: str
    instances: tuple[tuple[str, tuple[str, ...]], ...]
    """Pairs of an input, empty where the task needs none, and its references, at least one."""


def load_evaluation_tasks(
    path: str | Path | None = None, held: int = HELD_OUT, names: str | Path | None = None
) -> list[EvaluationTask]:
    """Held-out tasks from local files.

    Args:
        path: a task of Super-NaturalInstructions (``taskNNN_*.json``) or a folder of them, the user-oriented
            instructions (JSONL with ``motivation_app``), or seed tasks in Self-Instruct's format; None for the
            package's own seed tasks.
        held: of seed tasks, take this many by
            :func:`~instructgym.envs.tasks.instruction.pool.evaluation_split`, which are those that ``refine-af
            bootstrap`` never shows: a quarter of all at most; 0 takes all.
        names: a file with one task name a line, for instance Super-NaturalInstructions' list of test tasks: take those
            alone.

    Returns:
        Tasks with distinct names; those of a folder sorted by name.

    Raises:
        InputError: for files that cannot be read, a task without instances or a reference, naming file and field, two
            tasks of one name, and names that no task has.
    """
    tasks = _read(None if path is None else Path(path), held)
    name, count = Counter(task.name for task in tasks).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path} has {count} tasks called {name!r}: give each a name of its own")
    if names is None:
        return tasks
    wanted = dict.fromkeys(name.strip() for name in read_user_text(names).splitlines() if name.strip())
    by_name = {task.name: task for task in tasks}
    missing = [name for name in wanted if name not in by_name]
    if missing or not wanted:
        what = f"{len(missing)} tasks that {path} has not, the first is {missing[0]!r}" if missing else "no task"
        raise InputError(f"{names} names {what}")
    return [by_name[name] for name in wanted]


def _read(path: Path | None, held: int) -> list[EvaluationTask]:
    if path is None:
        return _seed_tasks(load_tasks(None), held, "the package's seed tasks")
    if path.is_dir():
        files = sorted(path.glob("task*.json"))
        if not files:
            raise InputError(f"{path} holds no task*.json, as Super-NaturalInstructions calls its files")
        return [_natural(file) for file in files]
    if path.suffix == ".json" and read_user_text(path).lstrip().startswith("{"):
        return [_natural(path)]
    rows = read_rows(path)
    if rows and USER_ORIENTED in rows[0][1]:
        return [_user_oriented(where, row) for where, row in rows]
    return _seed_tasks(load_tasks(path), held, str(path))


def _seed_tasks(tasks: Sequence[Task], held: int, where: str) -> list[EvaluationTask]:
    if held and len(tasks) <= DEMONSTRATIONS:
        raise InputError(f"{where} holds {len(tasks)} tasks, too few to hold any out: take all, with --held-out 0")
    chosen = evaluation_split(tasks, min(held, len(tasks) - DEMONSTRATIONS))[1] if held else tasks
    for task in chosen:
        if not task.instances or not all(instance.output.strip() for instance in task.instances):
            raise InputError(f"{where}: task {task.id!r} needs 'instances' with an 'output' each that is not empty")
    return [
        EvaluationTask(task.id, task.instruction, tuple((i.input.strip(), (i.output.strip(),)) for i in task.instances))
        for task in chosen
    ]


def _user_oriented(where: str, row: Mapping[str, Any]) -> EvaluationTask:
    return EvaluationTask(
        user_text(where, row, "id").strip(),
        user_text(where, row, "instruction").strip(),
        tuple(
            (optional_text(place, one, "input"), (user_text(place, one, "output").strip(),))
            for place, one in instances_of(where, row)
        ),
    )


def _natural(path: Path) -> EvaluationTask:
    """A task of Super-NaturalInstructions, called by its file."""
    try:
        content = json.loads(read_user_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is broken JSON: {error}; mend it or fetch it again") from error
    if not isinstance(content, dict) or "Definition" not in content or not isinstance(content.get("Instances"), list):
        raise InputError(
            f"{path} is no task of Super-NaturalInstructions: it needs 'Definition' and a list 'Instances'"
        )
    definition = content["Definition"]
    texts = [definition] if isinstance(definition, str) else definition
    if not isinstance(texts, list) or not texts:
        raise InputError(f"{path}: field 'Definition' must be a text or a list of texts")
    parts = [user_text(str(path), {"Definition": text}, "Definition").strip() for text in texts]
    instances = [_natural_instance(f"{path} instance {k}", one) for k, one in enumerate(content["Instances"], start=1)]
    if not instances:
        raise InputError(f"{path}: field 'Instances' is empty")
    return EvaluationTask(path.stem, "\n".join(parts), tuple(instances))


def _natural_instance(where: str, row: Any) -> tuple[str, tuple[str, ...]]:
    if not isinstance(row, dict):
        raise InputError(f"{where} is a {type(row).__name__}: make it an object with 'input' and 'output'")
    outputs = row.get("output")
    texts = [outputs] if isinstance(outputs, str) else outputs
    if not isinstance(texts, list) or not texts:
        raise InputError(f"{where}: field 'output' must be a list of texts, not empty")
    references = [user_text(where, {"output": text}, "output").strip() for text in texts]
    return optional_text(where, row, "input"), tuple(dict.fromkeys(references))
