"""Two-way verdicts by a judge LLM: generated and parsed strictly, or read off the log-probs of the two words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...llm_backends import Backend, BackendError, Prompt, Sampling, UnsupportedRequestError, resolve
from ...llm_backends.prompting import build_prompt, few_shot, fill, load_prompts
from ..base import Reward, Sample, Score

RETRY_TEMPERATURE = 0.7
"""A retry must be able to come out differently, so it is sampled."""

VerdictMode = Literal["auto", "verdict", "likelihood"]
"""``verdict``: generate and parse; ``likelihood``: compare the two words' log-probs, which small models need;
``auto``: likelihood for backends with few-shot prompts that report log-probs, verdict for all others."""


@dataclass(frozen=True)
class VerdictPrompt:
    """A question with two possible answers, in a chat and a few-shot form."""

    positive: str
    """The answer worth 1, e.g. ``Not Equal``."""
    negative: str
    """The answer worth 0, e.g. ``Equal``."""
    chat: str
    """Request to a chat model; ``{field}`` stands for a fenced text."""
    header: str
    labels: tuple[str, ...]
    """Line names of the few-shot form; the last is that of the verdict."""
    fields: tuple[str, ...]
    """Names of the texts, one per label but the last."""
    demonstrations: tuple[tuple[str, ...], ...]
    bias: float = 0.0
    """Nats taken off the log-odds of the positive answer: small models favour one word whatever they read."""

    @classmethod
    def from_file(cls, data: Mapping[str, Any], labels: Sequence[str], fields: Sequence[str]) -> VerdictPrompt:
        """From one table of a prompt file, with its demonstrations' texts under ``fields`` and ``verdict``."""
        return cls(
            positive=data["positive"],
            negative=data["negative"],
            chat=data["chat"],
            header=data["header"],
            labels=tuple(labels),
            fields=tuple(fields),
            demonstrations=tuple(tuple(shot[name] for name in (*fields, "verdict")) for shot in data["demonstrations"]),
            bias=float(data.get("bias", 0.0)),
        )

    def parse(self, reply: str) -> bool | None:
        """True for the positive answer, False for the negative one, None for anything else.

        Case, surrounding white space and one trailing period do not matter; any other word does.
        """
        words = re.sub(r"\s+", " ", reply.strip().removesuffix(".").strip()).casefold()
        return {self.positive.casefold(): True, self.negative.casefold(): False}.get(words)


@dataclass(frozen=True)
class Verdict:
    """What the judge said of one question."""

    answer: bool | None
    """None where there is no verdict: the request failed, or the reply is not one of the two answers."""
    log_odds: float | None = None
    """Of the positive answer, in nats and less the prompt's bias; likelihood mode only."""
    why: str = ""
    """The reason, where there is no verdict."""

    @property
    def probability(self) -> float | None:
        """Of the positive answer, among the two; likelihood mode only."""
        return None if self.log_odds is None else sigmoid(self.log_odds)


@dataclass(frozen=True)
class Question:
    """One question to the judge: the form of it, its texts and the request seed."""

    prompt: VerdictPrompt
    texts: Mapping[str, str]
    seed: int = 0


def check_mode(mode: str) -> None:
    """Refuses an unknown mode with a ValueError."""
    if mode not in ("auto", "verdict", "likelihood"):
        raise ValueError(f"unknown judge mode {mode!r}: use 'auto', 'verdict' or 'likelihood'")


def sigmoid(log_odds: float) -> float:
    """The probability of given log-odds in nats."""
    return 1 / (1 + math.exp(-max(min(log_odds, 500.0), -500.0)))


def temperature_for(samples: Sequence[Sample]) -> float:
    """Temperature of a judge's replies: greedy, but sampled where the samples come as a retry."""
    return RETRY_TEMPERATURE if any(sample.metadata.get("attempt") for sample in samples) else 0.0


def reads_likelihood(backend: Backend, mode: VerdictMode) -> bool:
    """Whether a judge of this mode compares log-probs on this backend, or else generates."""
    return mode == "likelihood" or (
        mode == "auto" and backend.prompt_style == "completion" and backend.supports_logprobs
    )


def word_log_probs(
    backend: Backend, prompts: Sequence[Prompt], words: Sequence[Sequence[str]]
) -> list[list[float] | BackendError]:
    """Log-probs of possible answers, in one backend call.

    Args:
        backend: the judge.
        prompts: n prompts.
        words: for each prompt its possible answers.

    Returns:
        For each prompt one log-prob in nats per answer, or the error of one of its requests.

    Raises:
        UnsupportedRequestError: if the backend reports no log-probs.
    """
    rows = backend.choice_logprobs(prompts, [[lead(backend) + word for word in mine] for mine in words])
    unsupported = next((row for row in rows if isinstance(row, UnsupportedRequestError)), None)
    if unsupported is not None:
        raise unsupported
    return [row if isinstance(row, BackendError) else row.tolist() for row in rows]


def judge_verdicts(
    backend: Backend, questions: Sequence[Question], mode: VerdictMode = "auto", temperature: float = 0.0
) -> list[Verdict]:
    """Asks the judge all questions in one backend call.

    Args:
        backend: the judge.
        questions: may differ in form.
        mode: see :data:`VerdictMode`.
        temperature: of generated verdicts.

    Raises:
        UnsupportedRequestError: in likelihood mode, if the backend reports no log-probs.
        ValueError: for an unknown mode.
    """
    check_mode(mode)
    if not questions:
        return []
    style = backend.prompt_style
    prompts = [
        build_prompt(
            style,
            fill(q.prompt.chat, q.texts),
            few_shot(
                q.prompt.header, q.prompt.labels, q.prompt.demonstrations, [q.texts[name] for name in q.prompt.fields]
            ),
        )
        for q in questions
    ]
    if reads_likelihood(backend, mode):
        return _by_likelihood(backend, prompts, questions)
    samplings = [verdict_sampling(backend, question, temperature) for question in questions]
    verdicts = []
    for question, result in zip(questions, backend.generate(prompts, samplings), strict=True):
        if isinstance(result, BackendError):
            verdicts.append(Verdict(None, why=str(result)))
            continue
        answer = question.prompt.parse(result[0].text)
        why = "" if answer is not None else f"not a verdict: {result[0].text[:80]!r}"
        verdicts.append(Verdict(answer, why=why))
    return verdicts


def verdict_sampling(backend: Backend, question: Question, temperature: float) -> Sampling:
    """How the verdict on one question is generated: held to its two answers, where the backend can do that."""
    words = (question.prompt.positive, question.prompt.negative)
    choices = allowed_replies(backend, words)
    return Sampling(max_tokens=8, temperature=temperature, stop=("\n",), choices=choices, seed=question.seed)


def lead(backend: Backend) -> str:
    """What stands before an answer: a blank, where it goes on from a few-shot label."""
    return " " if backend.prompt_style == "completion" else ""


def allowed_replies(backend: Backend, words: Sequence[str]) -> tuple[str, ...]:
    """``Sampling.choices`` for a reply that is one of the words; empty where the backend cannot hold it to them."""
    return tuple(lead(backend) + word for word in words) if backend.supports_choices else ()


def _by_likelihood(backend: Backend, prompts: Sequence[Prompt], questions: Sequence[Question]) -> list[Verdict]:
    verdicts = []
    words = [(question.prompt.positive, question.prompt.negative) for question in questions]
    for question, row in zip(questions, word_log_probs(backend, prompts, words), strict=True):
        if isinstance(row, BackendError):
            verdicts.append(Verdict(None, why=str(row)))
            continue
        odds = row[0] - row[1] - question.prompt.bias
        if math.isfinite(odds):
            verdicts.append(Verdict(odds > 0, odds))
        else:
            verdicts.append(Verdict(None, why=f"the judge's log-odds are {odds}"))
    return verdicts


def equality_prompt() -> VerdictPrompt:
    """Do two instructions ask for the same, by constraints and requirements, and by depth and breadth?"""
    data = {"positive": "Not Equal", "negative": "Equal"} | load_prompts(__package__, "equality")
    return VerdictPrompt.from_file(data, ("First", "Second", "Verdict"), ("first", "second"))


class EqualityJudge(Reward):
    """r = 1 for ``Not Equal``, 0 for ``Equal`` (TeaMs-RL, section 1.2 of its released code).

    The judge sees the text before and after the edit and decides by two criteria: same constraints and requirements,
    same depth and breadth. Texts that differ at most in white space are equal without a call. Where the judge gives no
    verdict the score is invalid.

    Args:
        backend: the judge LLM.
        mode: ``"verdict"`` generates and parses strictly, ``"likelihood"`` compares the log-probs of the two verdicts,
            ``"auto"`` takes the latter for backends with few-shot prompts that report log-probs.
        graded: in likelihood mode, pay the probability of ``Not Equal`` instead of 0 or 1.
        bias: nats taken off the log-odds of ``Not Equal``; by default the value tuned for the packaged prompt.
    """

    name = "judge"
    calls_per_sample = 1

    def __init__(
        self,
        backend: Any = "embedded",
        mode: VerdictMode = "auto",
        graded: bool = False,
        bias: float | None = None,
    ) -> None:
        check_mode(mode)
        self.backend = resolve("backend", backend)
        self.mode, self.graded = mode, graded
        prompt = equality_prompt()
        self.prompt = prompt if bias is None else VerdictPrompt(**(vars(prompt) | {"bias": bias}))

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores edits; a sample needs ``previous``.

        Raises:
            ValueError: if a sample has no previous text.
        """
        scores: list[Score | None] = []
        questions: list[Question] = []
        for sample in samples:
            if sample.previous is None:
                raise ValueError("the equality judge compares a text with the one before: Sample.previous is None")
            if sample.previous.split() == sample.response.split():
                scores.append(self._score(0.0, "the texts are the same", calls=0))
            else:
                scores.append(None)
                texts = {"first": sample.previous, "second": sample.response}
                questions.append(Question(self.prompt, texts, sample.seed))
        verdicts = iter(judge_verdicts(self.backend, questions, self.mode, temperature_for(samples)))
        for index, known in enumerate(scores):
            if known is None:
                verdict = next(verdicts)
                if verdict.answer is None:
                    scores[index] = Score.invalid(verdict.why, calls=1)
                else:
                    graded = verdict.probability if self.graded else None
                    value = float(verdict.answer) if graded is None else graded
                    scores[index] = self._score(value, "Not Equal" if verdict.answer else "Equal", calls=1)
        return scores  # type: ignore[return-value]

    def _score(self, value: float, feedback: str, calls: int) -> Score:
        return Score(value, terms={self.name: value}, feedback=feedback, calls=calls)
