"""Token-level PPO on GenerateInstance: the format is learned, the quality rises, the KL penalty starts at zero."""

import gymnasium as gym
import numpy as np
from tiny_models import build_model

import instructgym  # noqa: F401
from instructgym.agents.policy.language_model import LanguageModelPolicy
from instructgym.agents.policy_gradient.ppo import TokenPPO
from instructgym.envs.tokens.episode import PromptExample
from instructgym.llm_backends.local.causal_lm import CausalLM
from instructgym.llm_backends.local.tokenization import WordTokenizer
from instructgym.llm_backends.training.adapters import LoraSettings
from instructgym.rewards import LinearReward

WORDS = ("red", "blue", "Input:", "Output:", "sea", "sky")
UPDATES = 60
EXAMPLES = [
    PromptExample(place, place, metadata={"instruction": place, "order": "output_first", "opening": "Class label: "})
    for place in ("sea", "sky")
]


def right(samples):
    """The share of words that are blue."""
    return [float(np.mean([word == "blue" for word in sample.response.split()])) for sample in samples]


def test_ppo_learns_the_format_and_what_is_paid():
    tokenizer = WordTokenizer(words=WORDS)
    model = build_model(vocabulary=len(tokenizer.hf))
    model.generation_config.eos_token_id = tokenizer.hf.eos_token_id
    model.lm_head.weight.data *= 0.5  # flat enough to explore: from a peaked start the seed and rounding decide
    policy = LanguageModelPolicy(
        CausalLM(model, tokenizer.hf, name="tiny"), LoraSettings(rank=4), value="shared", dtype="float32"
    )
    reward = LinearReward("instruction_mining", {"rew": right, "und": right, "nat": right, "coh": right}, {"und": 0.0})
    envs = gym.make_vec(
        "instructgym/GenerateInstance-v0",
        num_envs=64,
        examples=EXAMPLES,
        tokenizer=tokenizer,
        reward=reward,
        max_tokens=4,
    )
    agent = TokenPPO(envs, policy, seed=0, learning_rate=3e-3, kl_coefficient=0.001, epochs=2)
    agent.start()
    rows = []
    for update in range(UPDATES):
        agent.update(update / UPDATES)
        rows.append(dict(agent.logger.name_to_value))
    first, last = rows[:3], rows[-3:]

    def mean(part, key):
        return float(np.mean([row[key] for row in part]))

    assert abs(rows[0]["train/kl"]) < 1e-6
    assert mean(first, "rollout/terms/well_formed") < 0.3
    assert mean(last, "rollout/terms/well_formed") > 0.7
    assert mean(last, "rollout/terms/coh") > mean(first, "rollout/terms/coh") + 0.2
    assert mean(last, "rollout/reward") > mean(first, "rollout/reward") + 0.6
    assert mean(last, "train/kl") > 1
