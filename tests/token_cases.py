"""Small token environments, twice the same, for the tests of the vector form."""

import threading
from dataclasses import dataclass

import numpy as np
from gymnasium.vector import AutoresetMode
from hypothesis import strategies as st

from instructgym.envs.tokens.env import TokenVectorEnv
from instructgym.envs.tokens.episode import PromptExample
from instructgym.envs.tokens.process import TokenSettings
from instructgym.llm_backends.local.tokenization import WordTokenizer
from instructgym.rewards import Reward, Score

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
