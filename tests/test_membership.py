"""Membership inference: attacks and their metrics against values worked out by hand, and what must always hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import auc as area

from instructgym.agents.policy.language_model import LanguageModelPolicy
from instructgym.agents.supervised.sft import TokenizedDemonstration
from instructgym.experiments.teaching.membership import attack_metrics, attack_scores, length_shift, roc, score_rows
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.training.adapters import LoraSettings

SCORES = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)


def test_attacks_by_hand():
    own = [-1.0, -5.0, -3.0, -2.0, -4.0, -0.5, -0.5, -1.0, -1.0, -2.0]
    scores = attack_scores(np.array(own), np.array(own) - 0.25)
    assert scores["loss"] == pytest.approx(-2.0)
    assert scores["calibrated"] == pytest.approx(0.25), "the model finds its tokens likelier than the reference does"
    assert scores["min_k"] == pytest.approx(-4.5), "the mean of the two least likely of ten"
    assert attack_scores(np.array(own[:3]), np.zeros(3))["min_k"] == -5.0, "at least one token"
    assert attack_scores(np.array(own), np.array(own), k=50)["min_k"] == pytest.approx(-3.2)


@pytest.mark.parametrize(
    ("own", "reference", "k"), [([], [], 20), ([-1.0], [-1.0, -2.0], 20), ([-1.0], [-1.0], 0), ([-1.0], [-1.0], 101)]
)
def test_scores_of_nothing_are_refused(own, reference, k):
    with pytest.raises(InputError):
        attack_scores(np.array(own), np.array(reference), k)


def test_auc_by_hand():
    # Of the 6 pairs the member is ahead in 5 (3 of 1, 2 and 0; 2 of 1 and 0) and 1 is a tie.
    found = attack_metrics([3.0, 2.0], [1.0, 2.0, 0.0])
    assert found.auc == pytest.approx(5.5 / 6)
    assert found.distance_to_chance == pytest.approx(5.5 / 6 - 0.5)
    assert found.tpr_at_1_percent_fpr is None and "3 non-members" in found.reason


def test_rate_at_one_percent_by_hand():
    others = np.arange(200.0)  # a threshold above 198 takes one of 200 (0.5%), above 197 two (1%), above 196 three
    members = [250.0, 198.5, 197.5, 196.5, 5.0]
    found = attack_metrics(members, others.tolist())
    assert found.tpr_at_1_percent_fpr == pytest.approx(3 / 5) and not found.reason
    assert attack_metrics(members, others[:100].tolist()).tpr_at_1_percent_fpr == pytest.approx(4 / 5)
    assert attack_metrics(members, others[:99].tolist()).tpr_at_1_percent_fpr is None
    # The best of the non-members tie with a member: no threshold parts them, and 2 of 100 are more than 1%.
    tied = attack_metrics([99.0, 5.0], [*range(98), 99, 99])
    assert tied.tpr_at_1_percent_fpr == 0.0


@given(SCORES, SCORES)
def test_metrics_depend_on_the_order_alone(members, others):
    found = attack_metrics(members, others, resamples=50)
    pairs = [(m > o) + (m == o) / 2 for m in members for o in others]
    assert found.auc == pytest.approx(np.mean(pairs))
    assert 0 <= found.auc_low <= found.auc_high <= 1
    twisted = attack_metrics([m**3 + 7 for m in members], [o**3 + 7 for o in others], resamples=50)
    assert twisted == found
    turned = attack_metrics(others, members, resamples=50)
    assert turned.auc == pytest.approx(1 - found.auc)
    rates = roc(members, others)
    assert area(*rates) == pytest.approx(found.auc), "the area under the drawn curve"


def test_ties_are_chance_without_any_doubt():
    found = attack_metrics([0.0] * 30, [0.0] * 20)
    assert (found.auc, found.auc_low, found.auc_high, found.distance_to_chance) == (0.5, 0.5, 0.5, 0.0)
    assert "guessing" in found.verdict


def test_the_interval_covers_what_it_should():
    """Scores of two normals one deviation apart have an AUC of Phi(1 / sqrt 2) = 0.7602."""
    rng = np.random.default_rng(0)
    hits, widths = 0, []
    for trial in range(60):
        found = attack_metrics(rng.normal(1, 1, 60).tolist(), rng.normal(0, 1, 60).tolist(), trial, resamples=200)
        hits += found.auc_low <= 0.7602 <= found.auc_high
        widths.append(found.auc_high - found.auc_low)
    assert hits >= 51, "a binomial of 60 at 0.95 is below 52 in less than 1% of cases"
    assert np.mean(widths) < 0.25


def test_the_interval_is_seeded_and_narrows_with_rows():
    rng = np.random.default_rng(1)
    members, others = rng.normal(0.5, 1, 400).tolist(), rng.normal(0, 1, 400).tolist()
    assert attack_metrics(members, others, 3) == attack_metrics(members, others, 3)
    few, many = attack_metrics(members[:50], others[:50]), attack_metrics(members, others)
    assert many.auc_high - many.auc_low < (few.auc_high - few.auc_low) / 2
    assert "are told" in many.verdict


def test_below_half_is_called_noise_or_shift():
    found = attack_metrics([0.0, 1.0, 2.0] * 10, [5.0, 6.0, 7.0] * 10)
    assert found.auc == 0.0 and found.distance_to_chance == 0.5
    assert "noise" in found.verdict and "no sign of more privacy" in found.verdict


@pytest.mark.parametrize(("members", "others"), [([], [1.0]), ([1.0], []), ([np.nan], [1.0]), ([1.0], [-np.inf])])
def test_sides_that_cannot_be_compared_are_refused(members, others):
    with pytest.raises(InputError):
        attack_metrics(members, others)


def test_length_shift():
    rng = np.random.default_rng(0)
    same = length_shift(rng.integers(10, 30, 200).tolist(), rng.integers(10, 30, 200).tolist())
    longer = length_shift(rng.integers(15, 35, 200).tolist(), rng.integers(10, 30, 200).tolist())
    assert not same.significant and longer.significant and longer.auc > 0.6 and longer.members > longer.nonmembers
    assert length_shift([5, 5], [5, 5]).p_value == 1.0 and length_shift([5, 5], [6, 6]).significant
    assert not length_shift([5], [9]).significant, "one row says nothing"


def test_scores_are_those_of_the_model_whatever_the_batch(tiny_lm, tiny_model_path):
    policy = LanguageModelPolicy(tiny_model_path, LoraSettings(rank=2), value="none", dtype="float32")
    rng = np.random.default_rng(0)
    rows = [
        TokenizedDemonstration(rng.integers(2, 300, rng.integers(2, 9)).tolist(), rng.integers(2, 300, n).tolist())
        for n in (7, 1, 12, 4)
    ]
    scores = score_rows(policy, policy, rows, token_budget=64)
    assert score_rows(policy, policy, rows, token_budget=1) == [
        {name: pytest.approx(value, abs=1e-5) for name, value in row.items()} for row in scores
    ]
    expected = tiny_lm.logprobs([row.prompt for row in rows], [row.response for row in rows])
    for row, logprobs in zip(scores, expected, strict=True):
        assert row["loss"] == pytest.approx(logprobs.mean(), abs=1e-4)
        assert row["calibrated"] == 0.0, "an adapter that was never trained changes nothing"
        assert row["min_k"] <= row["loss"]
