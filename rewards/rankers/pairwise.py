"""Pairwise ranking prompting (arXiv 2306.17563): ranking by a judge that compares two candidates at a time.

A schedule is a generator: it yields pairs to compare, is sent the outcome of each pair (1 if its first candidate is
better, 0 if its second is, 1/2 for a tie), and returns the scores. This lets the schedules of many prompts run side by
side, with one backend call per step.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from itertools import combinations
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from ...llm_backends import Backend, request_seed, resolve
from ...llm_backends.errors import check_at_least, check_known
from ..base import Sample
from ..judges.pairwise import OUTCOME_VALUES, Comparison, Pair, compare
from ..judges.ranking import distinct_texts
from ..judges.verdict import VerdictMode, check_mode, judge_temperature
from .base import CandidateScores, Ranker

Method = Literal["all", "heapsort", "sliding"]
"""Which pairs are compared; see :class:`PairwiseRanker`."""

Schedule: TypeAlias = Generator[list[tuple[int, int]], list[float], np.ndarray]
"""A generator that yields pairs of different candidates, is sent their outcomes and returns float64 scores, shape
(n,)."""

_Known: TypeAlias = dict[tuple[int, int], float]
"""Outcomes so far by pair (i, j) with i < j: the value of i."""
_Answer: TypeAlias = Generator[list[tuple[int, int]], list[float], bool]
"""A part of a schedule that returns whether one candidate is above another."""


def all_pairs(count: int) -> Schedule:
    """Compares all n(n - 1) / 2 pairs; the score is the number of wins, where a tie counts 1/2."""
    pairs = list(combinations(range(count), 2))
    outcomes = yield pairs
    wins = np.zeros(count)
    for (i, j), outcome in zip(pairs, outcomes, strict=True):
        wins[i] += outcome
        wins[j] += 1 - outcome
    return wins


def heapsort(count: int) -> Schedule:
    """Sorts with a heap, in O(n log n) comparisons; the score is minus the place."""
    known: _Known = {}
    heap = list(range(count))
    # Build a heap with the best candidate at its root, then take the root until the heap is empty.
    for root in reversed(range(count // 2)):
        yield from _sift(known, heap, root)
    order = []
    while heap:
        order.append(heap[0])
        last = heap.pop()
        if heap:
            heap[0] = last
            yield from _sift(known, heap, 0)
    return _levels(order, known, count)


def sliding(count: int, passes: int) -> Schedule:
    """Moves the best to the top, pass by pass, in at most passes x (n - 1) comparisons; the score is minus the place.

    Each pass settles one more place from the top, as in bubble sort. The candidates below the settled places share one
    place: their order is partly the input order, which means nothing if all were sampled in the same way.
    """
    known: _Known = {}
    order = list(range(count))
    for top in range(min(passes, count - 1)):
        for index in range(count - 2, top - 1, -1):
            if (yield from _above(known, order[index + 1], order[index])):
                order[index], order[index + 1] = order[index + 1], order[index]
    return _levels(order, known, min(passes, count))


def _above(known: _Known, i: int, j: int) -> _Answer:
    """Returns whether i ranks above j: it won, or it tied and has the lower index. No pair is compared twice."""
    pair = (min(i, j), max(i, j))
    if pair not in known:
        [known[pair]] = yield [pair]  # one pair per step: the next one depends on its outcome
    outcome = known[pair] if i < j else 1 - known[pair]
    return outcome > 0.5 or (outcome == 0.5 and i < j)


def _sift(known: _Known, heap: list[int], root: int) -> Generator[list[tuple[int, int]], list[float], None]:
    """Moves the candidate at ``root`` down until no child is above it."""
    while (child := 2 * root + 1) < len(heap):
        if child + 1 < len(heap) and (yield from _above(known, heap[child + 1], heap[child])):
            child += 1
        if not (yield from _above(known, heap[child], heap[root])):
            return
        heap[root], heap[child] = heap[child], heap[root]
        root = child


def _levels(order: Sequence[int], known: _Known, settled: int) -> np.ndarray:
    """Returns minus the place of each candidate, from their order.

    Neighbours share a place if their comparison was a tie. (A sort has compared all neighbours of its order, unless the
    judge contradicts itself; neighbours that were not compared keep their order.) From position ``settled`` on,
    candidates share the next place, except those that tie with the last settled one.

    Args:
        order: candidates from the best to the worst.
        known: outcomes of the comparisons so far.
        settled: number of leading candidates whose order is settled.
    """
    scores = np.zeros(len(order))
    level, open_end = 0, False
    for index in range(1, len(order)):
        pair = (min(order[index - 1], order[index]), max(order[index - 1], order[index]))
        tied = known.get(pair) == 0.5
        if not open_end and not tied:
            level += 1
            # The first place below the settled ones is the last: all that follow share it.
            open_end = index >= settled
        scores[order[index]] = -level
    return scores


class PairwiseRanker(Ranker):
    """Ranks by comparing two candidates at a time, each pair in both orders; if these disagree, the pair is a tie.

    Candidates that differ at most in white space are compared as one and share a score. If a comparison has no outcome,
    there is no ranking, and no more requests are made for that prompt.

    Args:
        backend: the judge LLM.
        method: ``all``: every pair, n(n - 1) / 2 comparisons, the score is the number of wins; ``heapsort``:
            O(n log n) comparisons, the score is minus the place; ``sliding``: ``passes`` passes that each move the best
            of the rest to the top, at most passes x (n - 1) comparisons, the score is minus the place, and the
            candidates below share the last place.
        passes: number of passes of ``sliding``; other methods ignore it.
        mode: see :data:`~instructgym.rewards.judges.verdict.VerdictMode`.

    Raises:
        ValueError: for an unknown method or mode, or fewer than one pass.
        UnsupportedRequestError: when ranking, in likelihood mode, if the backend reports no log-probs.
    """

    name = "pairwise"

    def __init__(
        self, backend: Any = "embedded", method: Method = "all", passes: int = 1, mode: VerdictMode = "auto"
    ) -> None:
        check_mode(mode)
        check_known("method", method, get_args(Method))
        check_at_least(1, passes=passes)
        self.backend: Backend = resolve("backend", backend)
        self.method, self.passes, self.mode = method, passes, mode

    def max_comparisons(self, count: int) -> int:
        """Returns the maximum number of comparisons that a ranking of ``count`` candidates takes."""
        pairs = count * (count - 1) // 2
        if self.method == "all":
            return pairs
        if self.method == "sliding":
            return sum(count - 1 - top for top in range(min(self.passes, count - 1)))
        # Building a heap takes fewer than 2n comparisons; sifting down the root of a heap of m takes 2 floor(log2 m).
        # No pair is compared twice, so the number of pairs is a limit as well.
        return min(pairs, 2 * count + sum(2 * (size.bit_length() - 1) for size in range(1, count)))

    def max_calls(self, count: int) -> int:
        return 2 * self.max_comparisons(count)

    def _rank(self, groups: Sequence[Sequence[Sample]]) -> list[CandidateScores]:
        new_schedule = {"all": all_pairs, "heapsort": heapsort, "sliding": partial(sliding, passes=self.passes)}[
            self.method
        ]
        runs = [_Run(group, new_schedule) for group in groups]
        temperature = judge_temperature([sample for group in groups for sample in group])
        # One step of all unfinished schedules per backend call: within a schedule, a pair depends on earlier outcomes.
        while any(run.pairs for run in runs):
            pairs = [pair for run in runs for pair in run.questions()]
            comparisons = iter(compare(self.backend, pairs, self.mode, temperature))
            for run in runs:
                run.take([next(comparisons) for _ in run.pairs])
        return [run.result() for run in runs]


class _Run:
    """The running schedule of one prompt's candidates."""

    def __init__(self, group: Sequence[Sample], new_schedule: Any) -> None:
        self.first = group[0]
        self.texts, self.distinct_indices = distinct_texts([sample.response for sample in group])
        self.schedule: Schedule = new_schedule(len(self.texts))
        self.pairs: list[tuple[int, int]] = []
        """Pairs that the schedule waits for; empty when it has ended."""
        self.scores = np.zeros(len(self.texts))
        self.calls, self.why = 0, ""
        if len(self.texts) > 1:
            self.pairs = next(self.schedule)

    def questions(self) -> list[Pair]:
        """Returns the pairs of texts to compare in this step."""
        return [
            Pair(self.texts[i], self.texts[j], self.first.prompt, request_seed(self.first.seed, "pair", i, j))
            for i, j in self.pairs
        ]

    def take(self, comparisons: Sequence[Comparison]) -> None:
        """Continues the schedule with the comparisons of its pairs, in order; one without outcome ends it."""
        if not self.pairs:
            return
        self.calls += sum(comparison.calls for comparison in comparisons)
        values = []
        for (i, j), comparison in zip(self.pairs, comparisons, strict=True):
            if comparison.outcome is None:
                # The message names the first candidates with these texts.
                first, second = self.distinct_indices.index(i), self.distinct_indices.index(j)
                self.why = f"comparison of candidates {first} and {second}: {comparison.why}"
                self.pairs = []
                return
            values.append(OUTCOME_VALUES[comparison.outcome])
        try:
            self.pairs = self.schedule.send(values)
        except StopIteration as finished:
            self.pairs, self.scores = [], finished.value

    def result(self) -> CandidateScores:
        """Returns the scores of all candidates, or an invalid result if a comparison had no outcome."""
        if self.why:
            return CandidateScores.invalid(len(self.distinct_indices), self.why, self.calls)
        return CandidateScores(self.scores[self.distinct_indices], calls=self.calls)
