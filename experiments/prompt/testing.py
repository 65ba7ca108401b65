"""The test of the prompts that a search found, once it is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...envs.tasks.prompt_search.tasks import PromptTask
from ...llm_backends import Backend
from ...rewards.prompt_scoring.scorer import TaskResult, TaskScorer
from ...rewards.prompt_scoring.task_prompt import Demonstration, LabelledExample, TaskPrompt

TESTED = "test.jsonl"
"""In the run folder: a row per test example."""
KINDS = ("raw", "calibrated")
CURVE, CURVE_EXAMPLES = 4, 300
"""Shares of the calls at which the best prompt so far is tested for the curve, and the test examples that do for it."""


def incumbents(task: PromptTask, history: Sequence[Mapping[str, Any]]) -> list[tuple[int, TaskPrompt]]:
    """The prompts that were the best when they were found, with the calls made until then.

    Args:
        task: that was searched.
        history: rows of ``prompts.jsonl``.
    """
    return [
        (
            row["calls"],
            replace(
                task.prompt(row["instruction"], [Demonstration(**shown) for shown in row["demonstrations"]]),
                verbalizers=tuple(row["verbalizers"]),
            ),
        )
        for row in history
        if row["best"]
    ]


def tested(
    task: PromptTask, history: Sequence[Mapping[str, Any]], calls: int, backend: Backend
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tests the best prompt on all test examples, and the best at each quarter of the calls on the first of them.

    Args:
        task: with the test examples.
        history: rows of ``prompts.jsonl``.
        calls: that the search had.
        backend: the frozen model.

    Returns:
        A row per quarter with ``calls``, ``raw`` and ``calibrated`` accuracy, and a row per test example with its
        ``id``, its ``label``, and what the best prompt predicts, ``raw`` and ``calibrated``.
    """
    scorer = TaskScorer(backend, content_free=task.content_free)
    found = incumbents(task, history)

    def results(prompt: TaskPrompt, examples: Sequence[LabelledExample]) -> list[TaskResult]:
        return [scorer.score([prompt], examples, calibrate)[0] for calibrate in (False, "contextual")]

    few, curve = task.test[:CURVE_EXAMPLES], []
    for number in range(1, CURVE + 1):
        standing = [prompt for made, prompt in found if made <= calls * number // CURVE]
        if standing:  # what was tested at the last quarter is remembered
            raw, calibrated = results(standing[-1], few)
            curve.append({"calls": calls * number // CURVE, "raw": raw.accuracy, "calibrated": calibrated.accuracy})
    raw, calibrated = results(found[-1][1], task.test)
    rows = [
        {"id": example.id, "label": example.label, "raw": int(one), "calibrated": int(other)}
        for example, one, other in zip(task.test, raw.predictions, calibrated.predictions, strict=True)
    ]
    return curve, rows


def accuracy(rows: Sequence[Mapping[str, Any]], kind: str) -> float:
    """Share of right predictions among rows of ``test.jsonl``."""
    return sum(row[kind] == row["label"] for row in rows) / len(rows)
