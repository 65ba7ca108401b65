"""Scores of responses against references, and comparisons of models over tasks."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import stats

from ...llm_backends import Embedder, request_seed
from ...rewards.texts.rouge import TOLERANCE

RESAMPLES = 10_000


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def stemmed_rouge_l(response: str, references: Sequence[str]) -> float:
    """The largest ROUGE-L F-measure between the response and a reference, in [0, 1].

    As in the evaluation of Super-NaturalInstructions and Self-Instruct: rouge-score with Porter's stemmer. Its
    tokenizer keeps a-z and 0-9 alone, so texts in other scripts score 0.

    Args:
        response: the text to score.
        references: at least one.
    """
    return max(float(_scorer().score(reference, response)["rougeL"].fmeasure) for reference in references)


def normalized_match(response: str, references: Sequence[str]) -> float:
    """1.0 if the response equals a reference but for case, ASCII punctuation and white space, else 0.0.

    The normalisation of Super-NaturalInstructions: SQuAD's, without the removal of articles.
    """
    return float(any(_normalized(response) == _normalized(reference) for reference in references))


def _normalized(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def task_scores(tasks: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """Mean score by task, in the order in which tasks first appear.

    Args:
        tasks: for each instance the name of its task.
        scores: for each instance its score.
    """
    by_task: dict[str, list[float]] = {}
    for task, score in zip(tasks, scores, strict=True):
        by_task.setdefault(task, []).append(score)
    return {task: float(np.mean(values)) for task, values in by_task.items()}


def macro_interval(
    scores: Mapping[str, float], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """The mean over tasks and the ends of its 95% percentile bootstrap interval (Efron 1979), tasks resampled.

    Args:
        scores: by task.
        seed: of the resampling.
        resamples: how many.

    Raises:
        ValueError: for no tasks.
    """
    if not scores:
        raise ValueError("no tasks to average over")
    values = np.array(list(scores.values()))
    rng = np.random.default_rng(request_seed(seed, "bootstrap"))
    means = np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


@dataclass(frozen=True)
class PairedComparison:
    """One model against another, task by task."""

    wins: int
    """Tasks on which the first has the higher mean."""
    ties: int
    """Tasks on which the means are equal."""
    losses: int
    difference: float
    """Mean over tasks of the first's score less the second's."""
    low: float
    """Lower end of the difference's 95% paired bootstrap interval over tasks."""
    high: float

    @property
    def shares(self) -> dict[str, float]:
        """``won``, ``tied`` and ``lost``: shares of tasks."""
        total = self.wins + self.ties + self.losses
        return {"won": self.wins / total, "tied": self.ties / total, "lost": self.losses / total}


def compare_paired(
    first: Mapping[str, float], second: Mapping[str, float], seed: int = 0, resamples: int = RESAMPLES
) -> PairedComparison:
    """Compares two models on the same tasks.

    The interval resamples tasks, both models' scores together. It says how far the difference would move with other
    tasks of the kind; not with other training seeds, of which it knows nothing.

    Args:
        first: score by task.
        second: likewise.
        seed: of the resampling.
        resamples: how many.

    Raises:
        ValueError: if the tasks are not the same, or there are none.
    """
    if first.keys() != second.keys():
        unshared = sorted(first.keys() ^ second.keys())
        raise ValueError(f"only tasks that both have answered can be compared, {unshared[0]!r} is one's alone")
    gaps = {task: score - second[task] for task, score in first.items()}
    difference, low, high = macro_interval(gaps, seed, resamples)
    values = np.array(list(gaps.values()))
    wins, losses = int((values > TOLERANCE).sum()), int((values < -TOLERANCE).sum())
    return PairedComparison(wins, len(values) - wins - losses, losses, difference, low, high)


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Share of distinct n-grams of words among all of them; 0 without any (Li et al. 2016)."""
    grams = [tuple(words[i : i + n]) for words in (t.lower().split() for t in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def mean_pairwise_distance(texts: Sequence[str], embedder: Embedder) -> float:
    """Mean cosine distance, 1 - cosine, over all pairs of sentence embeddings; 0 for fewer than two texts."""
    if len(texts) < 2:
        return 0.0
    vectors = np.concatenate([embedder.embed(texts[i : i + 64]) for i in range(0, len(texts), 64)]).astype(np.float64)
    total = vectors.sum(axis=0)
    count = len(vectors)
    pairs = (float(total @ total) - float((vectors * vectors).sum())) / (count * (count - 1))
    return 1.0 - pairs


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% interval by Student's t; the half-width of a single value is NaN."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return float(array.mean()), float("nan")
    quantile = stats.t.ppf(0.975, df=len(array) - 1)
    return float(array.mean()), float(quantile * array.std(ddof=1) / np.sqrt(len(array)))


def wilson(right: float, total: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share, right / total (Wilson 1927); (0, 1) where nothing was counted."""
    if not total:
        return 0.0, 1.0
    z = float(stats.norm.ppf(0.975))
    share, scale = right / total, 1 + z * z / total
    half = z * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    centre = share + z * z / (2 * total)
    return max(float((centre - half) / scale), 0.0), min(float((centre + half) / scale), 1.0)


def auc(values: Sequence[float], positive: Sequence[bool]) -> float | None:
    """Chance that a positive example has a higher value than a negative one, ties by halves; None without both."""
    ranks, labels = stats.rankdata(values), np.asarray(positive, dtype=bool)
    ahead, behind = int(labels.sum()), int((~labels).sum())
    if not ahead or not behind:
        return None
    return float((ranks[labels].sum() - ahead * (ahead + 1) / 2) / (ahead * behind))
