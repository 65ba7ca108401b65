"""A ranker as a reward: what a sample is worth is its place among the samples of its group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...llm_backends import resolve
from ...llm_backends.errors import InputError
from ...llm_backends.local.tokenization import Tokenizer
from ..base import Reward, Sample, Score
from ..judges.ranking import prompt_groups
from .base import CandidateScores, Ranker

ALONE_VALUE = 0.5
"""What a sample without others to compare it with is worth, and one of samples that all tie."""


class RankReward(Reward):
    """r = 1 for the best sample of a group, 0 for the worst, the others' places evenly in between.

    Samples of one ``group`` (or, where it is empty, of one ``episode_id``) are ranked together. Ties share a place and
    none is skipped, so the value does not depend on how many duplicates there are; where all tie it is 1/2. A sample
    alone in its group has no rank: its value is 1/2, too, and its term ``alone`` is 1 (in a retry it gets no verdict
    instead, as the others of its group may have had theirs already). Where the ranker has no ranking, the scores of the
    whole group are invalid, so a retry ranks it as a whole.

    The terms are the value; ``alone``; and, of ranked samples, ``place`` (1 for the best) and ``ranker_score``. The
    requests of a group are counted on its first sample.

    Args:
        ranker: a ranker or its id (``probabilistic``, ``contextual``, ``pairwise``, ``ground-truth``), or a function
            ``(prompt, candidates) -> scores``.
        largest_group: samples of a group at most, by which ``calls_per_sample`` is reserved.

    Raises:
        InputError: for a largest group below 1; when scoring, for a larger group or one with different prompts.
    """

    name = "rank"

    def __init__(self, ranker: Any, largest_group: int = 16) -> None:
        if largest_group < 1:
            raise InputError(f"the largest group must have at least 1 sample, got {largest_group}")
        self.ranker: Ranker = resolve("ranker", ranker)
        self.largest_group = largest_group
        sizes = range(2, largest_group + 1)
        self.calls_per_sample = max((-(-self.ranker.most_calls(size) // size) for size in sizes), default=0)

    def reset(self) -> None:
        self.ranker.reset()

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        self.ranker.check_tokenizer(tokenizer)

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        groups = prompt_groups(samples, "the rank reward")
        for group, members in groups.items():
            if len(members) > self.largest_group:
                raise InputError(
                    f"group {group!r} has {len(members)} samples, the rank reward was built for {self.largest_group}: "
                    "raise largest_group"
                )
        scores = [_alone(sample) for sample in samples]
        ranked = [members for members in groups.values() if len(members) > 1]
        found = self.ranker.rank_samples([[samples[i] for i in members] for members in ranked])
        for members, ranking in zip(ranked, found, strict=True):
            for number, index in enumerate(members):
                scores[index] = self._score(ranking, number)
        return scores

    def _score(self, ranking: CandidateScores, number: int) -> Score:
        calls = ranking.calls if number == 0 else 0
        if not ranking.valid:
            return Score.invalid(ranking.feedback, calls=calls)
        place, last = int(ranking.places[number]), int(ranking.places.max())
        value = 1 - place / last if last else ALONE_VALUE
        terms = {
            self.name: value,
            "alone": 0.0,
            "place": place + 1.0,
            "ranker_score": float(ranking.scores[number]),
        }
        feedback = f"place {place + 1} of {last + 1}" + (f"; {ranking.feedback}" if ranking.feedback else "")
        return Score(value, terms=terms, feedback=feedback, calls=calls)


def _alone(sample: Sample) -> Score:
    feedback = "the only sample of its group: it has no rank"
    if sample.metadata.get("attempt"):
        return Score.invalid(feedback)
    return Score(ALONE_VALUE, terms={RankReward.name: ALONE_VALUE, "alone": 1.0}, feedback=feedback)
