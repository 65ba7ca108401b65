"""What holds for every id of the token MDP: checkers, specs, seeds, options, play as step under every timing."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as check_sb3_env
from token_cases import REWARDS, assert_equal, plain, stepped

import instructgym  # noqa: F401
from instructgym.envs.registration import IDS

TOKEN_IDS = [env_id for env_id in IDS if "Generate" in env_id]


@pytest.fixture
def make(tmp_path):
    """``make(env_id, **kwargs)`` and ``make(env_id, n, **kwargs)``: an id's env, on small data of its own kind."""
    (tmp_path / "SST-2").mkdir()
    rows = [f"{('bad', 'good')[i % 2]} film {i}\t{i % 2}" for i in range(40)]
    (tmp_path / "SST-2" / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    own = {
        "instructgym/GenerateInstance-v0": {
            # Its own reward, but by a scorer that needs no language model.
            "reward": {"id": "quality", "kwargs": {"preset": "rm_only", "scorers": {"rew": "vader"}}},
        },
        "instructgym/GenerateLabel-v0": {"task": "SST-2", "data_dir": str(tmp_path)},
        "instructgym/GeneratePrompt-v0": {"task": "SST-2", "data_dir": str(tmp_path), "backend": "scripted"},
        "instructgym/GenerateResponse-v0": {"data": "instructions"},
    }
    assert set(own) == set(TOKEN_IDS), "a new id belongs here"

    def build(env_id, n=0, **kwargs):
        options = own[env_id] | {"tokenizer": "bytes", "max_tokens": 6, "embedder": "hashing"} | kwargs
        return (gym.make_vec(env_id, num_envs=n, **options) if n else gym.make(env_id, **options)).unwrapped

    return build


def responses(env, seed, count, length=9):
    """Random sequences of token ids, some with an end of sequence in them."""
    rng = np.random.default_rng(seed)
    written = [rng.integers(32, 127, size=rng.integers(1, length)).tolist() for _ in range(count)]
    eos = min(env.generation.eos_ids)
    return [[*tokens, eos] if rng.random() < 0.5 else tokens for tokens in written]


def walk(env, draws, steps=40, **reset):
    """Everything that an env says during a random walk."""
    rng = np.random.default_rng(draws)
    said = [plain(env.reset(**reset))]
    for _ in range(steps):
        said.append(plain(env.step(int(rng.integers(env.action_space.n)))))
        if said[-1][2]:
            said.append(plain(env.reset()))
    return said


@pytest.mark.parametrize("timing", [None, *REWARDS])
@pytest.mark.parametrize("env_id", TOKEN_IDS)
def test_both_checkers_find_nothing(env_id, timing, make):
    options = {} if timing is None else {"reward": REWARDS[timing]()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(env_id, **options))
        check_sb3_env(make(env_id, **options))


@pytest.mark.parametrize("env_id", TOKEN_IDS)
def test_a_spec_survives_json(env_id, make):
    env = make(env_id, limit=20, data_seed=3)
    again = gym.make(EnvSpec.from_json(env.spec.to_json())).unwrapped
    assert walk(again, 0, seed=4) == walk(env, 0, seed=4)
    vector = make(env_id, 2, limit=20)
    assert EnvSpec.from_json(vector.spec.to_json()).kwargs["limit"] == 20


@pytest.mark.parametrize("timing", REWARDS)
@pytest.mark.parametrize("env_id", TOKEN_IDS)
def test_a_live_reward_works_but_cannot_be_saved(env_id, timing, make):
    reward = REWARDS[timing]()
    env = make(env_id, reward=reward)
    walk(env, 0, seed=0)
    assert env.reward is reward and reward.calls
    with pytest.raises(ValueError, match=r"argument 'reward' holds a live"):
        env.spec.to_json()


@pytest.mark.parametrize("timing", REWARDS)
@pytest.mark.parametrize("env_id", TOKEN_IDS)
def test_same_seed_same_trajectory(env_id, timing, make):
    one, other = (make(env_id, reward=REWARDS[timing]()) for _ in range(2))
    said = walk(one, 0, seed=7)
    assert walk(other, 0, seed=7) == said == walk(one, 0, seed=7)
    assert walk(one, 0, seed=8) != said
    assert walk(other, 0) != said


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("timing", REWARDS)
@pytest.mark.parametrize("env_id", TOKEN_IDS)
def test_play_is_step(env_id, timing, mode, make):
    env, other = (make(env_id, 4, reward=REWARDS[timing](), autoreset_mode=mode.value) for _ in range(2))
    for turn in range(3):
        seed = 5 if turn == 0 else None
        assert plain(env.reset(seed=seed)) == plain(other.reset(seed=seed))
        actions, mask = responses(env, turn, 4), np.array([True, True, turn > 0, True])
        assert_equal(env.play(actions, mask), stepped(other, actions, mask), env, other)


@pytest.mark.parametrize("env_id", TOKEN_IDS)
def test_a_copy_is_a_single_env_of_its_own_seed(env_id, make):
    """But for the order of the examples, which copies share: it is given here."""
    vector = make(env_id, 3, reward=REWARDS["causal"]())
    index = np.array([4, 0, 2])
    vector.reset(seed=11, options={"index": index})
    actions = responses(vector, 0, 3)
    played = vector.play(actions)
    for copy in range(3):
        single = make(env_id, reward=REWARDS["causal"]())
        single.reset(seed=11 + copy, options={"index": int(index[copy])})
        steps = [single.step(token) for token in actions[copy][: played.n_consumed[copy]]]
        assert [np.float32(step[1]) for step in steps] == played.rewards[copy].tolist()
        assert plain(steps[-1][4]) == plain(played.infos[copy])


@pytest.mark.parametrize("env_id", TOKEN_IDS)
def test_reset_options(env_id, make):
    env = make(env_id)
    _, info = env.reset(seed=0, options={"index": 3, "prefix": "so"})
    assert info["index"] == 3 and info["episode_id"] == env.process.examples[3].id
    assert env.process.episode(0).tokens == env.tokenizer.encode_continuation("so")
    for options, message in [
        ({"idx": 1}, "unknown reset option 'idx'"),
        ({"index": 10**6}, "must be in"),
        ({"prefix": "too long for it"}, "already ends the episode"),
    ]:
        with pytest.raises(ValueError, match=message):
            env.reset(options=options)
    vector = make(env_id, 2)
    vector.reset(seed=0)
    vector.play([[min(vector.generation.eos_ids)], [65]])
    vector.reset(options={"reset_mask": np.array([True, False])})
    assert [len(vector.process.episode(i).tokens) for i in range(2)] == [0, 1]


@pytest.mark.parametrize("env_id", TOKEN_IDS)
def test_copies_of_a_group_answer_the_same_prompt(env_id, make):
    env = make(env_id, 4, group_size=2)
    _, infos = env.reset(seed=0)
    first, second, third, fourth = infos["episode_id"]
    assert first == second != third == fourth


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "nice"}, "unknown reward 'nice'"),
        ({"tokenizer": "letters"}, "unknown tokenizer 'letters'"),
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"limit": 0}, "limit of 0"),
        ({"layout": "sideways"}, "unknown layout 'sideways'"),
        ({"on_invalid": "ignore"}, "on_invalid must be one of"),
        ({"observation": "pixels"}, "unknown observation mode 'pixels'"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"context_length": 20}, "exceeds the context of 20"),
        ({"group_size": 0}, "group_size"),
    ],
)
@pytest.mark.parametrize("env_id", TOKEN_IDS)
def test_bad_arguments_are_refused_in_one_line(env_id, options, message, make):
    with pytest.raises(ValueError, match=message) as error:
        make(env_id, **options)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        make(env_id, 2, **options)


@pytest.mark.parametrize("env_id", TOKEN_IDS)
def test_an_unknown_argument_is_refused(env_id, make):
    with pytest.raises(TypeError, match="temprature"):
        make(env_id, temprature=1.0)
