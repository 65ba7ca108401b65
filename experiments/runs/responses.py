"""Evaluation rollouts of a policy: one response per example, generated and scored through the environment.

:func:`check_prompts` checks the examples before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from ...agents.policy.language_model import LanguageModelPolicy
from ...envs.tokens.episode import PromptExample
from ...llm_backends import Sampling, Tokenizer, request_seed

COPIES = 64
"""Largest number of sub-environments, and so of responses that are generated at once."""


@dataclass(frozen=True)
class Response:
    """A response to one example: a finished episode."""

    text: str
    """The text, without the end-of-sequence token or stop string that ended it."""
    finish_reason: str
    """The reason why it ended: ``choice``, ``eos``, ``stop`` or ``length``."""
    prompt_ids: np.ndarray
    """Token ids of the prompt, int32."""
    token_ids: np.ndarray
    """Token ids of the response, int32, including those that ended it."""
    reward: float
    """The env's reward, summed over the tokens."""
    valid: bool
    """False if the env got no valid score and imputed the reward."""


def check_prompts(env_id: str, examples: Sequence[PromptExample], tokenizer: Tokenizer, **env_options: Any) -> None:
    """Checks that every prompt leaves room for a response within the context length of an environment.

    Args:
        env_id: id of a token environment that takes ``examples`` and ``tokenizer``.
        examples: the prompts.
        tokenizer: tokenizer of the policy's model.
        **env_options: further arguments of the environment.

    Raises:
        InputError: if a prompt does not; the message names it.
    """
    # The environment checks the lengths when it is built.
    gym.make_vec(env_id, num_envs=1, examples=list(examples), tokenizer=tokenizer, **env_options).close()


def respond(
    policy: LanguageModelPolicy,
    env_id: str,
    examples: Sequence[PromptExample],
    temperature: float,
    seed: int = 0,
    **env_options: Any,
) -> list[Response]:
    """Returns the policy's response to every example, in order.

    Args:
        policy: the policy.
        env_id: id of a token environment that takes ``examples`` and ``tokenizer``.
        examples: the examples to respond to.
        temperature: sampling temperature; 0: greedy decoding.
        seed: seed of sampled responses; a response depends only on the seed and the example's index.
        **env_options: further arguments of the env, as in training.
    """
    copies = min(COPIES, len(examples))
    env: Any = gym.make_vec(
        env_id, num_envs=copies, examples=list(examples), tokenizer=policy.tokenizer, **env_options
    ).unwrapped
    # Batches of prompts of similar length need little padding.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    responses: dict[int, Response] = {}
    generation = env.generation
    sampling = Sampling(generation.max_tokens, temperature, stop=generation.stop)
    for start in range(0, len(order), copies):
        chunk = order[start : start + copies]
        mask = np.arange(copies) < len(chunk)
        # The last chunk may be smaller than the env: its last example fills the other copies, which stay idle.
        index = np.array([chunk[min(i, len(chunk) - 1)] for i in range(copies)])
        env.reset(seed=request_seed(seed, "env") if not start else None, options={"index": index})
        prompts, constraints = env.prompts(), env.constraints()
        samplings = [sampling.with_seed(request_seed(seed, "evaluate", i)) for i in chunk]
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
