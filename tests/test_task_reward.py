"""Rewards by task score: the published scale, minibatches, failures that stay their own, limits, rounding."""

import json

import numpy as np
import pytest
from score_cases import EXAMPLES, WORDS, scripted

from instructgym.llm_backends import BackendError, ContextLengthError, resolve
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.backend import TransformersBackend
from instructgym.llm_backends.scripted import ScriptedBackend
from instructgym.rewards import Demonstration, Sample, TaskGain, TaskPrompt, TaskReward, TaskScorer
from instructgym.rewards.prompt_scoring.scorer import CallLimitError, LimitedScorer

BLANK = TaskPrompt("", verbalizers=WORDS)
TABLE = {"warm": {"good": np.log(0.3), "bad": np.log(0.1)}, "dull": {"good": np.log(0.06), "bad": np.log(0.04)}}


@pytest.fixture
def backend(tiny_model_path):
    return TransformersBackend(tiny_model_path, prompt_style="completion")


def test_reward_by_hand():
    reward = TaskReward(BLANK, EXAMPLES[:2], 0, TaskScorer(scripted(TABLE)))
    score, empty, hint = reward.reward(
        [Sample("Is it good?"), Sample(" \n"), Sample("Think.", metadata={"example": EXAMPLES[1]})]
    )
    assert score.value == pytest.approx((200 * 0.5 - 180 * 0.2) / 2)
    assert score.terms == {"task": score.value, "accuracy": 0.5, "gap": pytest.approx(0.15)}
    assert TaskReward(BLANK, scorer=reward.scorer).calls_per_sample == 2 == hint.calls
    assert score.calls == 4 == reward.calls_per_sample and "predicted good, right bad" in score.feedback
    assert empty.value == -180.0 and empty.valid and empty.calls == 0
    assert hint.value == pytest.approx(-36.0) and hint.calls == 2
    measured = TaskReward(BLANK, EXAMPLES[:2], 2, TaskScorer(scripted(TABLE)), "accuracy")
    assert [score.value for score in measured.reward([Sample("Say."), Sample("")])] == [0.5, 0.0]
    assert TaskReward(BLANK, EXAMPLES[:2], 2, reward.scorer, empty=-1.0).reward([Sample("")])[0].value == -1.0


def test_reward_from_a_json_object_is_that_of_live_parts(tiny_model_path):
    scorer = {"backend": {"id": "transformers", "kwargs": {"model": tiny_model_path, "prompt_style": "completion"}}}
    shown = {"text": "so slow", "label": 1}
    part = {
        "id": "task",
        "kwargs": {
            "prompt": {"verbalizers": list(WORDS), "demonstrations": [shown]},
            "examples": [vars(example) for example in EXAMPLES],
            "size": 2,
            "scorer": scorer,
        },
    }
    reward = resolve("reward", json.loads(json.dumps(part)))
    live = TaskReward(TaskPrompt("", (Demonstration(**shown),), WORDS), EXAMPLES, 2, TaskScorer(**scorer))
    samples = [Sample("Is it?"), Sample("Was it?", metadata={"minibatch": 1})]
    assert [one.value for one in reward.reward(samples)] == [one.value for one in live.reward(samples)]


def test_minibatches_follow_their_number(backend):
    reward = TaskReward(BLANK, EXAMPLES, 1, TaskScorer(backend))
    numbers = [{}, {}, *({"minibatch": i} for i in range(12))]
    values = [score.value for score in reward.reward([Sample("Is it?", metadata=one) for one in numbers])]
    assert values[0] == values[1] and len(set(values)) == 3
    assert values == [score.value for score in reward.reward([Sample("Is it?", metadata=one) for one in numbers])]
    other = TaskReward(BLANK, EXAMPLES, 1, reward.scorer, seed=5)
    assert values[2:] != [score.value for score in other.reward([Sample("Is it?", metadata=m) for m in numbers[2:]])]


def test_an_instruction_may_hold_the_response():
    reward = TaskReward(
        TaskPrompt("Hint: {response}.", verbalizers=WORDS), EXAMPLES[:2], 2, TaskScorer(scripted(TABLE))
    )
    assert reward.prompt_of(" look ").instruction == "Hint: look."
    with pytest.raises(InputError, match=r"must have \{response\}"):
        TaskReward(TaskPrompt("Classify.", verbalizers=WORDS), EXAMPLES)


def test_bad_rewards_are_refused():
    scorer = TaskScorer(scripted(TABLE))
    for message, kwargs in (
        ("unknown measure", {"measure": "margin"}),
        ("a minibatch of 4 examples cannot be drawn from 3", {"size": 4}),
        ("batch calibration of one", {"size": 1, "scorer": {"backend": "scripted", "calibrate": "batch"}}),
    ):
        with pytest.raises(InputError, match=message):
            TaskReward(BLANK, EXAMPLES, **({"scorer": scorer} | kwargs))
    with pytest.raises(InputError, match="needs id, text and label"):
        TaskReward(BLANK, [{"text": "x"}], scorer=scorer)
    with pytest.raises(InputError, match="no examples"):
        TaskReward(BLANK, scorer=scorer).reward([Sample("Say.")])


def test_a_failed_request_is_no_verdict():
    class Down(ScriptedBackend):
        def _logprobs(self, prompts, completions):
            return [BackendError("the line is down") for _ in prompts]

    for calibrate, calls in ((False, 4), (True, 10)):
        (score,) = TaskReward(BLANK, EXAMPLES, 2, TaskScorer(Down(), calibrate)).reward([Sample("Say.")])
        assert not score.valid and "line is down" in score.feedback and score.calls == calls


class Odd(ScriptedBackend):
    """A model that never serves prompts with "odd", and that serves those with "once" the second time."""

    def _logprobs(self, prompts, completions):
        rows = super()._logprobs(prompts, completions)
        failed = [("odd" in text, "once" in text and not self.__dict__.get("tried")) for text in prompts]
        self.tried = True
        return [
            ContextLengthError("too long") if odd else BackendError("down") if once else row
            for row, (odd, once) in zip(rows, failed, strict=True)
        ]


def test_a_failed_response_is_not_the_others():
    backend = Odd()
    reward = TaskReward(BLANK, EXAMPLES, 2, TaskScorer(backend))
    samples = [Sample(text, metadata={"minibatch": i % 2}) for i, text in enumerate(["Say.", "odd", " ", "once"])]
    scores = reward.reward(samples)
    assert [score.valid for score in scores] == [True, False, True, True]
    assert [score.calls for score in scores] == [4, 4, 0, 4] and "too long" in scores[1].feedback
    alone = [TaskReward(BLANK, EXAMPLES, 2, TaskScorer(ScriptedBackend())).reward([one])[0] for one in samples]
    assert [one.value for one in scores[::3]] == [one.value for one in alone[::3]]


def test_a_failed_request_is_not_charged():
    backend = Odd()
    scorer = LimitedScorer(100, backend)
    reward = TaskReward(BLANK, EXAMPLES, 2, scorer)
    assert [one.valid for one in reward.reward([Sample("Say."), Sample("odd"), Sample("once")])] == [True, False, True]
    assert scorer.calls == 8
    with pytest.raises(CallLimitError):
        LimitedScorer(7, backend).score([TaskPrompt(text, verbalizers=WORDS) for text in "ab"], EXAMPLES[:2])


def test_arguments_that_a_scorer_does_not_have():
    for build in (lambda scorer: TaskReward(BLANK, EXAMPLES, 2, scorer), TaskGain):
        with pytest.raises(InputError, match=r"cannot build a task scorer from.*model"):
            build({"model": "x"})
        with pytest.raises(InputError, match="'embedded' is no scorer"):
            build("embedded")


ROUNDING = 5e-5
"""Nats between log-probs that a model in this process computes in different batches, in float32; of the embedded model
1.3e-5 were measured."""


@pytest.mark.parametrize("measure", ["gap", "accuracy"])
def test_rewards_with_and_without_a_cache_are_equal_up_to_rounding(backend, measure):
    samples = [Sample(text, metadata={"minibatch": i}) for i in range(3) for text in ("Is it?", "Say.", "Is it good?")]
    remembered, anew = (
        TaskReward(BLANK, EXAMPLES, 2, TaskScorer(backend, cache=cache), measure) for cache in (10_000, 0)
    )
    first = [one.value for one in remembered.reward(samples)]
    assert [one.value for one in remembered.reward(samples[::-1])][::-1] == first
    # The slope of a gap in the log-odds is at most 1/2, and log-odds are two log-probs.
    for again in ([anew.reward([one])[0].value for one in samples], [one.value for one in anew.reward(samples)]):
        np.testing.assert_allclose(again, first, rtol=0, atol=200 * ROUNDING)
