"""Tuna's contextual ranking (Li et al. 2023, arXiv 2310.13385): a judge orders all candidates of a prompt at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...llm_backends import Backend, BackendError, Sampling, request_seed, resolve
from ...llm_backends.errors import check_at_least
from ..base import Sample
from ..judges.ranking import RankingQuestion, RequestKind, check_count, check_kind, distinct_texts, rank
from ..judges.verdict import judge_temperature
from ..quality.likelihood import request_prompt
from .base import CandidateScores, Ranker


class ContextualRanker(Ranker):
    """Ranks all candidates by one reply of a judge.

    It uses :func:`~instructgym.rewards.judges.ranking.rank`: candidates are shown in an order drawn from the seed, and
    those that differ at most in white space are shown once. The score is minus the mean rank over the rounds, 0 for a
    candidate that was the best in all of them; duplicates share a score. If no round gives a ranking, there is none.

    Args:
        backend: the judge LLM.
        kind: kind of the requests, which sets the criteria: ``open`` (many responses can be good), ``closed`` (there is
            a right answer) or ``either`` (the judge decides).
        rounds: how often candidates are ranked, each time shown in another order.
        own_answer: let the judge answer the request first and rank its answer among the candidates (``added`` and
            ``added_scores`` of the result). If it gives no answer, there is no ranking.
        answer_tokens: maximum number of tokens of the judge's own answer.

    Raises:
        ValueError: for fewer than one round, an unknown kind or fewer than one token.
        InputError: when ranking, for more candidates than a request in the backend's form can hold.
    """

    name = "contextual"

    def __init__(
        self,
        backend: Any = "embedded",
        kind: RequestKind = "either",
        rounds: int = 1,
        own_answer: bool = False,
        answer_tokens: int = 512,
    ) -> None:
        check_kind(kind)
        check_at_least(1, rounds=rounds, answer_tokens=answer_tokens)
        self.backend: Backend = resolve("backend", backend)
        self.kind, self.rounds = kind, rounds
        self.own_answer, self.answer_tokens = own_answer, answer_tokens

    def max_calls(self, count: int) -> int:
        return self.rounds + self.own_answer

    def _rank(self, groups: Sequence[Sequence[Sample]]) -> list[CandidateScores]:
        # Refuse groups that are too large before the first request is spent.
        for group in groups:
            distinct, _ = distinct_texts([sample.response for sample in group])
            check_count(self.backend.prompt_style, len(distinct) + self.own_answer)
        temperature = judge_temperature([sample for group in groups for sample in group])
        answers = self._answers([group[0] for group in groups], temperature) if self.own_answer else [""] * len(groups)
        # A single text needs no ranking; a group whose own answer failed gets none.
        questions = {}
        for row, (group, answer) in enumerate(zip(groups, answers, strict=True)):
            texts = tuple(sample.response for sample in group)
            if isinstance(answer, str) and len(group) + self.own_answer > 1:
                texts += (answer,) if self.own_answer else ()
                questions[row] = RankingQuestion(group[0].prompt, texts, group[0].seed, self.kind)
        verdicts = dict(
            zip(questions, rank(self.backend, list(questions.values()), self.rounds, temperature), strict=True)
        )
        results = []
        for row, (group, answer) in enumerate(zip(groups, answers, strict=True)):
            calls = int(self.own_answer) + (verdicts[row].calls if row in verdicts else 0)
            if isinstance(answer, BackendError):
                results.append(CandidateScores.invalid(len(group), f"the judge's own answer: {answer}", calls))
            elif row not in verdicts:
                results.append(CandidateScores(np.zeros(len(group)), calls=calls, feedback="the only candidate"))
            elif (ranks := verdicts[row].ranks) is None:
                results.append(CandidateScores.invalid(len(group), verdicts[row].why, calls))
            else:
                # Not -rank: the best rank would become -0.0, which prints oddly.
                scores = 0.0 - np.array(ranks)
                own = (answer,) if self.own_answer else ()
                agreement = verdicts[row].agreement
                feedback = "" if agreement is None else f"agreement of the rounds {agreement:.3g}"
                results.append(CandidateScores(scores[: len(group)], True, calls, feedback, own, scores[len(group) :]))
        return results

    def _answers(self, samples: Sequence[Sample], temperature: float) -> list[str | BackendError]:
        """Returns the judge's own answer to each sample's prompt."""
        style = self.backend.prompt_style
        prompts = [request_prompt(style, sample.prompt) for sample in samples]
        # A completion model could go on with the next request.
        stop = () if style == "chat" else ("\nRequest:",)
        samplings = [
            Sampling(self.answer_tokens, temperature, stop=stop, seed=request_seed(sample.seed, "own answer"))
            for sample in samples
        ]
        answers: list[str | BackendError] = []
        for result in self.backend.generate(prompts, samplings):
            text = result if isinstance(result, BackendError) else result[0].text.strip()
            answers.append(text or BackendError("it is empty"))
        return answers
