"""The VecEnv for stable-baselines3 over the batched vector form."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

import instructgym  # noqa: F401 - registers the ids
from instructgym.agents.sb3.factory import VectorToVecEnv, make_sb3_env
from instructgym.llm_backends import ScriptedBackend

ENV_ID = "instructgym/EvolveInstruction-v0"
SEEDS = ["Name a bird that sings.", "Explain how rain forms.", "Describe a deep sea.", "Count the old trees."]
N = 3
NUMERIC = pytest.mark.parametrize("observation", ["last_edit", "embedding"])


def make(n=N, **kwargs):
    return make_sb3_env(ENV_ID, n, **({"backend": "scripted", "embedder": "hashing", "seeds": SEEDS} | kwargs))


def zeros(n=N):
    return np.zeros(n, dtype=np.int64)


def first(observations, i):
    return {k: v[i] for k, v in observations.items()} if isinstance(observations, dict) else observations[i]


@NUMERIC
def test_step_contract(observation):
    env = make(observation=observation, horizon=2, elimination=())
    assert env.num_envs == N and env.action_space == gym.spaces.Discrete(6)
    env.seed(0)
    observations = env.reset()
    for i in range(N):
        assert env.observation_space.contains(first(observations, i))
    observations, rewards, dones, infos = env.step(zeros())
    assert (rewards.dtype, rewards.shape, dones.dtype) == (np.float32, (N,), bool)
    assert not dones.any() and len(infos) == N
    for info in infos:
        assert info["TimeLimit.truncated"] is False
        assert "terminal_observation" not in info and not any(key.startswith("_") for key in info)
        assert type(info["reward_valid"]) is bool and type(info["step"]) is int and type(info["text"]) is str
        assert isinstance(info["reward_terms"], dict)


@NUMERIC
def test_the_last_step_hands_out_the_terminal_observation_and_the_reset_info(observation):
    env = make(observation=observation, horizon=2, elimination=())
    env.seed(0)
    env.reset()
    starts = [info["index"] for info in env.reset_infos]
    env.step(zeros())
    observations, _, dones, infos = env.step(zeros() + 3)
    assert dones.all()
    for i, info in enumerate(infos):
        last = info["terminal_observation"]
        assert env.observation_space.contains(last)
        assert (last["last_edit"] if observation == "embedding" else last)[3] == 1
        assert (info["step"], info["finish_reason"], info["operation"]) == (2, "horizon", "concretizing")
        assert info["TimeLimit.truncated"] is False
        assert not {"final_obs", "final_info"} & (set(info) | set(env.reset_infos[i]))
        fresh = env.reset_infos[i]
        assert fresh["text"] == SEEDS[fresh["index"]]
        start = first(observations, i)
        assert not (start["last_edit"] if observation == "embedding" else start).any()
    assert len({*starts, *(info["index"] for info in env.reset_infos)}) == len(SEEDS)


def test_seeds_give_the_same_run_and_are_used_once():
    def run(env):
        env.seed(9)
        env.reset()
        return [[info["text"] for info in env.step(zeros())[3]] for _ in range(10)]

    env = make()
    said = run(env)
    assert run(env) == said == run(make())
    env.reset()
    assert [[info["text"] for info in env.step(zeros())[3]] for _ in range(10)] != said


def test_copies_are_seeded_one_after_the_other():
    env = make(preset="published", seeds=None)
    env.seed(4)
    env.reset()
    texts = [info["text"] for info in env.step(zeros())[3]]
    for i, text in enumerate(texts):
        single = gym.make(ENV_ID, backend="scripted", preset="published")
        single.reset(seed=4 + i)
        assert single.step(0)[4]["text"] == text


def test_options_are_passed_on_once():
    env = make()
    env.set_options([{"index": 2}, {"prefix": "Sing a song."}, {}])
    env.seed(0)
    env.reset()
    texts = [info["text"] for info in env.reset_infos]
    assert texts[:2] == [SEEDS[2], "Sing a song."] and texts[2] in SEEDS
    env.reset()
    assert "Sing a song." not in [info["text"] for info in env.reset_infos]
    env.set_options({"index": 3})
    env.reset()
    assert [info["index"] for info in env.reset_infos] == [3] * N
    env.set_options({"idx": 3})
    with pytest.raises(ValueError, match="unknown reset option 'idx'"):
        env.reset()


def test_masks_per_copy():
    env = make()
    env.set_options([{"prefix": " ".join(["word"] * 201)}, {}, {}])
    env.reset()
    masks = np.stack(env.env_method("action_masks"))
    assert masks.dtype == bool
    assert masks.sum(axis=1).tolist() == [1, 6, 6]
    assert [mask.sum() for mask in env.env_method("action_masks", indices=[2, 0])] == [6, 1]
    assert [mask.sum() for mask in env.env_method("action_masks", indices=0)] == [1]
    assert env.has_attr("action_masks")


def test_attributes_are_those_of_the_vector_env():
    env = make()
    assert env.get_attr("operations") == [env.env.unwrapped.operations] * N
    assert len(env.get_attr("operations", indices=[0, 1])) == 2
    assert not env.has_attr("nonsense")
    env.set_attr("note", 5)
    assert env.get_attr("note") == [5] * N
    assert env.env_is_wrapped(VecMonitor) == [False] * N
    env.close()


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_other_autoreset_modes_are_refused(mode):
    env = gym.make_vec(ENV_ID, num_envs=2, autoreset_mode=mode, backend="scripted")
    with pytest.raises(ValueError, match="autoreset_mode='SameStep'"):
        VectorToVecEnv(env)


def test_gymnasiums_vector_wrappers_may_lie_between():
    inner = gym.make_vec(ENV_ID, num_envs=2, autoreset_mode="SameStep", backend="scripted", horizon=1)
    env = VectorToVecEnv(gym.wrappers.vector.RecordEpisodeStatistics(inner))
    env.reset()
    assert all(
        "episode" in {**info, **reset} for info, reset in zip(env.step(zeros(2))[3], env.reset_infos, strict=True)
    )
    assert env.env_method("action_masks")[0].shape == (6,)


def test_a_step_is_one_call_per_role():
    rewriter, judge = ScriptedBackend(), ScriptedBackend()
    env = make(8, backend=rewriter, judge_backend=judge, elimination=())
    env.reset()
    for step in range(1, 15):
        env.step(zeros(8) + step % 6)
        assert (rewriter.usage.calls, judge.usage.calls) == (step, step)


@NUMERIC
def test_monitor_and_normaliser_on_top(observation):
    paid = make(horizon=2, elimination=(), observation=observation, reward=lambda samples: [0.5] * len(samples))
    env = VecNormalize(VecMonitor(paid), norm_reward=False, clip_obs=5.0)
    env.reset()
    for step in range(1, 7):
        observations, rewards, dones, infos = env.step(np.array([step % 6, 0, 3]))
        for part in observations.values() if isinstance(observations, dict) else [observations]:
            assert np.abs(part).max() <= 5 and np.isfinite(part).all()
        assert rewards.tolist() == [0.5] * N
        for done, info in zip(dones, infos, strict=True):
            assert done == (step % 2 == 0)
            if done:
                assert (info["episode"]["r"], info["episode"]["l"]) == (1.0, 2)


@NUMERIC
@pytest.mark.parametrize("name", ["PPO", "TRPO", "MaskablePPO", "A2C", "DQN"])
def test_algorithms_learn_on_it_as_they_come(name, observation):
    """Built by hand with their own defaults, not by our factory."""
    import sb3_contrib
    import stable_baselines3

    algorithm = getattr(stable_baselines3, name, None) or getattr(sb3_contrib, name)
    policy = "MlpPolicy" if observation == "last_edit" else "MultiInputPolicy"
    rollout = {"learning_starts": 8} if name == "DQN" else {"n_steps": 8}
    if "PO" in name:
        rollout |= {"batch_size": 24}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = algorithm(policy, make(observation=observation), seed=0, device="cpu", **rollout)
        model.learn(48)
    assert model.num_timesteps >= 48
    action, _ = model.predict(model.get_env().reset(), deterministic=True)
    assert action.shape == (N,)
