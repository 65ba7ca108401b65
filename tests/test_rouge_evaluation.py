"""ROUGE-L, macro averages and paired comparisons, against hand-made figures."""

import numpy as np
import pytest

from instructgym.experiments.runs.statistics import (
    compare_paired,
    macro_interval,
    normalized_match,
    stemmed_rouge_l,
    task_scores,
)


@pytest.mark.parametrize(
    ("response", "references", "score"),
    [
        ("the cat sat", ["the cat sat"], 1.0),
        ("The CAT, sat!", ["the cat sat"], 1.0),
        ("the dog sat", ["the cat sat down"], 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),  # LCS: the, sat
        ("sat cat the", ["the cat sat"], 1 / 3),  # one word in order
        ("cats running", ["cat run"], 1.0),  # stems
        ("a b", ["c d", "a x", "a b c d"], 2 * (2 / 2) * (2 / 4) / (2 / 2 + 2 / 4)),  # the best reference
        ("", ["a"], 0.0),
        ("x", ["y"], 0.0),
    ],
)
def test_rouge_l_by_hand(response, references, score):
    assert stemmed_rouge_l(response, references) == pytest.approx(score)


def test_exact_match_ignores_case_punctuation_and_blanks():
    assert normalized_match("  Yes. ", ["no", "yes"]) == 1.0 and normalized_match("yes it is", ["yes"]) == 0.0
    assert normalized_match("the yes", ["yes"]) == 0.0, "articles count"


def test_tasks_weigh_alike_however_many_instances():
    scores = task_scores(["a", "b", "a", "a"], [0.0, 1.0, 0.5, 1.0])
    assert scores == {"a": 0.5, "b": 1.0} and list(scores) == ["a", "b"]
    assert macro_interval(scores)[0] == 0.75
    with pytest.raises(ValueError, match="no tasks"):
        macro_interval({})
    with pytest.raises(ValueError, match="shorter"):
        task_scores(["a"], [])


def test_wins_ties_and_losses():
    first = {"a": 0.5, "b": 0.3, "c": 1.0, "d": 0.0}
    second = {"a": 0.5, "c": 0.6, "b": 0.1 + 0.2, "d": 0.2}  # 0.1 + 0.2 is not 0.3 to the last bit
    found = compare_paired(first, second, seed=1)
    assert (found.wins, found.ties, found.losses) == (1, 2, 1)
    assert found.shares == {"won": 0.25, "tied": 0.5, "lost": 0.25}
    assert found.difference == pytest.approx(0.05) and found.low < 0 < found.high
    back = compare_paired(second, first, seed=1)
    assert (back.wins, back.losses, back.difference) == (1, 1, pytest.approx(-0.05))
    assert found == compare_paired(first, second, seed=1)
    same = compare_paired(first, first)
    assert (same.ties, same.difference, same.low, same.high) == (4, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="'d' is one's alone"):
        compare_paired(first, {name: 0.0 for name in "abc"})


def test_pairing_narrows_the_interval():
    hardness = np.linspace(0, 0.9, 30)
    first = {str(i): float(h + 0.05 + 0.01 * (i % 2)) for i, h in enumerate(hardness)}
    second = {str(i): float(h) for i, h in enumerate(hardness)}
    found, alone = compare_paired(first, second, resamples=2000), macro_interval(first, resamples=2000)
    assert 0.05 < found.low <= found.difference <= found.high < 0.06
    assert alone[2] - alone[1] > 10 * (found.high - found.low)


def test_the_interval_covers_the_true_mean():
    """Of 200 samples of 40 tasks, about 190 intervals hold the mean that they are drawn around."""
    rng = np.random.default_rng(0)
    draws = rng.normal(0.3, 0.1, (200, 40))
    held = 0
    for k, draw in enumerate(draws):
        _, low, high = macro_interval(dict(enumerate(draw)), seed=k, resamples=300)
        held += low <= 0.3 <= high
    assert 175 <= held <= 199
