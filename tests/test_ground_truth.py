"""Rewards from the right answer: the presets, the strict parser, and what counts as malformed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructgym.envs.tokens.env import TokenEnv
from instructgym.envs.tokens.episode import PromptExample
from instructgym.envs.tokens.process import TokenSettings
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.tokenization import ByteTokenizer
from instructgym.rewards.base import Sample
from instructgym.rewards.ground_truth import (
    GroundTruth,
    LabelMatch,
    RegressionReward,
    SpanReward,
    normalize_answer,
    parse_label,
    parse_number,
)

WORDS = ("Positive", "Negative")


def sample(response, reference="Positive", **metadata):
    return Sample(response, reference=reference, episode_id="SST-2/7", metadata={"choices": WORDS, **metadata})


def value(reward, *args, **kwargs):
    return reward.reward([sample(*args, **kwargs)])[0].value


MALFORMED = ["Positive Negative", "positive", "Positive.", "", " ", "Posit", "Positive </Judgement>", "Yes"]


@pytest.mark.parametrize("text", ["Positive", " Positive ", "\nPositive"])
def test_blanks_around_a_word_do_not_matter(text):
    assert parse_label(text, WORDS) == "Positive"


@pytest.mark.parametrize("text", MALFORMED)
def test_anything_but_one_word_is_malformed(text):
    assert parse_label(text, WORDS) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("2.5", 2.5), (" 3 ", 3.0), ("-1", -1.0), ("+.5", 0.5), ("5.", 5.0), ("999999999999", 999999999999.0)]
    + [(text, None) for text in ["", ".", "nan", "inf", "2,5", "2.5 points", "1 2", "1_0", "0x2", "٣", "9" * 400]],
)
def test_numbers_have_to_be_the_whole_text(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize(("preset", "points"), [("paper", (1, 0, -1)), ("code", (1, -1, -3))])
def test_label_presets(preset, points):
    reward = LabelMatch(preset)
    scores = reward.reward([sample(" Positive "), sample("Negative"), sample("Positive Negative")])
    assert tuple(score.value for score in scores) == points
    assert [score.terms["correct"] for score in scores] == [1, 0, 0]
    assert [score.terms["format"] for score in scores] == [1, 1, 0]
    assert reward.timing == "terminal"


@pytest.mark.parametrize(("reason", "points"), [("stop", 1), ("choice", 1), ("length", -1), ("truncated", -1)])
def test_a_response_has_to_be_closed(reason, points):
    assert value(LabelMatch(), "Positive", finish_reason=reason) == points


@pytest.mark.parametrize("preset", ["paper", "code"])
@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("4.0", 2.5),
        ("3.5", 2.0),
        ("0", -1.5),
        ("999999999999", 1.5),
        ("-7", -1.5),
        ("four", -2.5),
        ("4.0 4.0", -2.5),
        ("", -2.5),
    ],
)
def test_regression(preset, text, points):
    assert value(RegressionReward(preset), text, "4.0") == pytest.approx(points)


def test_regression_terms():
    right, cut = RegressionReward().reward([sample("3.0", "4.0"), sample("4.0", "4.0", finish_reason="length")])
    assert right.terms == {"error": -1.0, "format": 1.0}
    assert (cut.value, cut.terms) == (-2.5, {"error": -5.0, "format": 0.0})


@given(st.text() | st.floats().map(str), st.floats(0, 5).map(lambda number: f"{number:.1f}"))
def test_the_regression_reward_stays_in_its_range(text, reference):
    assert -2.5 <= value(RegressionReward(), text, reference) <= 2.5


@pytest.mark.parametrize(
    ("text", "em", "f1"),
    [
        ("The Eiffel Tower!", 1, 1),
        ("Eiffel", 0, 2 / 3),
        ("tower of Eiffel", 0, 4 / 5),
        ("Big Ben", 0, 0),
        (" ", -1, -1),
        ("the", 0, 0),
    ],
)
def test_spans(text, em, f1):
    answers = ["Eiffel Tower", "an iron tower in Paris"]
    assert value(SpanReward("em"), text, answers=answers) == pytest.approx(em)
    assert value(SpanReward("f1"), text, answers=answers) == pytest.approx(f1)


def test_a_span_without_a_list_is_measured_against_the_reference():
    assert value(SpanReward(), "positive") == 1
    assert value(SpanReward(), "positive", finish_reason="length") == -1
    assert normalize_answer(" The  cat's-eye, a\nstone ") == "catseye stone"


def test_ground_truth_follows_the_kind_of_each_sample():
    mixture = [
        sample("Negative"),
        sample("Positive", kind="label"),
        sample("3.0", "4.0", kind="regression"),
        sample("Oslo", None, kind="span", answers=["Oslo"]),
    ]
    assert [score.value for score in GroundTruth("code").reward(mixture)] == [-1, 1, 1.5, 1]


@pytest.mark.parametrize("reward", [LabelMatch(), RegressionReward(), SpanReward(), GroundTruth()])
def test_a_sample_without_reference_is_refused(reward):
    with pytest.raises(InputError, match="'SST-2/7' has no reference"):
        reward.reward([sample("Positive", None)])


def test_unusable_arguments_are_refused():
    with pytest.raises(InputError, match="unknown preset 'trl': use paper or code"):
        GroundTruth("trl")
    with pytest.raises(InputError, match="unknown measure 'bleu'"):
        SpanReward("bleu")
    with pytest.raises(InputError, match="kind 'rank': use label, regression, span"):
        value(GroundTruth(), "Positive", kind="rank")
    with pytest.raises(InputError, match="reference 'Great', which is none of its choices"):
        value(LabelMatch(), "Positive", "Great")
    with pytest.raises(InputError, match="reference 'high': use a number from 0 to 5"):
        value(RegressionReward(), "2", "high")


@pytest.mark.parametrize("choice", [" positive", "positive ", "\tpositive", "positive\n"])
def test_choices_with_blanks_around_them_are_refused(choice):
    example = PromptExample("x", "It is", choice, (choice, "negative"))
    example = PromptExample("x", "It is", choice, (choice, "negative"))
    for settings in (TokenSettings(), TokenSettings(constrained=True)):
        with pytest.raises(InputError, match=r"the choice .* of example 'x' has blanks around it"):
            TokenEnv([example], ByteTokenizer(), "label-match", settings)
    sample = Sample(choice, reference=choice, metadata={"choices": (choice, "no"), "finish_reason": "choice"})
    with pytest.raises(InputError, match="a choice with blanks around it"):
        LabelMatch().score(sample)
