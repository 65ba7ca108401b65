"""GLUE and SuperGLUE as text generation: one table of prompts, words, label maps, metrics and hub names.

Two layouts of the same tasks. ``tagged``: a header that names the task and the required form, the filled input, and an
opened judgement tag; the response is ``" Positive </Judgement>"``. ``plain``: the input and a cue such as
``"Sentiment:"``; the response is ``" Positive"`` and a line end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from ....llm_backends.errors import InputError
from ....llm_backends.prompting import fill, load_prompts, one_line
from ....rewards.ground_truth import HIGH, LOW

Layout = Literal["tagged", "plain"]

OPEN_TAG = "<Judgement>"
CLOSE_TAG = "</Judgement>"
STOPS: dict[str, str] = {"tagged": CLOSE_TAG, "plain": "\n"}
"""Layout to the stop string of its responses."""


@dataclass(frozen=True)
class NLUTask:
    """One task: how its rows become prompts, and their labels words."""

    name: str
    suite: str
    """``GLUE``, ``SuperGLUE`` or ``offline``; :data:`SUITES` lists the members of each, RTE being in two."""
    wording: str
    """Name of its table in ``prompts/nlu.toml``."""
    words: tuple[str, ...] = ()
    """The allowed answers, the positive class first; none for a regression task."""
    label_map: Mapping[str, str] = field(default_factory=dict)
    """Raw label as GLUE's TSV, SuperGLUE's JSONL or the hub has it, as text, to word."""
    kind: Literal["label", "regression"] = "label"
    metrics: tuple[str, ...] = ("accuracy",)
    """Names of the official metrics, the main one first."""
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Field (or ``label``) to the columns that may hold it, where that is not a column of the field's own name."""
    headerless: tuple[str, ...] = ()
    """The columns of a TSV file without a header line."""
    hub: tuple[str, str] = ("", "")
    """Path and configuration for ``datasets.load_dataset``."""
    train_split: str = "train"
    """Hub split to train on; empty for sets that are for evaluation alone."""
    test_split: str = "validation"
    """Hub split to report on: the labels of GLUE's and SuperGLUE's test splits are hidden."""
    folders: tuple[str, ...] = ()
    """Names of its folder in a local copy, beside the task's own name."""
    test_files: tuple[str, ...] = ("dev.tsv", "val.jsonl", "dev.jsonl", "validation.jsonl")
    """Local files to report on, in order of preference."""
    shots_from: str = ""
    """Task whose training rows serve as demonstrations, where it has none itself."""
    group_by: str = ""
    """Field whose equal values never straddle the train and validation splits; all fields where empty."""
    labelled: bool = True
    """False where the public copy has no labels, so that predictions can be made but not scored."""

    @property
    def template(self) -> str:
        """The filled input, with a place for every field."""
        return load_prompts(__package__, "nlu")[self.wording]["input"]

    @property
    def cue(self) -> str:
        """What the plain layout puts before the answer."""
        return load_prompts(__package__, "nlu")[self.wording]["cue"]

    @property
    def description(self) -> str:
        """What to decide, in one sentence."""
        return load_prompts(__package__, "nlu")[self.wording]["description"]

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the texts of a row, in the order of the prompt."""
        return tuple(re.findall(r"\{(\w+)\}", self.template))

    @property
    def eval_only(self) -> bool:
        """Whether there is nothing to train on."""
        return not self.train_split

    @property
    def header(self) -> str:
        """The description with the required form: the shared beginning of all tagged prompts, with its line end."""
        if self.kind == "regression":
            return f"{self.description} Reply with one decimal, in the form {OPEN_TAG} 2.5 {CLOSE_TAG}.\n"
        forms = [f"{OPEN_TAG} {word} {CLOSE_TAG}" for word in self.words]
        return f"{self.description} Reply in the form {', '.join(forms[:-1])} or {forms[-1]}.\n"

    def answer(self, raw: Any) -> str | None:
        """The word (or number, with one decimal) for a raw label; None where the label is hidden or unknown."""
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
    """A raw label as the label maps write it: booleans as ``True`` and ``False``, integers without a point."""
    key = str(int(raw)) if isinstance(raw, float) and raw.is_integer() else str(raw).strip()
    return key.capitalize() if key.casefold() in ("true", "false") else key


def is_hidden(raw: Any) -> bool:
    """Whether a raw label says that there is none: absent, empty, or -1 as the hub writes it."""
    return raw is None or label_key(raw) in ("", "-1")


_YES_NO = ("Yes", "No")
_NLI = ("Entailment", "Neutral", "Contradiction")
_NLI_NAMES = {"entailment": "Entailment", "neutral": "Neutral", "contradiction": "Contradiction"}
_ENTAILED = {"entailment": "Yes", "not_entailment": "No", "0": "Yes", "1": "No"}
_TRUTH = {"True": "Yes", "False": "No", "1": "Yes", "0": "No"}
_PAIR = {"sentence1": ("sentence1", "premise"), "sentence2": ("sentence2", "hypothesis")}
_PREMISE = {
    "premise": ("premise", "sentence1"),
    "hypothesis": ("hypothesis", "sentence2"),
    "label": ("gold_label", "label"),
}
_GLUE, _SUPERGLUE = "nyu-mll/glue", "aps/super_glue"

_SST2 = NLUTask(
    "SST-2",
    "GLUE",
    "SST-2",
    words=("Positive", "Negative"),
    label_map={"1": "Positive", "0": "Negative"},
    hub=(_GLUE, "sst2"),
)
_MRPC = NLUTask(
    "MRPC",
    "GLUE",
    "MRPC",
    words=_YES_NO,
    label_map={"1": "Yes", "0": "No"},
    metrics=("f1", "accuracy"),
    columns={
        "sentence1": ("sentence1", "#1 String"),
        "sentence2": ("sentence2", "#2 String"),
        "label": ("label", "Quality"),
    },
    hub=(_GLUE, "mrpc"),
)
_MNLI = NLUTask(
    "MNLI",
    "GLUE",
    "MNLI",
    words=_NLI,
    label_map=_NLI_NAMES | {"0": "Entailment", "1": "Neutral", "2": "Contradiction"},
    columns=_PREMISE,
    hub=(_GLUE, "mnli"),
    test_split="validation_matched",
    test_files=("dev_matched.tsv", "dev_matched.jsonl", "val.jsonl"),
)
_RTE = NLUTask("RTE", "GLUE", "RTE", words=_YES_NO, label_map=_ENTAILED, columns=_PAIR, hub=(_GLUE, "rte"))

_TABLE = (
    NLUTask(
        "CoLA",
        "GLUE",
        "CoLA",
        words=_YES_NO,
        label_map={"1": "Yes", "0": "No"},
        metrics=("mcc",),
        headerless=("source", "label", "star", "sentence"),
        hub=(_GLUE, "cola"),
    ),
    _SST2,
    _MRPC,
    replace(_MRPC, name="QQP", wording="QQP", columns={"label": ("label", "is_duplicate")}, hub=(_GLUE, "qqp")),
    NLUTask(
        "STS-B",
        "GLUE",
        "STS-B",
        kind="regression",
        metrics=("spearman", "pearson"),
        columns={"label": ("score", "label")},
        hub=(_GLUE, "stsb"),
    ),
    _MNLI,
    replace(
        _MNLI,
        name="MNLI-mm",
        train_split="",
        test_split="validation_mismatched",
        folders=("MNLI",),
        test_files=("dev_mismatched.tsv", "dev_mismatched.jsonl"),
        shots_from="MNLI",
    ),
    NLUTask("QNLI", "GLUE", "QNLI", words=_YES_NO, label_map=_ENTAILED, hub=(_GLUE, "qnli")),
    _RTE,
    # The hypotheses of one sentence share its words and differ in their labels.
    replace(_RTE, name="WNLI", label_map={"1": "Yes", "0": "No"}, hub=(_GLUE, "wnli"), group_by="sentence1"),
    replace(
        _MNLI,
        name="AX",
        metrics=("mcc",),
        columns={
            "premise": ("premise", "sentence1", "Premise"),
            "hypothesis": ("hypothesis", "sentence2", "Hypothesis"),
            "label": ("label", "Label"),
        },
        hub=(_GLUE, "ax"),
        train_split="",
        test_split="test",
        folders=("diagnostic",),
        test_files=("diagnostic.tsv", "AX.tsv", "test.tsv", "test.jsonl"),
        shots_from="MNLI",
        labelled=False,
    ),
    NLUTask(
        "BoolQ", "SuperGLUE", "BoolQ", words=_YES_NO, label_map=_TRUTH, hub=(_SUPERGLUE, "boolq"), group_by="passage"
    ),
    replace(
        _MNLI,
        name="CB",
        suite="SuperGLUE",
        label_map=_NLI_NAMES | {"0": "Entailment", "1": "Contradiction", "2": "Neutral"},
        metrics=("f1_macro", "accuracy"),
        hub=(_SUPERGLUE, "cb"),
        test_split="validation",
        test_files=_RTE.test_files,
    ),
    NLUTask(
        "COPA",
        "SuperGLUE",
        "COPA",
        words=("Option one", "Option two"),
        label_map={"0": "Option one", "1": "Option two", "choice1": "Option one", "choice2": "Option two"},
        hub=(_SUPERGLUE, "copa"),
    ),
    NLUTask(
        "MultiRC",
        "SuperGLUE",
        "MultiRC",
        words=("True", "False"),
        label_map={"1": "True", "0": "False", "True": "True", "False": "False"},
        metrics=("f1a", "em"),
        columns={"passage": ("passage", "paragraph")},
        hub=(_SUPERGLUE, "multirc"),
        group_by="passage",
    ),
    NLUTask(
        "ReCoRD",
        "SuperGLUE",
        "ReCoRD",
        words=_YES_NO,
        label_map=_TRUTH,
        metrics=("f1", "em"),
        hub=(_SUPERGLUE, "record"),
        group_by="passage",
    ),
    NLUTask(
        "WiC",
        "SuperGLUE",
        "WiC",
        words=("Same", "Different"),
        label_map={"True": "Same", "False": "Different", "1": "Same", "0": "Different"},
        hub=(_SUPERGLUE, "wic"),
    ),
    NLUTask(
        "WSC",
        "SuperGLUE",
        "WSC",
        words=_YES_NO,
        label_map=_TRUTH,
        columns={"span1": ("span1", "span1_text"), "pronoun": ("pronoun", "span2_text")},
        hub=(_SUPERGLUE, "wsc"),
    ),
    replace(
        _RTE,
        name="AXb",
        suite="SuperGLUE",
        metrics=("mcc",),
        hub=(_SUPERGLUE, "axb"),
        train_split="",
        test_split="test",
        folders=("AX-b",),
        test_files=("AX-b.jsonl", "test.jsonl"),
        shots_from="RTE",
    ),
    replace(
        _RTE,
        name="AXg",
        suite="SuperGLUE",
        metrics=("accuracy", "gender_parity"),
        hub=(_SUPERGLUE, "axg"),
        train_split="",
        test_split="test",
        folders=("AX-g",),
        test_files=("AX-g.jsonl", "test.jsonl"),
        shots_from="RTE",
    ),
    replace(
        _SST2,
        name="rotten-tomatoes",
        suite="offline",
        label_map=dict(_SST2.label_map) | {"fresh": "Positive", "rotten": "Negative"},
        columns={"sentence": ("sentence", "text"), "label": ("label", "category")},
        hub=("", ""),
    ),
)

TASKS: dict[str, NLUTask] = {task.name: task for task in _TABLE}
"""Name to task. ``MNLI-mm`` is MNLI's mismatched evaluation set; ``rotten-tomatoes`` needs no download."""

SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "GLUE": tuple(task.name for task in _TABLE if task.suite == "GLUE"),
        "SuperGLUE": (*(task.name for task in _TABLE if task.suite == "SuperGLUE"), "RTE"),
        "offline": ("rotten-tomatoes",),
    }
)
"""Suite to the names of its tasks."""


def get_task(name: str) -> NLUTask:
    """The task of that name.

    Raises:
        InputError: for an unknown name, listing the known ones.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}: use one of {', '.join(TASKS)}")
    return TASKS[name]


def render(task: NLUTask | str, row: Mapping[str, Any], layout: Layout = "tagged") -> tuple[str, str]:
    """The prompt of a row in two parts, to be joined without a gap.

    Args:
        task: the task, or its name.
        row: a text for each of the task's fields.
        layout: ``"tagged"`` or ``"plain"``.

    Returns:
        The header, which all prompts of the task share (empty in the plain layout), and the body, which ends with the
        opened tag or the cue.

    Raises:
        InputError: for an unknown task or layout, or a row that lacks a field.
    """
    task = get_task(task) if isinstance(task, str) else task
    check_layout(layout)
    missing = [name for name in task.fields if name not in row]
    if missing:
        raise InputError(f"a row of {task.name} lacks the field {missing[0]!r}: it has {', '.join(row) or 'none'}")
    filled = fill(task.template, {name: one_line(str(row[name])) for name in task.fields})
    return (task.header, f"{filled}\n{OPEN_TAG}") if layout == "tagged" else ("", f"{filled}\n{task.cue}:")


def response_text(word: str, layout: Layout = "tagged") -> str:
    """What a right response says in full, its stop string included: ``" Positive </Judgement>"``."""
    check_layout(layout)
    return f" {word} {CLOSE_TAG}" if layout == "tagged" else f" {word}\n"


def few_shot_header(task: NLUTask | str, rows: Sequence[Mapping[str, Any]], layout: Layout = "tagged") -> str:
    """The header followed by solved rows, for prompts that share them all.

    Args:
        task: the task, or its name.
        rows: labelled rows; those of ReCoRD with a candidate filled in.
        layout: ``"tagged"`` or ``"plain"``.

    Raises:
        InputError: for a row without a label of the task.
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
    """Refuses an unknown layout with an InputError."""
    if layout not in STOPS:
        raise InputError(f"unknown layout {layout!r}: use {' or '.join(STOPS)}")
