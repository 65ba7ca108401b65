"""How good is a set of instructions or a judge: counts, diversity, ranking quality, intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from ...llm_backends import Embedder


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
