"""A labelled task of one's own, described in a TOML file beside its examples."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from ....llm_backends.errors import InputError
from ....llm_backends.records import read_user_rows, read_user_text, user_text
from ....rewards.prompt_scoring.task_prompt import BLOCK, TEMPLATE, LabelledExample
from ....rewards.texts.sentiment import text_hash
from ..instruction.seeds import SPLITS

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
        for example, where in _examples(path.parent / str(task.pop(name)), task):
            split = name if name != "data" else _split(example.text)
            if seen.setdefault(example.text, split) != split:
                raise InputError(f"{where}: the text stands in the split {seen[example.text]!r} as well: keep one")
            splits[split].append(example)
    return task, splits


def _split(text: str) -> str:
    return next(name for name, part in SPLITS.items() if int(text_hash(text) * 10) in part)


def _examples(path: Path, task: dict[str, Any]) -> list[tuple[LabelledExample, str]]:
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
