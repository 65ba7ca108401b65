"""Rewards that compare a response with the right answer (label, number or span), and the strict parser of answers.

A response is the text before the closing tag. It is well-formed only if it is one allowed answer and nothing else; a
response that was cut off before the tag is malformed, whatever its text.
"""

from __future__ import annotations

import math
import re
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..llm_backends.errors import InputError, check_known
from .base import Reward, Sample, Score

Preset = Literal["paper", "code"]
"""Key of :data:`PRESETS`."""


class LabelPoints(NamedTuple):
    """The reward of a response to a task with labels."""

    correct: float
    """Reward of the right label."""
    wrong: float
    """Reward of another allowed label."""
    malformed: float
    """Reward of anything else."""


PRESETS: dict[str, LabelPoints] = {"paper": LabelPoints(1.0, 0.0, -1.0), "code": LabelPoints(1.0, -1.0, -3.0)}
"""``paper``: the points of the RL4GLUE paper (arXiv 2410.11020); ``code``: those of its released code."""

LOW, HIGH = 0.0, 5.0
"""Range of STS-B's labels, to which predictions are clamped."""

COMPLETE = ("stop", "choice")
"""Finish reasons of a response that was not cut off."""


def parse_label(text: str, choices: Sequence[str]) -> str | None:
    """Returns the choice that equals the text without surrounding blanks, case included; None if there is none."""
    stripped = text.strip()
    return stripped if stripped in choices else None


def parse_answer(text: str, finish_reason: str, choices: Sequence[str] = ()) -> str | None:
    """Returns the answer that a response gives; None if the response is malformed.

    Args:
        text: the response, without the stop string.
        finish_reason: why the response ended; any reason not in :data:`COMPLETE` makes it malformed.
        choices: the allowed answers; if empty, every text is allowed.
    """
    if finish_reason not in COMPLETE:
        return None
    return parse_label(text, choices) if choices else text.strip()


def parse_number(text: str) -> float | None:
    """Parses a text that is one finite decimal number, surrounding blanks aside; returns None for anything else."""
    stripped = text.strip()
    # Without re.ASCII, \d also matches the digits of other scripts.
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", stripped, re.ASCII):
        return None
    value = float(stripped)
    return value if math.isfinite(value) else None  # enough digits overflow to infinity


def clamp(value: float) -> float:
    """Returns the nearest number in STS-B's range, [0, 5]."""
    return min(max(value, LOW), HIGH)


def normalize_answer(text: str) -> str:
    """Returns the text in SQuAD's normal form: lower case, no punctuation, no articles, single blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(text: str, answers: Sequence[str]) -> float:
    """Returns 1 if the text equals one of the answers in SQuAD's normal form, else 0."""
    return float(normalize_answer(text) in map(normalize_answer, answers))


def token_f1(text: str, answers: Sequence[str]) -> float:
    """Returns the best F1, 0 to 1, of the words of the text and those of any answer, in SQuAD's normal form.

    Without answers it is 0.
    """
    return max((_f1(normalize_answer(text).split(), normalize_answer(answer).split()) for answer in answers), default=0)


def _f1(words: list[str], reference_words: list[str]) -> float:
    # Two empty texts are equal, but the formula below would divide 0 by 0.
    if not words or not reference_words:
        return float(words == reference_words)
    return 2 * sum((Counter(words) & Counter(reference_words)).values()) / (len(words) + len(reference_words))


class _AnswerReward(Reward):
    """A reward that scores samples one by one; ``terms["format"]`` is 1 for a well-formed response, else 0."""

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        return [self.score(sample) for sample in samples]

    @abstractmethod
    def score(self, sample: Sample) -> Score:
        """Scores one sample."""


class LabelMatch(_AnswerReward):
    """Gives points for the right label, for a wrong one, and for a malformed response.

    ``sample.reference`` is the right label and ``sample.metadata["choices"]`` are the allowed ones. The terms are
    ``correct`` (1 for the right label, else 0) and ``format``.

    Args:
        preset: points for right, wrong and malformed. ``"paper"``: 1, 0 and -1; ``"code"``: 1, -1 and -3.

    Raises:
        InputError: for an unknown preset; when scoring, for a sample whose reference is missing or not among its
            choices.
    """

    name = "label_match"

    def __init__(self, preset: Preset = "paper") -> None:
        self.points = _points(preset)

    def score(self, sample: Sample) -> Score:
        reference, choices = _reference(sample), sample.metadata.get("choices") or ()
        if reference not in choices:
            raise InputError(
                f"sample {sample.episode_id!r} has the reference {reference!r}, which is none of its choices "
                f"({', '.join(choices) or 'none'}): put both into the example"
            )
        if any(choice != choice.strip() for choice in choices):
            raise InputError(f"sample {sample.episode_id!r} has a choice with blanks around it: leave them out")
        label = parse_answer(sample.response, _finish_reason(sample), choices)
        if label is None:
            return _malformed(self.points.malformed, "correct", 0.0, f"has to be one of {', '.join(choices)}")
        correct = label == reference
        return Score(
            self.points.correct if correct else self.points.wrong,
            terms={"correct": float(correct), "format": 1.0},
            feedback="Right." if correct else f"Wrong: the answer is {reference}.",
        )


class RegressionReward(_AnswerReward):
    """Gives 2.5 minus the distance of the prediction to the right number; -2.5 for a malformed response.

    Predictions are clamped to [0, 5], so one outside the range gets the reward of the nearest number in it.
    ``sample.reference`` is the right number as text; ``sample.metadata["label"]``, if present, is the same number
    before rounding and is used instead. ``terms["error"]`` is minus the distance, -5 for a malformed response.

    Args:
        preset: only checked; both presets give the same points.

    Raises:
        InputError: for an unknown preset; when scoring, for a missing reference or a right number outside [0, 5].
    """

    name = "regression"

    def __init__(self, preset: Preset = "paper") -> None:
        _points(preset)

    def score(self, sample: Sample) -> Score:
        reference = _reference(sample)
        # The reference is rounded, the label is not.
        target = parse_number(str(sample.metadata.get("label", reference)))
        if target is None or not LOW <= target <= HIGH:
            raise InputError(f"sample {sample.episode_id!r} has the reference {reference!r}: use a number from 0 to 5")
        value = parse_number(parse_answer(sample.response, _finish_reason(sample)) or "")
        if value is None:
            return _malformed(-2.5, "error", LOW - HIGH, "has to be a number from 0 to 5")
        error = abs(clamp(value) - target)
        return Score(2.5 - error, terms={"error": -error, "format": 1.0}, feedback=f"The answer is {reference}.")


class SpanReward(_AnswerReward):
    """Gives the overlap with the best of several right answers, 0 to 1, in SQuAD's normal form; -1 if malformed.

    A response is malformed if it is empty or was cut off. The answers are ``sample.metadata["answers"]``, or else
    ``sample.reference``. The terms are ``correct`` (the exact match, for either measure) and ``format``.

    Args:
        measure: ``"em"``: exact match, 0 or 1; ``"f1"``: F1 of the words.

    Raises:
        InputError: for an unknown measure; when scoring, for a sample without answers.
    """

    name = "span"

    def __init__(self, measure: Literal["em", "f1"] = "f1") -> None:
        check_known("measure", measure, ("em", "f1"))
        self.measure = measure

    def score(self, sample: Sample) -> Score:
        answers = sample.metadata.get("answers") or [_reference(sample)]
        exact = exact_match(sample.response, answers)
        if not parse_answer(sample.response, _finish_reason(sample)):
            return _malformed(-1.0, "correct", 0.0, "is empty or was cut off")
        value = exact if self.measure == "em" else token_f1(sample.response, answers)
        return Score(value, terms={"correct": exact, "format": 1.0}, feedback=f"The answer is {answers[0]}.")


class GroundTruth(_AnswerReward):
    """Scores each sample by the reward for its kind of task, so that a mixture of tasks needs only one reward.

    ``sample.metadata["kind"]`` is ``"label"`` (the default, scored by :class:`LabelMatch`), ``"regression"``
    (:class:`RegressionReward`) or ``"span"`` (:class:`SpanReward`).

    Args:
        preset: the preset for labels and regression.
        measure: the measure for spans.

    Raises:
        InputError: for an unknown preset or measure; when scoring, for an unknown kind or a sample that the reward of
            its kind refuses.
    """

    name = "ground_truth"

    def __init__(self, preset: Preset = "paper", measure: Literal["em", "f1"] = "f1") -> None:
        self.rewards: dict[str, _AnswerReward] = {
            "label": LabelMatch(preset),
            "regression": RegressionReward(preset),
            "span": SpanReward(measure),
        }

    def score(self, sample: Sample) -> Score:
        kind = sample.metadata.get("kind", "label")
        if kind not in self.rewards:
            raise InputError(f"sample {sample.episode_id!r} is of kind {kind!r}: use {', '.join(self.rewards)}")
        return self.rewards[kind].score(sample)


def _malformed(points: float, term: str, value: float, fault: str) -> Score:
    return Score(points, terms={term: value, "format": 0.0}, feedback=f"Malformed: the answer {fault}.")


def _points(preset: str) -> LabelPoints:
    check_known("preset", preset, PRESETS)
    return PRESETS[preset]


def _reference(sample: Sample) -> str:
    if sample.reference is None:
        raise InputError(f"sample {sample.episode_id!r} has no reference: use labelled examples for this reward")
    return sample.reference


def _finish_reason(sample: Sample) -> str:
    return str(sample.metadata.get("finish_reason", "stop"))
