"""A small task, a scripted model that scores prompts on it, and EditPrompt envs on both; shared by test files."""

import gymnasium as gym
import numpy as np

import instructgym  # noqa: F401 - registers the ids
from instructgym.envs.process import Unicode
from instructgym.envs.tasks.prompt_search.tasks import PromptTask
from instructgym.llm_backends import ScriptedBackend
from instructgym.rewards import LabelledExample, TaskScorer

ENV_ID = "instructgym/EditPrompt-v0"
EDITS = (
    "rephrase",
    "shorten",
    "add_constraint",
    "add_demonstration",
    "swap_demonstrations",
    "drop_demonstration",
    "swap_verbalizers",
    "no_op",
)
REPHRASE, ADD, SWAP, DROP, WORDS, NO_OP = (
    EDITS.index(n)
    for n in ("rephrase", "add_demonstration", "swap_demonstrations", "drop_demonstration", "swap_verbalizers", "no_op")
)
DELETE, EXCHANGE, ADD_BACK, NOTHING = range(4)
LONG = "Read the review, then decide whether it is good or bad."
OPERATORS = ("edits", "phrases", "free-text")


def task(count=40, instructions=(LONG, "Is it good?"), words=("Negative", "Positive")):
    examples = tuple(LabelledExample(f"t/{i}", f"a {('bad', 'good')[i % 2]} film {i}", i % 2) for i in range(count))
    return PromptTask("films", words, words, tuple(instructions), train=examples)


def likelihoods(prompt, completion):
    """A model that reads better the more films it has seen, and best with the words bad and good."""
    shown = prompt.count("film") - 1
    right = "good" if "good film" in prompt.split("\n\n")[-1] else "bad"
    word = completion.strip().casefold()
    says = {"negative": "bad", "positive": "good", "terrible": "bad", "great": "good"}.get(word, word)
    clear = 0.3 * shown + 0.5 * (word in ("bad", "good")) - 0.02 * len(prompt.split("\n\n")[0].split())
    return (clear if says == right else -clear) - 5.0


def scripted(**kwargs):
    return TaskScorer(ScriptedBackend(score=likelihoods), **kwargs)


def arguments(**kwargs):
    return {
        "task": task(),
        "backend": "scripted",
        "embedder": "hashing",
        "scorer": scripted(),
        "batch_size": 6,
    } | kwargs


def make(**kwargs):
    return gym.make(ENV_ID, **arguments(**kwargs)).unwrapped


def vector(n=3, mode="SameStep", **kwargs):
    return gym.make_vec(ENV_ID, num_envs=n, autoreset_mode=mode, **arguments(**kwargs))


def started(seed=0, prefix=None, **kwargs):
    env = make(**kwargs)
    env.reset(seed=seed, options={"prefix": prefix} if prefix is not None else None)
    return env


def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def draw(env, rng):
    """A random action, also where the action space is text."""
    space = env.action_space
    if isinstance(space, Unicode):
        return ["", "Good or bad?", "...", f"Say what you feel about it {rng.integers(9)}."][rng.integers(4)]
    return int(rng.integers(space.n)) if isinstance(space, gym.spaces.Discrete) else rng.integers(space.nvec)


def play(env, draws=0, steps=20, **reset):
    rng, said = np.random.default_rng(draws), [plain(env.reset(**reset))]
    for _ in range(steps):
        said.append(plain(env.step(draw(env, rng))))
        if said[-1][2]:
            said.append(plain(env.reset()))
    return said
