"""The fast path of the token MDP: play is step, whole responses, playing in the background, saved state."""

import json
import threading

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from token_cases import (
    BLUE,
    END,
    EOS,
    RED,
    SEA,
    SKY,
    TOKENS,
    Causal,
    N,
    Terminal,
    Whole,
    assert_equal,
    cases,
    make,
    plain,
    start,
    stepped,
)

from instructgym.envs.process import InvalidRewardError
from instructgym.envs.tokens.env import TokenVectorEnv
from instructgym.envs.tokens.episode import PromptExample
from instructgym.envs.tokens.process import TokenSettings
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.tokenization import ByteTokenizer
from instructgym.rewards import WeightedSum

# --- play is step ------------------------------------------------------------------------------------------------


@given(case=cases(), data=st.data())
@settings(max_examples=150)
def test_play_is_step(case, data):
    env, other = case.make(), case.make()
    reset = start(env, data, seed=data.draw(st.integers(0, 99)))
    env.reset(**reset)
    other.reset(**reset)
    done = np.zeros(case.n, dtype=bool)
    for _ in range(3):
        actions = data.draw(st.lists(TOKENS, min_size=case.n, max_size=case.n))
        mask = np.array(data.draw(st.lists(st.booleans(), min_size=case.n, max_size=case.n))) & ~done
        starts = [len(env.process.episode(i).tokens) for i in range(case.n)]
        episodes = list(env.process.episodes)
        told = stepped(other, actions, mask)
        played = env.play(actions, mask)
        assert_equal(played, told, env, other)
        dropped = [len(actions[i]) - int(played.n_consumed[i]) if mask[i] else 0 for i in range(case.n)]
        assert played.n_dropped.tolist() == dropped
        assert (played.credit is None) == (case.timing != "whole")
        if case.timing == "whole":
            check_credit(played, episodes, starts)
        if case.mode is AutoresetMode.DISABLED:
            done |= played.terminated
            if done.any() and data.draw(st.booleans()):
                again = start(env, data, mask=done.copy())
                env.reset(**again)
                other.reset(**again)
                done[:] = False


def check_credit(played, episodes, starts):
    for i, credit in enumerate(played.credit):
        assert credit.dtype == np.float32 and credit.shape == played.rewards[i].shape
        if played.terminated[i] and played.valid[i] and not starts[i]:
            assert credit.sum() == pytest.approx(played.rewards[i].sum(), rel=1e-4, abs=1e-4)
            ids = np.array(episodes[i].tokens)
            np.testing.assert_allclose(credit, ids[::-1] - 0.3 * len(ids), rtol=1e-5)
        elif not (played.terminated[i] and played.valid[i]):
            assert credit.tolist() == played.rewards[i].tolist()


@given(case=cases(mode=AutoresetMode.DISABLED), data=st.data())
def test_play_goes_on_where_steps_stopped(case, data):
    env, other = case.make(), case.make()
    for one in (env, other):
        one.reset(seed=4)
    done = np.zeros(case.n, dtype=bool)
    for actions in data.draw(st.lists(st.lists(st.sampled_from([RED, SKY]), min_size=case.n, max_size=case.n))):
        if not done.any():
            done = env.step(actions)[2]
            other.step(actions)
    actions = data.draw(st.lists(TOKENS, min_size=case.n, max_size=case.n))
    told = stepped(other, actions, ~done)
    assert_equal(env.play(actions, ~done), told, env, other)


@given(actions=st.lists(st.lists(st.integers(0, 256), max_size=12), min_size=2, max_size=2))
def test_play_is_step_for_bytes(actions):
    def make():
        return TokenVectorEnv(
            2,
            [PromptExample("x", "é")],
            ByteTokenizer(),
            Terminal(),
            TokenSettings(max_tokens=10, stop=("é", "\n"), context_length=16),
            embedder="hashing",
        )

    env, other = make(), make()
    env.reset(seed=0)
    other.reset(seed=0)
    assert_equal(env.play(actions), stepped(other, actions, [True, True]), env, other)


@given(case=cases(mode=AutoresetMode.DISABLED), data=st.data())
def test_playing_in_two_halves_pays_the_same(case, data):
    env, other = case.make(), case.make()
    for one in (env, other):
        one.reset(seed=4, options={"index": [0, 1, 3][: case.n]})
    actions = data.draw(st.lists(TOKENS, min_size=case.n, max_size=case.n))
    at = data.draw(st.integers(0, 8))
    first = env.play([ids[:at] for ids in actions])
    second = env.play([ids[at:] for ids in actions], ~first.terminated)
    whole = other.play(actions)
    rewards = [np.concatenate(halves) for halves in zip(first.rewards, second.rewards, strict=True)]
    if not case.moody:  # the mean of what came before is another one then
        assert plain(rewards) == plain(whole.rewards)
    assert (first.n_consumed + second.n_consumed).tolist() == whole.n_consumed.tolist()
    assert (first.terminated | second.terminated).tolist() == whole.terminated.tolist()
    assert plain(env.prompts()) == plain(other.prompts())


@given(case=cases(mode=AutoresetMode.DISABLED), data=st.data())
def test_one_call_scores_all(case, data):
    env = case.make()
    env.reset(seed=0)
    actions = data.draw(st.lists(TOKENS, min_size=case.n, max_size=case.n))
    played = env.play(actions)
    due = int(((played.n_consumed > 0) if case.timing == "causal" else played.terminated).sum())
    calls = env.reward.calls
    assert calls[:1] == [due] * bool(due)
    assert len(calls) <= (2 if case.moody else 1)  # the retry


def test_composed_rewards_play_as_they_step():
    terms = {"end": Terminal(), "each": Causal(), "split": Whole()}
    env, other = (make(reward=WeightedSum(terms, {"each": 0.5, "end": 2})) for _ in range(2))
    env.reset(seed=0)
    other.reset(seed=0)
    actions = [[RED, BLUE, EOS], [SEA] * 4, [EOS]]
    played = env.play(actions)
    assert_equal(played, stepped(other, actions, [True] * N), env, other)
    for credit, rewards in zip(played.credit, played.rewards, strict=True):
        assert rewards[:-1].tolist() == [0] * (len(rewards) - 1) and rewards[-1] != 0
        assert credit.sum() == pytest.approx(rewards[-1], rel=1e-5)


def test_an_empty_play_changes_nothing():
    env = make(timing="causal")
    env.reset(seed=0)
    before = plain(env.prompts())
    for played in (
        env.play([[]] * N),
        env.play([[RED]] * N, np.zeros(N, bool)),
        env.play([None] * N, np.zeros(N, bool)),
    ):
        assert plain(played.rewards) == [[]] * N and not played.terminated.any() and played.valid.all()
    assert plain(env.prompts()) == before and env.reward.calls == []


def test_observations_asked_for_late_are_those_of_their_play():
    env = make()
    env.reset(seed=0, options={"index": 0})
    played = env.play([[BLUE]] * N)
    env.play([[SKY, EOS]] * N)
    env.reset()
    assert played.final_obs["ids"][:, :4].tolist() == [[RED, SEA, BLUE, 0]] * N
    assert played.final_obs["mask"].sum(axis=1).tolist() == [3] * N
    assert played.terminated.tolist() == [False] * N


def test_actions_may_be_arrays():
    env = make()
    env.reset(seed=0)
    played = env.play(np.array([[RED, EOS, 0], [SEA, SKY, EOS], [EOS, 1, 1]]))
    assert played.n_consumed.tolist() == [2, 3, 1] and played.n_dropped.tolist() == [1, 0, 2]
    with pytest.raises(IndexError, match="copy 0 consumed 2 tokens"):
        played.observation(0, 3)


@pytest.mark.parametrize(
    ("actions", "mask", "message"),
    [
        ([[RED]] * 2, None, r"one action per copy is needed \(3\), got 2"),
        ([[RED], [7], []], None, r"token ids must be in \[0, 7\), got 7 to 7"),
        ([[RED], [EOS, -1], []], None, r"got -1 to 5"),
        ([[RED], [0.5], []], None, "one-dimensional sequence of integers"),
        ([RED, RED, RED], None, "one-dimensional sequence of integers"),
        ([[RED]] * 3, [True] * 3, "mask must be a bool array"),
        ([[RED]] * 3, np.ones(2, bool), "mask must be a bool array"),
    ],
)
def test_bad_plays_are_refused_and_change_nothing(actions, mask, message):
    env = make()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.play(actions, mask)
    assert [len(state) for state in env.prompts()] == [int(n) for n in env.reset(seed=0)[1]["prompt_tokens"]]


def test_an_ended_copy_is_not_played():
    env = make()
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        env.play([[RED]] * N)
    env.reset(seed=0)
    env.play([[EOS], [RED], [EOS]])
    for act in (env.play, env.play_async):
        with pytest.raises(RuntimeError, match=r"copies \[0, 2\] have ended.*reset_mask"):
            act([[RED]] * N)
    with pytest.raises(RuntimeError, match=r"copies \[0, 2\] have ended"):
        env.step([RED] * N)
    assert env.play([[RED]] * N, np.array([False, True, False])).n_consumed.tolist() == [0, 1, 0]
    env.reset(options={"reset_mask": np.array([True, False, True])})
    assert env.play([[EOS]] * N).terminated.all()


def test_next_step_mode_cannot_play():
    env = make(mode=AutoresetMode.NEXT_STEP)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="play needs autoreset_mode 'Disabled' or 'SameStep'"):
        env.play([[RED]] * N)


def test_without_a_verdict_the_env_may_stop():
    env = make(moody=True, on_invalid="raise")
    env.reset(seed=0)
    with pytest.raises(InvalidRewardError, match="no verdict"):
        env.play([[RED, BLUE, EOS]] + [[SEA, BLUE, RED, RED]] * 2)
    with pytest.raises(RuntimeError, match=r"copies \[0, 1, 2\] have ended"):
        env.play([[RED]] * N)


def test_a_generator_is_told_what_it_needs():
    env = make(constrained=True, stop=("end",))
    env.reset(seed=0, options={"index": [1, 0, 2], "prefix": [[RED], [], "sky"]})
    assert plain(env.prompts()) == [[BLUE, SKY, SKY, RED], [RED, SEA], [SEA, SKY]]
    assert all(state.dtype == np.int32 for state in env.prompts())
    env.prompts()[0][:] = 0
    assert env.prompts()[0].any()
    first, second, third = env.constraints()
    assert first.allowed([]).tolist() == [SEA, EOS]  # behind the prefix, as the prompts are
    assert second.allowed([]).tolist() == [RED, BLUE]
    assert third.allowed([]).tolist() == [RED, END]
    assert env.action_masks().shape == (N, 7)
    assert np.flatnonzero(env.action_masks()[0]).tolist() == [SEA, EOS]
    env.play([[EOS], [], []])
    assert env.constraints()[0] is None
    with pytest.raises(ValueError, match="nothing may follow"):
        second.suffixes([SEA])
    free = make()
    free.reset(seed=0)
    assert free.constraints() == [None] * N


# --- in the background -------------------------------------------------------------------------------------------


@given(case=cases(), data=st.data())
def test_play_async_is_play(case, data):
    env, other = case.make(), case.make()
    env.reset(seed=1)
    other.reset(seed=1)
    for turn in range(3):
        actions = data.draw(st.lists(TOKENS, min_size=case.n, max_size=case.n))
        kept = [plain(state) for state in env.prompts()]
        env.play_async(actions)
        played = other.play(actions)
        seed = 5 if turn == 1 else None
        if data.draw(st.booleans()) or (case.mode is AutoresetMode.DISABLED and played.terminated.any()):
            assert plain(env.reset(seed=seed)) == plain(other.reset(seed=seed))
        assert plain(env.prompts()) == plain(other.prompts())
        waited = env.play_wait()
        for name in ("rewards", "credit", "n_consumed", "n_dropped", "terminated", "valid", "infos", "reset_infos"):
            assert plain(getattr(waited, name)) == plain(getattr(played, name)), name
        assert plain(waited.final_obs) == plain(played.final_obs)
        for i, prompt in enumerate(kept):
            assert waited.observation(i, 0)["ids"].tolist()[: len(prompt)] == prompt
        assert env.process.state_dict() == other.process.state_dict()
    env.close()


def test_scores_come_from_another_thread():
    env = make()
    env.reset(seed=0)
    env.play_async([[EOS]] * N)
    env.play_wait()
    assert [name.split("_")[0] for name in env.reward.threads] == ["play"]
    env.close()
    env.close()


def test_a_seed_waits_for_the_reward_before_it_forgets():
    gate, order = threading.Event(), []

    class Slow(Terminal):
        def reward(self, samples):
            gate.wait(10)
            order.append("scored")
            return super().reward(samples)

        def reset(self):
            order.append("reset")

    env = make(reward=Slow())
    env.reset(seed=0)
    env.play_async([[EOS]] * N)
    threading.Timer(0.05, gate.set).start()
    env.reset(seed=1)
    assert order == ["reset", "scored", "reset"]
    assert env.play_wait().terminated.all()
    assert env.state_dict()["mean"] == [0.0, 0]
    env.close()


def test_one_play_at_a_time():
    env = make()
    with pytest.raises(RuntimeError, match="call play_async"):
        env.play_wait()
    env.reset(seed=0)
    env.play_async([[RED]] * N)
    for act in (
        lambda: env.play_async([[RED]] * N),
        lambda: env.play([[RED]] * N),
        lambda: env.step([RED] * N),
        env.state_dict,
        lambda: env.load_state_dict({}),
    ):
        with pytest.raises(RuntimeError, match=r"call play_wait\(\) first"):
            act()
    env.play_wait()
    assert not env.step([RED] * N)[2].any()
    env.close()


def test_what_went_wrong_in_the_background_is_raised_by_play_wait():
    class Failing(Terminal):
        def reward(self, samples):
            raise ConnectionError("the judge is away")

    for seed in (None, 3):
        env = make(reward=Failing())
        env.reset(seed=0)
        env.play_async([[EOS]] * N)
        env.reset(seed=seed)
        with pytest.raises(ConnectionError, match="away"):
            env.play_wait()
        env.play_async([[RED]] * N)
        assert not env.play_wait().terminated.any()
        env.close()


# --- saved state -------------------------------------------------------------------------------------------------


@given(case=cases(), turns=st.integers(0, 3), data=st.data())
def test_a_saved_state_goes_on(case, turns, data):
    env, other = case.make(), case.make()
    env.reset(seed=3)
    for _ in range(turns):
        env.play(data.draw(st.lists(TOKENS, min_size=case.n, max_size=case.n)))
        env.reset()
    other.reset(seed=8)
    other.play([[EOS]] * case.n)
    other.load_state_dict(json.loads(json.dumps(env.state_dict())))
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        other.step([RED] * case.n)
    for _ in range(2):
        assert plain(env.reset()) == plain(other.reset())
        actions = data.draw(st.lists(TOKENS, min_size=case.n, max_size=case.n))
        assert plain(env.play(actions).rewards) == plain(other.play(actions).rewards)
    assert env.state_dict() == other.state_dict()


def test_a_state_before_the_first_reset_is_unseeded():
    env, other = make(), make()
    other.load_state_dict(json.loads(json.dumps(env.state_dict())))
    assert plain(env.reset()) == plain(other.reset())
    with pytest.raises(InputError, match="the state is of 3 copies, this env has 2"):
        make(n=2).load_state_dict(env.state_dict())
