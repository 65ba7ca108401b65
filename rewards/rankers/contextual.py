"""Tuna's contextual ranking (Li et al. 2023, arXiv 2310.13385): a judge orders all candidates of a prompt at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...llm_backends import Backend, BackendError, Sampling, request_seed, resolve
from ..base import Sample
from ..judges.ranking import RankingQuestion, RequestKind, check_count, check_kind, distinct_texts, rank
from ..judges.verdict import temperature_for
from ..quality.likelihood import request_prompt
from .base import CandidateScores, Ranker


class ContextualRanker(Ranker):
    """A judge puts all candidates in order in one reply.

    Builds on :func:`~instructgym.rewards.judges.ranking.rank`: candidates are shown in an order drawn from the seed,
    those that differ at most in white space once. The score is minus the mean rank over the rounds, 0 for one that was
    the best in all of them; duplicates share theirs. Where no round gives a ranking, there is none.

    Args:
        backend: the judge.
        kind: whether the requests are ``open`` or ``closed``, which have criteria of their own; with ``either`` the
            judge decides.
        rounds: how often candidates are ranked, each time shown in another order.
        own_answer: the judge first answers the request itself, and its answer is ranked among the candidates
            (``added`` and ``added_scores`` of the result). Where it gives none, there is no ranking.
        answer_tokens: of its own answer at most.

    Raises:
        ValueError: for fewer than one round, an unknown kind or fewer than one token.
        InputError: when ranking, for more candidates than the prompt's form takes.
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
        for name, value in (("rounds", rounds), ("answer_tokens", answer_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.backend: Backend = resolve("backend", backend)
        self.kind, self.rounds = kind, rounds
        self.own_answer, self.answer_tokens = own_answer, answer_tokens

    def most_calls(self, count: int) -> int:
        return self.rounds + self.own_answer

    def _rank(self, groups: Sequence[Sequence[Sample]]) -> list[CandidateScores]:
        for group in groups:  # before anything is paid for
            distinct, _ = distinct_texts([sample.response for sample in group])
            check_count(self.backend.prompt_style, len(distinct) + self.own_answer)
        temperature = temperature_for([sample for group in groups for sample in group])
        answers = self._answers([group[0] for group in groups], temperature) if self.own_answer else [""] * len(groups)
        asked = {}
        for row, (group, answer) in enumerate(zip(groups, answers, strict=True)):
            texts = tuple(sample.response for sample in group)
            if isinstance(answer, str) and len(group) + self.own_answer > 1:
                texts += (answer,) if self.own_answer else ()
                asked[row] = RankingQuestion(group[0].prompt, texts, group[0].seed, self.kind)
        found = dict(zip(asked, rank(self.backend, list(asked.values()), self.rounds, temperature), strict=True))
        results = []
        for row, (group, answer) in enumerate(zip(groups, answers, strict=True)):
            calls = int(self.own_answer) + (found[row].calls if row in found else 0)
            if isinstance(answer, BackendError):
                results.append(CandidateScores.invalid(len(group), f"the judge's own answer: {answer}", calls))
            elif row not in found:
                results.append(CandidateScores(np.zeros(len(group)), calls=calls, feedback="the only candidate"))
            elif (ranks := found[row].ranks) is None:
                results.append(CandidateScores.invalid(len(group), found[row].why, calls))
            else:
                # 0 - rank: minus zero would print oddly.
                scores = 0.0 - np.array(ranks)
                own = (answer,) if self.own_answer else ()
                agreement = found[row].agreement
                feedback = "" if agreement is None else f"agreement of the rounds {agreement:.3g}"
                results.append(CandidateScores(scores[: len(group)], True, calls, feedback, own, scores[len(group) :]))
        return results

    def _answers(self, samples: Sequence[Sample], temperature: float) -> list[str | BackendError]:
        """The judge's own answer to each sample's prompt."""
        style = self.backend.prompt_style
        prompts = [request_prompt(style, sample.prompt) for sample in samples]
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
