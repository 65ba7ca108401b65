import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructgym.experiments.evolve.plots import plot_comparison, plot_training
from instructgym.experiments.runs.report import smooth
from instructgym.experiments.runs.statistics import distinct_n, interval, mean_pairwise_distance
from instructgym.llm_backends import resolve


def test_distinct_2_counts_bigrams_over_the_whole_set():
    assert distinct_n(["a b c", "A b d"], 2) == pytest.approx(3 / 4)
    assert distinct_n(["one"], 2) == 0.0


@given(st.lists(st.text("abc ", min_size=1, max_size=12), min_size=2, max_size=8))
def test_mean_pairwise_distance_is_the_mean_over_pairs(texts):
    embedder = resolve("embedder", "hashing")
    vectors = embedder.embed(texts)
    expected = np.mean([1 - float(a @ b) for a, b in itertools.combinations(vectors, 2)])
    assert mean_pairwise_distance(texts, embedder) == pytest.approx(expected, abs=1e-5)


def test_interval_is_students_t():
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (pytest.approx(2.0), pytest.approx(4.3027 / np.sqrt(3), rel=1e-4))
    assert np.isnan(interval([1.0])[1])


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.integers(1, 10))
def test_smooth_is_the_mean_of_the_last_values(values, window):
    expected = [np.mean(values[max(i + 1 - window, 0) : i + 1]) for i in range(len(values))]
    assert smooth(values, window) == pytest.approx(expected, abs=1e-9)


def test_figures_are_written(tmp_path):
    episodes = [{"timesteps": 6 * i, "return": i % 5} for i in range(1, 40)]
    updates = [{"timesteps": 48 * i, "operations/breadth": 0.4, "operations/deepening": 0.6} for i in range(1, 6)]
    assert plot_training(episodes, updates, tmp_path / "training.png").stat().st_size > 5_000
    result = {
        "calls_per_accepted": 9.0,
        "calls_per_accepted_generation": 7.0,
        "embedding_distance": 0.8,
        "distinct_2": 0.7,
    }
    curves = [[(100, 0), (200, 10 + i)] for i in range(3)]
    arm = [result | {"curve": curve, "training": [(6, 1.0), (12, 2.0)]} for curve in curves]
    baseline = [result | {"curve": [(0, 0), (200, 20)], "training": []}] * 3
    figure = plot_comparison({"TRPO": arm, "random": baseline}, 200, tmp_path / "comparison.png")
    assert figure.stat().st_size > 5_000
