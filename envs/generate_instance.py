"""GenerateInstance: an input and an output for an instruction as a token MDP, as in REFINE-AF's second stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..llm_backends import resolve
from .tasks.instruction.instance_prompts import STOPS, instance_prompts
from .tokens.env import TokenEnv, TokenVectorEnv
from .tokens.episode import PromptExample
from .tokens.process import TokenSettings

MAX_TOKENS = 96
"""Of a response: an input and an output of two or three sentences each."""


def _arguments(
    data: str = "instructions",
    split: str | None = "train",
    limit: int | None = None,
    layout: str = "plain",
    data_seed: int = 0,
    examples: Sequence[PromptExample] | None = None,
    reward: Any = "quality",
    max_tokens: int = MAX_TOKENS,
    context_length: int = 1024,
    group_size: int = 1,
    on_invalid: str = "retry",
    tokenizer: Any = "embedded",
    **others: Any,
) -> dict[str, Any]:
    tokenizer = resolve("tokenizer", tokenizer)  # once, for the prompts and for the env
    if examples is None:
        examples = instance_prompts(data, split, limit, layout, data_seed, tokenizer)  # type: ignore[arg-type]
    return others | {
        "examples": examples,
        "tokenizer": tokenizer,
        "reward": reward,
        "settings": TokenSettings(
            max_tokens=max_tokens,
            stop=STOPS,
            on_invalid=on_invalid,
            context_length=context_length,
            group_size=group_size,
        ),
    }


def generate_instance(**kwargs: Any) -> TokenEnv:
    r"""``instructgym/GenerateInstance-v0``.

    The setting of REFINE-AF's second stage (Roy et al., arXiv 2505.06548): the state is an instruction behind a few
    solved ones, and the tokens written so far; the response is one instance of it, an input (or that none is needed)
    and its output; its quality is paid with the last token. A blank line, or the beginning of another instance, ends
    the episode. Classification tasks ask for the label before the input.

    Rewards find ``instruction``, ``order`` (``input_first`` or ``output_first``), ``opening`` (the field that the
    prompt ends with, which belongs before the response) and ``finish_reason`` in a sample's metadata;
    :func:`~instructgym.envs.tasks.instruction.instance_prompts.read_response` reads an instance from them.

    Args:
        **kwargs: as follows.

    Keyword Args:
        data: ``instructions`` (the package's own), or a file with ``instruction`` and perhaps ``is_classification``,
            such as the ``instructions.jsonl`` of ``refine-af bootstrap``; see
            :func:`~instructgym.envs.tasks.instruction.instance_prompts.instance_prompts`.
        split: ``train``, ``validation`` or ``test``: 80 / 10 / 10 % by a hash of the instruction; None for all.
        limit: instructions at most; None for all.
        layout: ``plain``: the response continues a few solved tasks, for any language model; ``chat``: a request in
            the tokenizer's chat template, for models tuned to follow one.
        data_seed: of limit.
        examples: ready-made ones in place of the above, with the metadata named above.
        reward: scores responses; the quality of the instance by default.
        max_tokens: of a response; one that is cut there is no instance.
        context_length: tokens of prompt and response at most.
        group_size: vector form: that many consecutive copies answer the same prompt.
        on_invalid: ``retry`` or ``raise``.
        tokenizer, observation, backend, embedder, render_mode: as of :class:`TokenEnv`.

    Raises:
        InputError: for data that cannot be used, an unknown layout, and prompts that do not fit.
    """
    return TokenEnv(**_arguments(**kwargs))


def generate_instance_vector(num_envs: int = 1, **kwargs: Any) -> TokenVectorEnv:
    """The vector form, for ``gymnasium.make_vec``: as :func:`generate_instance`, with ``autoreset_mode``."""
    return TokenVectorEnv(num_envs, **_arguments(**kwargs))
