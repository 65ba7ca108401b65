"""``instructgym bench token-learning``: compares the tokens that PPO of this library and of stable-baselines3 need.

Both act in ``instructgym/GenerateLabel-v0`` with the same examples, reward and vocabulary of eight tokens: the prompt
is a digit, the response has to count on from it, and every correct token gets its reward at once. PPO of
stable-baselines3 has ``onehot`` observations and a multilayer perceptron; PPO of this library has a transformer with
random weights. The learning rate of each was chosen from 1e-3, 3e-3 and 1e-2 by the median over three other seeds (100
to 102). Discount, lambda and rollout length are the same; epochs and minibatches are the defaults of each library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from rich.console import Console

from ...envs.tokens.episode import PromptExample
from ...rewards import Reward, Sample, Score
from .learning import CAP, Goal, LearningOptions, publish_tokens, tokens_of_ppo

DIGITS, LENGTH, NUM_ENVS = 6, 4, 16
TARGET = 0.8


class CountingReward(Reward):
    """A reward per token: 1 / LENGTH for each token that is the digit before it plus one, modulo DIGITS, else 0."""

    timing = "causal"
    name = "counting"

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        scores = []
        for sample in samples:
            assert sample.token_ids is not None
            # The first token continues the prompt, each further token the one before it.
            before = np.concatenate([[int(sample.prompt)], sample.token_ids[:-1]])
            right = (sample.token_ids == (before + 1) % DIGITS) & (sample.token_ids < DIGITS)
            split = (right / LENGTH).astype(np.float32)
            scores.append(Score(float(split.sum()), per_token=split, terms={"right": float(right.mean())}))
        return scores


@dataclass
class BenchTokenLearning(LearningOptions):
    """Env steps (tokens) until the mean return of the last 64 episodes reaches 0.8 of the best."""

    ours_rate: float = 3e-3
    """Learning rate of PPO of this library."""
    theirs_rate: float = 3e-3
    """Learning rate of PPO of stable-baselines3."""


def counting_env(**options: Any) -> gym.vector.VectorEnv[Any, Any, Any]:
    """Returns the vector env of the task."""
    return gym.make_vec(
        "instructgym/GenerateLabel-v0",
        num_envs=NUM_ENVS,
        examples=[PromptExample(id=str(d), prompt=str(d)) for d in range(DIGITS)],
        tokenizer={"id": "words", "kwargs": {"words": [str(d) for d in range(DIGITS)]}},
        reward=CountingReward(),
        max_tokens=LENGTH,
        context_length=1 + LENGTH,
        **options,
    )


def tokens_of_ours(seed: int, learning_rate: float) -> int:
    """Returns the number of tokens until PPO of this library reaches the target; CAP or a little more if not."""
    return tokens_of_ppo(
        counting_env(), seed, Goal(TARGET), lambda batch: batch.per_episode(batch.rewards).tolist(), "none",
        learning_rate=learning_rate, rollout_batches=2, kl_coefficient=0.0, lam=0.95, gamma=0.9,
    )  # fmt: skip


def tokens_of_sb3(seed: int, learning_rate: float) -> int:
    """Returns the number of tokens until PPO of stable-baselines3 reaches the target; CAP or a little more if not."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecMonitor

    from ...agents.sb3.factory import VectorToVecEnv

    env = VecMonitor(VectorToVecEnv(counting_env(observation="onehot", autoreset_mode="SameStep")))
    agent = PPO(
        "MlpPolicy", env, learning_rate=learning_rate, n_steps=2 * LENGTH, batch_size=64, n_epochs=10,
        gamma=0.9, gae_lambda=0.95, seed=seed, device="cpu",
    )  # fmt: skip
    goal = Goal(TARGET)

    def learned(scope: dict[str, Any], _: Any) -> bool:
        return not goal.reached(info["episode"]["r"] for info in scope["infos"] if "episode" in info)

    agent.learn(CAP, callback=learned)
    return int(agent.num_timesteps)


def run(options: BenchTokenLearning, console: Console) -> dict[str, Any]:
    """Measures both agents and returns ``{"ours": ..., "theirs": ..., "ratio": ..., "settings": ...}``.

    Raises:
        InputError: if there are no seeds or the JSON file cannot be written.
    """
    options.check()
    tokens = {
        "TokenPPO (ours)": [tokens_of_ours(seed, options.ours_rate) for seed in options.seed_range()],
        "stable-baselines3 PPO": [tokens_of_sb3(seed, options.theirs_rate) for seed in options.seed_range()],
    }
    return publish_tokens(options, TARGET, tokens, {"rates": [options.ours_rate, options.theirs_rate]}, console)
