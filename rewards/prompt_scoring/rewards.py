"""Rewards for generated prompts: the response is an instruction, or a hint, for a frozen model that solves a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from ...llm_backends import Backend, BackendError, Prompt, Sampling, request_seed, resolve
from ...llm_backends.errors import InputError, check_at_least, check_known
from ...llm_backends.prompting import build_prompt, fill, load_prompts, one_line
from ..base import Reward, Sample, Score
from ..texts.rouge import rouge_l
from .scorer import TaskResult, TaskScorer, check_batch, make_scorer
from .task_prompt import Demonstration, LabelledExample, TaskPrompt

Measure = Literal["gap", "accuracy"]
CORRECT, INCORRECT = 200.0, 180.0
"""Factors by which RLPrompt multiplies a positive gap and any other gap."""


class TaskReward(Reward):
    """Score of a frozen model on a task with the response as its instruction.

    ``gap`` is RLPrompt's reward for classification (Deng et al. 2022, arXiv 2205.12548, section 3.2 and its code): the
    mean over the examples of p(right label) - the highest p of another label, multiplied by ``correct`` if it is
    positive and by ``incorrect`` if not. The probabilities are normalised over the labels. ``accuracy`` is the share of
    right answers, in [0, 1]. To standardise rewards over prompts is left to the agent.

    Task-level scoring: a response is scored on a minibatch of ``size`` examples, drawn without replacement. The draw
    depends on ``seed`` and the sample's ``metadata["minibatch"]`` (an int); without the latter all responses are scored
    on the same minibatch. Instance-level scoring, as in Directional Stimulus (Li et al. 2023, arXiv 2302.11520): if
    ``metadata["example"]`` is a :class:`~instructgym.rewards.prompt_scoring.task_prompt.LabelledExample`
    (or its fields as a mapping), the response is a hint for that input and is scored on it alone.

    A response that is empty or white space cannot be an instruction: it gets the reward ``empty``, by default the
    lowest possible one, so that an agent whose instructions do worse than chance does not learn to write nothing.

    Args:
        prompt: prompt whose instruction the response becomes, or its fields as a mapping; an instruction that it has
            already must contain ``{response}``, which is replaced by the response.
        examples: examples that minibatches are drawn from; may be empty if every sample has ``metadata["example"]``.
        size: examples per minibatch; 0: all.
        scorer: a :class:`~instructgym.rewards.prompt_scoring.scorer.TaskScorer`, or its arguments as a mapping; None:
            its defaults.
        measure: ``gap`` or ``accuracy``.
        correct: factor of a positive gap.
        incorrect: factor of any other gap.
        empty: reward of an empty response; None: -``incorrect``, or 0 if ``measure`` is ``accuracy``.
        seed: seed of the drawn minibatches.

    Raises:
        InputError: for an unknown measure, a size above the number of examples, batch calibration of single examples,
            an instruction without ``{response}``, and a scorer that
            :func:`~instructgym.rewards.prompt_scoring.scorer.make_scorer` refuses; when scoring, for a task-level
            sample if there are no examples, and for prompts or examples that
            :meth:`~instructgym.rewards.prompt_scoring.scorer.TaskScorer.check` refuses.
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
        check_known("measure", measure, get_args(Measure))
        self.prompt = prompt if isinstance(prompt, TaskPrompt) else _prompt(prompt)
        if self.prompt.instruction and "{response}" not in self.prompt.instruction:
            raise InputError(
                f"the instruction {self.prompt.instruction!r} of a task reward must have {{response}} or be empty"
            )
        self.examples = [_example(example) for example in examples]
        # Without examples any size is allowed, because each sample has its own example.
        if size < 0 or size > len(self.examples) > 0:
            raise InputError(f"a minibatch of {size} examples cannot be drawn from {len(self.examples)}: change size")
        self.scorer = make_scorer(scorer)
        self.size = min(size or len(self.examples), len(self.examples))
        check_batch(self.scorer.calibration, self.size)  # size 0: each sample has its own example
        self.measure, self.seed = measure, seed
        self.correct, self.incorrect = correct, incorrect
        lowest = -incorrect if measure == "gap" else 0.0
        self.empty = lowest if empty is None else empty
        self.calls_per_sample = self.scorer.calls_for(self.prompt, max(self.size, 1))

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        nonempty = [sample for sample in samples if sample.response.strip()]
        prompts = [self.prompt_of(sample.response) for sample in nonempty]
        minibatches = [self.minibatch(sample) for sample in nonempty]
        scores = iter(self.scorer.reward_each(prompts, minibatches, self._score))
        return [
            next(scores) if sample.response.strip() else Score(self.empty, terms={self.name: self.empty})
            for sample in samples
        ]

    def prompt_of(self, response: str) -> TaskPrompt:
        """Returns the prompt with the response as its instruction, or in place of ``{response}`` in the instruction."""
        instruction = (self.prompt.instruction or "{response}").replace("{response}", response.strip())
        return replace(self.prompt, instruction=instruction)

    def minibatch(self, sample: Sample) -> tuple[LabelledExample, ...]:
        """Returns the examples that a sample is scored on."""
        if (example := sample.metadata.get("example")) is not None:
            return (_example(example),)
        if not self.examples:
            raise InputError("the task reward has no examples: give it some, or each sample metadata['example']")
        if self.size == len(self.examples):
            return tuple(self.examples)
        number = sample.metadata.get("minibatch", 0)
        # A hash of seed and number: the same minibatch in every process, whatever was drawn before.
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
        demonstrations = tuple(Demonstration(**fields) for fields in value.get("demonstrations", ()))
        return TaskPrompt(**{"instruction": "", **value, "demonstrations": demonstrations})
    except TypeError as error:
        raise InputError(f"the prompt of a task reward has the fields of TaskPrompt: {error}") from None


def _example(value: LabelledExample | Mapping[str, Any]) -> LabelledExample:
    if isinstance(value, LabelledExample):
        return value
    try:
        return LabelledExample(**value)
    except TypeError:
        raise InputError(f"an example of a task reward needs id, text and label, got {value!r}") from None


class HintedResponse(Reward):
    """ROUGE-L between the sample's reference and the answer of a frozen model that reads the response as a hint.

    This is the reward of Directional Stimulus prompting for free text (Li et al. 2023, arXiv 2302.11520): the response
    is a hint, such as keywords, for one input. The model decodes greedily, so each hint has one value, in [0, 1]. An
    empty hint gets the value of the answer without a hint.

    ``sample.reference`` is the reference; ``sample.metadata`` has the input, as ``plain`` (the text that an answer
    continues) and as ``request`` (the question of a user). The feedback of a score is the answer.

    Args:
        backend: the frozen model.
        max_tokens: maximum tokens of an answer.
        stop: texts that end an answer.

    Raises:
        InputError: when scoring, for a sample without reference or input.
    """

    name = "rouge"
    calls_per_sample = 1

    def __init__(self, backend: Any = "embedded", max_tokens: int = 48, stop: Sequence[str] = ()) -> None:
        self.backend: Backend = resolve("backend", backend)
        stop_texts = (stop,) if isinstance(stop, str) else tuple(stop)
        self.sampling = Sampling(max_tokens=max_tokens, temperature=0.0, stop=stop_texts)

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        results = self.backend.generate([self.prompt_of(sample) for sample in samples], self.sampling)
        return [
            Score.invalid(str(result), calls=1)
            if isinstance(result, BackendError)
            else self._score(str(sample.reference), result[0].text)
            for sample, result in zip(samples, results, strict=True)
        ]

    def prompt_of(self, sample: Sample) -> Prompt:
        """Returns the prompt that the frozen model reads for a sample.

        Raises:
            InputError: for a sample without reference or input.
        """
        plain, request = sample.metadata.get("plain"), sample.metadata.get("request")
        if sample.reference is None or not plain or not request:
            raise InputError(
                f"sample {sample.episode_id!r} needs a reference and metadata['plain'] and ['request'] to score a hint"
            )
        hint = one_line(sample.response)
        if not hint:
            return build_prompt(self.backend.prompt_style, request, plain)
        forms = load_prompts(__package__, "hinted_response")
        values = {"hint": hint, "prompt": plain, "request": request}
        return build_prompt(self.backend.prompt_style, fill(forms["chat"], values), fill(forms["completion"], values))

    def _score(self, reference: str, answer: str) -> Score:
        value = rouge_l(answer, reference)
        return Score(value, terms={self.name: value}, feedback=f"The answer was: {one_line(answer)}", calls=1)


class TaskGain(Reward):
    """Task score after an edit of the prompt minus the task score before it, on the same examples.

    This is TEMPERA's reward (Zhang et al. 2023, arXiv 2211.11890) without its scale, which is left to the agent. The
    task score is the mean gap, p(right label) - the highest p of another label, in [-1, 1], or the accuracy, in [0, 1].

    A sample's metadata holds ``prompt`` (the new :class:`~instructgym.rewards.prompt_scoring.task_prompt.TaskPrompt`),
    ``examples`` (labelled) and ``previous_score``. The score's terms are ``task-gain``, ``score``, ``accuracy`` and
    ``gap``; its feedback lists the new prompt's wrong answers.

    Args:
        scorer: a :class:`~instructgym.rewards.prompt_scoring.scorer.TaskScorer`, or its arguments as a mapping; None:
            its defaults.
        metric: ``gap`` or ``accuracy``.
        failures: maximum number of wrong answers in the feedback.

    Raises:
        InputError: for an unknown metric, a negative ``failures``, and a scorer that
            :func:`~instructgym.rewards.prompt_scoring.scorer.make_scorer` refuses.
    """

    name = "task-gain"

    def __init__(
        self, scorer: TaskScorer | Mapping[str, Any] | None = None, metric: str = "gap", failures: int = 4
    ) -> None:
        check_known("metric", metric, get_args(Measure))
        check_at_least(0, failures=failures)
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
        """Returns the task scores of prompts, computed in one batch.

        Args:
            prompts: n prompts.
            examples: the examples of each prompt.

        Returns:
            For each prompt a score whose value is the task score, with the terms ``accuracy`` and ``gap`` and the wrong
            answers as feedback; an invalid score if the model could not serve a request.
        """
        return self.scorer.reward_each(prompts, examples, self._score)

    def _score(self, result: TaskResult) -> Score:
        terms = {"accuracy": float(result.accuracy), "gap": float(result.gaps.mean())}
        return Score(terms[self.metric], terms=terms, feedback=result.failures(self.failures), calls=result.calls)

    def _gain(self, score: Score, previous: float) -> Score:
        gain = score.value - previous
        terms = {self.name: gain, "score": score.value} | score.terms
        return Score(gain, terms=terms, feedback=score.feedback, calls=score.calls)
