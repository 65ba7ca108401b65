"""GLUE and SuperGLUE as text generation: prompts, verbalizers, label maps, metrics and hub names of the tasks.

``prompts/nlu.toml`` has one table per task, of the fields of :class:`NLUTask`.

Each task has two layouts. ``tagged``: a header that names the task and the required form, the filled input, and an
opened judgement tag; the response is ``" Positive </Judgement>"``. ``plain``: the input and a cue such as
``"Sentiment:"``; the response is ``" Positive"`` and a line end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from ....llm_backends.errors import InputError, check_known
from ....llm_backends.prompting import fill, load_prompts, one_line
from ....rewards.ground_truth import HIGH, LOW

Layout = Literal["tagged", "plain"]

OPEN_TAG = "<Judgement>"
CLOSE_TAG = "</Judgement>"
STOPS: dict[str, str] = {"tagged": CLOSE_TAG, "plain": "\n"}
"""Maps a layout to the stop string of its responses."""


@dataclass(frozen=True)
class NLUTask:
    """One task: how its rows are turned into prompts, and its labels into words."""

    name: str
    suite: str
    """``GLUE``, ``SuperGLUE`` or ``offline``; :data:`SUITES` lists the members of each (RTE is in two)."""
    description: str
    """The decision that the task asks for, in one sentence."""
    template: str
    """The input's text, with a placeholder ``{name}`` for every field."""
    cue: str
    """The words before the answer in the plain layout, without their colon."""
    wording: str
    """Name of the task that this wording was written for; instructions of ``prompt_tasks.toml`` stand under it."""
    words: tuple[str, ...] = ()
    """The allowed answers (verbalizers), the positive class first; empty for a regression task."""
    label_map: Mapping[str, str] = field(default_factory=dict)
    """Maps a raw label of GLUE's TSV, SuperGLUE's JSONL or the hub, as text, to its word."""
    kind: Literal["label", "regression"] = "label"
    metrics: tuple[str, ...] = ("accuracy",)
    """Names of the official metrics, the main one first."""
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Maps a field (or ``label``) to the columns that may hold it; a field that is absent has a column of its name."""
    headerless: tuple[str, ...] = ()
    """The columns of a TSV file without a header line; empty if the task's files have one."""
    hub: tuple[str, str] = ("", "")
    """Path and configuration for ``datasets.load_dataset``; empty for a task that comes with a package."""
    train_split: str = "train"
    """Hub split to train on; empty for a set that is for evaluation only."""
    test_split: str = "validation"
    """Hub split to report on, usually the validation split: the labels of the test splits are hidden."""
    folders: tuple[str, ...] = ()
    """Names that the task's folder in a local copy may have, besides the task's own name."""
    test_files: tuple[str, ...] = ("dev.tsv", "val.jsonl", "dev.jsonl", "validation.jsonl")
    """Local files to report on, in order of preference."""
    shots_from: str = ""
    """Task whose training rows serve as demonstrations; empty: the task's own."""
    group_by: str = ""
    """Field whose equal values are always in one split, train or validation; empty: all fields together."""
    labelled: bool = True
    """False if the public copy has no labels, so that predictions can be made but not scored."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the text fields of a row, in the order of the prompt."""
        return tuple(re.findall(r"\{(\w+)\}", self.template))

    @property
    def eval_only(self) -> bool:
        """Whether the task has no training rows."""
        return not self.train_split

    @property
    def header(self) -> str:
        """The description and the required form: the first line of all tagged prompts, with its line end."""
        if self.kind == "regression":
            return f"{self.description} Reply with one decimal, in the form {OPEN_TAG} 2.5 {CLOSE_TAG}.\n"
        forms = [f"{OPEN_TAG} {word} {CLOSE_TAG}" for word in self.words]
        return f"{self.description} Reply in the form {', '.join(forms[:-1])} or {forms[-1]}.\n"

    def answer(self, raw: Any) -> str | None:
        """Returns the word (or number, with one decimal) for a raw label; None if the label is hidden or unknown."""
        if is_hidden(raw):
            return None
        if self.kind == "label":
            return self.label_map.get(label_key(raw))
        try:
            value = float(raw)
        except (TypeError, ValueError):
            return None
        return f"{value:.1f}" if LOW <= value <= HIGH else None


def label_key(raw: Any) -> str:
    """Returns a raw label as the label maps write it: ``True`` or ``False``, integers without a decimal point."""
    # The same label is an integer, a float, a boolean or a text, depending on the file format.
    key = str(int(raw)) if isinstance(raw, float) and raw.is_integer() else str(raw).strip()
    return key.capitalize() if key.casefold() in ("true", "false") else key


def is_hidden(raw: Any) -> bool:
    """Returns whether a raw label means that there is none: absent, empty, -1 as on the hub, or - as in MultiNLI."""
    return raw is None or label_key(raw).casefold() in ("", "-1", "-", "nan", "null", "none")


def _frozen(value: Any) -> Any:
    """Returns an entry of a TOML file with tuples in place of lists."""
    if isinstance(value, dict):
        return {key: _frozen(part) for key, part in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _load_tasks() -> dict[str, NLUTask]:
    """Reads the tasks of ``nlu.toml``, in the order of the file."""
    entries: dict[str, dict[str, Any]] = {}
    for name, table in load_prompts(__package__, "nlu").items():
        own = {key: _frozen(value) for key, value in table.items() if key != "like"}
        entries[name] = entries.get(table.get("like", ""), {"wording": name}) | own
    return {name: NLUTask(name, **entry) for name, entry in entries.items()}


TASKS: dict[str, NLUTask] = _load_tasks()
"""Maps a name to its task. ``MNLI-mm`` is MNLI's mismatched evaluation set; ``rotten-tomatoes`` needs no download."""

SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "GLUE": tuple(task.name for task in TASKS.values() if task.suite == "GLUE"),
        # RTE belongs to both suites; the table lists it under GLUE.
        "SuperGLUE": (*(task.name for task in TASKS.values() if task.suite == "SuperGLUE"), "RTE"),
        "offline": ("rotten-tomatoes",),
    }
)
"""Maps a suite to the names of its tasks."""


def get_task(name: str) -> NLUTask:
    """Returns the task of that name.

    Raises:
        InputError: if the name is unknown; the message lists the known ones.
    """
    check_known("task", name, TASKS)
    return TASKS[name]


def render(task: NLUTask | str, row: Mapping[str, Any], layout: Layout = "tagged") -> tuple[str, str]:
    """Returns the prompt of a row in two parts, to be joined without a separator.

    Args:
        task: the task, or its name.
        row: a text for each of the task's fields.
        layout: ``"tagged"`` or ``"plain"``.

    Returns:
        The header, which all prompts of the task share (empty in the plain layout), and the body, which ends with the
        opened tag or the cue.

    Raises:
        InputError: if the task or layout is unknown, or the row lacks a field.
    """
    task = get_task(task) if isinstance(task, str) else task
    check_layout(layout)
    missing = [name for name in task.fields if name not in row]
    if missing:
        raise InputError(f"a row of {task.name} lacks the field {missing[0]!r}: it has {', '.join(row) or 'none'}")
    filled = fill(task.template, {name: one_line(str(row[name])) for name in task.fields})
    return (task.header, f"{filled}\n{OPEN_TAG}") if layout == "tagged" else ("", f"{filled}\n{task.cue}:")


def response_text(word: str, layout: Layout = "tagged") -> str:
    """Returns the full text of a response that answers ``word``, with its stop string: ``" Positive </Judgement>"``."""
    check_layout(layout)
    return f" {word} {CLOSE_TAG}" if layout == "tagged" else f" {word}\n"


def few_shot_header(task: NLUTask | str, rows: Sequence[Mapping[str, Any]], layout: Layout = "tagged") -> str:
    """Returns the header followed by solved rows, the common beginning of all few-shot prompts of a task.

    Args:
        task: the task, or its name.
        rows: labelled rows; those of ReCoRD with a candidate filled in.
        layout: ``"tagged"`` or ``"plain"``.

    Raises:
        InputError: if the task or layout is unknown, or a row has no label of the task.
    """
    task = get_task(task) if isinstance(task, str) else task
    check_layout(layout)
    parts = [task.header if layout == "tagged" else ""]
    for row in rows:
        word = task.answer(row.get("label"))
        if word is None:
            raise InputError(f"a demonstration of {task.name} has the label {row.get('label')!r}: use a labelled row")
        parts.append(f"{render(task, row, layout)[1]}{response_text(word, layout)}\n")
    return "".join(parts)


def check_layout(layout: str) -> None:
    """Raises an InputError if the layout is unknown."""
    check_known("layout", layout, STOPS)
