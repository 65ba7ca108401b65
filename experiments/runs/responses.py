"""What a policy writes when it is asked: one response per example, through the environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from ...agents.policy.language_model import LanguageModelPolicy
from ...envs.tokens.episode import PromptExample
from ...llm_backends import Sampling, request_seed

COPIES = 64


@dataclass(frozen=True)
class Response:
    """One finished episode."""

    text: str
    """Without what ended it."""
    finish_reason: str
    """``choice``, ``eos``, ``stop`` or ``length``."""
    prompt_ids: np.ndarray
    """int32: the tokens it continues."""
    token_ids: np.ndarray
    """int32: its tokens, what ended it included."""
    reward: float
    """The env's, summed over its tokens."""
    valid: bool
    """False where there was no verdict and the reward is imputed."""


def respond(
    policy: LanguageModelPolicy,
    env_id: str,
    examples: Sequence[PromptExample],
    temperature: float,
    seed: int = 0,
    **env_options: Any,
) -> list[Response]:
    """The policy's response to every example, in order.

    Args:
        policy: who writes.
        env_id: a token environment that takes ``examples`` and ``tokenizer``.
        examples: what it is asked.
        temperature: 0 for greedy decoding.
        seed: of sampled responses; a response depends on it and the example's place alone.
        env_options: arguments of the env, as in training.
    """
    copies = min(COPIES, len(examples))
    env: Any = gym.make_vec(
        env_id, num_envs=copies, examples=list(examples), tokenizer=policy.tokenizer, **env_options
    ).unwrapped
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))  # like lengths: little padding
    responses: dict[int, Response] = {}
    generation = env.generation
    for start in range(0, len(order), copies):
        chunk = order[start : start + copies]
        mask = np.arange(copies) < len(chunk)
        index = np.array([chunk[min(i, len(chunk) - 1)] for i in range(copies)])
        env.reset(seed=request_seed(seed, "env") if not start else None, options={"index": index})
        prompts, constraints = env.prompts(), env.constraints()
        samplings = [
            Sampling(
                max_tokens=generation.max_tokens,
                temperature=temperature,
                stop=generation.stop,
                seed=request_seed(seed, "evaluate", i),
            )
            for i in chunk
        ]
        completions = policy.generate(prompts[: len(chunk)], samplings, constraints[: len(chunk)], generation.eos_ids)
        written = [np.array(c[0].token_ids, np.int32) for c in completions]
        played = env.play([*written, *[[]] * (copies - len(chunk))], mask)
        for k, i in enumerate(chunk):
            info, count = played.infos[k], int(played.n_consumed[k])
            responses[i] = Response(
                text=info["text"],
                finish_reason=info["finish_reason"],
                prompt_ids=np.asarray(prompts[k], np.int32),
                token_ids=written[k][:count],
                reward=float(played.rewards[k].sum()),
                valid=bool(played.valid[k]),
            )
    env.close()
    return [responses[i] for i in range(len(examples))]
