"""Measures PPO of this library once and prints a line of JSON.

Usage: ``python -m instructgym.experiments.benchmarks.workers.ppo JSON``. The JSON is the ``spec`` of
:func:`~instructgym.experiments.benchmarks.token_ppo.run`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from ....agents.policy.language_model import LanguageModelPolicy
from ....agents.policy_gradient.ppo import TokenPPO
from ....envs.tokens.env import TokenVectorEnv
from ....envs.tokens.episode import PromptExample
from ....envs.tokens.process import TokenSettings
from ....llm_backends.local.loading import resolved_dtype
from ....llm_backends.training.adapters import LoraSettings
from ..tiny import EndlessTokenizer, endless_model, peak_mb, share_of_e


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains for one warm-up update, then for the measured updates, and returns the measurement."""
    torch.set_num_threads(spec["threads"])
    dtype = resolved_dtype("auto" if spec["dtype"] == "default" else spec["dtype"], "cpu")
    tokenizer = EndlessTokenizer(spec["model"])
    env = TokenVectorEnv(
        spec["batch"],
        [PromptExample(str(i), prompt) for i, prompt in enumerate(spec["prompts"])],
        tokenizer,
        share_of_e,
        TokenSettings(max_tokens=spec["response_tokens"]),
    )
    policy = LanguageModelPolicy(
        endless_model(spec["model"], tokenizer, dtype),
        LoraSettings(rank=spec["rank"], alpha=spec["alpha"], targets=spec["targets"]),
        dtype=dtype,
        device="cpu",
    )
    agent = TokenPPO(env, policy, epochs=spec["epochs"], learning_rate=1e-5, kl_coefficient=0.05)
    before = peak_mb()
    marks: list[tuple[float, float, int]] = []
    update_tokens = spec["batch"] * spec["response_tokens"]
    agent.learn(
        update_tokens * (spec["updates"] + 1),
        lambda agent: marks.append((time.process_time(), time.perf_counter(), agent.num_timesteps)),
    )
    # The first mark is the end of the warm-up update.
    (cpu, wall, tokens), (cpu_end, wall_end, tokens_end) = marks[0], marks[-1]
    env.close()
    return {
        "tokens": tokens_end - tokens,
        "cpu_seconds": cpu_end - cpu,
        "wall_seconds": wall_end - wall,
        "start_mb": before,
        "peak_mb": peak_mb(),
        "computes_in": dtype,
        "token_budget": agent.settings.token_budget,
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
