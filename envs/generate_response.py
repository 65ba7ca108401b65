"""GenerateResponse: a free response to a prompt as a token MDP, the setting of learning from fine-grained rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..llm_backends import resolve
from .tasks.responses.openings import response_prompts
from .tokens.env import TokenEnv, TokenVectorEnv
from .tokens.episode import PromptExample
from .tokens.process import TokenSettings

MAX_TOKENS = 48
"""Of a response: two sentences of a review."""


def _arguments(
    data: str = "reviews",
    split: str = "train",
    limit: int | None = None,
    layout: str = "plain",
    data_seed: int = 0,
    examples: Sequence[PromptExample] | None = None,
    reward: Any = "vader",
    max_tokens: int = MAX_TOKENS,
    stop: Sequence[str] = (),
    context_length: int = 1024,
    group_size: int = 1,
    on_invalid: str = "retry",
    tokenizer: Any = "embedded",
    **others: Any,
) -> dict[str, Any]:
    tokenizer = resolve("tokenizer", tokenizer)  # once, for the prompts and for the env
    if examples is None:
        examples = response_prompts(data, split, limit, layout, data_seed, tokenizer)  # type: ignore[arg-type]
    return others | {
        "examples": examples,
        "tokenizer": tokenizer,
        "reward": reward,
        "settings": TokenSettings(
            max_tokens=max_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            on_invalid=on_invalid,
            context_length=context_length,
            group_size=group_size,
        ),
    }


def generate_response(**kwargs: Any) -> TokenEnv:
    r"""``instructgym/GenerateResponse-v0``.

    The setting of fine-grained supervision (Xu et al. 2024, arXiv 2406.02756): the state is a prompt and the tokens
    written so far, an action is a token. A *causal* reward pays every token when it is written, the end-of-sequence
    token included; a *terminal* one pays the last token.

    Args:
        **kwargs: as follows.

    Keyword Args:
        data: ``reviews`` (openings of film reviews, offline), ``instructions`` (the package's own), or a JSONL file
            with ``prompt`` or ``instruction``; see :func:`~instructgym.envs.tasks.responses.openings.response_prompts`.
        split: ``train``, ``validation`` or ``test``: 80 / 10 / 10 % by a hash of the text.
        limit: prompts at most; None for all.
        layout: ``plain``: the response continues the prompt; ``chat``: the tokenizer's chat template around it.
        data_seed: of limit and openings.
        examples: ready-made ones in place of the above.
        reward: scores responses, with any timing; the sentiment of the text by default.
        max_tokens: of a response.
        stop: texts that end a response, of which they are no part; a line end, for instance.
        context_length: tokens of prompt and response at most.
        group_size: vector form: that many consecutive copies answer the same prompt.
        on_invalid: ``retry`` or ``raise``.
        tokenizer, observation, backend, embedder, render_mode: as of :class:`TokenEnv`.

    Raises:
        InputError: for data that cannot be used, an unknown layout, and prompts that do not fit.
    """
    return TokenEnv(**_arguments(**kwargs))


def generate_response_vector(num_envs: int = 1, **kwargs: Any) -> TokenVectorEnv:
    """The vector form, for ``gymnasium.make_vec``: as :func:`generate_response`, with ``autoreset_mode``."""
    return TokenVectorEnv(num_envs, **_arguments(**kwargs))
