"""Holds ``instructgym/GenerateResponse-v0``: a free response to a prompt as a token MDP.

This is the setting of learning from fine-grained rewards. The env is a
:class:`~instructgym.envs.tokens.env.TokenEnv`; this file turns its arguments into prompts, reward and settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..llm_backends import resolve
from .tasks.responses.openings import response_prompts
from .tokens.env import TokenEnv, TokenVectorEnv
from .tokens.episode import PromptExample
from .tokens.process import take_settings

MAX_TOKENS = 48
"""Default length of a response, in tokens: two sentences of a review."""


def _arguments(
    data: str = "reviews",
    split: str = "train",
    limit: int | None = None,
    layout: str = "plain",
    data_seed: int = 0,
    examples: Sequence[PromptExample] | None = None,
    reward: Any = "vader",
    tokenizer: Any = "embedded",
    **others: Any,
) -> dict[str, Any]:
    settings = take_settings(others, fixed=("constrained",), max_tokens=MAX_TOKENS)
    # Resolved once, so that prompts and env share it.
    tokenizer = resolve("tokenizer", tokenizer)
    if examples is None:
        examples = response_prompts(data, split, limit, layout, data_seed, tokenizer)  # type: ignore[arg-type]
    return dict(others, examples=examples, tokenizer=tokenizer, reward=reward, settings=settings)


def generate_response(**kwargs: Any) -> TokenEnv:
    r"""Builds ``instructgym/GenerateResponse-v0``, in which a policy writes a free response, token by token.

    This is the setting of fine-grained supervision (Xu et al. 2024, arXiv 2406.02756).

    ## Action Space
    ``Discrete(vocabulary)``: the id of the next token.

    ## Observation Space
    Prompt and response so far, by default as padded token ids and their mask.

    ## Rewards
    A *causal* reward is given at every token when it is written, including the end-of-sequence token; a *terminal* or
    *whole* one at the last token.

    ## Starting State
    A prompt of the data, drawn in shuffled epochs.

    ## Episode End
    ``terminated`` is True after an end-of-sequence token, a stop string or ``max_tokens``.

    See :class:`~instructgym.envs.tokens.env.TokenEnv` for the details.

    Args:
        **kwargs: the keyword arguments below.

    Keyword Args:
        data: source of the prompts: ``reviews`` (openings of film reviews, works offline), ``instructions`` (the
            package's own), or a JSONL file with ``prompt`` or ``instruction``; see
            :func:`~instructgym.envs.tasks.responses.openings.response_prompts`.
        split: ``train``, ``validation`` or ``test``: 80 / 10 / 10 % by a hash of the text.
        limit: largest number of prompts; None for all.
        layout: ``plain``: the response continues the prompt; ``chat``: the prompt is a message in the tokenizer's chat
            template.
        data_seed: seed by which the prompts of ``limit`` and the lengths of the openings are drawn.
        examples: prompts to use instead of those that the arguments above select.
        reward: the reward that scores responses, of any timing; by default the sentiment of the text.
        max_tokens, stop, context_length, group_size, on_invalid: the fields of
            :class:`~instructgym.envs.tokens.process.TokenSettings`, with ``max_tokens=48`` and no stop string by
            default.
        tokenizer, observation, backend, embedder, render_mode: see :class:`~instructgym.envs.tokens.env.TokenEnv`.

    Raises:
        InputError: for data that cannot be used, an unknown layout, and prompts that do not fit.
    """
    return TokenEnv(**_arguments(**kwargs))


def generate_response_vector(num_envs: int = 1, **kwargs: Any) -> TokenVectorEnv:
    """Builds the vector env for ``gymnasium.make_vec``.

    Args:
        num_envs: number of copies.
        **kwargs: the arguments of :func:`generate_response`, and ``autoreset_mode`` of
            :class:`~instructgym.envs.tokens.env.TokenVectorEnv`.
    """
    return TokenVectorEnv(num_envs, **_arguments(**kwargs))
