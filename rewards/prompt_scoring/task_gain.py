"""The reward of a prompt edit: by how much it changed the task score of a frozen model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...llm_backends.errors import InputError
from ..base import Reward, Sample, Score
from .scorer import TaskResult, TaskScorer, make_scorer
from .task_prompt import LabelledExample, TaskPrompt

METRICS = ("gap", "accuracy")


class TaskGain(Reward):
    """Task score after the edit minus task score before it, on the same examples.

    TEMPERA's reward (Zhang et al. 2023, arXiv 2211.11890) without its scale, which is the agent's. The
    task score is the mean gap, p(right label) - the highest p of another label, in [-1, 1], or the accuracy, in [0, 1].

    A sample's metadata holds ``prompt`` (the new :class:`~.task_prompt.TaskPrompt`), ``examples`` (labelled) and
    ``previous_score``. The score's terms are ``task-gain``, ``score``, ``accuracy`` and ``gap``; its feedback is the
    new prompt's failures.

    Args:
        scorer: a :class:`~.task_score.TaskScorer`, or the arguments of one as a mapping.
        metric: ``gap`` or ``accuracy``.
        failures: wrong answers that the feedback tells at most.

    Raises:
        InputError: for an unknown metric, a negative count, and as :func:`~.task_score.make_scorer`.
    """

    name = "task-gain"

    def __init__(
        self, scorer: TaskScorer | Mapping[str, Any] | None = None, metric: str = "gap", failures: int = 4
    ) -> None:
        if metric not in METRICS:
            raise InputError(f"unknown metric {metric!r}: use {', '.join(METRICS)}")
        if failures < 0:
            raise InputError(f"failures must be at least 0, got {failures}")
        self.scorer = make_scorer(scorer)
        self.metric, self.failures = metric, failures

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        scores = self.evaluate(
            [sample.metadata["prompt"] for sample in samples], [sample.metadata["examples"] for sample in samples]
        )
        return [
            self._gain(score, float(sample.metadata["previous_score"])) if score.valid else score
            for score, sample in zip(scores, samples, strict=True)
        ]

    def evaluate(self, prompts: Sequence[TaskPrompt], examples: Sequence[Sequence[LabelledExample]]) -> list[Score]:
        """The task scores themselves, all asked for in one batch.

        Args:
            prompts: n prompts.
            examples: for each prompt its examples.

        Returns:
            For each prompt a score whose value is the task score, with the terms ``accuracy`` and ``gap`` and the
            failures as feedback; an invalid one where the model could not serve a request.
        """
        return self.scorer.reward_each(prompts, examples, self._score)

    def _score(self, result: TaskResult) -> Score:
        terms = {"accuracy": float(result.accuracy), "gap": float(result.gaps.mean())}
        return Score(terms[self.metric], terms=terms, feedback=result.failures(self.failures), calls=result.calls)

    def _gain(self, score: Score, previous: float) -> Score:
        gain = score.value - previous
        terms = {self.name: gain, "score": score.value} | score.terms
        return Score(gain, terms=terms, feedback=score.feedback, calls=score.calls)
