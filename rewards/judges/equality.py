"""The judge reward of TeaMs-RL: 1 if a judge LLM finds the edited instruction not equal to the one before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...llm_backends import resolve
from ...llm_backends.prompting import load_prompts
from ..base import Reward, Sample, Score
from .verdict import Question, VerdictMode, VerdictPrompt, check_mode, judge_verdicts, temperature_for


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
