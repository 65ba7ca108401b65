"""Copies of envs: by ``copy.deepcopy``, as tree search makes them, and by pickle, as worker processes get them."""

import copy
import pickle

import gymnasium
import numpy as np
import pytest

import instructgym
from instructgym.llm_backends import ScriptedBackend
from instructgym.rewards import Reward, Score

SMALL = {
    "EvolveInstruction-v0": {"backend": "scripted", "reward": "diversity", "embedder": "hashing"},
    "EditPrompt-v0": {
        "backend": "scripted",
        "embedder": "hashing",
        "scorer": {"backend": "scripted"},
        "limit": 40,
        "batch_size": 4,
        "operator": "edits",
        "observation": "embedding",
    },
    "GeneratePrompt-v0": {"backend": "scripted", "tokenizer": "bytes", "max_tokens": 4, "limit": 40, "size": 4},
    "GenerateLabel-v0": {"tokenizer": "bytes", "limit": 8, "context_length": 4096},
    "GenerateResponse-v0": {"tokenizer": "bytes", "reward": "diversity", "embedder": "hashing", "max_tokens": 3},
    "GenerateInstance-v0": {"tokenizer": "bytes", "reward": "diversity", "embedder": "hashing", "max_tokens": 3},
}


class Counting(Reward):
    """1, 2, 3, ...: a memory that tells how often it was asked; its backend stands for a model."""

    name = "counting"

    def __init__(self):
        self.asked, self.backend = [], ScriptedBackend()

    def reward(self, samples):
        self.asked += [sample.response for sample in samples]
        return [Score(float(len(self.asked))) for _ in samples]

    def reset(self):
        self.asked = []


def evolve(**options):
    options = {"seeds": ["How to cook food?"], "backend": "scripted", "embedder": "hashing"} | options
    return gymnasium.make("instructgym/EvolveInstruction-v0", **options)


def walk(env, actions):
    told = []
    for action in actions:
        _, reward, terminated, _, info = env.step(action)
        told.append((float(reward), terminated, info["text"], info["episode_id"], info["reward_valid"]))
        if terminated:
            env.reset()
    return told


def by_pickle(env):
    return pickle.loads(pickle.dumps(env))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize("name", SMALL)
def test_a_copy_goes_on_alone(name, copied):
    instructgym.register_envs()
    env = gymnasium.make(f"instructgym/{name}", **SMALL[name])
    env.reset(seed=0)
    env.action_space.seed(1)
    actions = [env.action_space.sample() for _ in range(24)]
    walk(env, actions[:9])
    tried, other = copied(env), copied(env)
    expected = walk(tried, actions[9:])
    other.reset(seed=5)
    walk(other, actions[:3])
    assert walk(env, actions[9:]) == expected


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize("name", ["EditPrompt-v0", "GenerateInstance-v0"])
def test_vector_envs_too(name, copied):
    env = gymnasium.make_vec(f"instructgym/{name}", num_envs=2, **SMALL[name])
    env.reset(seed=3)
    if hasattr(env, "play_async"):
        env.play_async([[1, 2], [3]])
        with pytest.raises(RuntimeError, match="play is under way"):
            copied(env)
        env.play_wait()
    actions = np.zeros(2, int)
    first, second = (one.step(actions) for one in (copied(env), env))
    assert first[1].tolist() == second[1].tolist() and first[4]["text"].tolist() == second[4]["text"].tolist()
    env.close()


def test_the_parts_of_a_copy_are_its_own_but_for_models():
    reward = Counting()
    env = evolve(reward=reward, observation="embedding")
    env.reset(seed=0)
    tried = copy.deepcopy(env)
    process, own = env.unwrapped.process, tried.unwrapped.process
    assert [tried.step(1)[1] for _ in range(2)] == [1, 2] and env.step(1)[1] == 1 and len(reward.asked) == 1
    assert own.reward is not reward and own.reward.backend is reward.backend and own.backend is process.backend
    assert own.mean.total == 3 and process.mean.total == 1
    # One embedder serves reward and observation, before and after.
    assert tried.unwrapped.observer._embedder is not env.unwrapped.observer._embedder


def test_a_terms_memory_is_copied_and_its_embedder_stays_one():
    env = evolve(reward={"id": "weighted-sum", "kwargs": {"terms": {"new": "diversity", "count": Counting()}}})
    env.reset(seed=0)
    env.step(1)
    tried = copy.deepcopy(env)
    terms, own = (e.unwrapped.process.reward.terms for e in (env, tried))
    assert own["new"].pool == terms["new"].pool and own["new"].pool is not terms["new"].pool
    tried.reset(seed=1)
    assert own["new"].pool == [] and len(terms["new"].pool) == 1 and len(terms["count"].asked) == 1
    assert own["new"].embedder.usage is not terms["new"].embedder.usage


def test_the_arguments_of_an_env_are_still_shared():
    """Gymnasium deep-copies a spec: that must not copy a live part."""
    reward = Counting()
    env = evolve(reward=reward)
    assert copy.deepcopy(reward) is reward and env.unwrapped.process.reward is reward
    assert env.spec.kwargs["reward"] is reward


def test_info_has_the_same_keys_at_every_step():
    for name, options in SMALL.items():
        env = gymnasium.make(f"instructgym/{name}", **options)
        env.action_space.seed(0)
        env.reset(seed=0)
        keys = set()
        for _ in range(12):
            _, _, terminated, _, info = env.step(env.action_space.sample())
            keys.add(frozenset(info))
            if terminated:
                env.reset()
        assert len(keys) == 1, name
