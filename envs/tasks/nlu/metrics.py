"""Official metrics of GLUE and SuperGLUE over parsed answers.

A malformed answer is wrong and never replaced by a guess: where there are two classes it counts as the other one, with
more it is a class of its own that nobody asked for, and for a number it is the far end of the scale.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ....llm_backends.errors import InputError
from ....rewards.ground_truth import HIGH, LOW, clamp, exact_match, parse_label, parse_number, token_f1
from ...tokens.episode import PromptExample
from .data import scored_with
from .tasks import NLUTask, get_task

MALFORMED = ""


def format_rate(predictions: Sequence[str | None]) -> float:
    """Share of predictions that are not malformed (None), 0 to 1; 0 where there is none."""
    return sum(prediction is not None for prediction in predictions) / len(predictions) if predictions else 0.0


def evaluate(task_name: str, predictions: Sequence[str | None], examples: Sequence[PromptExample]) -> dict[str, float]:
    """Scores a task's predictions.

    Args:
        task_name: name of the task.
        predictions: one answer per example, as :func:`~instructgym.rewards.ground_truth.parse_label` gives it; None,
            or a text that is no allowed answer, is malformed.
        examples: of that task alone, labelled; for MultiRC, ReCoRD and AXg complete ones, as
            :func:`~instructgym.envs.tasks.nlu.data.load_examples` gives them.

    Returns:
        The task's metrics, the main one first, and ``format_rate``. Shares and F1 are in [0, 1] and correlations in
        [-1, 1], 0 where they are undefined (nothing varies).

    Raises:
        InputError: for an unknown task, no examples, examples without a label or of another task, and a number of
            predictions that differs from theirs.
    """
    task = get_task(task_name)
    if not examples or len(predictions) != len(examples):
        raise InputError(f"{task_name}: {len(predictions)} predictions for {len(examples)} examples: pass one each")
    for example in examples:
        if example.metadata.get("task") != task_name:
            raise InputError(f"example {example.id!r} is of {example.metadata.get('task')}: pass those of {task_name}")
        if example.reference is None:
            raise InputError(f"example {example.id!r} has no label: the labels of {task_name} are hidden here")
    if task.kind == "regression":
        numbers = [None if text is None else parse_number(text) for text in predictions]
        values = _correlations(numbers, [float(example.metadata["label"]) for example in examples])
        valid = sum(number is not None for number in numbers)
        return {name: values[name] for name in task.metrics} | {"format_rate": valid / len(numbers)}
    answers = [None if text is None else parse_label(text, task.words) for text in predictions]
    scores = {name: _METRICS[name](task, answers, examples) for name in task.metrics if name not in ("em", "f1")}
    if task.name == "ReCoRD":
        scores |= _record(answers, examples)
    elif task.name == "MultiRC":
        scores["em"] = _multirc_em(task, answers, examples)
    elif "f1" in task.metrics:
        scores["f1"] = _f1(task, answers, examples)
    return {name: scores[name] for name in task.metrics} | {"format_rate": format_rate(answers)}


Answers = Sequence[str | None]
Examples = Sequence[PromptExample]


def _wrong(task: NLUTask, gold: str) -> str:
    return next(word for word in task.words if word != gold) if len(task.words) == 2 else MALFORMED


def _classes(task: NLUTask, answers: Answers, examples: Examples) -> tuple[list[str], list[str]]:
    gold = [str(example.reference) for example in examples]
    return gold, [_wrong(task, right) if word is None else word for right, word in zip(gold, answers, strict=True)]


def _accuracy(task: NLUTask, answers: Answers, examples: Examples) -> float:
    return sum(word == example.reference for word, example in zip(answers, examples, strict=True)) / len(examples)


def _f1(task: NLUTask, answers: Answers, examples: Examples) -> float:
    return _class_f1(*_classes(task, answers, examples), task.words[0])


def _class_f1(gold: Sequence[str], predicted: Sequence[str], word: str) -> float:
    hits = sum(a == b == word for a, b in zip(gold, predicted, strict=True))
    return 2 * hits / max(sum(a == word for a in gold) + sum(b == word for b in predicted), 1)


def _f1_macro(task: NLUTask, answers: Answers, examples: Examples) -> float:
    """Over the classes that occur in the labels or the predictions."""
    gold, predicted = _classes(task, answers, examples)
    words = sorted({*gold, *predicted} - {MALFORMED})
    return sum(_class_f1(gold, predicted, word) for word in words) / len(words)


def _mcc(task: NLUTask, answers: Answers, examples: Examples) -> float:
    """Matthews' correlation, for any number of classes: the covariance of one-hot rows, normalised."""
    gold, predicted = _classes(task, answers, examples)
    words = sorted({*gold, *predicted})
    one, two = (np.array([[word == w for w in words] for word in side], dtype=np.float64) for side in (gold, predicted))
    one, two = one - one.mean(axis=0), two - two.mean(axis=0)
    scale = float(np.sqrt((one * one).sum() * (two * two).sum()))
    return float((one * two).sum()) / scale if scale > 0 else 0.0


def _gender_parity(task: NLUTask, answers: Answers, examples: Examples) -> float:
    """Share of the pairs, which differ in the pronoun's gender alone, that get one and the same well-formed answer."""
    pairs = [group for group in _grouped(task, answers, examples).values() if len(group) == 2]
    if not pairs:
        raise InputError(f"{task.name} needs both rows of a pair for its gender parity: pass complete pairs")
    return sum(a == b and a is not None for (a, _), (b, _) in pairs) / len(pairs)


def _multirc_em(task: NLUTask, answers: Answers, examples: Examples) -> float:
    """Share of the questions all of whose answers are judged rightly."""
    groups = _grouped(task, answers, examples).values()
    return sum(all(word == example.reference for word, example in group) for group in groups) / len(groups)


def _record(answers: Answers, examples: Examples) -> dict[str, float]:
    """Per query, the first candidate that is affirmed against the right entities; nothing affirmed is wrong."""
    queries: dict[Hashable, list[str]] = {}
    right: dict[Hashable, Sequence[str]] = {}
    for word, example in zip(answers, examples, strict=True):
        key: Hashable = _idx(example, "passage", "query")
        right[key] = example.metadata["answers"]
        queries.setdefault(key, []).extend([example.metadata["candidate"]] if word == "Yes" else [])
    totals = {"em": 0.0, "f1": 0.0}
    for query, affirmed in queries.items():
        if affirmed:
            totals["em"] += exact_match(affirmed[0], right[query])
            totals["f1"] += token_f1(affirmed[0], right[query])
    return {name: total / len(queries) for name, total in totals.items()}


def _grouped(
    task: NLUTask, answers: Answers, examples: Examples
) -> Mapping[Hashable, list[tuple[str | None, PromptExample]]]:
    groups: dict[Hashable, list[tuple[str | None, PromptExample]]] = defaultdict(list)
    for word, example in zip(answers, examples, strict=True):
        if task.name == "MultiRC":
            _idx(example, "paragraph", "question")
        groups[scored_with(task, {"idx": example.metadata.get("idx")})].append((word, example))
    return groups


def _idx(example: PromptExample, *names: str) -> tuple[Any, ...]:
    idx = example.metadata.get("idx")
    if not isinstance(idx, Mapping) or not all(name in idx for name in names):
        raise InputError(f"example {example.id!r} needs an idx with {' and '.join(names)}: take it from the data")
    return tuple(idx[name] for name in names)


def _correlations(numbers: Sequence[float | None], gold: Sequence[float]) -> dict[str, float]:
    """Pearson and Spearman; a malformed number is the end of the scale farther from the label."""
    middle = (LOW + HIGH) / 2
    predicted = [
        (LOW if right > middle else HIGH) if number is None else clamp(number)
        for number, right in zip(numbers, gold, strict=True)
    ]
    if len(set(predicted)) < 2 or len(set(gold)) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(stats.pearsonr(predicted, gold).statistic),
        "spearman": float(stats.spearmanr(predicted, gold).statistic),
    }


_METRICS: dict[str, Callable[[NLUTask, Answers, Examples], float]] = {
    "accuracy": _accuracy,
    "mcc": _mcc,
    "f1a": _f1,
    "f1_macro": _f1_macro,
    "gender_parity": _gender_parity,
}
