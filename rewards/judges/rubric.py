"""Rubric scoring: a judge LLM grades a response on named criteria.

A grade is generated and parsed strictly, or is the expected grade under the judge's distribution over the grades, as in
G-Eval (Liu et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...llm_backends import Backend, BackendError, Prompt, Sampling, resolve
from ...llm_backends.prompting import build_prompt, few_shot, fill, load_prompts
from ..base import Reward, Sample, Score
from .verdict import VerdictMode, allowed_replies, check_mode, judge_temperature, uses_likelihood, word_log_probs

CRITERIA = {
    "helpfulness": "does the response do all that the request asks for, in the form it asks for?",
    "correctness": "is everything that the response says true, and does one thing follow from the other?",
    "clarity": "is the response well ordered, easy to read and no longer than it has to be?",
}
"""The default criteria: description by name."""


@dataclass(frozen=True)
class Rubric:
    """The criteria and the scale of grades.

    Raises:
        ValueError: on construction, for a name that a line ``name: grade`` cannot hold, for no or equal names, or for a
            scale that does not go from one integer to a higher one.
    """

    criteria: Mapping[str, str]
    """Description by name."""
    low: int = 1
    """The worst grade."""
    high: int = 5
    """The best grade."""

    def __post_init__(self) -> None:
        names = list(self.criteria)
        for name in names:
            if name != " ".join(name.split()) or not name or ":" in name:
                raise ValueError(f"a criterion's name is words without a colon on one line, got {name!r}")
        if not names or len({name.casefold() for name in names}) < len(names):
            raise ValueError(f"a rubric needs criteria with different names, got {names}")
        if not all(isinstance(end, int) for end in (self.low, self.high)) or self.low >= self.high:
            raise ValueError(f"a scale goes from one integer to a higher one, got {self.low!r} to {self.high!r}")

    @property
    def one_digit(self) -> bool:
        """Whether every grade is one digit, so that none is the beginning of another (1, 10); likelihoods need this."""
        return self.low >= 0 and self.high <= 9

    @property
    def grades(self) -> dict[str, int]:
        """All grades, by their text."""
        return {str(grade): grade for grade in range(self.low, self.high + 1)}

    def parse(self, reply: str, names: Sequence[str] | None = None) -> dict[str, int] | None:
        """Parses a reply of one line ``name: grade`` per criterion; returns None for anything else.

        Every criterion must occur once, in any order, with a whole number on the scale. Case, blank lines and white
        space around name and grade are ignored.

        Args:
            reply: the reply.
            names: the criteria that the reply has to grade; None: all.

        Returns:
            Grade by criterion, in the order of ``names``.
        """
        known = {name.casefold(): name for name in names or self.criteria}
        grades: dict[str, int] = {}
        for line in filter(str.strip, reply.split("\n")):
            name, _, grade_text = line.partition(":")
            criterion = known.get(" ".join(name.split()).casefold())
            grade = self.grades.get(grade_text.strip())
            if criterion is None or grade is None or criterion in grades:
                return None
            grades[criterion] = grade
        return {name: grades[name] for name in known.values()} if len(grades) == len(known) else None

    def check(self, mode: VerdictMode) -> None:
        """Raises a ValueError for an unknown mode, or for likelihood mode if not every grade is one digit."""
        check_mode(mode)
        if mode == "likelihood" and not self.one_digit:
            raise ValueError(
                f"likelihood mode compares single digits, the scale goes from {self.low} to {self.high}: use a scale "
                "within 0 to 9, or mode 'verdict'"
            )

    def prompt(self, style: str, sample: Sample, names: Sequence[str]) -> Prompt:
        """Returns the request to grade a sample on the named criteria; the few-shot form takes exactly one."""
        data = load_prompts(__package__, "rubric")
        scale = {"low": str(self.low), "high": str(self.high)}
        if style == "chat":
            texts = {
                "prompt": sample.prompt,
                "response": sample.response,
                "criteria": "\n".join(f"- {name}: {self.criteria[name]}" for name in names),
                "form": "\n".join(f"{name}: grade" for name in names),
            }
            return build_prompt("chat", fill(data["chat"], texts | scale), "")
        [name] = names
        criterion = f"{name}: {self.criteria[name]}"
        shots = []
        for shot in data["demonstrations"]:
            shown_grade = round(self.low + shot["quality"] * (self.high - self.low))
            shots.append((shot["prompt"], shot["response"], criterion, str(shown_grade)))
        labels = ("Request", "Response", "Criterion", "Grade")
        return few_shot(fill(data["header"], scale), labels, shots, (sample.prompt, sample.response, criterion))


@dataclass(frozen=True)
class Grades:
    """The judge's grades of one response."""

    values: dict[str, float] | None
    """Grade by criterion; None if any of them is missing."""
    why: str = ""
    """Why there are no grades; empty if there are."""
    calls: int = 1
    """Number of LLM requests that the grades took."""


def grade(
    backend: Backend, rubric: Rubric, samples: Sequence[Sample], mode: VerdictMode = "auto", temperature: float = 0.0
) -> list[Grades]:
    """Grades the response of every sample, in one backend call.

    A chat model writes all grades of a response in one reply. Few-shot prompts and likelihoods take one request per
    criterion.

    Args:
        backend: the judge LLM.
        rubric: criteria and scale.
        samples: n samples with ``prompt``, ``response`` and ``seed``.
        mode: see :data:`~instructgym.rewards.judges.verdict.VerdictMode`; ``auto`` generates if not every grade is
            one digit.
        temperature: sampling temperature of generated grades; 0: greedy.

    Returns:
        n results, in order.

    Raises:
        UnsupportedRequestError: in likelihood mode, if the backend reports no log-probs.
        ValueError: for an unknown mode, or in likelihood mode if not every grade is one digit.
    """
    rubric.check(mode)
    if not samples:
        return []
    likelihood = uses_likelihood(backend, mode) and rubric.one_digit
    together = backend.prompt_style == "chat" and not likelihood
    parts = [list(rubric.criteria)] if together else [[name] for name in rubric.criteria]
    # Sample by sample, so that the replies about one response are neighbours.
    requests = [(sample, names) for sample in samples for names in parts]
    prompts = [rubric.prompt(backend.prompt_style, sample, names) for sample, names in requests]
    replies = (
        _expected(backend, rubric, prompts, [names[0] for _, names in requests])
        if likelihood
        else _generated(backend, rubric, prompts, requests, temperature)
    )
    return [_merge_grades(replies[i : i + len(parts)]) for i in range(0, len(replies), len(parts))]


def _generated(
    backend: Backend,
    rubric: Rubric,
    prompts: Sequence[Prompt],
    requests: Sequence[tuple[Sample, list[str]]],
    temperature: float,
) -> list[Grades]:
    chat = backend.prompt_style == "chat"
    stop, choices = ((), ()) if chat else (("\n",), allowed_replies(backend, list(rubric.grades)))
    samplings = [
        # A name takes at most one token per character.
        Sampling(sum(len(n) + 8 for n in names), temperature, stop=stop, choices=choices, seed=sample.seed)
        for sample, names in requests
    ]
    results = []
    for (_, names), result in zip(requests, backend.generate(prompts, samplings), strict=True):
        if isinstance(result, BackendError):
            results.append(Grades(None, str(result)))
            continue
        text = result[0].text if chat else f"{names[0]}: {result[0].text}"
        # A reply that was cut off may have lost a digit of its grade.
        values = rubric.parse(text, names) if result[0].finish_reason == "stop" else None
        why = "" if values is not None else f"not one grade from {rubric.low} to {rubric.high} each: {text[:80]!r}"
        results.append(Grades(None if values is None else {k: float(v) for k, v in values.items()}, why))
    return results


def _expected(backend: Backend, rubric: Rubric, prompts: Sequence[Prompt], names: Sequence[str]) -> list[Grades]:
    """Returns the expected grade under the judge's distribution over all grades."""
    # A chat model is asked for a line ``name: grade``, few-shot text ends where the grade follows.
    chat = backend.prompt_style == "chat"
    words = [[f"{name}: {digit}" if chat else digit for digit in rubric.grades] for name in names]
    scale = np.array(list(rubric.grades.values()), dtype=np.float64)
    results = []
    for name, row in zip(names, word_log_probs(backend, prompts, words), strict=True):
        if isinstance(row, BackendError):
            results.append(Grades(None, str(row)))
        elif not np.isfinite(row).all():
            results.append(Grades(None, f"the judge's log-probs of the grades are {row}"))
        else:
            # Softmax, shifted by the maximum: exp() of very low log-probs would underflow to 0 for every grade.
            weights = np.exp(np.array(row) - max(row))
            results.append(Grades({name: float(weights @ scale / weights.sum())}))
    return results


def _merge_grades(parts: Sequence[Grades]) -> Grades:
    """Merges the grades from all replies about one response; they are missing if any reply gave none."""
    values: dict[str, float] = {}
    for part in parts:
        if part.values is None:
            return Grades(None, part.why, len(parts))
        values |= part.values
    return Grades(values, calls=len(parts))


class RubricJudge(Reward):
    """Gives the weighted mean of a response's grades, with the worst grade mapped to 0 and the best to 1.

    The grade on each criterion is logged as a term under its name. If any grade is missing, the score is invalid.

    Args:
        backend: the judge LLM.
        criteria: description by name.
        weights: weight by criterion, not negative and not all 0; 1 for a criterion that is missing here.
        scale: the worst and the best grade, integers.
        mode: ``"verdict"`` generates a reply and parses it strictly, ``"likelihood"`` takes the expected grade by the
            log-probs of the digits, ``"auto"`` is likelihood for backends with few-shot prompts that report log-probs
            if every grade is one digit, else verdict.

    Raises:
        ValueError: for criteria, weights or a scale that cannot be used, for an unknown mode, or in likelihood mode if
            not every grade is one digit.
    """

    name = "rubric"

    def __init__(
        self,
        backend: Any = "embedded",
        criteria: Mapping[str, str] = CRITERIA,
        weights: Mapping[str, float] | None = None,
        scale: Sequence[int] = (1, 5),
        mode: VerdictMode = "auto",
    ) -> None:
        if len(scale) != 2:
            raise ValueError(f"scale is the worst and the best grade, got {scale!r}")
        self.rubric = Rubric(dict(criteria), *scale)
        self.rubric.check(mode)
        unknown = set(weights or {}) - set(criteria)
        if unknown:
            raise ValueError(f"weights without a criterion: {sorted(unknown)}")
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in criteria}
        if not all(0 <= w < math.inf for w in self.weights.values()) or not any(self.weights.values()):
            raise ValueError(f"weights must not be negative, and not all 0, got {self.weights}")
        self.backend, self.mode = resolve("backend", backend), mode
        self.calls_per_sample = len(self.weights)

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        results = grade(self.backend, self.rubric, samples, self.mode, judge_temperature(samples))
        return [self._score(result) for result in results]

    def _score(self, result: Grades) -> Score:
        if result.values is None:
            return Score.invalid(result.why, calls=result.calls)
        mean = sum(self.weights[name] * graded for name, graded in result.values.items()) / sum(self.weights.values())
        value = (mean - self.rubric.low) / (self.rubric.high - self.rubric.low)
        feedback = ", ".join(f"{name} {graded:.3g}" for name, graded in result.values.items())
        return Score(value, terms={self.name: value} | result.values, feedback=feedback, calls=result.calls)
