"""Statistics of experiments: scores against references, comparisons of models over tasks, diversity, intervals."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import stats

from ...llm_backends import Embedder, request_seed
from ...rewards.texts.rouge import TOLERANCE

RESAMPLES = 10_000
"""Number of resamples of a bootstrap interval."""


@cache
def _scorer() -> Any:
    """Returns the ROUGE-L scorer of rouge-score, which is imported on first use."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def stemmed_rouge_l(response: str, references: Sequence[str]) -> float:
    """Returns the largest ROUGE-L F-measure between the response and a reference, in [0, 1].

    It is computed as in the evaluation of Super-NaturalInstructions and Self-Instruct: by rouge-score with Porter's
    stemmer. Its tokenizer keeps only a-z and 0-9, so texts in other scripts score 0.

    Args:
        response: the text to score.
        references: reference texts, at least one.
    """
    return max(float(_scorer().score(reference, response)["rougeL"].fmeasure) for reference in references)


def normalized_match(response: str, references: Sequence[str]) -> float:
    """Returns 1.0 if the response equals a reference up to case, ASCII punctuation and white space, otherwise 0.0.

    The normalisation is that of Super-NaturalInstructions: SQuAD's, but without removing articles.
    """
    return float(any(_normalized(response) == _normalized(reference) for reference in references))


def _normalized(text: str) -> str:
    """Returns a text in lower case, without ASCII punctuation, with single blanks as white space."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def task_scores(tasks: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """Returns the mean score of each task, in the order in which tasks first appear.

    Args:
        tasks: name of the task of each instance.
        scores: score of each instance.
    """
    by_task: dict[str, list[float]] = {}
    for task, score in zip(tasks, scores, strict=True):
        by_task.setdefault(task, []).append(score)
    return {task: float(np.mean(values)) for task, values in by_task.items()}


def macro_interval(
    scores: Mapping[str, float], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Computes the mean over tasks and its 95% percentile bootstrap interval (Efron 1979), which resamples tasks.

    Args:
        scores: score of each task.
        seed: seed of the resampling.
        resamples: number of resamples.

    Returns:
        The mean, and the lower and upper end of the interval.

    Raises:
        ValueError: if there are no tasks.
    """
    if not scores:
        raise ValueError("no tasks to average over")
    values = np.array(list(scores.values()))
    rng = np.random.default_rng(request_seed(seed, "bootstrap"))
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


@dataclass(frozen=True)
class PairedComparison:
    """A comparison of two models, task by task."""

    wins: int
    """Number of tasks on which the first model has the higher mean score."""
    ties: int
    """Number of tasks on which the mean scores are equal."""
    losses: int
    """Number of tasks on which the first model has the lower mean score."""
    difference: float
    """Mean over tasks of the first model's score minus the second's."""
    low: float
    """Lower end of the 95% paired bootstrap interval of the difference, over tasks."""
    high: float
    """Upper end of that interval."""

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the tasks that the first model ``won``, ``tied`` and ``lost``."""
        total = self.wins + self.ties + self.losses
        return {"won": self.wins / total, "tied": self.ties / total, "lost": self.losses / total}


def compare_paired(
    first: Mapping[str, float], second: Mapping[str, float], seed: int = 0, resamples: int = RESAMPLES
) -> PairedComparison:
    """Compares two models on the same tasks.

    The interval resamples tasks, with the scores of both models together. It covers the variation of the difference
    over tasks of the same kind, not over training seeds.

    Args:
        first: score of the first model on each task.
        second: score of the second model on each task.
        seed: seed of the resampling.
        resamples: number of resamples.

    Raises:
        ValueError: if the models have different tasks, or none.
    """
    if first.keys() != second.keys():
        unshared = sorted(first.keys() ^ second.keys())
        raise ValueError(f"only tasks that both have answered can be compared, {unshared[0]!r} is one's alone")
    gaps = {task: score - second[task] for task, score in first.items()}
    difference, low, high = macro_interval(gaps, seed, resamples)
    values = np.array(list(gaps.values()))
    # Sums of floats: differences within the tolerance are ties.
    wins, losses = int((values > TOLERANCE).sum()), int((values < -TOLERANCE).sum())
    return PairedComparison(wins, len(values) - wins - losses, losses, difference, low, high)


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Returns the number of distinct n-grams of words over the number of all; 0 without any (Li et al. 2016)."""
    grams = [tuple(words[i : i + n]) for words in (t.lower().split() for t in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def mean_pairwise_distance(texts: Sequence[str], embedder: Embedder) -> float:
    """Returns the mean cosine distance, 1 - cosine, over all pairs of texts' embeddings; 0 for fewer than two texts."""
    if len(texts) < 2:
        return 0.0
    vectors = np.concatenate([embedder.embed(texts[i : i + 64]) for i in range(0, len(texts), 64)]).astype(np.float64)
    total = vectors.sum(axis=0)
    count = len(vectors)
    # The squared norm of the sum holds the cosine of every ordered pair, and of every vector with itself.
    pairs = (float(total @ total) - float((vectors * vectors).sum())) / (count * (count - 1))
    return 1.0 - pairs


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the half-width of its 95% interval by Student's t; the half-width of one value is NaN."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return float(array.mean()), float("nan")
    quantile = stats.t.ppf(0.975, df=len(array) - 1)
    return float(array.mean()), float(quantile * array.std(ddof=1) / np.sqrt(len(array)))


def wilson(right: float, total: int) -> tuple[float, float]:
    """Returns Wilson's 95% interval of the share right / total (Wilson 1927); (0, 1) if the total is 0."""
    if not total:
        return 0.0, 1.0
    z = float(stats.norm.ppf(0.975))
    share, scale = right / total, 1 + z * z / total
    half = z * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    centre = share + z * z / (2 * total)
    return max(float((centre - half) / scale), 0.0), min(float((centre + half) / scale), 1.0)


def known_mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
