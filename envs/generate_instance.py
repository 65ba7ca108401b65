"""Holds ``instructgym/GenerateInstance-v0``: an input and an output for an instruction as a token MDP.

This is the second stage of REFINE-AF. The env is a :class:`~instructgym.envs.tokens.env.TokenEnv`; this file turns its
arguments into prompts, reward and settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..llm_backends import resolve
from .tasks.instruction.instance_prompts import STOPS, instance_prompts
from .tokens.env import TokenEnv, TokenVectorEnv
from .tokens.episode import PromptExample
from .tokens.process import take_settings

MAX_TOKENS = 96
"""Default length of a response, in tokens: an input and an output of two or three sentences each."""


def _arguments(
    data: str = "instructions",
    split: str | None = "train",
    limit: int | None = None,
    layout: str = "plain",
    data_seed: int = 0,
    examples: Sequence[PromptExample] | None = None,
    reward: Any = "quality",
    tokenizer: Any = "embedded",
    **others: Any,
) -> dict[str, Any]:
    settings = take_settings(others, fixed=("stop", "constrained"), max_tokens=MAX_TOKENS, stop=STOPS)
    # Resolved once, so that prompts and env share it.
    tokenizer = resolve("tokenizer", tokenizer)
    if examples is None:
        examples = instance_prompts(data, split, limit, layout, data_seed, tokenizer)  # type: ignore[arg-type]
    return dict(others, examples=examples, tokenizer=tokenizer, reward=reward, settings=settings)


def generate_instance(**kwargs: Any) -> TokenEnv:
    r"""Builds ``instructgym/GenerateInstance-v0``, in which a policy writes an instance of an instruction.

    This is the setting of REFINE-AF's second stage (Roy et al., arXiv 2505.06548). An instance is an input (or the
    statement that none is needed) and its output; the prompt of a classification task asks for the label before the
    input.

    ## Action Space
    ``Discrete(vocabulary)``: the id of the next token.

    ## Observation Space
    Prompt and response so far, by default as padded token ids and their mask.

    ## Rewards
    By default the quality of the instance, given at the last token; 0 before. The metadata of a reward's sample has
    ``instruction``, ``order`` (``input_first`` or ``output_first``), ``opening`` (the field that the prompt ends with,
    which belongs before the response) and ``finish_reason``;
    :func:`~instructgym.envs.tasks.instruction.instance_prompts.read_response` reads an instance from them.

    ## Starting State
    A prompt of an instruction after a few solved ones (layout ``plain``) or in a chat template (``chat``), drawn in
    shuffled epochs.

    ## Episode End
    ``terminated`` is True after a blank line, the beginning of another instance, an end-of-sequence token or
    ``max_tokens``.

    See :class:`~instructgym.envs.tokens.env.TokenEnv` for the details.

    Args:
        **kwargs: the keyword arguments below.

    Keyword Args:
        data: source of the instructions: ``instructions`` (the package's own), or a file with ``instruction`` and
            optionally ``is_classification``, such as the ``instructions.jsonl`` of ``refine-af bootstrap``; see
            :func:`~instructgym.envs.tasks.instruction.instance_prompts.instance_prompts`.
        split: ``train``, ``validation`` or ``test``: 80 / 10 / 10 % by a hash of the instruction; None for all.
        limit: largest number of instructions; None for all.
        layout: ``plain``: the response continues a few solved tasks, for any language model; ``chat``: a request in
            the tokenizer's chat template, for models tuned to follow one.
        data_seed: seed by which the instructions of ``limit`` are drawn.
        examples: prompts, with the metadata named above, to use instead of those that the arguments above select.
        reward: the reward that scores responses; by default the quality of the instance.
        max_tokens, context_length, group_size, on_invalid: the fields of
            :class:`~instructgym.envs.tokens.process.TokenSettings`, with ``max_tokens=96`` by default; a response that
            is cut there is no instance.
        tokenizer, observation, backend, embedder, render_mode: see :class:`~instructgym.envs.tokens.env.TokenEnv`.

    Raises:
        InputError: for data that cannot be used, an unknown layout, and prompts that do not fit.
    """
    return TokenEnv(**_arguments(**kwargs))


def generate_instance_vector(num_envs: int = 1, **kwargs: Any) -> TokenVectorEnv:
    """Builds the vector env for ``gymnasium.make_vec``.

    Args:
        num_envs: number of copies.
        **kwargs: the arguments of :func:`generate_instance`, and ``autoreset_mode`` of
            :class:`~instructgym.envs.tokens.env.TokenVectorEnv`.
    """
    return TokenVectorEnv(num_envs, **_arguments(**kwargs))
