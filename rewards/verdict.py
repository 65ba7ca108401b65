"""Two-way verdicts by a judge LLM: generated and parsed strictly, or read off the log-probs of the two words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..llm_backends import Backend, BackendError, Sampling, UnsupportedRequestError
from ..llm_backends.prompting import build_prompt, few_shot, fill

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
    probability: float | None = None
    """Of the positive answer, among the two; likelihood mode only."""
    why: str = ""
    """The reason, where there is no verdict."""


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
    if mode == "likelihood" or (mode == "auto" and style == "completion" and backend.supports_logprobs):
        return _by_likelihood(backend, prompts, questions)
    samplings = [Sampling(max_tokens=8, temperature=temperature, stop=("\n",), seed=q.seed) for q in questions]
    verdicts = []
    for question, result in zip(questions, backend.generate(prompts, samplings), strict=True):
        if isinstance(result, BackendError):
            verdicts.append(Verdict(None, why=str(result)))
            continue
        answer = question.prompt.parse(result[0].text)
        why = "" if answer is not None else f"not a verdict: {result[0].text[:80]!r}"
        verdicts.append(Verdict(answer, why=why))
    return verdicts


def _by_likelihood(backend: Backend, prompts: Sequence[Any], questions: Sequence[Question]) -> list[Verdict]:
    lead = " " if backend.prompt_style == "completion" else ""
    doubled = [prompt for prompt in prompts for _ in range(2)]
    words = [lead + word for q in questions for word in (q.prompt.positive, q.prompt.negative)]
    rows = backend.logprobs(doubled, words)
    verdicts = []
    for index, question in enumerate(questions):
        positive, negative = rows[2 * index], rows[2 * index + 1]
        failed = next((row for row in (positive, negative) if isinstance(row, BackendError)), None)
        if isinstance(failed, UnsupportedRequestError):
            raise failed
        if failed is not None:
            verdicts.append(Verdict(None, why=str(failed)))
            continue
        odds = float(positive.sum()) - float(negative.sum()) - question.prompt.bias  # type: ignore[union-attr]
        if not math.isfinite(odds):
            verdicts.append(Verdict(None, why=f"the judge's log-odds are {odds}"))
            continue
        verdicts.append(Verdict(odds > 0, probability=1 / (1 + math.exp(-max(min(odds, 500.0), -500.0)))))
    return verdicts
