"""The task score of a generated prompt as a reward: a response is an instruction, or a hint, for a frozen model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ...llm_backends import request_seed
from ...llm_backends.errors import InputError
from ..base import Reward, Sample, Score
from .calibration import check_batch
from .scorer import TaskResult, TaskScorer, make_scorer
from .task_prompt import Demonstration, LabelledExample, TaskPrompt

Measure = Literal["gap", "accuracy"]
CORRECT, INCORRECT = 200.0, 180.0
"""RLPrompt's factors of a gap."""


class TaskReward(Reward):
    """How well a frozen model does on a task with the response as its instruction.

    ``gap`` is RLPrompt's reward for classification (Deng et al. 2022, arXiv 2205.12548, section 3.2 and its code): of
    each example p(right label) - the highest p of another label, over the labels, times ``correct`` where it is
    positive and ``incorrect`` where it is not; the mean over the examples. ``accuracy`` is the share of right answers,
    in [0, 1]. Standardising over prompts is the agent's.

    Task-level: a response is scored on a minibatch of ``size`` of the examples, drawn without replacement by the
    sample's ``metadata["minibatch"]`` (an int) where there is one, else by ``seed`` alone, so that all responses are
    scored on the same minibatch. Instance-level, as in Directional Stimulus (Li et al. 2023, arXiv 2302.11520): where
    ``metadata["example"]`` is a :class:`LabelledExample` (or its fields as a mapping), the response is a hint for that
    input and is scored on it alone.

    A response that is empty once its surrounding blanks are gone cannot be an instruction: it is worth ``empty``, by
    default the lowest reward there is, lest an agent whose instructions do worse than chance learns to say nothing.

    Args:
        prompt: the prompt that the response becomes the instruction of; its own instruction, where it has one, must
            hold ``{response}``, which stands for the response.
        examples: to draw minibatches from; none where every sample brings its example.
        size: examples of a minibatch; 0 for all.
        scorer: a :class:`TaskScorer`, or the arguments of one as a mapping.
        measure: ``gap`` or ``accuracy``.
        correct: factor of a positive gap.
        incorrect: factor of any other.
        empty: the reward of an empty response; None for -``incorrect``, or 0 where ``accuracy`` is measured.
        seed: of the minibatch.

    Raises:
        InputError: for an unknown measure, a size beyond the examples, batch calibration of single examples, an
            instruction without ``{response}``, and as :func:`~.task_score.make_scorer`; when scoring, for a task-level
            sample where there are no examples, and as :meth:`TaskScorer.check`.
    """

    name = "task"

    def __init__(
        self,
        prompt: TaskPrompt | Mapping[str, Any],
        examples: Sequence[LabelledExample | Mapping[str, Any]] = (),
        size: int = 16,
        scorer: TaskScorer | Mapping[str, Any] | None = None,
        measure: Measure = "gap",
        correct: float = CORRECT,
        incorrect: float = INCORRECT,
        empty: float | None = None,
        seed: int = 0,
    ) -> None:
        if measure not in ("gap", "accuracy"):
            raise InputError(f"unknown measure {measure!r} of a task reward: use gap or accuracy")
        self.prompt = prompt if isinstance(prompt, TaskPrompt) else _prompt(prompt)
        if self.prompt.instruction and "{response}" not in self.prompt.instruction:
            raise InputError(
                f"the instruction {self.prompt.instruction!r} of a task reward must have {{response}} or be empty"
            )
        self.examples = [_example(one) for one in examples]
        if size < 0 or size > len(self.examples) > 0:
            raise InputError(f"a minibatch of {size} examples cannot be drawn from {len(self.examples)}: change size")
        self.scorer = make_scorer(scorer)
        self.size = min(size or len(self.examples), len(self.examples))
        check_batch(self.scorer.calibration, self.size)  # 0: each sample brings its own
        self.measure, self.seed = measure, seed
        self.correct, self.incorrect = correct, incorrect
        lowest = -incorrect if measure == "gap" else 0.0
        self.empty = lowest if empty is None else empty
        self.calls_per_sample = self.scorer.calls_for(self.prompt, max(self.size, 1))

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        asked = [sample for sample in samples if sample.response.strip()]
        prompts = [self.prompt_of(sample.response) for sample in asked]
        minibatches = [self._minibatch(sample) for sample in asked]
        scores = iter(self.scorer.reward_each(prompts, minibatches, self._score))
        return [
            next(scores) if sample.response.strip() else Score(self.empty, terms={self.name: self.empty})
            for sample in samples
        ]

    def prompt_of(self, response: str) -> TaskPrompt:
        """The prompt with a response as its instruction (or in its place there)."""
        instruction = (self.prompt.instruction or "{response}").replace("{response}", response.strip())
        return replace(self.prompt, instruction=instruction)

    def _minibatch(self, sample: Sample) -> tuple[LabelledExample, ...]:
        if (own := sample.metadata.get("example")) is not None:
            return (_example(own),)
        if not self.examples:
            raise InputError("the task reward has no examples: give it some, or each sample metadata['example']")
        if self.size == len(self.examples):
            return tuple(self.examples)
        number = sample.metadata.get("minibatch", 0)
        rng = np.random.default_rng(request_seed(self.seed, "minibatch", number))
        return tuple(self.examples[i] for i in sorted(rng.choice(len(self.examples), self.size, replace=False)))

    def _score(self, result: TaskResult) -> Score:
        gap = float(np.mean(result.gaps))
        scaled = float(np.mean(result.gaps * np.where(result.gaps > 0, self.correct, self.incorrect)))
        value = scaled if self.measure == "gap" else result.accuracy
        terms = {self.name: value, "accuracy": result.accuracy, "gap": gap}
        return Score(value, terms=terms, feedback=result.failures(), calls=result.calls)


def _prompt(value: Mapping[str, Any]) -> TaskPrompt:
    try:
        shown = tuple(Demonstration(**one) for one in value.get("demonstrations", ()))
        return TaskPrompt(**{"instruction": "", **value, "demonstrations": shown})
    except TypeError as error:
        raise InputError(f"the prompt of a task reward has the fields of TaskPrompt: {error}") from None


def _example(value: LabelledExample | Mapping[str, Any]) -> LabelledExample:
    if isinstance(value, LabelledExample):
        return value
    try:
        return LabelledExample(**value)
    except TypeError:
        raise InputError(f"an example of a task reward needs id, text and label, got {value!r}") from None
