"""Rewards from the right answer: label match, distance of numbers, overlap of spans; and the strict parser of answers.

A response is the text before the closing tag. It is well-formed only if it says one allowed answer and nothing else;
what was cut off before the tag is malformed, whatever it says.
"""

from __future__ import annotations

import math
import re
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..llm_backends.errors import InputError
from .base import Reward, Sample, Score

Preset = Literal["paper", "code"]


class LabelPoints(NamedTuple):
    """What a label is worth."""

    correct: float
    wrong: float
    malformed: float


PRESETS: dict[str, LabelPoints] = {"paper": LabelPoints(1.0, 0.0, -1.0), "code": LabelPoints(1.0, -1.0, -3.0)}
"""Points as the RL4GLUE paper (arXiv 2410.11020) states them, and as its released code gives them."""

LOW, HIGH = 0.0, 5.0
"""Range of STS-B's labels, into which predictions are clamped."""

COMPLETE = ("stop", "choice")
"""Finish reasons of a response that ended by itself."""


def parse_label(text: str, choices: Sequence[str]) -> str | None:
    """The choice that the text, without surrounding blanks, equals to the letter; None if it is none of them."""
    stripped = text.strip()
    return stripped if stripped in choices else None


def parse_answer(text: str, finish_reason: str, choices: Sequence[str] = ()) -> str | None:
    """The answer that a response gives; None for a malformed one.

    Args:
        text: the response, without the stop string.
        finish_reason: why it ended; what was cut off is malformed.
        choices: the allowed answers; without any, every text is one.
    """
    if finish_reason not in COMPLETE:
        return None
    return parse_label(text, choices) if choices else text.strip()


def parse_number(text: str) -> float | None:
    """The finite decimal number that the text, without surrounding blanks, consists of; None if it is none."""
    stripped = text.strip()
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", stripped, re.ASCII):
        return None
    value = float(stripped)
    return value if math.isfinite(value) else None


def clamp(value: float) -> float:
    """The nearest number in STS-B's range, [0, 5]."""
    return min(max(value, LOW), HIGH)


def normalize_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 if the text equals one of the answers in SQuAD's normal form, else 0."""
    return float(normalize_answer(text) in map(normalize_answer, answers))


def token_f1(text: str, answers: Sequence[str]) -> float:
    """The best F1 between the words of the text and those of an answer in SQuAD's normal form, 0 to 1."""
    return max((_f1(normalize_answer(text).split(), normalize_answer(answer).split()) for answer in answers), default=0)


def _f1(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    return 2 * sum((Counter(words) & Counter(wanted)).values()) / (len(words) + len(wanted))


class _AnswerReward(Reward):
    """Scores samples one by one; ``terms["format"]`` is 1 for a well-formed response, else 0."""

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        return [self.score(sample) for sample in samples]

    @abstractmethod
    def score(self, sample: Sample) -> Score:
        """Scores one sample."""


class LabelMatch(_AnswerReward):
    """Points for the right word, for a wrong one, and for anything else.

    ``sample.reference`` is the right word and ``sample.metadata["choices"]`` are the allowed ones.

    Args:
        preset: ``"paper"``: 1, 0 and -1; ``"code"``: 1, -1 and -3.

    Raises:
        InputError: for an unknown preset; when scoring, for a sample without reference or choices.
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
        word = parse_answer(sample.response, _finish_reason(sample), choices)
        if word is None:
            feedback = f"Malformed: the answer has to be one of {', '.join(choices)}."
            return Score(self.points.malformed, terms={"correct": 0.0, "format": 0.0}, feedback=feedback)
        correct = word == reference
        return Score(
            self.points.correct if correct else self.points.wrong,
            terms={"correct": float(correct), "format": 1.0},
            feedback="Right." if correct else f"Wrong: the answer is {reference}.",
        )


class RegressionReward(_AnswerReward):
    """2.5 minus the distance to the right number, the prediction clamped into [0, 5]; -2.5 for anything else.

    ``sample.reference`` is the right number as text; ``terms["error"]`` is minus the distance, -5 for a malformed
    response.

    Args:
        preset: both give the same points; a number outside the range costs no more than the nearest one in it.

    Raises:
        InputError: for an unknown preset; when scoring, for a sample whose reference is no number.
    """

    name = "regression"

    def __init__(self, preset: Preset = "paper") -> None:
        _points(preset)

    def score(self, sample: Sample) -> Score:
        reference = _reference(sample)
        wanted = parse_number(str(sample.metadata.get("label", reference)))  # the label is not rounded
        if wanted is None or not LOW <= wanted <= HIGH:
            raise InputError(f"sample {sample.episode_id!r} has the reference {reference!r}: use a number from 0 to 5")
        value = parse_number(parse_answer(sample.response, _finish_reason(sample)) or "")
        if value is None:
            feedback = "Malformed: the answer has to be a number from 0 to 5."
            return Score(-2.5, terms={"error": LOW - HIGH, "format": 0.0}, feedback=feedback)
        error = abs(clamp(value) - wanted)
        return Score(2.5 - error, terms={"error": -error, "format": 1.0}, feedback=f"The answer is {reference}.")


class SpanReward(_AnswerReward):
    """Overlap with the best of several right answers, 0 to 1, in SQuAD's normal form; -1 for an empty response.

    The answers are ``sample.metadata["answers"]``, or else ``sample.reference``.

    Args:
        measure: ``"em"`` for an exact match, ``"f1"`` for the F1 of the words.

    Raises:
        InputError: for an unknown measure; when scoring, for a sample without answers.
    """

    name = "span"

    def __init__(self, measure: Literal["em", "f1"] = "f1") -> None:
        if measure not in ("em", "f1"):
            raise InputError(f"unknown measure {measure!r}: use em or f1")
        self.measure = measure

    def score(self, sample: Sample) -> Score:
        answers = sample.metadata.get("answers") or [_reference(sample)]
        exact = exact_match(sample.response, answers)
        if not parse_answer(sample.response, _finish_reason(sample)):
            feedback = "Malformed: the answer is empty or was cut off."
            return Score(-1.0, terms={"correct": 0.0, "format": 0.0}, feedback=feedback)
        value = exact if self.measure == "em" else token_f1(sample.response, answers)
        return Score(value, terms={"correct": exact, "format": 1.0}, feedback=f"The answer is {answers[0]}.")


class GroundTruth(_AnswerReward):
    """The reward that a sample's task asks for, so that a mixture of tasks needs one reward only.

    ``sample.metadata["kind"]`` is ``"label"`` (the default), ``"regression"`` or ``"span"``.

    Args:
        preset: of :class:`LabelMatch` and :class:`RegressionReward`.
        measure: of :class:`SpanReward`.

    Raises:
        InputError: as these; when scoring, for an unknown kind.
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


def _points(preset: str) -> LabelPoints:
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}: use {' or '.join(PRESETS)}")
    return PRESETS[preset]


def _reference(sample: Sample) -> str:
    if sample.reference is None:
        raise InputError(f"sample {sample.episode_id!r} has no reference: use labelled examples for this reward")
    return sample.reference


def _finish_reason(sample: Sample) -> str:
    return str(sample.metadata.get("finish_reason", "stop"))
