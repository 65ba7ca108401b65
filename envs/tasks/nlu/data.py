"""Rows of the language-understanding tasks, from local files, the hub or an installed package, and their prompts.

The splits are not the published ones, because the labels of GLUE's and SuperGLUE's test sets are hidden:

* ``test`` is the published development set (``dev.tsv``, ``val.jsonl``, the hub's validation split), to be used once;
* ``validation``, for tuning, is about a tenth of the published training set, at most 1000 rows, selected by a hash of
  the texts: it does not depend on the seed, and equal texts are never in both ``validation`` and ``train``;
* ``train`` is the rest of the published training set.

``rotten-tomatoes``, which has no published split, is split 80 / 10 / 10 % by the same hash.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ....llm_backends.errors import InputError, check_known
from ....llm_backends.records import check_encodable, read_user_rows, read_user_text
from ....rewards.texts.sentiment import packaged_reviews, text_hash
from ...tokens.episode import PromptExample
from ..instruction.seeds import SPLITS, check_limit
from .tasks import TASKS, Layout, NLUTask, check_layout, few_shot_header, get_task, is_hidden, render

RowT = TypeVar("RowT")

TRAIN_FILES = ("train.tsv", "train.jsonl")


class RowError(InputError):
    """One row that cannot be used: a torn line, or an empty text. A few in a large file are skipped, with a warning."""


class UnlabelledError(InputError):
    """A row without a gold label. Such rows are left out, with a warning: nothing can be learned or scored by them."""


def leave_out_unlabelled(
    read: Callable[[Any], RowT], rows: Iterable[Any], place: str, errors: list[RowError] | None = None
) -> list[RowT]:
    """Reads rows, and warns of the number of those without a gold label, which are left out.

    Args:
        read: reads one row; raises an UnlabelledError for one without a label.
        rows: the rows.
        place: the file or data set, for messages.
        errors: filled with the RowErrors of rows that cannot be used; None: the first one is raised.

    Raises:
        InputError: if no row has a label, and as ``read``.
    """
    labelled: list[RowT] = []
    unlabelled: list[UnlabelledError] = []
    for row in rows:
        try:
            labelled.append(read(row))
        except UnlabelledError as error:
            unlabelled.append(error)
        except RowError as error:
            if errors is None:
                raise
            errors.append(error)
    if unlabelled and not labelled:
        raise InputError(f"no row of {place} has a gold label; the first: {unlabelled[0]}")
    if unlabelled:
        warnings.warn(
            f"{len(unlabelled)} rows of {place} without a gold label were left out; the first: {unlabelled[0]}",
            stacklevel=2,
        )
    return labelled


def task_folder(task: NLUTask, data_dir: str | Path) -> Path | None:
    """Returns the task's own folder in a local copy, found by its name in any letter case; None if there is none.

    Raises:
        InputError: if ``data_dir`` is not a folder.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise InputError(f"no folder {root}: set --data-dir to a folder with {task.name}/train.tsv or the like")
    names = {name.casefold() for name in (task.name, *task.folders)}
    return next((path for path in sorted(root.iterdir()) if path.is_dir() and path.name.casefold() in names), None)


def find_file(task: NLUTask, part: str, data_dir: str | Path) -> Path | None:
    """Finds the file of a part, ``"train"`` or ``"test"``, in the task's folder or else in ``data_dir`` itself.

    Returns:
        The path; None for a task that comes with a package, if ``data_dir`` has no folder for it.

    Raises:
        InputError: if there is no such file, or ``data_dir`` is the folder of another task.
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


def read_task_rows(task: NLUTask, path: Path) -> list[tuple[str, dict[str, Any] | RowError]]:
    """Reads the rows of a TSV or JSONL file.

    TSV is split at tabs and line ends alone, because GLUE's files hold stray quotes. Blank lines are skipped.

    Returns:
        For each row its location, for error messages (``"FILE row 3"``), and its columns; a torn row is a RowError.

    Raises:
        InputError: if the file is empty or not UTF-8, or holds broken JSON.
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
    # A user's copy of a file without a header line may have one.
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
    """Flattens a nested row of SuperGLUE into one row per answer of MultiRC or query of ReCoRD; WSC gets its spans.

    Raises:
        InputError: if a nested row lacks a part.
    """
    try:
        nested = isinstance(row.get("passage"), Mapping)
        if task.name == "MultiRC":
            return _answers(row) if nested else [{**row, **_without_marks(row, "paragraph")}]
        if task.name == "ReCoRD":
            return _queries(row) if nested else [{**row, **_without_marks(row, "passage")}]
        if task.name == "WSC":
            flat = {**row, **row.get("target", {})}
            return [flat | _mark_pronoun(flat)]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where} is no row of {task.name} in SuperGLUE's layout: {error!r}; mend it") from error
    return [dict(row)]


def _answers(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns one flat row per answer of a nested MultiRC passage."""
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
    """Returns one flat row per query of a nested ReCoRD passage."""
    text = row["passage"]["text"]
    # The end of a span is the index of its last character.
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


def _without_marks(row: Mapping[str, Any], name: str) -> dict[str, str]:
    return {name: _plain(row[name])} if isinstance(row.get(name), str) else {}


def _plain(text: str) -> str:
    """Returns a passage without MultiRC's sentence marks and ReCoRD's highlight marks."""
    return re.sub(r"<b>Sent \d+: </b>|<br>|@highlight\b", " ", text)


def _mark_pronoun(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns WSC's text with asterisks around the pronoun to resolve, since the same pronoun may occur twice."""
    words, index, pronoun = str(row.get("text", "")).split(), row.get("span2_index"), row.get("span2_text")
    if not (isinstance(index, int) and isinstance(pronoun, str) and 0 <= index < len(words)):
        return {}
    if not words[index].casefold().startswith(pronoun.casefold()):
        return {}
    words[index] = f"*{words[index][: len(pronoun)]}*{words[index][len(pronoun) :]}"
    return {"text": " ".join(words)}


HELD_OUT_SHARE, HELD_OUT_LIMIT = 0.1, 1000
"""Size of ``validation``: share of the published training set, and rows at most."""
MAX_UNUSABLE_SHARE = 0.001
"""Share of a file's rows that may be unusable before they are an error."""
OFFLINE_TASK = "rotten-tomatoes"


def load_rows(
    task: NLUTask | str, split: str, data_dir: str | Path = "", limit: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Loads the rows of one task: a text per field, ``label`` as published, ``idx`` and a stable ``id``.

    A row of ReCoRD is a query with its ``entities`` and ``answers``; :func:`record_candidates` fills one in.

    Args:
        task: the task, or its name.
        split: ``"train"``, ``"validation"`` or ``"test"``, as the module defines them.
        data_dir: folder with ``TASK/train.tsv``, ``TASK/dev.tsv`` (GLUE) or ``TASK/train.jsonl``, ``TASK/val.jsonl``
            (SuperGLUE), or with these files themselves; empty: load from the hub.
        limit: number of rows to draw at random; those of a smaller limit are a subset of those of a larger one. None:
            all rows, in file order. Rows that are scored together (the answers to a question of MultiRC, a pair of
            AXg) are drawn together, so fewer rows than the limit may be returned, or one group that exceeds it.
        seed: seed of that draw.

    Raises:
        InputError: if the task or split is unknown, the split is empty or the task lacks it, the data cannot be
            loaded, or rows cannot be used; in a file, up to one unusable row in a thousand is skipped, with a warning.
    """
    task = get_task(task) if isinstance(task, str) else task
    check_known("split", split, SPLITS)
    if task.eval_only and split != "test":
        raise InputError(f"{task.name} is for evaluation alone: use the split 'test', and {task.shots_from} to train")
    check_limit(limit)
    part = "test" if split == "test" else "train"
    path = find_file(task, part, data_dir) if data_dir else None
    if path is not None:
        rows = _file_rows(task, path)
    elif task.name == OFFLINE_TASK:
        rows = [_row(task, raw, where, number) for number, (where, raw) in enumerate(packaged_reviews())]
        rows = [row for row in rows if int(_hash(task, row) * 10) in SPLITS[split]]
    else:
        rows = _hub_rows(task, part)
    for row in rows:
        row["id"] = f"{part}-{row['id']}"
    # The packaged reviews are split above. Everything else has its validation split in the published training set.
    if split != "test" and (path is not None or task.name != OFFLINE_TASK):
        rows = _split_training_rows(task, rows, split == "validation")
    if not rows:
        raise InputError(f"{task.name} has no rows for the split {split!r} in {path or 'its data'}: add rows")
    return rows if limit is None else _subset(task, rows, limit, seed)


def load_examples(
    tasks: str | Sequence[str],
    split: str = "train",
    data_dir: str | Path = "",
    limit: int | None = None,
    shots: int = 0,
    layout: Layout = "tagged",
    seed: int = 0,
) -> list[PromptExample]:
    """Loads prompts with their right answers for one task or for a mixture of tasks, one task after the other.

    Args:
        tasks: names, as a list or separated by commas: ``"SST-2,CoLA,RTE"``.
        split: ``"train"``, ``"validation"`` or ``"test"``, as the module defines them.
        data_dir: folder with the data, as in :func:`load_rows`; for a mixture it has to hold one folder per task.
        limit: rows per task, as in :func:`load_rows`.
        shots: number of solved training rows put before every prompt of a task, with the labels in turn. They depend
            on the seed alone, so all splits share them; they are left out of the training examples.
        layout: ``"tagged"`` or ``"plain"``.
        seed: seed of the rows drawn for the limit, of the shots, and of the candidates of ReCoRD.

    Returns:
        One example per row; for a query of ReCoRD, one per candidate in ``test`` and ``validation``, and a right and a
        wrong one in ``train``. ``metadata`` has ``task``, ``kind``, ``label`` (as published), ``choices`` and ``idx``,
        that of ReCoRD also ``candidate`` and ``answers``. If the label is hidden, ``reference`` is None.

    Raises:
        InputError: if :func:`load_rows` raises it, the layout is unknown, or there are too few rows for the shots.
    """
    check_layout(layout)
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks)]
    selected = [get_task(name) for name in names]
    if not selected or len(set(names)) < len(names):
        raise InputError(f"tasks {', '.join(names) or 'none'}: name at least one, and each once")
    if data_dir and len(selected) > 1:
        missing = [task.name for task in selected if task.hub[0] and task_folder(task, data_dir) is None]
        if missing:
            raise InputError(f"{data_dir} has no folder {missing[0]!r}: a mixture needs one folder per task")
    examples = []
    for task in selected:
        demonstrations = _shots(task, data_dir, shots, seed)
        header = few_shot_header(task, demonstrations, layout)
        shown = {row["id"] for row in demonstrations} if split == "train" else set()
        # With shots, the limit is applied after their removal, so that it counts the rows that remain.
        rows = load_rows(task, split, data_dir, None if shown else limit, seed)
        if shown:
            rows = [row for row in rows if row["id"] not in shown]
            rows = rows if limit is None else _subset(task, rows, limit, seed)
        for row in rows:
            asked = questions(task, row, seed if split == "train" else None)
            examples += [_example(task, question, header, layout) for question in asked]
    if not examples:
        raise InputError(f"no examples of {', '.join(names)} are left in the split {split!r}: use fewer shots")
    return examples


def questions(task: NLUTask, row: dict[str, Any], seed: int | None = None) -> list[dict[str, Any]]:
    """Returns the questions that a row asks: the row itself, and for ReCoRD one per candidate of the query.

    Args:
        task: the task of the row.
        row: the row; one of ReCoRD has ``query``, ``entities`` and ``answers``.
        seed: draws one right and one wrong entity of ReCoRD, as far as there are any, which depends on the seed and the
            row's id alone; None: all entities are candidates.

    Returns:
        Rows with a ``label``; those of ReCoRD have ``candidate``, the filled ``query``, and ``label`` True or False.
    """
    if task.name != "ReCoRD":
        return [row]
    answers = set(row["answers"])
    candidates = list(dict.fromkeys(row["entities"]))
    if seed is not None:
        rng = random.Random(f"{seed}/{row['id']}")
        # The answers may not be among the entities. Sorting makes the draw independent of the order of a set.
        right = [name for name in candidates if name in answers] or sorted(answers)
        wrong = [name for name in candidates if name not in answers]
        candidates = [rng.choice(names) for names in (right, wrong) if names]
    queries = {name: row["query"].replace("@placeholder", name) for name in candidates}
    return [
        {**row, "query": query, "candidate": name, "label": name in answers, "id": f"{row['id']}#{name}"}
        for name, query in queries.items()
    ]


def _example(task: NLUTask, row: Mapping[str, Any], header: str, layout: Layout) -> PromptExample:
    metadata = {"task": task.name, "kind": task.kind, "label": row["label"], "choices": list(task.words)}
    metadata |= {name: row[name] for name in ("idx", "candidate", "answers") if name in row}
    return PromptExample(
        id=f"{task.name}/{row['id']}",
        prompt=header + render(task, row, layout)[1],
        reference=task.answer(row["label"]),
        choices=task.words,
        metadata=metadata,
    )


def _shots(task: NLUTask, data_dir: str | Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Draws solved training rows, with the labels in turn."""
    if count < 0:
        raise InputError(f"{count} shots are too few: use 0 or more")
    if not count:
        return []
    source = get_task(task.shots_from or task.name)
    rows = load_rows(source, "train", data_dir, None, seed)
    random.Random(f"{seed}/shots").shuffle(rows)
    queues: dict[str, list[dict[str, Any]]] = {word: [] for word in source.words or ("",)}
    for row in rows:
        for filled in questions(source, row, seed):
            word = source.answer(filled["label"]) if source.words else ""
            # The query's own id, without the candidate, so that the whole query is left out of the training rows.
            queues[word or ""].append({**filled, "id": row["id"]})
    # Round robin over the labels, for as long as a label has rows left.
    shots: list[dict[str, Any]] = []
    while len(shots) < count:
        left = [queue for queue in queues.values() if queue]
        if not left:
            raise InputError(f"{source.name} has {len(shots)} training rows, too few for {count} shots")
        shots += [queue.pop(0) for queue in left[: count - len(shots)]]
    return shots


def _file_rows(task: NLUTask, path: Path) -> list[dict[str, Any]]:
    """Reads and checks the rows of a file, skipping a few unusable ones with a warning."""

    def read(numbered: tuple[int, tuple[str, dict[str, Any] | RowError]]) -> dict[str, Any]:
        number, (where, raw) = numbered
        if isinstance(raw, RowError):
            raise raw
        return _row(task, raw, where, number)

    errors: list[RowError] = []
    rows = leave_out_unlabelled(read, enumerate(read_task_rows(task, path)), str(path), errors)
    if len(errors) > MAX_UNUSABLE_SHARE * (len(rows) + len(errors)):
        raise errors[0]
    if errors:  # the published QQP has some
        warnings.warn(f"{len(errors)} rows of {path} were left out; the first: {errors[0]}", stacklevel=2)
    return rows


def _row(task: NLUTask, raw: Mapping[str, Any], where: str, number: int, strict: bool = True) -> dict[str, Any]:
    """Checks one row and returns it with the task's field names; ``strict`` raises a RowError for an empty text."""
    row: dict[str, Any] = {}
    for name in task.fields:
        value = raw[_column(task, name, raw, where)]
        if strict and not str("" if value is None else value).strip():
            raise RowError(f"{where}: the field {name!r} of {task.name} is empty: fill it in or delete the row")
        if isinstance(value, list | Mapping):
            kind = type(value).__name__
            raise InputError(f"{where}: the field {name!r} of {task.name} is a {kind}: make it a text")
        row[name] = "" if value is None else str(value)
        check_encodable(f"{where}: the field {name!r}", row[name])
    row["idx"] = raw.get("idx", number)
    idx = row["idx"].values() if isinstance(row["idx"], Mapping) else [number]
    row["id"] = "-".join(map(str, idx))
    if task.name == "ReCoRD":
        missing = [name for name in ("entities", "answers") if not isinstance(raw.get(name), list)]
        if missing or not (raw["entities"] and raw["answers"]):
            raise InputError(f"{where}: ReCoRD needs the lists 'entities' and 'answers', not empty: add them")
        return row | {"entities": raw["entities"], "answers": raw["answers"], "label": None}
    # Sets for evaluation alone may be published without a label column.
    optional = task.eval_only and not any(name in raw for name in task.columns.get("label", ("label",)))
    label = None if optional else raw[_column(task, "label", raw, where)]
    if task.answer(label) is None and not (task.eval_only and is_hidden(label)):
        allowed = ", ".join(task.label_map) or "a number from 0 to 5"
        refusal = UnlabelledError if is_hidden(label) else InputError
        raise refusal(f"{where}: the label {label!r} is none of {task.name}: use {allowed}")
    row["label"] = None if is_hidden(label) else label
    return row


def _column(task: NLUTask, name: str, raw: Mapping[str, Any], where: str) -> str:
    """Returns the column of a raw row that holds a field, or raises InputError."""
    names = task.columns.get(name, (name,))
    match = next((column for column in names if column in raw), None)
    if match is None:
        has = ", ".join(map(str, raw))
        raise InputError(f"{where}: {task.name} needs the column {' or '.join(map(repr, names))}; it has {has}")
    return match


def _hub_rows(task: NLUTask, part: str) -> list[dict[str, Any]]:
    path, config = task.hub
    split = task.test_split if part == "test" else task.train_split
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{task.name} comes from the hub: pip install datasets, or pass --data-dir") from error
    try:
        source = datasets.load_dataset(path, config, split=split)
    except Exception as error:  # the hub's failures have no common base
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot load {path} ({config}, {split}): {reason}; or pass --data-dir") from error
    name = f"{path} ({config}, {split})"
    nested = [(number, flat) for number, raw in enumerate(source) for flat in unnest(task, raw, f"{name} row {number}")]
    rows = leave_out_unlabelled(
        lambda row: _row(task, row[1], f"{name} row {row[0]}", row[0], strict=False), nested, name
    )
    # The hub's copies hold a few empty texts: they count for the score but are useless for training.
    return [row for row in rows if part == "test" or all(row[field].strip() for field in task.fields)]


def _hash(task: NLUTask, row: Mapping[str, Any]) -> float:
    """Returns a number in [0, 1) that depends on the texts alone."""
    # The separator keeps ("ab", "c") and ("a", "bc") apart.
    return text_hash("\x1f".join(row[name] for name in ([task.group_by] if task.group_by else task.fields)))


def _split_training_rows(task: NLUTask, rows: Sequence[dict[str, Any]], validation: bool) -> list[dict[str, Any]]:
    """Returns the rows of the split ``validation`` or, if ``validation`` is False, those of ``train``."""
    hashes = [_hash(task, row) for row in rows]
    # Below the bound are a tenth of the hash space and at most HELD_OUT_LIMIT rows. Equal texts have equal hashes, so
    # they are on the same side.
    bound = min([HELD_OUT_SHARE, *sorted(hashes)[HELD_OUT_LIMIT : HELD_OUT_LIMIT + 1]])
    return [row for row, value in zip(rows, hashes, strict=True) if (value < bound) is validation]


def _subset(task: NLUTask, rows: Sequence[dict[str, Any]], limit: int, seed: int) -> list[dict[str, Any]]:
    """Draws about ``limit`` rows; rows that are scored together are drawn together."""
    units: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        units.setdefault(scored_with(task, row), []).append(row)
    keys = list(units)
    random.Random(f"{seed}/limit").shuffle(keys)
    subset: list[dict[str, Any]] = []
    # Stopping at the first unit that does not fit, not skipping it, makes a smaller limit a subset of a larger one.
    for key in keys:
        if subset and len(subset) + len(units[key]) > limit:
            break
        subset += units[key]
    return subset


def scored_with(task: NLUTask, row: Mapping[str, Any]) -> Any:
    """Returns the key of the rows that a metric scores together with this one.

    Raises:
        InputError: if the ``idx`` of a row of AXg is not a number.
    """
    if task.name == "MultiRC" and isinstance(row["idx"], Mapping):
        return row["idx"]["paragraph"], row["idx"]["question"]
    if task.name == "AXg":
        try:
            return int(row["idx"]) // 2  # the rows 2k and 2k + 1 are a pair
        except (TypeError, ValueError):
            raise InputError(f"a row of AXg has the idx {row['idx']!r}: number the rows, pairs together") from None
    return row["id"]
