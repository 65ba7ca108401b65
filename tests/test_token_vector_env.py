"""The vector form of the token MDP: play is step, autoreset modes, groups, playing in the background, saved state."""

import json
import threading
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

from instructgym.envs.process import InvalidRewardError
from instructgym.envs.tasks.prompt_examples import PromptExample
from instructgym.envs.token_env import TokenEnv
from instructgym.envs.token_process import TokenSettings
from instructgym.envs.token_vector_env import TokenVectorEnv
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.tokenization import ByteTokenizer, WordTokenizer
from instructgym.rewards import Reward, Score, WeightedSum

WORDS = ("red", "blue", "sea", "sky", "end")
RED, BLUE, SEA, SKY, END, EOS, UNK = range(7)
EXAMPLES = [
    PromptExample("one", "red sea", "blue", ("red", "blue"), {"task": "colour"}),
    PromptExample("two", "blue sky sky", "red", ("red", "red sea", "red sea sky end")),
    PromptExample("three", "sea", None, ("end", "sky end", "sky red"), {"moody": True}),
    PromptExample("four", "end", None, ("blue", "blue blue")),
]
N = 3
MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]


def unhappy(sample):
    """Whether a moody reward has no verdict on a response."""
    return sample.token_ids.sum() % 3 == 0


class Terminal(Reward):
    name = "mine"

    def __init__(self, moody=False):
        self.moody, self.calls, self.threads = moody, [], set()

    def reward(self, samples):
        self.calls.append(len(samples))
        self.threads.add(threading.current_thread().name)
        return [Score.invalid("no idea") if self.moody and self.bad(s) else self.score(s) for s in samples]

    def bad(self, sample):
        return unhappy(sample)

    def score(self, sample):
        value = len(sample.response) + 0.1 * float(sample.token_ids.sum()) + (sample.seed % 97) / 7
        return Score(value, terms={"length": float(len(sample.response))})


class Causal(Terminal):
    timing = "causal"

    def bad(self, sample):  # by prompt: a causal verdict is there from the first token on or never
        return bool(sample.metadata.get("moody"))

    def score(self, sample):
        steps = np.arange(len(sample.token_ids))
        split = (0.1 * sample.token_ids - steps + (sample.seed % 97) * sample.loss_mask).astype(np.float32)
        return Score(float(split.sum()), per_token=split)


class Whole(Terminal):
    timing = "whole"

    def score(self, sample):
        split = (sample.token_ids[::-1] - 0.3 * len(sample.token_ids)).astype(np.float32)
        return Score(float(split.sum()), per_token=split)


REWARDS = {"terminal": Terminal, "causal": Causal, "whole": Whole}


@dataclass(frozen=True)
class Case:
    """A way to build an env, twice the same."""

    timing: str = "terminal"
    moody: bool = False
    stop: tuple[str, ...] = ()
    max_tokens: int = 4
    constrained: bool = False
    mode: AutoresetMode = AutoresetMode.DISABLED
    n: int = N
    group_size: int = 1
    observation: str = "tokens"

    def make(self, **kwargs):
        return TokenVectorEnv(
            self.n,
            EXAMPLES,
            WordTokenizer(words=WORDS),
            kwargs.pop("reward", None) or REWARDS[self.timing](self.moody),
            TokenSettings(
                max_tokens=self.max_tokens,
                stop=self.stop,
                constrained=self.constrained,
                context_length=12,
                group_size=self.group_size,
                **kwargs,
            ),
            self.observation,
            embedder="hashing",
            autoreset_mode=self.mode,
            render_mode="ansi",
        )


def make(**kwargs):
    names = set(Case.__dataclass_fields__)
    return Case(**{k: v for k, v in kwargs.items() if k in names}).make(
        **{k: v for k, v in kwargs.items() if k not in names}
    )


def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def row(batched, i):
    """Copy i's info out of a vector env's."""
    return {
        key: row(value, i) if isinstance(value, dict) else plain(value[i])
        for key, value in batched.items()
        if not key.startswith("_") and (f"_{key}" not in batched or batched[f"_{key}"][i])
    }


def stepped(env, actions, mask):
    """What ``play`` promises to equal: all copies stepped side by side, each through its tokens until it ends."""
    process, n = env.process, env.num_envs
    told = {"rewards": [[] for _ in range(n)], "valid": [True] * n, "terminated": [False] * n, "infos": [None] * n}
    told["observations"] = [[env.observer.encode([process.state(i)])[0]] for i in range(n)]
    told["reset_infos"] = [{} for _ in range(n)]
    for t in range(max(map(len, actions), default=0)):
        live = [i for i in range(n) if mask[i] and not told["terminated"][i] and t < len(actions[i])]
        ended = []
        for i, transition in zip(live, process.step([actions[i][t] for i in live], live), strict=True):
            told["rewards"][i].append(np.float32(transition.reward))
            told["valid"][i] &= transition.info["reward_valid"]
            told["terminated"][i] = transition.terminated
            told["infos"][i] = transition.info
            told["observations"][i].append(env.observer.encode([process.state(i)])[0])
            ended += [i] * transition.terminated
        if env.autoreset_mode is AutoresetMode.SAME_STEP and ended:
            for i, info in zip(ended, process.begin(ended), strict=True):
                told["reset_infos"][i] = info
    return told


def assert_equal(played, told, env, other):
    assert plain(played.rewards) == plain(told["rewards"])
    assert all(part.dtype == np.float32 for part in played.rewards)
    assert played.n_consumed.tolist() == list(map(len, told["rewards"])) and played.n_consumed.dtype == np.int64
    assert played.terminated.tolist() == told["terminated"] and played.terminated.dtype == bool
    assert played.valid.tolist() == told["valid"] and played.valid.dtype == bool
    assert not played.truncated.any() and played.truncated.dtype == bool
    assert [part.dtype for part in played.appended] == [np.int32] * len(played.appended)
    assert not any(len(part) for part in played.appended)
    for info, expected in zip(played.infos, told["infos"], strict=True):
        assert expected is None or plain(info) == plain(expected)
        assert expected is not None or set(info) >= {"episode_id", "finish_reason", "step", "reward_valid"}
    assert plain(played.reset_infos) == plain(told["reset_infos"])
    for i, seen in enumerate(told["observations"]):
        assert plain([played.observation(i, t) for t in range(len(seen))]) == plain(seen)
        assert plain({key: part[i] for key, part in played.final_obs.items()}) == plain(seen[-1])
    assert plain(env.prompts()) == plain(other.prompts())
    assert env.process.state_dict() == other.process.state_dict()


def cases(**fixed):
    options = {
        "timing": st.sampled_from(sorted(REWARDS)),
        "moody": st.booleans(),
        "stop": st.sampled_from([(), ("end",), ("sea sky", "blue"), ("a s",)]),
        "max_tokens": st.integers(4, 6),
        "constrained": st.booleans(),
        "mode": st.sampled_from(MODES[1:]),
        "n": st.integers(1, 3),
    }
    return st.builds(Case, **(options | {key: st.just(value) for key, value in fixed.items()}))


TOKENS = st.lists(st.sampled_from([RED, RED, BLUE, SEA, SKY, END, UNK, EOS]), max_size=8)


def start(env, data, seed=None, mask=None):
    """Resets the copies of a mask, some with a prefix where their example allows it."""
    options = {} if mask is None else {"reset_mask": mask}
    prefixes = data.draw(st.lists(TOKENS.map(lambda ids: ids[:2]), min_size=env.num_envs, max_size=env.num_envs))
    index = data.draw(st.lists(st.integers(0, 3), min_size=env.num_envs, max_size=env.num_envs))

    def fits(copy, prefix):
        probe = env.process._new_episode
        generator = env.process.generators[copy]
        state = generator.bit_generator.state
        try:
            probe(index[copy], copy, prefix)
            return True
        except ValueError:
            return False
        finally:
            generator.bit_generator.state = state

    prefixes = [prefix if fits(copy, prefix) else [] for copy, prefix in enumerate(prefixes)]
    return {"seed": seed, "options": options | {"index": index, "prefix": prefixes}}


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
    assert first.allowed([RED]).tolist() == [SEA, EOS]
    assert second.allowed([]).tolist() == [RED, BLUE]
    assert third.allowed([SKY]).tolist() == [RED, END]
    assert env.action_masks().shape == (N, 7)
    assert np.flatnonzero(env.action_masks()[0]).tolist() == [SEA, EOS]
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


# --- stepping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observation", ["tokens", "onehot"])
@pytest.mark.parametrize("timing", REWARDS)
@pytest.mark.parametrize("mode", MODES)
def test_copies_equal_single_envs(mode, timing, observation):
    examples = EXAMPLES[:1]  # the order of examples is what copies share
    parts = {"embedder": "hashing", "observation": observation}
    options = TokenSettings(max_tokens=3, context_length=12, stop=("sea sky",))
    tokenizer = WordTokenizer(words=WORDS)
    env = TokenVectorEnv(N, examples, tokenizer, REWARDS[timing](), options, autoreset_mode=mode, **parts)
    singles = [TokenEnv(examples, tokenizer, REWARDS[timing](), options, **parts) for _ in range(N)]
    assert env.single_observation_space == singles[0].observation_space

    def observation_of(seen, i):
        return plain({key: part[i] for key, part in seen.items()} if isinstance(seen, dict) else seen[i])

    seen, infos = env.reset(seed=11)
    for i, single in enumerate(singles):
        assert plain(single.reset(seed=11 + i)) == [observation_of(seen, i), row(infos, i)]
    ended = np.zeros(N, dtype=bool)
    for actions in np.random.default_rng(0).integers(7, size=(40, N)):
        before, (seen, rewards, terminated, truncated, infos) = ended, env.step(actions)
        assert env.observation_space.contains(seen) and not truncated.any()
        assert (rewards.dtype, rewards.shape, terminated.dtype) == (np.float64, (N,), bool)
        for i, single in enumerate(singles):
            if before[i] and mode is AutoresetMode.NEXT_STEP:
                assert plain(single.reset()) == [observation_of(seen, i), row(infos, i)]
                continue
            last, reward, end, _, info = single.step(actions[i])
            assert (rewards[i], terminated[i]) == (reward, end)
            told, mine = observation_of(seen, i), row(infos, i)
            if end and mode is AutoresetMode.SAME_STEP:
                assert plain(single.reset()) == [told, {k: v for k, v in mine.items() if not k.startswith("final_")}]
                told, mine = plain(infos["final_obs"][i]), row(infos["final_info"], i)
            assert (plain(last), plain(info)) == (told, mine)
        ended = terminated
        if mode is AutoresetMode.DISABLED and terminated.any():
            seen, infos = env.reset(options={"reset_mask": terminated})
            for i in np.flatnonzero(terminated):
                assert plain(singles[i].reset()) == [observation_of(seen, i), row(infos, i)]


def test_stable_baselines3_takes_the_vector_form():
    from stable_baselines3 import PPO

    from instructgym.envs.sb3 import VectorToVecEnv

    env = VectorToVecEnv(make(mode=AutoresetMode.SAME_STEP, observation="onehot", max_tokens=4))
    PPO("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=1, seed=0).learn(48)


def test_the_default_mode_is_disabled():
    env = TokenVectorEnv(2, EXAMPLES, WordTokenizer(words=WORDS), Terminal(), embedder="hashing")
    assert env.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    assert env.action_space == gym.spaces.MultiDiscrete([7, 7])


def test_examples_come_in_epochs_without_replacement():
    env = make(mode=AutoresetMode.SAME_STEP, n=3)
    drawn = env.reset(seed=0)[1]["index"].tolist()
    while len(drawn) < 12:
        drawn += [info["index"] for info in env.play([[EOS]] * 3).reset_infos]
    assert [sorted(drawn[k : k + 4]) for k in (0, 4, 8)] == [[0, 1, 2, 3]] * 3


def test_rendering():
    env = make()
    assert env.render() == ("", "", "")
    env.reset(seed=0, options={"index": 0})
    env.play([[RED, EOS], [], [SEA]])
    assert env.render() == ("red seared", "red sea", "red seasea")


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_envs must be at least 1"):
        make(n=0)
    with pytest.raises(ValueError, match="Sometimes"):
        make(mode="Sometimes")
    with pytest.raises(ValueError, match=r"group_size must divide the number of copies \(3\), got 2"):
        make(group_size=2)
    with pytest.raises(ValueError, match="group_size=3 needs autoreset_mode='Disabled'"):
        make(group_size=3, mode=AutoresetMode.SAME_STEP)


# --- groups ------------------------------------------------------------------------------------------------------


def test_the_copies_of_a_group_answer_one_prompt():
    env = make(n=6, group_size=3)
    drawn = []
    for _ in range(4):
        index = env.reset(seed=None if drawn else 0)[1]["index"].tolist()
        assert index[:3] == [index[0]] * 3 and index[3:] == [index[3]] * 3
        drawn += [index[0], index[3]]
    assert sorted(drawn[:4]) == sorted(drawn[4:]) == [0, 1, 2, 3]


def test_groups_are_reset_whole():
    env = make(n=4, group_size=2)
    env.reset(seed=0)
    env.play([[EOS], [EOS], [RED], [EOS]])
    with pytest.raises(ValueError, match=r"splits a group.*groups of 2"):
        env.reset(options={"reset_mask": np.array([True, True, False, True])})
    _, infos = env.reset(options={"reset_mask": np.array([True, True, False, False])})
    assert infos["_index"].tolist() == [True, True, False, False]
    assert infos["index"][0] == infos["index"][1]


def test_a_group_may_be_chosen_but_not_divided():
    env = make(n=4, group_size=2)
    assert env.reset(options={"index": [2, 2, 0, 0]})[1]["index"].tolist() == [2, 2, 0, 0]
    assert env.reset(options={"index": 1})[1]["index"].tolist() == [1] * 4
    for index in ([2, 1, 0, 0], [2, 2, 0, 3]):
        with pytest.raises(ValueError, match="same for the 2 copies of a group"):
            env.reset(options={"index": index})


def test_the_copies_of_a_group_have_seeds_of_their_own():
    env = make(n=3, group_size=3)
    env.reset(seed=0)
    assert len({episode.base_seed for episode in env.process.episodes}) == 3


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
