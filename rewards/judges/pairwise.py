"""Pairwise comparison by a judge LLM, and the rewards that use it.

Each pair is judged in both orders, because judges favour one position (Zheng et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...llm_backends import Backend, request_seed, resolve
from ...llm_backends.errors import InputError
from ...llm_backends.prompting import load_prompts
from ..base import Reward, Sample, Score, scores_of
from .verdict import (
    Question,
    Verdict,
    VerdictMode,
    VerdictPrompt,
    check_mode,
    judge_temperature,
    judge_verdicts,
    sigmoid,
)

Outcome = Literal["first", "second", "tie"]
"""Which text of a pair is better: ``first``, ``second``, or neither (``tie``)."""

OUTCOME_VALUES: dict[Outcome, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}
"""Value of the first text of a pair, by outcome."""
OUTCOME_FEEDBACK: dict[Outcome, str] = {
    "first": "better than the reference",
    "tie": "a tie",
    "second": "worse than the reference",
}
"""Feedback on a response that is the first text of a pair, by outcome."""


@dataclass(frozen=True)
class Pair:
    """Two texts to compare."""

    first: str
    second: str
    prompt: str = ""
    """The request that both texts respond to."""
    seed: int = 0
    """Request seed of the original order; the seed of the swapped order is derived from it."""


@dataclass(frozen=True)
class Comparison:
    """The judge's comparison of one pair."""

    outcome: Outcome | None
    """The better text; a tie if the two orders disagree, None if one of them gave no verdict."""
    agreed: bool | None = None
    """Whether both orders preferred the same text; None without an outcome."""
    verdicts: tuple[Verdict, Verdict] | None = None
    """Verdicts on the original and on the swapped order, each on whether the text shown first is better; None if the
    judge was not called."""
    probability: float | None = None
    """Probability that the first text is better, from the mean of both orders' log-odds; likelihood mode only."""
    why: str = ""
    """Why there is no outcome; empty if there is one."""

    @property
    def calls(self) -> int:
        """Number of LLM requests that the comparison took."""
        return 2 if self.verdicts else 0


def pairwise_prompt() -> VerdictPrompt:
    """Returns the question which of two responses, A or B, is better; the positive answer is A."""
    data = load_prompts(__package__, "pairwise")
    return VerdictPrompt.from_file(data, ("Request", "A", "B", "Better"), ("prompt", "first", "second"))


def pair_question(prompt: VerdictPrompt, pair: Pair) -> Question:
    """Returns the question about a pair in its original order."""
    return Question(prompt, {"prompt": pair.prompt, "first": pair.first, "second": pair.second}, pair.seed)


def both_orders(
    backend: Backend, prompt: VerdictPrompt, pairs: Sequence[Pair], mode: VerdictMode = "auto", temperature: float = 0.0
) -> list[tuple[Verdict, Verdict]]:
    """Asks the judge a question about every pair in both orders, all in one backend call.

    Args:
        backend: the judge LLM.
        prompt: the question, with the fields ``first`` and ``second`` and, if it needs one, ``prompt``.
        pairs: n pairs.
        mode: see :data:`~instructgym.rewards.judges.verdict.VerdictMode`.
        temperature: sampling temperature of generated verdicts; 0: greedy.

    Returns:
        For each pair the verdicts on its original and on its swapped order.

    Raises:
        UnsupportedRequestError: in likelihood mode, if the backend reports no log-probs.
        ValueError: for an unknown mode.
    """
    swapped = [Pair(pair.second, pair.first, pair.prompt, request_seed(pair.seed, "swapped")) for pair in pairs]
    # All original orders come first, then all swapped ones; the verdicts are cut in the middle.
    questions = [pair_question(prompt, pair) for pair in (*pairs, *swapped)]
    verdicts = judge_verdicts(backend, questions, mode, temperature)
    return list(zip(verdicts[: len(pairs)], verdicts[len(pairs) :], strict=True))


def compare(
    backend: Backend, pairs: Sequence[Pair], mode: VerdictMode = "auto", temperature: float = 0.0
) -> list[Comparison]:
    """Compares the texts of each pair, in both orders; all pairs are judged in one backend call.

    The judge has to choose one text, and a pair is a tie if its choice changes with the order. Texts that differ at
    most in white space are a tie without a call.

    Args:
        backend: the judge LLM.
        pairs: n pairs.
        mode: see :data:`~instructgym.rewards.judges.verdict.VerdictMode`.
        temperature: sampling temperature of generated verdicts; 0: greedy.

    Returns:
        n comparisons, in order.

    Raises:
        UnsupportedRequestError: in likelihood mode, if the backend reports no log-probs.
        ValueError: for an unknown mode.
    """
    different = [pair for pair in pairs if pair.first.split() != pair.second.split()]
    verdicts = iter(both_orders(backend, pairwise_prompt(), different, mode, temperature))
    return [
        _comparison(*next(verdicts)) if pair.first.split() != pair.second.split() else Comparison("tie", agreed=True)
        for pair in pairs
    ]


def _comparison(original: Verdict, swapped: Verdict) -> Comparison:
    if original.answer is None or swapped.answer is None:
        return Comparison(None, verdicts=(original, swapped), why=original.why or swapped.why)
    # True means that the text shown first is better: equal answers prefer a position, different ones a text.
    agreed = original.answer != swapped.answer
    outcome: Outcome = "tie" if not agreed else "first" if original.answer else "second"
    probability = None
    if original.log_odds is not None and swapped.log_odds is not None:
        # A preference for one position adds the same log-odds in both orders and cancels out.
        probability = sigmoid((original.log_odds - swapped.log_odds) / 2)
    return Comparison(outcome, agreed, (original, swapped), probability)


class PairwiseJudge(Reward):
    """Gives 1 if the judge prefers the response to the reference, 0 if it prefers the reference, 1/2 for a tie.

    The mean of this reward is the win rate against the references. The judge sees both orders; if they disagree, the
    pair is a tie and the term ``agreement`` is 0. If one of the orders gets no verdict, the score is invalid.

    Args:
        backend: the judge LLM.
        mode: ``"verdict"`` generates a reply and parses it strictly, ``"likelihood"`` compares the log-probs of both
            letters, ``"auto"`` is likelihood for backends with few-shot prompts that report log-probs, else verdict.
        graded: in likelihood mode, give the probability that the response is better instead of 0, 1/2 or 1.

    Raises:
        ValueError: for an unknown mode.
    """

    name = "pairwise"
    calls_per_sample = 2

    def __init__(self, backend: Any = "embedded", mode: VerdictMode = "auto", graded: bool = False) -> None:
        check_mode(mode)
        self.backend = resolve("backend", backend)
        self.mode, self.graded = mode, graded

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores responses; each sample needs a ``reference``.

        Raises:
            InputError: if a sample has no reference.
        """
        pairs = [
            Pair(sample.response, reference, sample.prompt, sample.seed)
            for sample, reference in zip(samples, _references(samples, "pairwise judge"), strict=True)
        ]
        return [self._score(c) for c in compare(self.backend, pairs, self.mode, judge_temperature(samples))]

    def _score(self, comparison: Comparison) -> Score:
        if comparison.outcome is None:
            return Score.invalid(comparison.why, calls=comparison.calls)
        value = OUTCOME_VALUES[comparison.outcome]
        if self.graded and comparison.probability is not None:
            value = comparison.probability
        terms = {self.name: value, "agreement": float(bool(comparison.agreed))}
        return Score(value, terms=terms, feedback=OUTCOME_FEEDBACK[comparison.outcome], calls=comparison.calls)


class ScoredComparison(Reward):
    """Gives 1 if another reward scores the response above the reference, 0 if below, 1/2 if it scores them alike.

    The mean of this reward is the win rate against the references by a reward that scores one text at a time. Such a
    scorer never sees two texts side by side, so it has no position bias: both orders agree by construction, and the
    term ``agreement`` is always 1. The terms are otherwise those of :class:`PairwiseJudge`. If one of the two scores is
    invalid, so is the comparison. Responses and references are scored in one call.

    Args:
        scorer: the reward that scores both texts, or its id.
        margin: largest difference of two scores that is a tie, in units of the score.

    Raises:
        InputError: for a negative or infinite margin; when scoring, for a sample without a reference.
    """

    name = "pairwise"

    def __init__(self, scorer: Any, margin: float = 0.0) -> None:
        if not 0 <= margin < math.inf:
            raise InputError(f"the margin of a tie must be a number of at least 0, got {margin}")
        self.scorer = resolve("reward", scorer)
        self.margin = margin
        self.calls_per_sample = 2 * self.scorer.calls_per_sample

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores responses; each sample needs a ``reference``."""
        # Tokens, mask and finish reason describe the response; they do not apply to the reference.
        reference_samples = [
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
        scores = scores_of(self.scorer, [*samples, *reference_samples])
        return [self._score(*pair) for pair in zip(scores[: len(samples)], scores[len(samples) :], strict=True)]

    def reset(self) -> None:
        self.scorer.reset()

    def _score(self, response: Score, reference: Score) -> Score:
        calls = response.calls + reference.calls
        for score in (response, reference):
            if not score.valid:
                return Score.invalid(score.feedback, calls=calls)
        difference = response.value - reference.value
        outcome: Outcome = "tie" if abs(difference) <= self.margin else "first" if difference > 0 else "second"
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
