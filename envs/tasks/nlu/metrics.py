"""Official metrics of GLUE and SuperGLUE, computed from parsed answers.

A malformed answer is always wrong: in a task with two classes it counts as the class that is not the label, in a task
with more classes as an extra class, and in a regression task as the end of the scale that is farther from the label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from scipy import stats

from ....llm_backends.errors import InputError
from ....rewards.ground_truth import HIGH, LOW, clamp, exact_match, parse_label, parse_number, token_f1
from ...tokens.episode import PromptExample
from .data import scored_with
from .tasks import NLUTask, get_task

MALFORMED = ""


def format_rate(predictions: Sequence[str | None]) -> float:
    """Returns the share of predictions that are not malformed (None), in [0, 1]; 0 if there are no predictions."""
    return sum(prediction is not None for prediction in predictions) / len(predictions) if predictions else 0.0


def evaluate(task_name: str, predictions: Sequence[str | None], examples: Sequence[PromptExample]) -> dict[str, float]:
    """Computes a task's metrics from its predictions.

    Args:
        task_name: name of the task.
        predictions: one answer per example, as :func:`~instructgym.rewards.ground_truth.parse_label` returns it; None,
            or a text that is not an allowed answer, is malformed.
        examples: labelled examples of that task alone; for MultiRC, ReCoRD and AXg whole questions, queries and pairs,
            as :func:`~instructgym.envs.tasks.nlu.data.load_examples` returns them.

    Returns:
        The task's metrics, the main one first, then ``format_rate``. Shares and F1 are in [0, 1] and correlations in
        [-1, 1], 0 where they are undefined (all labels, or all predictions, are equal).

    Raises:
        InputError: if the task is unknown, there are no examples, an example has no label or belongs to another task,
            or the numbers of predictions and examples differ.
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
    # `em` and `f1` are computed below: which examples they group depends on the task.
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
    """Returns the class that a malformed answer counts as, which is never the label."""
    return next(word for word in task.words if word != gold) if len(task.words) == 2 else MALFORMED


def _classes(task: NLUTask, answers: Answers, examples: Examples) -> tuple[list[str], list[str]]:
    """Returns the labels and the predicted classes, with malformed answers replaced by wrong classes."""
    gold = [str(example.reference) for example in examples]
    return gold, [_wrong(task, right) if word is None else word for right, word in zip(gold, answers, strict=True)]


def _accuracy(task: NLUTask, answers: Answers, examples: Examples) -> float:
    return sum(word == example.reference for word, example in zip(answers, examples, strict=True)) / len(examples)


def _f1(task: NLUTask, answers: Answers, examples: Examples) -> float:
    return _mean_f1(*_classes(task, answers, examples), [task.words[0]])


def _f1_macro(task: NLUTask, answers: Answers, examples: Examples) -> float:
    """Returns the mean F1 over the classes that occur in the labels or the predictions."""
    gold, predicted = _classes(task, answers, examples)
    # A malformed answer is a miss of its label's class, not a class to average over.
    return _mean_f1(gold, predicted, sorted({*gold, *predicted} - {MALFORMED}))


def _mean_f1(gold: Sequence[str], predicted: Sequence[str], words: Sequence[str]) -> float:
    """Returns the mean F1 over the classes; that of a class in neither the labels nor the predictions is 0."""
    # Imported here, because it takes a second, which a dry run or a refusal should not wait for.
    from sklearn.metrics import f1_score

    return float(f1_score(gold, predicted, labels=words, average="macro", zero_division=0.0))


def _mcc(task: NLUTask, answers: Answers, examples: Examples) -> float:
    """Returns Matthews' correlation for any number of classes."""
    from sklearn.metrics import matthews_corrcoef

    gold, predicted = _classes(task, answers, examples)
    # scikit-learn warns if there is only one class.
    return float(matthews_corrcoef(gold, predicted)) if len(set(gold)) > 1 else 0.0


def _gender_parity(task: NLUTask, answers: Answers, examples: Examples) -> float:
    """Returns the share of pairs, which differ only in the pronoun's gender, with two equal well-formed answers."""
    pairs = [group for group in _grouped(task, answers, examples).values() if len(group) == 2]
    if not pairs:
        raise InputError(f"{task.name} needs both rows of a pair for its gender parity: pass complete pairs")
    return sum(a == b and a is not None for (a, _), (b, _) in pairs) / len(pairs)


def _multirc_em(task: NLUTask, answers: Answers, examples: Examples) -> float:
    """Returns the share of questions for which the predictions for all candidate answers are right."""
    groups = _grouped(task, answers, examples).values()
    return sum(all(word == example.reference for word, example in group) for group in groups) / len(groups)


def _record(answers: Answers, examples: Examples) -> dict[str, float]:
    """Scores the first candidate of each query that is answered "Yes"; a query without such a candidate scores 0."""
    queries: dict[Hashable, list[str]] = {}
    entities: dict[Hashable, Sequence[str]] = {}
    for word, example in zip(answers, examples, strict=True):
        key: Hashable = _idx(example, "passage", "query")
        entities[key] = example.metadata["answers"]
        queries.setdefault(key, []).extend([example.metadata["candidate"]] if word == "Yes" else [])
    totals = {"em": 0.0, "f1": 0.0}
    for query, affirmed in queries.items():
        if affirmed:
            totals["em"] += exact_match(affirmed[0], entities[query])
            totals["f1"] += token_f1(affirmed[0], entities[query])
    return {name: total / len(queries) for name, total in totals.items()}


def _grouped(
    task: NLUTask, answers: Answers, examples: Examples
) -> Mapping[Hashable, list[tuple[str | None, PromptExample]]]:
    """Groups (answer, example) pairs by what the metric scores together: a question, or a pair of sentences."""
    groups: dict[Hashable, list[tuple[str | None, PromptExample]]] = defaultdict(list)
    for word, example in zip(answers, examples, strict=True):
        if task.name == "MultiRC":
            _idx(example, "paragraph", "question")  # raises if the idx is incomplete; `scored_with` would accept it
        groups[scored_with(task, {"idx": example.metadata.get("idx")})].append((word, example))
    return groups


def _idx(example: PromptExample, *names: str) -> tuple[Any, ...]:
    """Returns the named parts of the example's ``idx``, or raises InputError if one is missing."""
    idx = example.metadata.get("idx")
    if not isinstance(idx, Mapping) or not all(name in idx for name in names):
        raise InputError(f"example {example.id!r} needs an idx with {' and '.join(names)}: take it from the data")
    return tuple(idx[name] for name in names)


def _correlations(numbers: Sequence[float | None], gold: Sequence[float]) -> dict[str, float]:
    """Returns Pearson's and Spearman's correlation; None counts as the end of the scale farther from the label."""
    middle = (LOW + HIGH) / 2
    predicted = [
        (LOW if right > middle else HIGH) if number is None else clamp(number)
        for number, right in zip(numbers, gold, strict=True)
    ]
    # scipy returns NaN if one side is constant.
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
