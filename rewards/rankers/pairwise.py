"""Pairwise ranking prompting (arXiv 2306.17563): an order from a judge that compares two at a time.

A schedule is a generator: it yields pairs to compare, is sent for each one what the first of the pair is worth (1, 1/2
for a tie, 0), and returns the scores. So the schedules of many prompts run side by side, one backend call per step.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from itertools import combinations
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from ...llm_backends import Backend, request_seed, resolve
from ..base import Sample
from ..judges.pairwise import OUTCOME_VALUES, Comparison, Pair, compare
from ..judges.ranking import distinct_texts
from ..judges.verdict import VerdictMode, check_mode, temperature_for
from .base import CandidateScores, Ranker

Method = Literal["all", "heapsort", "sliding"]
"""Which pairs are compared."""

Schedule: TypeAlias = Generator[list[tuple[int, int]], list[float], np.ndarray]
"""Yields pairs of different candidates, is sent their outcomes, returns float64 scores, shape (n,)."""

_Known: TypeAlias = dict[tuple[int, int], float]
_Answer: TypeAlias = Generator[list[tuple[int, int]], list[float], bool]


def all_pairs(count: int) -> Schedule:
    """Compares all n(n - 1) / 2 pairs; the score is the number of wins, a tie counting a half."""
    pairs = list(combinations(range(count), 2))
    outcomes = yield pairs
    wins = np.zeros(count)
    for (i, j), outcome in zip(pairs, outcomes, strict=True):
        wins[i] += outcome
        wins[j] += 1 - outcome
    return wins


def heapsort(count: int) -> Schedule:
    """Sorts by a heap, in O(n log n) comparisons; the score is minus the place."""
    known: _Known = {}
    heap = list(range(count))
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
    """Bubbles the best up, pass by pass, in at most passes x (n - 1) comparisons; the score is minus the place.

    Each pass settles one more place from the top. The candidates below share one place: their order is partly that in
    which they came, which means nothing where they were sampled alike.
    """
    known: _Known = {}
    order = list(range(count))
    for top in range(min(passes, count - 1)):
        for at in range(count - 2, top - 1, -1):
            if (yield from _above(known, order[at + 1], order[at])):
                order[at], order[at + 1] = order[at + 1], order[at]
    return _levels(order, known, min(passes, count))


def _above(known: _Known, i: int, j: int) -> _Answer:
    """Whether i stands above j: it won, or it tied and came first. No pair is asked about twice."""
    pair = (min(i, j), max(i, j))
    if pair not in known:
        [known[pair]] = yield [pair]
    outcome = known[pair] if i < j else 1 - known[pair]
    return outcome > 0.5 or (outcome == 0.5 and i < j)


def _sift(known: _Known, heap: list[int], root: int) -> Generator[list[tuple[int, int]], list[float], None]:
    while (child := 2 * root + 1) < len(heap):
        if child + 1 < len(heap) and (yield from _above(known, heap[child + 1], heap[child])):
            child += 1
        if not (yield from _above(known, heap[child], heap[root])):
            return
        heap[root], heap[child] = heap[child], heap[root]
        root = child


def _levels(order: Sequence[int], known: _Known, settled: int) -> np.ndarray:
    """Minus the place of each candidate, given their order from the best.

    Neighbours share a place where their comparison was a tie. (A sort has compared all neighbours of its order, if the
    judge does not contradict itself; where it does and they were not compared, the order stands.) From place
    ``settled`` on, candidates share the next place, but for those that tie with the last settled one.
    """
    scores = np.zeros(len(order))
    level, open_end = 0, False
    for at in range(1, len(order)):
        pair = (min(order[at - 1], order[at]), max(order[at - 1], order[at]))
        tied = known.get(pair) == 0.5
        if not open_end and not tied:
            level += 1
            open_end = at >= settled
        scores[order[at]] = -level
    return scores


class PairwiseRanker(Ranker):
    """Ranks by comparing two candidates at a time, each pair in both orders; where these disagree, it is a tie.

    Candidates that differ at most in white space are compared once and share a score. Where a comparison has no
    outcome, there is no ranking, and no more is asked about that prompt.

    Args:
        backend: the judge.
        method: ``all``: every pair, n(n - 1) / 2 comparisons, the score being the wins; ``heapsort``: O(n log n), the
            score being minus the place; ``sliding``: ``passes`` passes that each bring the best of the rest to the top,
            at most passes x (n - 1), the candidates below sharing the last place.
        passes: of ``sliding``.
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
        if method not in get_args(Method):
            raise ValueError(f"unknown method {method!r}: use {', '.join(get_args(Method))}")
        if passes < 1:
            raise ValueError(f"passes must be at least 1, got {passes}")
        self.backend: Backend = resolve("backend", backend)
        self.method, self.passes, self.mode = method, passes, mode

    def most_comparisons(self, count: int) -> int:
        """Comparisons that a ranking of so many candidates takes at most."""
        every = count * (count - 1) // 2
        if self.method == "all":
            return every
        if self.method == "sliding":
            return sum(count - 1 - top for top in range(min(self.passes, count - 1)))
        # A heap is built by fewer than 2n comparisons, and one of m takes 2 floor(log2 m) to sift its root down.
        return min(every, 2 * count + sum(2 * (size.bit_length() - 1) for size in range(1, count)))

    def most_calls(self, count: int) -> int:
        return 2 * self.most_comparisons(count)

    def _rank(self, groups: Sequence[Sequence[Sample]]) -> list[CandidateScores]:
        start = {"all": all_pairs, "heapsort": heapsort, "sliding": partial(sliding, passes=self.passes)}[self.method]
        runs = [_Run(group, start) for group in groups]
        temperature = temperature_for([sample for group in groups for sample in group])
        while any(run.pairs for run in runs):
            asked = [pair for run in runs for pair in run.questions()]
            found = iter(compare(self.backend, asked, self.mode, temperature))
            for run in runs:
                run.take([next(found) for _ in run.pairs])
        return [run.result() for run in runs]


class _Run:
    """The schedule of one prompt."""

    def __init__(self, group: Sequence[Sample], start: Any) -> None:
        self.first = group[0]
        self.texts, self.twins = distinct_texts([sample.response for sample in group])
        self.schedule: Schedule = start(len(self.texts))
        self.pairs: list[tuple[int, int]] = []
        """Whose comparison it waits for; none once it has ended."""
        self.scores = np.zeros(len(self.texts))
        self.calls, self.why = 0, ""
        if len(self.texts) > 1:
            self.pairs = next(self.schedule)

    def questions(self) -> list[Pair]:
        """What is to be compared now."""
        return [
            Pair(self.texts[i], self.texts[j], self.first.prompt, request_seed(self.first.seed, "pair", i, j))
            for i, j in self.pairs
        ]

    def take(self, found: Sequence[Comparison]) -> None:
        """Goes on with what came of them."""
        if not self.pairs:
            return
        self.calls += sum(comparison.calls for comparison in found)
        values = []
        for (i, j), comparison in zip(self.pairs, found, strict=True):
            if comparison.outcome is None:
                self.why = f"comparison of candidates {self.twins.index(i)} and {self.twins.index(j)}: {comparison.why}"
                self.pairs = []
                return
            values.append(OUTCOME_VALUES[comparison.outcome])
        try:
            self.pairs = self.schedule.send(values)
        except StopIteration as end:
            self.pairs, self.scores = [], end.value

    def result(self) -> CandidateScores:
        """What it came to."""
        if self.why:
            return CandidateScores.invalid(len(self.twins), self.why, self.calls)
        return CandidateScores(self.scores[self.twins], calls=self.calls)
