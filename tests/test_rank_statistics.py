"""AUC and Kendall's tau against their definitions, and where they are not defined."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from instructgym.rewards.rank_statistics import auc, auc_between, mean_kendall_tau


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=12))
def test_auc_is_the_share_of_pairs_in_order(rows):
    ahead = [(a > b) + (a == b) / 2 for a, is_a in rows for b, is_b in rows if is_a and not is_b]
    assert auc(*([r[i] for r in rows] for i in (0, 1))) == (pytest.approx(np.mean(ahead)) if ahead else None)


@given(st.integers(0, 2**32 - 1))
def test_auc_is_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    values = np.round(rng.normal(size=40), 1)
    positive = np.arange(40) < rng.integers(1, 40)
    assert auc(values, positive) == pytest.approx(roc_auc_score(positive, values), abs=1e-12)


def test_auc_of_values_in_single_precision_has_double_precision():
    # 8 of 9 pairs are in order, a share that single precision rounds at the eighth digit.
    values, positive = np.arange(6, dtype=np.float32), np.array([False, False, True, False, True, True])
    assert auc(values, positive) == pytest.approx(8 / 9, abs=1e-15)


def test_auc_at_the_edges():
    assert auc([], []) is None and auc([1.0, 2.0], [True, True]) is None and auc([1.0, 2.0], [False, False]) is None
    assert auc([3.0, 3.0, 3.0], [True, False, True]) == 0.5
    assert auc([np.inf, np.inf, -np.inf], [True, False, False]) == 0.75, "equal infinities tie"
    assert np.isnan(auc([np.nan, 1.0], [True, False]))


def test_auc_of_several_rows_is_that_of_each():
    rng = np.random.default_rng(0)
    positives, negatives = rng.integers(0, 5, (4, 6)).astype(float), rng.integers(0, 5, (4, 3)).astype(float)
    rows = [float(auc_between(*sides)) for sides in zip(positives, negatives, strict=True)]
    assert auc_between(positives, negatives).tolist() == rows
    assert auc_between(np.array([1.0]), np.array([0.0])) == 1.0


@given(st.integers(2, 8).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.permutations(range(n)))))
def test_tau_without_ties_is_the_share_of_concordant_minus_that_of_discordant_pairs(pair):
    first, second = pair
    signs = [np.sign((first[i] - first[j]) * (second[i] - second[j])) for i, j in combinations(range(len(first)), 2)]
    assert mean_kendall_tau([(first, second)]) == pytest.approx(np.mean(signs), abs=1e-12)


def test_tau_is_averaged_over_the_pairs_that_have_one():
    order, tied = [1, 2, 3], [0, 0, 0]
    assert mean_kendall_tau([]) is None and mean_kendall_tau([(order, tied), (tied, order)]) is None
    assert mean_kendall_tau([(order, order), (order, tied), (order, [1, 3, 2])]) == pytest.approx(2 / 3)
    # One pair ties in the second ranking: two concordant pairs over sqrt(3 * 2).
    assert mean_kendall_tau([(order, [1, 2, 2])]) == pytest.approx(2 / 6**0.5)
