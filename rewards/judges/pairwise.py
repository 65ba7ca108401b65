"""Pairwise comparison by a judge LLM, each pair in both orders: judges favour a position (Zheng et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...llm_backends import Backend, request_seed, resolve
from ...llm_backends.errors import InputError
from ...llm_backends.prompting import load_prompts
from ..base import Reward, Sample, Score
from .verdict import Question, Verdict, VerdictMode, VerdictPrompt, check_mode, judge_verdicts, sigmoid, temperature_for

Outcome = Literal["first", "second", "tie"]
"""``first`` or ``second``: the better text of a pair; ``tie``: neither."""

OUTCOME_VALUES: dict[Outcome, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}
OUTCOME_FEEDBACK: dict[Outcome, str] = {
    "first": "better than the reference",
    "tie": "a tie",
    "second": "worse than the reference",
}


@dataclass(frozen=True)
class Pair:
    """Two texts to compare."""

    first: str
    second: str
    prompt: str = ""
    """What both respond to."""
    seed: int = 0
    """Request seed of the order as given; that of the swapped order is derived from it."""


@dataclass(frozen=True)
class Comparison:
    """What the judge said of one pair."""

    outcome: Outcome | None
    """None where one of the orders gave no verdict; a tie where the two orders disagree."""
    agreed: bool | None = None
    """Whether both orders preferred the same text; None where there is no outcome."""
    verdicts: tuple[Verdict, Verdict] | None = None
    """For the order as given and for the swapped one, whether the text shown first is better; None where no one was
    asked."""
    probability: float | None = None
    """That the first text is better, by the mean of both orders' log-odds; likelihood mode only."""
    why: str = ""
    """The reason, where there is no outcome."""

    @property
    def calls(self) -> int:
        """LLM requests it took."""
        return 2 if self.verdicts else 0


def pairwise_prompt() -> VerdictPrompt:
    """Which of two responses, A or B, is better? The positive answer is A."""
    data = load_prompts(__package__, "pairwise")
    return VerdictPrompt.from_file(data, ("Request", "A", "B", "Better"), ("prompt", "first", "second"))


def pair_question(prompt: VerdictPrompt, pair: Pair) -> Question:
    """The question about a pair in the order as given."""
    return Question(prompt, {"prompt": pair.prompt, "first": pair.first, "second": pair.second}, pair.seed)


def both_orders(
    backend: Backend,
    prompt: VerdictPrompt,
    pairs: Sequence[Pair],
    mode: VerdictMode = "auto",
    temperature: float = 0.0,
) -> list[tuple[Verdict, Verdict]]:
    """Asks a question about every pair in both orders, all in one backend call.

    Args:
        backend: the judge.
        prompt: the question, with the fields ``first`` and ``second`` and, if it needs one, ``prompt``.
        pairs: n pairs.
        mode: see :data:`~instructgym.rewards.judges.verdict.VerdictMode`.
        temperature: of generated verdicts.

    Returns:
        For each pair the verdicts on the order as given and on the swapped one.

    Raises:
        UnsupportedRequestError: in likelihood mode, if the backend reports no log-probs.
        ValueError: for an unknown mode.
    """
    swapped = [Pair(pair.second, pair.first, pair.prompt, request_seed(pair.seed, "swapped")) for pair in pairs]
    questions = [pair_question(prompt, pair) for pair in (*pairs, *swapped)]
    verdicts = judge_verdicts(backend, questions, mode, temperature)
    return list(zip(verdicts[: len(pairs)], verdicts[len(pairs) :], strict=True))


def compare(
    backend: Backend, pairs: Sequence[Pair], mode: VerdictMode = "auto", temperature: float = 0.0
) -> list[Comparison]:
    """Which text of each pair is better? Both orders of all pairs are asked in one backend call.

    The judge has to choose, and a pair is a tie where its choice changes with the order. Texts that differ at most in
    white space are a tie without a call.

    Args:
        backend: the judge.
        pairs: n pairs.
        mode: see :data:`~instructgym.rewards.judges.verdict.VerdictMode`.
        temperature: of generated verdicts.

    Returns:
        n comparisons, in order.

    Raises:
        UnsupportedRequestError: in likelihood mode, if the backend reports no log-probs.
        ValueError: for an unknown mode.
    """
    asked = [pair for pair in pairs if pair.first.split() != pair.second.split()]
    verdicts = iter(both_orders(backend, pairwise_prompt(), asked, mode, temperature))
    return [
        _comparison(*next(verdicts)) if pair.first.split() != pair.second.split() else Comparison("tie", agreed=True)
        for pair in pairs
    ]


def _comparison(given: Verdict, swapped: Verdict) -> Comparison:
    if given.answer is None or swapped.answer is None:
        return Comparison(None, verdicts=(given, swapped), why=given.why or swapped.why)
    agreed = given.answer != swapped.answer
    outcome: Outcome = "tie" if not agreed else "first" if given.answer else "second"
    probability = None
    if given.log_odds is not None and swapped.log_odds is not None:
        probability = sigmoid((given.log_odds - swapped.log_odds) / 2)  # what a position is worth cancels out
    return Comparison(outcome, agreed, (given, swapped), probability)


class PairwiseJudge(Reward):
    """r = 1 where the judge prefers the response to the reference, 0 where it prefers the reference, 1/2 for a tie.

    Its mean is the win rate against the references. Both orders are asked; where they disagree the pair is a tie, and
    the term ``agreement`` is 0. Where one of the orders gets no verdict the score is invalid.

    Args:
        backend: the judge LLM.
        mode: ``"verdict"`` generates and parses strictly, ``"likelihood"`` compares the log-probs of both letters,
            ``"auto"`` takes the latter for backends with few-shot prompts that report log-probs.
        graded: in likelihood mode, pay the probability that the response is better instead of 0, 1/2 or 1.
    """

    name = "pairwise"
    calls_per_sample = 2

    def __init__(self, backend: Any = "embedded", mode: VerdictMode = "auto", graded: bool = False) -> None:
        check_mode(mode)
        self.backend = resolve("backend", backend)
        self.mode, self.graded = mode, graded

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores responses; a sample needs ``reference``.

        Raises:
            InputError: if a sample has no reference.
        """
        pairs = [
            Pair(sample.response, reference, sample.prompt, sample.seed)
            for sample, reference in zip(samples, _references(samples, "pairwise judge"), strict=True)
        ]
        return [self._score(c) for c in compare(self.backend, pairs, self.mode, temperature_for(samples))]

    def _score(self, comparison: Comparison) -> Score:
        if comparison.outcome is None:
            return Score.invalid(comparison.why, calls=comparison.calls)
        value = OUTCOME_VALUES[comparison.outcome]
        if self.graded and comparison.probability is not None:
            value = comparison.probability
        return Score(
            value,
            terms={self.name: value, "agreement": float(bool(comparison.agreed))},
            feedback=OUTCOME_FEEDBACK[comparison.outcome],
            calls=comparison.calls,
        )


class ScoredComparison(Reward):
    """r = 1 where a reward scores the response above the reference, 0 where below, 1/2 where it scores them alike.

    Its mean is the win rate against the references by a reward that scores one text at a time. Such a scorer never
    sees two texts side by side, so it has no position bias: both orders agree by construction, and the term
    ``agreement`` is always 1. The terms are otherwise those of :class:`PairwiseJudge`. Where one of the two scores is
    invalid, so is the comparison. Responses and references are scored in one call.

    Args:
        scorer: a reward, or its id.
        margin: scores no further apart than this are a tie.

    Raises:
        InputError: for a negative margin; when scoring, for a sample without a reference.
    """

    name = "pairwise"

    def __init__(self, scorer: Any, margin: float = 0.0) -> None:
        if not 0 <= margin < math.inf:
            raise InputError(f"the margin of a tie must be a number of at least 0, got {margin}")
        self.scorer = resolve("reward", scorer)
        self.margin = margin
        self.calls_per_sample = 2 * self.scorer.calls_per_sample

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores responses; a sample needs ``reference``."""
        others = [
            replace(
                sample,
                response=reference,
                token_ids=None,
                loss_mask=None,
                seed=request_seed(sample.seed, "reference"),
                metadata={key: value for key, value in sample.metadata.items() if key != "finish_reason"},
            )
            for sample, reference in zip(samples, _references(samples, "scored comparison"), strict=True)
        ]
        scores = self.scorer.reward([*samples, *others])
        return [self._score(*both) for both in zip(scores[: len(samples)], scores[len(samples) :], strict=True)]

    def reset(self) -> None:
        self.scorer.reset()

    def _score(self, response: Score, reference: Score) -> Score:
        calls = response.calls + reference.calls
        for score in (response, reference):
            if not score.valid:
                return Score.invalid(score.feedback, calls=calls)
        above = response.value - reference.value
        outcome: Outcome = "tie" if abs(above) <= self.margin else "first" if above > 0 else "second"
        value = OUTCOME_VALUES[outcome]
        terms = {self.name: value, "agreement": 1.0}
        return Score(value, terms=terms, feedback=OUTCOME_FEEDBACK[outcome], calls=calls)


def _references(samples: Sequence[Sample], name: str) -> list[str]:
    references = []
    for number, sample in enumerate(samples):
        if sample.reference is None:
            raise InputError(
                f"the {name} compares a response with its reference: sample {number} "
                f"({sample.episode_id or sample.prompt[:40]!r}) has none; use a task with references"
            )
        references.append(sample.reference)
    return references
