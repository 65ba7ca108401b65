"""``instructgym/GenerateLabel-v0`` as registered: checkers, specs, play as step, what is paid, speed of a step."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_sb3_env

import instructgym  # noqa: F401
from instructgym.envs.tokens.episode import PromptExample
from instructgym.llm_backends.errors import InputError

ENV_ID = "instructgym/GenerateLabel-v0"
WORDS = {"id": "words", "kwargs": {"words": ["good", "bad", "Positive", "Negative", "</Judgement>"]}}


@pytest.fixture
def data(tmp_path):
    (tmp_path / "SST-2").mkdir()
    rows = [f"{('bad', 'good')[i % 2]} film {i}\t{i % 2}" for i in range(40)]
    for name in ("train", "dev"):
        (tmp_path / "SST-2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return str(tmp_path)


def quick(data, **kwargs):
    return {"task": "SST-2", "data_dir": data, "tokenizer": "bytes", "max_tokens": 24} | kwargs


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("preset", ["paper", "code"])
def test_both_checkers_find_nothing(preset, constrained, data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = quick(data, preset=preset, constrained=constrained)
        check_env(gym.make(ENV_ID, **options).unwrapped)
        check_sb3_env(gym.make(ENV_ID, **options).unwrapped)


@pytest.mark.parametrize("observation", ["tokens", "onehot"])
def test_both_checkers_find_nothing_for_a_small_vocabulary(observation):
    examples = [PromptExample("1", "good good", "Positive", ("Positive", "Negative"), {"kind": "label"})]
    options = {"examples": examples, "tokenizer": WORDS, "context_length": 16, "observation": observation}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(ENV_ID, **options).unwrapped)
        check_sb3_env(gym.make(ENV_ID, **options).unwrapped)


def test_the_default_needs_no_network_and_no_model():
    env = gym.make(ENV_ID, tokenizer="bytes", limit=50)
    _, info = env.reset(seed=0)
    assert info["task"] == "rotten-tomatoes" and info["episode_id"]


def test_a_spec_survives_json(data):
    env = gym.make(ENV_ID, **quick(data, constrained=True))
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    for seed in (0, 3):
        assert env.reset(seed=seed)[1]["episode_id"] == again.reset(seed=seed)[1]["episode_id"]


@pytest.mark.parametrize(
    ("preset", "text", "reward"),
    [
        ("paper", " {right} </Judgement>", 1.0),
        ("paper", " {wrong} </Judgement>", 0.0),
        ("paper", " maybe </Judgement>", -1.0),
        ("paper", " {right}", -1.0),
        ("code", " {wrong} </Judgement>", -1.0),
        ("code", " {right} {wrong} </Judgement>", -3.0),
    ],
)
def test_answers_are_paid_by_the_preset_in_step_and_in_play(preset, text, reward, data):
    single = gym.make(ENV_ID, **quick(data, preset=preset, max_tokens=40)).unwrapped
    vector = gym.make_vec(ENV_ID, num_envs=2, **quick(data, preset=preset, max_tokens=40)).unwrapped
    example = single.process.examples[3]
    wrong = next(word for word in example.choices if word != example.reference)
    tokens = single.tokenizer.encode_continuation(text.format(right=example.reference, wrong=wrong))
    if "</" not in text:
        tokens = (tokens * 10)[:40]  # cut off by the cap
    single.reset(options={"index": 3})
    vector.reset(options={"index": 3})
    paid = [single.step(token) for token in tokens]
    assert paid[-1][2] and sum(step[1] for step in paid) == reward
    played = vector.play([tokens, tokens])
    assert played.terminated.all() and [row.sum() for row in played.rewards] == [reward, reward]
    assert played.infos[0]["reward_terms"] == paid[-1][4]["reward_terms"]


def test_only_answers_can_be_written_under_constraints(data):
    env = gym.make(ENV_ID, **quick(data, constrained=True)).unwrapped
    rng = np.random.default_rng(0)
    for _ in range(10):
        _, info = env.reset()
        ended = False
        while not ended:
            allowed = np.flatnonzero(info["action_mask"])
            _, reward, ended, _, info = env.step(int(rng.choice(allowed)))
        assert info["finish_reason"] == "choice" and reward in (0.0, 1.0)
        assert info["text"].strip() in ("Positive", "Negative")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "SST-9"}, "SST-9"),
        ({"layout": "chat"}, "layout"),
        ({"preset": "generous"}, "preset"),
        ({"context_length": 40}, "40"),
        ({"task": "STS-B", "constrained": True}, "STS-B"),
    ],
)
def test_bad_arguments_are_refused(options, message, data):
    with pytest.raises((InputError, ValueError), match=message):
        gym.make(ENV_ID, **quick(data, **options))
