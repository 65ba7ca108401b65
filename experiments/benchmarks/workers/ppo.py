"""Measures PPO of this library once."""

from __future__ import annotations

from typing import Any

from ....agents.policy.language_model import LanguageModelPolicy
from ....agents.policy_gradient.ppo import TokenPPO
from ....agents.rollouts.agent import RolloutAgent
from ....envs.tokens.env import TokenVectorEnv
from ....envs.tokens.episode import PromptExample
from ....envs.tokens.process import TokenSettings
from ....llm_backends.training.adapters import LoraSettings
from ..tiny import EndlessTokenizer, endless_model, share_of_e
from .common import Meter


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains for one warm-up update, then for the measured updates, and returns the measurement."""
    tokenizer = EndlessTokenizer(spec["model"])
    env = TokenVectorEnv(
        spec["batch"],
        [PromptExample(str(i), prompt) for i, prompt in enumerate(spec["data"])],
        tokenizer,
        share_of_e,
        TokenSettings(max_tokens=spec["response_tokens"]),
    )
    lm = endless_model(spec["model"], tokenizer, spec["dtype"])
    policy = LanguageModelPolicy(lm, LoraSettings(**spec["lora"]), dtype=spec["dtype"], device="cpu")
    agent = TokenPPO(env, policy, epochs=spec["epochs"], learning_rate=1e-5, kl_coefficient=0.05)
    meter = Meter()

    def updated(agent: RolloutAgent) -> None:
        meter.tokens = agent.num_timesteps
        meter.mark()

    meter.start()
    agent.learn(spec["batch"] * spec["response_tokens"] * (spec["updates"] + 1), updated)
    env.close()
    return meter.measurement(spec["dtype"], token_budget=agent.settings.token_budget)
