"""The ranking agent: that a rule is learned from ranks, one core with offline training, resuming, what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import KVWriter, Logger

import instructgym  # noqa: F401  (registers the envs)
from instructgym.agents.language_model import LanguageModelPolicy, LoraSettings
from instructgym.agents.on_policy import TrainingDivergedError
from instructgym.agents.ranking import RankedCandidates, RankingTrainer
from instructgym.agents.ranking_agent import RankingAgent
from instructgym.envs.tasks.prompt_examples import PromptExample
from instructgym.llm_backends.causal_lm import CausalLM
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.tokenization import WordTokenizer
from instructgym.rewards import RankReward, Reward, Score
from tests.conftest import build_model

TOKENIZER = WordTokenizer(words=("red", "blue", "sea", "sky", "end"), positions=64)
RED, BLUE, SEA, SKY, END, EOS, UNK = range(7)
PROMPTS = ("red sea", "sky", "sea sky end sea", "end sky red")
EXAMPLES = [PromptExample(prompt, prompt, "blue sky blue") for prompt in PROMPTS]


def share(samples):
    """Of "red" among the tokens of a response."""
    return [float(np.mean(sample.token_ids == RED)) for sample in samples]


def make_env(n=16, group_size=4, reward=share, examples=EXAMPLES, max_tokens=6, **options):
    return gymnasium.make_vec(
        "instructgym/GenerateResponse-v0",
        n,
        examples=examples,
        tokenizer=TOKENIZER,
        reward=reward,
        max_tokens=max_tokens,
        context_length=32,
        group_size=group_size,
        **options,
    )


def make_policy(rank=4, dropout=0.0, seed=0, **options):
    lm = CausalLM(build_model(vocabulary=TOKENIZER.vocabulary, context=64), TOKENIZER.hf, name="tiny")
    return LanguageModelPolicy(
        lm, LoraSettings(rank=rank, dropout=dropout), value="none", dtype="float32", seed=seed, **options
    )


class Rows(KVWriter):
    """Keeps what is logged, times aside."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append({k: float(key_values[k]) for k in sorted(key_values) if not k.startswith("time/")})

    def close(self):
        pass


def logged(agent):
    agent.set_logger(Logger(folder=None, output_formats=[writer := Rows()]))
    return agent, writer.rows


def weights(policy):
    return {name: parameter.detach().clone() for name, parameter in policy.parameters().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def updates(agent, count):
    return agent.learn(10**9, lambda agent: agent.updates < count)


# --- what is learned -----------------------------------------------------------------------------------------------


def by_red(prompt, candidates):
    return [candidate.split().count("red") / max(len(candidate.split()), 1) for candidate in candidates]


CASES = {
    "tuna": {"imitate": "best"},
    "dpo": {},
    "lipo_lambda": {},
    "sppo": {"beta": 0.02, "refresh_reference": 1},
    "ipo": {},
}


@pytest.mark.parametrize("loss", CASES)
def test_the_share_of_a_word_rises(loss):
    agent, rows = logged(RankingAgent(make_env(32), make_policy(), loss=loss, learning_rate=1e-2, **CASES[loss]))
    updates(agent, 20)
    rewards = [row["rollout/reward"] for row in rows]
    print(loss, rewards)
    assert np.mean(rewards[:2]) < 0.3 and np.mean(rewards[-3:]) > 0.7
