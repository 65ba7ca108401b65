"""Statistics of ranks: the area under a ROC curve and Kendall's tau, both by scipy, which is imported on first use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def auc(values: ArrayLike, positive: ArrayLike) -> float | None:
    """Returns the area under the ROC curve of examples that are positive or negative.

    Args:
        values: value of each example; higher means more likely positive.
        positive: True for each positive example.

    Returns:
        The AUC as :func:`auc_between` defines it; None if there is no positive or no negative example.
    """
    numbers, labels = np.asarray(values, dtype=np.float64), np.asarray(positive, dtype=bool)
    if labels.all() or not labels.any():
        return None
    return float(auc_between(numbers[labels], numbers[~labels]))


def auc_between(positives: np.ndarray, negatives: np.ndarray) -> Any:
    """Returns the probability that a positive example has a higher value than a negative one, a tie counting half.

    Args:
        positives: values of the positive examples; float64, shape (..., positives), at least one.
        negatives: values of the negative examples; float64, shape (..., negatives), at least one.

    Returns:
        One AUC per row; float64, shape (...).
    """
    from scipy.stats import mannwhitneyu

    # The statistic counts the pairs in order. Only its p-value, which is not used, depends on the method: take a cheap
    # one.
    statistic = mannwhitneyu(positives, negatives, axis=-1, method="asymptotic").statistic
    return statistic / (positives.shape[-1] * negatives.shape[-1])


def mean_kendall_tau(pairs: Iterable[tuple[ArrayLike, ArrayLike]]) -> float | None:
    """Returns the mean of Kendall's tau-b, in [-1, 1], over pairs of rankings of the same items.

    Args:
        pairs: two rankings each: numbers that are higher (or, in both, lower) for better items.

    Returns:
        The mean over the pairs for which tau is defined; None if there are none. It is not defined if all items of one
        of the two rankings tie.
    """
    from scipy.stats import kendalltau

    taus = [float(kendalltau(first, second).statistic) for first, second in pairs]
    defined = [tau for tau in taus if np.isfinite(tau)]
    return float(np.mean(defined)) if defined else None
