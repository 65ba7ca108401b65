"""The vector form of the token MDP: copies and single envs, autoreset modes, groups."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from token_cases import EOS, EXAMPLES, MODES, RED, REWARDS, SEA, WORDS, N, Terminal, make, plain, row

from instructgym.envs.tokens.env import TokenEnv, TokenVectorEnv
from instructgym.envs.tokens.process import TokenSettings
from instructgym.llm_backends.local.tokenization import WordTokenizer

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

    from instructgym.agents.sb3.factory import VectorToVecEnv

    env = VectorToVecEnv(make(mode=AutoresetMode.SAME_STEP, observation="onehot", max_tokens=4))
    agent = PPO("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=1, seed=0).learn(48)
    assert agent.num_timesteps >= 48
    assert all(bool(weight.isfinite().all()) for weight in agent.policy.parameters())


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
