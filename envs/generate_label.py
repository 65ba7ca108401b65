"""GenerateLabel: language understanding as a token MDP (RL4GLUE), the answer written between judgement tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .tasks.nlu.data import load_examples
from .tasks.nlu.tasks import STOPS, check_layout
from .tokens.env import TokenEnv, TokenVectorEnv
from .tokens.episode import PromptExample
from .tokens.process import TokenSettings

MAX_TOKENS = 12
"""Of a response: an answer and the closing tag take at most nine with SmolLM2's tokenizer."""


def _arguments(
    task: str | Sequence[str] = "rotten-tomatoes",
    split: str = "train",
    data_dir: str = "",
    limit: int | None = None,
    shots: int = 0,
    layout: str = "tagged",
    data_seed: int = 0,
    examples: Sequence[PromptExample] | None = None,
    preset: str = "paper",
    reward: Any = None,
    constrained: bool = False,
    max_tokens: int = MAX_TOKENS,
    context_length: int = 1024,
    group_size: int = 1,
    on_invalid: str = "retry",
    **others: Any,
) -> dict[str, Any]:
    check_layout(layout)
    if examples is None:
        examples = load_examples(task, split, data_dir, limit, shots, layout, data_seed)  # type: ignore[arg-type]
    return others | {
        "examples": examples,
        "reward": {"id": "ground-truth", "kwargs": {"preset": preset}} if reward is None else reward,
        "settings": TokenSettings(
            max_tokens=max_tokens,
            stop=(STOPS[layout],),
            constrained=constrained,
            on_invalid=on_invalid,
            context_length=context_length,
            group_size=group_size,
        ),
    }


def generate_label(**kwargs: Any) -> TokenEnv:
    """``instructgym/GenerateLabel-v0``.

    Args:
        **kwargs: as follows.

    Keyword Args:
        task: a GLUE or SuperGLUE task, ``rotten-tomatoes`` (offline), or several, separated by commas.
        split: ``train``, ``validation`` (held out of train by hash) or ``test`` (the published dev set).
        data_dir: folder of GLUE's TSV or SuperGLUE's JSONL files; by default the ``datasets`` library fetches them.
        limit: rows per task; None for all.
        shots: solved examples before every prompt.
        layout: ``tagged``: the answer stands in judgement tags (the paper's); ``plain``: behind a cue, to the end of
            the line.
        data_seed: of limit and shots.
        examples: ready-made ones in place of the above.
        preset: points for right, wrong and malformed answers: ``paper`` (1, 0, -1) or ``code`` (1, -1, -3).
        reward: another reward in place of the right answer.
        constrained: only the allowed answers can be written (verbalizer-constrained decoding); False, as published,
            lets the model write anything.
        max_tokens: of a response.
        context_length: tokens of prompt and response at most.
        group_size: vector form: that many consecutive copies answer the same prompt.
        on_invalid: ``retry`` or ``raise``.
        tokenizer, observation, backend, embedder, render_mode: as of :class:`TokenEnv`.

    Raises:
        InputError: for unknown tasks, files that cannot be used, and prompts that do not fit.
    """
    return TokenEnv(**_arguments(**kwargs))


def generate_label_vector(num_envs: int = 1, **kwargs: Any) -> TokenVectorEnv:
    """The vector form, for ``gymnasium.make_vec``: as :func:`generate_label`, with ``autoreset_mode``."""
    return TokenVectorEnv(num_envs, **_arguments(**kwargs))
