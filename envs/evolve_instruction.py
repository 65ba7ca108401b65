"""EvolveInstruction: the edit MDP of TeaMs-RL, as published and corrected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..llm_backends import resolve
from ..rewards.elimination import STRING_RULES, check_rules
from .edit.env import TextEditEnv, TextEditVectorEnv
from .edit.operators import LLMOperator
from .edit.process import EditSettings
from .tasks.instruction.seeds import Instruction, load_instructions

PUBLISHED_SEED = "How to cook food?"
"""The one instruction that the released code trains on."""

PRESETS: dict[str, dict[str, Any]] = {
    "published": {"seeds": (PUBLISHED_SEED,), "carry_text": True, "elimination": (), "max_words": 2048},
    "corrected": {"seeds": None, "carry_text": False, "elimination": tuple(STRING_RULES), "max_words": 200},
}
"""``published``: one seed whose text is never reset, nothing eliminated (the released code). ``corrected``: a seed
per episode, the text reset, all four elimination rules active."""


def _arguments(
    preset: str = "corrected",
    seeds: str | Path | Sequence[str | Instruction] | None = None,
    split: str | None = None,
    horizon: int = 6,
    operator: Any = None,
    operations: Sequence[str] | None = None,
    no_op: bool = False,
    candidates: int = 1,
    sampling: Mapping[str, Any] | None = None,
    max_words: int | None = None,
    carry_text: bool | None = None,
    elimination: Sequence[str] | None = None,
    elimination_ends: bool = True,
    on_invalid: str = "retry",
    **others: Any,
) -> dict[str, Any]:
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: use {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    rules = chosen["elimination"] if elimination is None else tuple(elimination)
    check_rules(rules)
    if operator is None:
        words = chosen["max_words"] if max_words is None else max_words
        operator = LLMOperator(operations, no_op, candidates, sampling, words)
    return others | {
        "instructions": load_instructions(chosen["seeds"] if seeds is None else seeds, split),
        "operator": resolve("operator", operator),
        "settings": EditSettings(
            horizon=horizon,
            carry_text=chosen["carry_text"] if carry_text is None else carry_text,
            elimination=rules,
            elimination_ends=elimination_ends,
            on_invalid=on_invalid,
        ),
    }


def evolve_instruction(**kwargs: Any) -> TextEditEnv:
    """``instructgym/EvolveInstruction-v0``.

    Args:
        **kwargs: as follows.

    Keyword Args:
        preset: ``corrected`` or ``published``; the arguments below override it.
        seeds: a file, a list of texts, or None for the preset's.
        split: ``train``, ``validation``, ``test`` (fixed by hash), or None for all seeds.
        horizon: edits per episode, H.
        operations: names, in action order; None for the paper's six.
        no_op: a seventh action that does nothing and costs nothing.
        candidates: rewrites per edit, of which the most likely is taken.
        sampling: sampling parameters of the rewriter that replace the defaults.
        max_words: longer texts admit only operations that need not lengthen them.
        operator: an :class:`~instructgym.envs.edit.operators.Operator` in place of the four above.
        carry_text: start from the text the last episode ended with.
        elimination: string rules that end an episode; ``()`` for none.
        elimination_ends: False lets an episode go on after an eliminated edit, with the text as it was.
        on_invalid: ``retry`` or ``raise``.
        backend, reward, judge_backend, observation, embedder, render_mode: as of :class:`TextEditEnv`.

    Raises:
        ValueError: for an unknown preset, operation, rule, observation mode or part, and for counts below 1.
        SeedFileError: for a seed file that cannot be used.
    """
    return TextEditEnv(**_arguments(**kwargs))


def evolve_instruction_vector(num_envs: int = 1, **kwargs: Any) -> TextEditVectorEnv:
    """The vector form, for ``gymnasium.make_vec``: as :func:`evolve_instruction`, with ``autoreset_mode``."""
    return TextEditVectorEnv(num_envs, **_arguments(**kwargs))
