"""``instructgym bench dense-reward``: compares rewards per token with their sum at the end of the response.

The vocabulary has 32 words, of which 24 are bad, and a response has at most 32 tokens. An editor replaces the bad words
of responses by good ones, a token-level reward model learns from these minimal edits alone (``mean_bt``; Xu et al.
2024, arXiv 2406.02756), and two policies learn from that model with the same PPO: *dense* gets the model's reward of
every token when the token is written, *terminal* gets the sum of the same rewards at the last token. Both have a KL
penalty per token. The result is the number of tokens until responses are good by the true share of good tokens, which
neither policy sees.

Learning rate (1e-3, 3e-3, 1e-2 or 3e-2) and lambda of GAE (0.5, 0.95 or 1) were chosen for each policy by the median
over three other seeds (100 to 102).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import gymnasium as gym
import numpy as np
from annotated_types import Le
from rich.console import Console

from ...envs.tokens.episode import PromptExample
from ...llm_backends import Tokenizer
from ...llm_backends.local.tokenization import WordTokenizer
from ...rewards import Reward, Sample, Score
from ...rewards.learned.edits import EditedPair
from .learning import CAP, Goal, LearningOptions, publish_tokens, tokens_of_ppo
from .tiny import tiny_llama

if TYPE_CHECKING:
    from ...rewards.learned.reward_model import RewardModel

WORDS = tuple(f"w{i}" for i in range(32))
BAD = frozenset(int(i) for i in np.random.default_rng(0).permutation(len(WORDS))[:24])
"""Ids of the bad words. ``</s>`` is neither good nor bad."""
LENGTH, NUM_ENVS = 32, 4
PAIRS, HELD_OUT, BAD_SHARE, PAIR_EPOCHS, PAIR_RATE = 1024, 256, 0.2, 3, 3e-3
UNCHANGED_PENALTY = 1.0
KL_COEFFICIENT = 0.004
TARGET = 0.9
EPISODES = 3_000
"""Maximum number of episodes: a limit for policies whose responses have become so short that CAP is out of reach."""

Share = Annotated[float, Le(1)]


@dataclass
class BenchDenseReward(LearningOptions):
    """Tokens until 90% of what a policy writes is good: with a reward for each token, or their sum at the end."""

    dense_rate: float = 3e-2
    """Learning rate of the dense policy, which gets a reward for every token."""
    dense_lambda: Share = 0.5
    """Lambda of generalised advantage estimation (GAE) of the dense policy, in [0, 1]."""
    terminal_rate: float = 1e-2
    """Learning rate of the terminal policy, which gets the sum of the rewards at the last token."""
    terminal_lambda: Share = 0.95
    """Lambda of generalised advantage estimation (GAE) of the terminal policy, in [0, 1]."""


class TerminalSum(Reward):
    """A reward that gives the sum of a causal reward at the last token: the same return without credit per token.

    Args:
        reward: the causal reward.
    """

    name = "paid-at-the-end"

    def __init__(self, reward: Reward) -> None:
        self._reward = reward

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        self._reward.check_tokenizer(tokenizer)

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        return [replace(score, per_token=None) for score in self._reward.reward(samples)]


def edited_pairs(count: int, seed: int) -> list[EditedPair]:
    """Returns pairs of a random response of 8 to 31 words and its edit.

    A fifth of the words of a response is bad; the edit has a good word in place of each of them.

    Args:
        count: number of pairs.
        seed: seed of the random words and lengths.
    """
    rng = np.random.default_rng(seed)
    good, bad = [i for i in range(len(WORDS)) if i not in BAD], sorted(BAD)
    pairs = []
    for number in range(count):
        edited = rng.choice(good, size=rng.integers(8, LENGTH))
        # Word for word: original and edit have one length, so an edit changes nothing but single words.
        original = np.where(rng.random(len(edited)) < BAD_SHARE, rng.choice(bad, size=len(edited)), edited)
        before, after = (" ".join(WORDS[i] for i in side) for side in (original, edited))
        pairs.append(EditedPair(WORDS[int(rng.integers(len(WORDS)))], before, after, str(number)))
    return pairs


def true_return(tokens: np.ndarray) -> float:
    """Returns the number of good tokens of a response as a share of the maximum, in [0, 1]."""
    return sum(int(token) < len(WORDS) and int(token) not in BAD for token in tokens) / LENGTH


def trained_reward(seed: int) -> tuple[RewardModel, dict[str, float]]:
    """Trains a token-level reward model on edits and returns it with its metrics on held-out edits."""
    from ...agents.supervised.reward_modelling import RewardTrainer, evaluate_reward_model, tokenize_pairs
    from ...llm_backends.training.adapters import LoraSettings
    from ...rewards.learned.reward_model import RewardModel

    tokenizer = WordTokenizer(words=WORDS)
    lm = tiny_llama(tokenizer, seed)
    pairs, _ = tokenize_pairs(edited_pairs(PAIRS + HELD_OUT, seed), tokenizer, lm.context_length)
    model = RewardModel(lm, LoraSettings(rank=0), dtype="float32", seed=seed)
    trainer = RewardTrainer(
        model, "mean_bt", seed, learning_rate=PAIR_RATE, epochs=PAIR_EPOCHS, unchanged_penalty=UNCHANGED_PENALTY
    )
    trainer.fit(pairs[:-HELD_OUT])
    return model, evaluate_reward_model(model, pairs[-HELD_OUT:])


def scaled_reward(model: RewardModel, measures: Mapping[str, float]) -> Reward:
    """Returns the reward of the model for every token, with a scale from the held-out edits.

    On average, an edited word changes the return by 1 / LENGTH, as in the true return, and a random word has reward 0.
    An untrained policy thus gains nothing from shorter or longer responses.
    """
    from ...rewards.learned.token_reward import TokenReward

    removed, written = measures["removed_reward"], measures["written_reward"]
    # Expected reward of a word from the uniform distribution over good and bad words.
    center = removed + (written - removed) * (1.0 - len(BAD) / len(WORDS))
    return TokenReward(model, scale=1.0 / (LENGTH * (written - removed)), center=center)


def tokens_needed(seed: int, reward: Reward, learning_rate: float, lam: float) -> int:
    """Returns the number of tokens until PPO reaches the target with the reward; CAP if it does not."""
    env = gym.make_vec(
        "instructgym/GenerateResponse-v0",
        num_envs=NUM_ENVS,
        examples=[PromptExample(id=word, prompt=word) for word in WORDS],
        tokenizer=WordTokenizer(words=WORDS),
        reward=reward,
        max_tokens=LENGTH,
        context_length=1 + LENGTH,
    )
    goal = Goal(TARGET)
    tokens = tokens_of_ppo(
        env, seed, goal, lambda batch: map(true_return, batch.responses), "base", EPISODES,
        learning_rate=learning_rate, kl_coefficient=KL_COEFFICIENT, gamma=1.0, lam=lam,
    )  # fmt: skip
    return tokens if goal.reached() else CAP


def run(options: BenchDenseReward, console: Console) -> dict[str, Any]:
    """Measures both placements and returns their results.

    Returns:
        ``{"ours": dense, "theirs": terminal, "ratio": ..., "reward_model": ..., "settings": ...}``.

    Raises:
        InputError: if an option is out of range or the JSON file cannot be written.
    """
    options.check()
    settings = {
        "dense": (options.dense_rate, options.dense_lambda),
        "terminal": (options.terminal_rate, options.terminal_lambda),
    }
    tokens: dict[str, list[int]] = {placement: [] for placement in settings}
    models = []
    for seed in options.seed_range():
        model, measures = trained_reward(seed)
        models.append(measures)
        dense = scaled_reward(model, measures)
        for placement, reward in (("dense", dense), ("terminal", TerminalSum(dense))):
            tokens[placement].append(tokens_needed(seed, reward, *settings[placement]))
    titles = {"rewarded token by token (ours)": tokens["dense"], "rewarded at the end": tokens["terminal"]}
    aucs = {name: [measures[name] for measures in models] for name in ("accuracy", "removed_auc", "written_auc")}
    lowest = min(aucs["removed_auc"] + aucs["written_auc"])
    return publish_tokens(
        options,
        TARGET,
        titles,
        {"rate_and_lambda": {placement: list(values) for placement, values in settings.items()}},
        console,
        {"reward_model": aucs},
        f"reward models: lowest token AUC on held-out edits {lowest:.3f}",
    )
