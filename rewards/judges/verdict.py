"""Verdicts of a judge LLM on questions with two answers, and the equality judge.

A verdict is generated and parsed strictly, or decided by comparing the log-probs of the two answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ...llm_backends import Backend, BackendError, Prompt, Sampling, UnsupportedRequestError, resolve
from ...llm_backends.base import PromptStyle
from ...llm_backends.errors import check_known
from ...llm_backends.prompting import build_prompt, few_shot, fill, load_prompts
from ..base import Reward, Sample, Score

RETRY_TEMPERATURE = 0.7
"""Temperature of a retry: it is sampled, because a greedy judge would give the same reply again."""

VerdictMode = Literal["auto", "verdict", "likelihood"]
"""How a verdict is obtained.

``verdict``: generate a reply and parse it; ``likelihood``: compare the log-probs of the two answers, which small models
need; ``auto``: likelihood for backends with few-shot prompts that report log-probs, verdict for all others."""


@dataclass(frozen=True)
class VerdictPrompt:
    """A question with two possible answers, in a chat and in a few-shot form."""

    positive: str
    """The answer with value 1, e.g. ``Not Equal``."""
    negative: str
    """The answer with value 0, e.g. ``Equal``."""
    chat: str
    """Template of the request to a chat model; ``{field}`` is replaced by a text between tags."""
    header: str
    """First line of the few-shot form."""
    labels: tuple[str, ...]
    """Line labels of the few-shot form; the last one is the label of the verdict."""
    fields: tuple[str, ...]
    """Names of the texts, one per label except the last."""
    demonstrations: tuple[tuple[str, ...], ...]
    """Examples of the few-shot form, each with one value per label."""
    bias: float = 0.0
    """Nats subtracted from the log-odds of the positive answer: small models favour one word whatever the texts are."""

    @classmethod
    def from_file(cls, data: Mapping[str, Any], labels: Sequence[str], fields: Sequence[str]) -> VerdictPrompt:
        """Builds a prompt from one table of a prompt file.

        Args:
            data: the table; its demonstrations hold their texts under the names in ``fields`` and ``verdict``.
            labels: line labels of the few-shot form.
            fields: names of the texts, one per label except the last.
        """
        shots = tuple(tuple(shot[name] for name in (*fields, "verdict")) for shot in data["demonstrations"])
        texts = {name: data[name] for name in ("positive", "negative", "chat", "header")}
        bias = float(data.get("bias", 0.0))
        return cls(**texts, labels=tuple(labels), fields=tuple(fields), demonstrations=shots, bias=bias)

    def build(self, style: PromptStyle, texts: Mapping[str, str]) -> Prompt:
        """Returns the request about some texts, given by field name."""
        shown = few_shot(self.header, self.labels, self.demonstrations, [texts[name] for name in self.fields])
        return build_prompt(style, fill(self.chat, texts), shown)

    def parse(self, reply: str) -> bool | None:
        """Returns True for the positive answer, False for the negative one, None for anything else.

        Case, surrounding white space and one trailing period are ignored; any other word makes the reply no verdict.
        """
        words = re.sub(r"\s+", " ", reply.strip().removesuffix(".").strip()).casefold()
        return {self.positive.casefold(): True, self.negative.casefold(): False}.get(words)


@dataclass(frozen=True)
class Verdict:
    """The judge's verdict on one question."""

    answer: bool | None
    """True for the positive answer; None without a verdict (the request failed, or the reply is neither answer)."""
    log_odds: float | None = None
    """Log-odds of the positive answer, in nats, minus the prompt's bias; likelihood mode only."""
    why: str = ""
    """Why there is no verdict; empty if there is one."""

    @property
    def probability(self) -> float | None:
        """Probability of the positive answer among the two; likelihood mode only."""
        return None if self.log_odds is None else sigmoid(self.log_odds)


@dataclass(frozen=True)
class Question:
    """One question to the judge."""

    prompt: VerdictPrompt
    """The form of the question."""
    texts: Mapping[str, str]
    """The texts by field name."""
    seed: int = 0
    """Request seed."""


def check_mode(mode: str) -> None:
    """Raises a ValueError for an unknown mode."""
    check_known("judge mode", mode, get_args(VerdictMode))


def sigmoid(log_odds: float) -> float:
    """Returns the probability for log-odds in nats."""
    # math.exp raises OverflowError above 709.
    return 1 / (1 + math.exp(-max(min(log_odds, 500.0), -500.0)))


def judge_temperature(samples: Sequence[Sample]) -> float:
    """Returns the temperature of a judge's replies: 0, or :data:`RETRY_TEMPERATURE` if any sample is a retry."""
    return RETRY_TEMPERATURE if any(sample.metadata.get("attempt") for sample in samples) else 0.0


def uses_likelihood(backend: Backend, mode: VerdictMode) -> bool:
    """Returns whether a judge in this mode compares log-probs on this backend; if not, it generates replies."""
    return mode == "likelihood" or (
        mode == "auto" and backend.prompt_style == "completion" and backend.supports_logprobs
    )


def word_log_probs(
    backend: Backend, prompts: Sequence[Prompt], words: Sequence[Sequence[str]]
) -> list[list[float] | BackendError]:
    """Returns the log-probs of possible answers, computed in one backend call.

    Args:
        backend: the judge LLM.
        prompts: n prompts.
        words: for each prompt its possible answers.

    Returns:
        For each prompt one log-prob in nats per answer, or the error if one of its requests failed.

    Raises:
        UnsupportedRequestError: if the backend reports no log-probs.
    """
    rows = backend.choice_logprobs(
        prompts, [[answer_separator(backend) + word for word in answers] for answers in words]
    )
    unsupported = next((row for row in rows if isinstance(row, UnsupportedRequestError)), None)
    if unsupported is not None:
        raise unsupported
    return [row if isinstance(row, BackendError) else row.tolist() for row in rows]


def judge_verdicts(
    backend: Backend, questions: Sequence[Question], mode: VerdictMode = "auto", temperature: float = 0.0
) -> list[Verdict]:
    """Asks the judge all questions in one backend call.

    Args:
        backend: the judge LLM.
        questions: the questions, which may differ in form.
        mode: see :data:`VerdictMode`.
        temperature: sampling temperature of generated verdicts; 0: greedy.

    Returns:
        One verdict per question, in order.

    Raises:
        UnsupportedRequestError: in likelihood mode, if the backend reports no log-probs.
        ValueError: for an unknown mode.
    """
    check_mode(mode)
    if not questions:
        return []
    style = backend.prompt_style
    prompts = [question.prompt.build(style, question.texts) for question in questions]
    if uses_likelihood(backend, mode):
        return _by_likelihood(backend, prompts, questions)
    words = [(question.prompt.positive, question.prompt.negative) for question in questions]
    samplings = [
        Sampling(8, temperature, stop=("\n",), choices=allowed_replies(backend, answers), seed=question.seed)
        for question, answers in zip(questions, words, strict=True)
    ]
    verdicts = []
    for question, result in zip(questions, backend.generate(prompts, samplings), strict=True):
        if isinstance(result, BackendError):
            verdicts.append(Verdict(None, why=str(result)))
            continue
        answer = question.prompt.parse(result[0].text)
        why = "" if answer is not None else f"not a verdict: {result[0].text[:80]!r}"
        verdicts.append(Verdict(answer, why=why))
    return verdicts


def answer_separator(backend: Backend) -> str:
    """Returns the text between prompt and answer: a blank after a few-shot label, nothing in a chat."""
    return " " if backend.prompt_style == "completion" else ""


def allowed_replies(backend: Backend, words: Sequence[str]) -> tuple[str, ...]:
    """Returns ``Sampling.choices`` that allow only the words; empty if the backend lacks constrained decoding."""
    return tuple(answer_separator(backend) + word for word in words) if backend.supports_choices else ()


def _by_likelihood(backend: Backend, prompts: Sequence[Prompt], questions: Sequence[Question]) -> list[Verdict]:
    verdicts = []
    words = [(question.prompt.positive, question.prompt.negative) for question in questions]
    for question, row in zip(questions, word_log_probs(backend, prompts, words), strict=True):
        if isinstance(row, BackendError):
            verdicts.append(Verdict(None, why=str(row)))
            continue
        log_odds = row[0] - row[1] - question.prompt.bias
        # An answer of probability 0 has log-prob -inf, two of them give NaN.
        if math.isfinite(log_odds):
            verdicts.append(Verdict(log_odds > 0, log_odds))
        else:
            verdicts.append(Verdict(None, why=f"the judge's log-odds are {log_odds}"))
    return verdicts


def verdict_score(name: str, verdict: Verdict, prompt: VerdictPrompt, graded: bool = True) -> Score:
    """Returns the score of a verdict that took one request.

    Args:
        name: name of the reward.
        verdict: the verdict; without an answer the score is invalid.
        prompt: the form of the question.
        graded: give the probability of the positive answer, if there is one, instead of 0 or 1.
    """
    if verdict.answer is None:
        return Score.invalid(verdict.why, calls=1)
    # There is no probability for a generated verdict.
    probability = verdict.probability if graded else None
    value = float(verdict.answer) if probability is None else probability
    feedback = prompt.positive if verdict.answer else prompt.negative
    return Score(value, terms={name: value}, feedback=feedback, calls=1)


def equality_prompt() -> VerdictPrompt:
    """Returns the question whether two instructions ask for the same: constraints, requirements, depth and breadth."""
    data = {"positive": "Not Equal", "negative": "Equal"} | load_prompts(__package__, "equality")
    return VerdictPrompt.from_file(data, ("First", "Second", "Verdict"), ("first", "second"))


class EqualityJudge(Reward):
    """Gives 1 for the verdict ``Not Equal``, 0 for ``Equal`` (TeaMs-RL, section 1.2 of its released code).

    The judge sees the text before and after the edit and decides by two criteria: same constraints and requirements,
    same depth and breadth. Texts that differ at most in white space are equal without a call. If the judge gives no
    verdict, the score is invalid.

    Args:
        backend: the judge LLM.
        mode: ``"verdict"`` generates a reply and parses it strictly, ``"likelihood"`` compares the log-probs of the two
            verdicts, ``"auto"`` is likelihood for backends with few-shot prompts that report log-probs, else verdict.
        graded: in likelihood mode, give the probability of ``Not Equal`` instead of 0 or 1.
        bias: nats subtracted from the log-odds of ``Not Equal``; None: the value tuned for the packaged prompt.

    Raises:
        ValueError: for an unknown mode.
    """

    name = "judge"
    calls_per_sample = 1

    def __init__(
        self, backend: Any = "embedded", mode: VerdictMode = "auto", graded: bool = False, bias: float | None = None
    ) -> None:
        check_mode(mode)
        self.backend = resolve("backend", backend)
        self.mode, self.graded = mode, graded
        prompt = equality_prompt()
        self.prompt = prompt if bias is None else replace(prompt, bias=bias)

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores edits; each sample needs ``previous``.

        Raises:
            ValueError: if a sample has no previous text.
        """
        # Equal texts need no verdict: None in place of a question.
        questions: list[Question | None] = []
        for sample in samples:
            if sample.previous is None:
                raise ValueError("the equality judge compares a text with the one before: Sample.previous is None")
            texts = {"first": sample.previous, "second": sample.response}
            same = sample.previous.split() == sample.response.split()
            questions.append(None if same else Question(self.prompt, texts, sample.seed))
        asked = [question for question in questions if question is not None]
        verdicts = iter(judge_verdicts(self.backend, asked, self.mode, judge_temperature(samples)))
        return [
            Score(0.0, terms={self.name: 0.0}, feedback="the texts are the same")
            if question is None
            else verdict_score(self.name, next(verdicts), self.prompt, self.graded)
            for question in questions
        ]
