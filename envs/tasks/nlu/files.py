"""Local copies of GLUE (TSV) and SuperGLUE (JSONL): finding the file, reading its rows, flattening nested ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....llm_backends.errors import InputError
from ....llm_backends.records import read_user_rows, read_user_text
from .tasks import TASKS, NLUTask

TRAIN_FILES = ("train.tsv", "train.jsonl")


class RowError(InputError):
    """One row that cannot be used: torn, or without a text. A few in a large file are left out, with a warning."""


def task_folder(task: NLUTask, data_dir: str | Path) -> Path | None:
    """The task's own folder in a local copy, in any case of its letters; None where there is none.

    Raises:
        InputError: where ``data_dir`` is no folder.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise InputError(f"no folder {root}: set --data-dir to a folder with {task.name}/train.tsv or the like")
    names = {name.casefold() for name in (task.name, *task.folders)}
    return next((path for path in sorted(root.iterdir()) if path.is_dir() and path.name.casefold() in names), None)


def find_file(task: NLUTask, part: str, data_dir: str | Path) -> Path | None:
    """The file of a part, ``"train"`` or ``"test"``, in the task's folder or else in ``data_dir`` itself.

    Returns:
        The path; None for a task that a package brings, where ``data_dir`` has no folder for it.

    Raises:
        InputError: where there is no such file, or ``data_dir`` is the folder of another task.
    """
    folder = task_folder(task, data_dir)
    if folder is None and not task.hub[0]:
        return None
    place = folder or Path(data_dir)
    owners = {name.casefold() for other in TASKS.values() for name in (other.name, *other.folders)}
    own = {name.casefold() for name in (task.name, *task.folders)}
    if folder is None and place.resolve().name.casefold() in owners - own:
        raise InputError(f"{place} is the folder of another task: set --data-dir to one with a folder {task.name}")
    names = TRAIN_FILES if part == "train" else task.test_files
    path = next((place / name for name in names if (place / name).is_file()), None)
    if path is None:
        raise InputError(f"{place} has no file {' or '.join(names)} for {task.name}: add it or check --data-dir")
    return path


def read_rows(task: NLUTask, path: Path) -> list[tuple[str, dict[str, Any] | RowError]]:
    """The rows of a TSV or JSONL file, each with the words that say where it stands; a torn one is its error.

    TSV is split at tabs and line ends alone: GLUE's files hold stray quotes. Blank lines are passed over.

    Raises:
        InputError: for a file that is empty or not UTF-8, and for broken JSON.
    """
    rows: Rows = list(read_user_rows(path)) if path.suffix == ".jsonl" else _tsv(task, path)
    return [
        (where, flat)
        for where, row in rows
        for flat in ([row] if isinstance(row, RowError) else unnest(task, row, where))
    ]


Rows = list[tuple[str, dict[str, Any] | RowError]]


def _tsv(task: NLUTask, path: Path) -> Rows:
    lines = read_user_text(path).replace("\r\n", "\n").rstrip("\n").split("\n")
    if not lines[0].strip():
        raise InputError(f"{path} is empty: put the rows of {task.name} there")
    header, start = lines[0].split("\t"), 1
    if task.headerless and not {"sentence", "label"} <= set(header):
        header, start = list(task.headerless), 0
    rows: Rows = []
    for number, line in enumerate(lines[start:], start=start + 1):
        cells, where = line.split("\t"), f"{path} row {number}"
        if len(cells) < len(header) and line.strip():
            torn = f"it has {len(cells)} of {len(header)} columns, {header[len(cells)]!r} is missing"
            rows.append((where, RowError(f"{where} is torn: {torn}; mend or delete the row")))
        elif line.strip():
            rows.append((where, dict(zip(header, cells, strict=False))))
    return rows


def unnest(task: NLUTask, row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """SuperGLUE's nested rows as flat ones: an answer of MultiRC, a query of ReCoRD, the spans of WSC.

    Raises:
        InputError: for a nested row that lacks a part.
    """
    try:
        if task.name == "MultiRC":
            return _answers(row) if isinstance(row.get("passage"), Mapping) else [{**row, **_tidy(row, "paragraph")}]
        if task.name == "ReCoRD":
            return _queries(row) if isinstance(row.get("passage"), Mapping) else [{**row, **_tidy(row, "passage")}]
        if task.name == "WSC":
            flat = {**row, **row.get("target", {})}
            return [flat | _marked(flat)]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where} is no row of {task.name} in SuperGLUE's layout: {error!r}; mend it") from error
    return [dict(row)]


def _answers(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "passage": _plain(row["passage"]["text"]),
            "question": question["question"],
            "answer": answer["text"],
            "idx": {"paragraph": row["idx"], "question": question["idx"], "answer": answer["idx"]},
        }
        | ({"label": answer["label"]} if "label" in answer else {})
        for question in row["passage"]["questions"]
        for answer in question["answers"]
    ]


def _queries(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    text = row["passage"]["text"]
    # The end of a span is its last character.
    entities = [text[span["start"] : span["end"] + 1] for span in row["passage"]["entities"]]
    return [
        {
            "passage": _plain(text),
            "query": query["query"],
            "entities": list(dict.fromkeys(entities)),
            "answers": list(dict.fromkeys(answer["text"] for answer in query.get("answers", ()))),
            "idx": {"passage": row["idx"], "query": query["idx"]},
        }
        for query in row["qas"]
    ]


def _tidy(row: Mapping[str, Any], name: str) -> dict[str, str]:
    return {name: _plain(row[name])} if isinstance(row.get(name), str) else {}


def _plain(text: str) -> str:
    """A passage without MultiRC's sentence marks and ReCoRD's highlight marks."""
    return re.sub(r"<b>Sent \d+: </b>|<br>|@highlight\b", " ", text)


def _marked(row: Mapping[str, Any]) -> dict[str, str]:
    """WSC's text with asterisks around the pronoun meant, as the same pronoun may occur twice."""
    words, index, pronoun = str(row.get("text", "")).split(), row.get("span2_index"), row.get("span2_text")
    if not (isinstance(index, int) and isinstance(pronoun, str) and 0 <= index < len(words)):
        return {}
    if not words[index].casefold().startswith(pronoun.casefold()):
        return {}
    words[index] = f"*{words[index][: len(pronoun)]}*{words[index][len(pronoun) :]}"
    return {"text": " ".join(words)}
