"""``instructgym bench token-learning``: tokens until a small task is learned, ours and theirs.

Both act in ``instructgym/GenerateLabel-v0`` with the same examples, reward and vocabulary of eight tokens: the prompt
is a digit, the response has to count on from it, and every right token is paid at once. Stable-baselines3's PPO sees
it as ``onehot``, through a multilayer perceptron; ours is a transformer of random weights. The learning rate of each
was chosen from :data:`LEARNING_RATES` by the median over three other seeds (100 to 102). Discount, lambda and rollout
are the same; epochs and minibatches are the defaults of either library.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from rich.console import Console
from rich.table import Table

from ...envs.tokens.episode import PromptExample
from ...llm_backends.errors import InputError
from ...rewards import Reward, Sample, Score
from ..runs.folder import write_json
from ..runs.options import check_output
from .tiny import tiny_llama

DIGITS, LENGTH, COPIES = 6, 4, 16
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
OURS_RATE, THEIRS_RATE = 3e-3, 3e-3
TARGET, WINDOW, CAP = 0.8, 64, 20_000


class CountingReward(Reward):
    """1 / LENGTH for every token that is the digit before it plus one, modulo DIGITS; paid token by token."""

    timing = "causal"
    name = "counting"

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        scores = []
        for sample in samples:
            assert sample.token_ids is not None
            before = np.concatenate([[int(sample.prompt)], sample.token_ids[:-1]])
            right = (sample.token_ids == (before + 1) % DIGITS) & (sample.token_ids < DIGITS)
            split = (right / LENGTH).astype(np.float32)
            scores.append(Score(float(split.sum()), per_token=split, terms={"right": float(right.mean())}))
        return scores


@dataclass
class BenchTokenLearning:
    """Env steps (tokens) until the mean return of the last 64 episodes reaches 0.8 of the best."""

    seeds: int = 5
    """Seeds of each."""
    ours_rate: float = OURS_RATE
    """Learning rate of our PPO."""
    theirs_rate: float = THEIRS_RATE
    """Learning rate of stable-baselines3's PPO."""
    first_seed: int = 0
    """The first seed."""
    json: str = ""
    """File for the figures, as JSON."""


def counting_env(**options: Any) -> gym.vector.VectorEnv[Any, Any, Any]:
    """The vector env of the task."""
    return gym.make_vec(
        "instructgym/GenerateLabel-v0",
        num_envs=COPIES,
        examples=[PromptExample(id=str(d), prompt=str(d)) for d in range(DIGITS)],
        tokenizer={"id": "words", "kwargs": {"words": [str(d) for d in range(DIGITS)]}},
        reward=CountingReward(),
        max_tokens=LENGTH,
        context_length=1 + LENGTH,
        **options,
    )


def tokens_of_ours(seed: int, learning_rate: float = OURS_RATE) -> int:
    """Tokens that our PPO needs; CAP where it does not get there."""
    from ...agents import LanguageModelPolicy, LoraSettings, TokenPPO

    env = counting_env()
    lm = tiny_llama(env.unwrapped.tokenizer, seed, "counting")  # type: ignore[attr-defined]
    policy = LanguageModelPolicy(lm, LoraSettings(rank=0), reference="none", dtype="float32", seed=seed)
    agent = TokenPPO(
        env, policy, seed, learning_rate=learning_rate, rollout_batches=2, epochs=4, kl_coefficient=0.0, lam=0.95,
        gamma=0.9, value_coefficient=0.5, value_clip=0.0,
    )  # fmt: skip
    returns: deque[float] = deque(maxlen=WINDOW)

    def learned(agent: TokenPPO) -> bool:
        assert agent.last_rollout is not None
        returns.extend(agent.last_rollout.per_episode(agent.last_rollout.rewards).tolist())
        return not (len(returns) == WINDOW and np.mean(returns) >= TARGET)

    agent.learn(CAP, learned)  # type: ignore[arg-type]
    return agent.num_timesteps


def tokens_of_sb3(seed: int, learning_rate: float = THEIRS_RATE) -> int:
    """Tokens that stable-baselines3's PPO needs; CAP where it does not get there."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecMonitor

    from ...agents.sb3.factory import VectorToVecEnv

    env = VecMonitor(VectorToVecEnv(counting_env(observation="onehot", autoreset_mode="SameStep")))
    agent = PPO(
        "MlpPolicy", env, learning_rate=learning_rate, n_steps=2 * LENGTH, batch_size=64, n_epochs=10,
        gamma=0.9, gae_lambda=0.95, seed=seed, device="cpu",
    )  # fmt: skip
    returns: deque[float] = deque(maxlen=WINDOW)

    def learned(scope: dict[str, Any], _: Any) -> bool:
        returns.extend(info["episode"]["r"] for info in scope["infos"] if "episode" in info)
        return not (len(returns) == WINDOW and np.mean(returns) >= TARGET)

    agent.learn(CAP, callback=learned)
    return int(agent.num_timesteps)


def run(options: BenchTokenLearning, console: Console | None = None) -> dict[str, Any]:
    """Measures and returns ``{"ours": ..., "theirs": ..., "ratio": ...}``."""
    console = console or Console()
    if options.seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {options.seeds}")
    if options.json:
        check_output(Path(options.json))
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    ours = [tokens_of_ours(seed, options.ours_rate) for seed in seeds]
    theirs = [tokens_of_sb3(seed, options.theirs_rate) for seed in seeds]
    figures = {
        "ours": {"tokens": ours, "median": float(np.median(ours))},
        "theirs": {"tokens": theirs, "median": float(np.median(theirs))},
        "ratio": {"tokens": float(np.median(theirs) / np.median(ours))},
        "settings": {"target": TARGET, "cap": CAP, "rates": [options.ours_rate, options.theirs_rate]},
    }
    table = Table(title=f"Tokens until {TARGET} of the best return, {options.seeds} seeds (cap {CAP})")
    for title in ("", "median", "each seed"):
        table.add_column(title)
    table.add_row("TokenPPO (ours)", f"{np.median(ours):.0f}", " ".join(map(str, ours)))
    table.add_row("stable-baselines3 PPO", f"{np.median(theirs):.0f}", " ".join(map(str, theirs)))
    console.print(table)
    if options.json:
        write_json(Path(options.json), figures)
    return figures
