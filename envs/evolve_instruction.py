"""Holds ``instructgym/EvolveInstruction-v0``: the edit MDP of TeaMs-RL, in a published and a corrected version.

An LLM rewrites a seed instruction step by step; the agent selects the operation. The env is a
:class:`~instructgym.envs.edit.env.TextEditEnv`; this file turns its arguments into instructions, operator and settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..llm_backends import resolve
from ..llm_backends.errors import check_known
from ..rewards.elimination import STRING_RULES, check_rules
from .edit.env import TextEditEnv, TextEditVectorEnv
from .edit.operators import LLMOperator
from .edit.process import EditSettings
from .tasks.instruction.seeds import Instruction, load_instructions

PUBLISHED_SEED = "How to cook food?"
"""The only instruction that the released code trains on."""

PRESETS: dict[str, dict[str, Any]] = {
    "published": {"seeds": (PUBLISHED_SEED,), "carry_text": True, "elimination": (), "max_words": 2048},
    "corrected": {"seeds": None, "carry_text": False, "elimination": tuple(STRING_RULES), "max_words": 200},
}
"""Arguments by preset. ``published`` (the released code): one seed instruction whose text is never reset, and no edit
is eliminated. ``corrected``: an episode starts from a seed instruction, and all four elimination rules are active."""


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
    check_known("preset", preset, PRESETS)
    # An argument that is not None overrides the preset.
    defaults = PRESETS[preset]
    rules = defaults["elimination"] if elimination is None else tuple(elimination)
    check_rules(rules)
    if operator is None:
        words = defaults["max_words"] if max_words is None else max_words
        operator = LLMOperator(operations, no_op, candidates, sampling, words)
    return others | {
        "instructions": load_instructions(defaults["seeds"] if seeds is None else seeds, split),
        "operator": resolve("operator", operator),
        "settings": EditSettings(
            horizon=horizon,
            carry_text=defaults["carry_text"] if carry_text is None else carry_text,
            elimination=rules,
            elimination_ends=elimination_ends,
            on_invalid=on_invalid,
        ),
    }


def evolve_instruction(**kwargs: Any) -> TextEditEnv:
    """Builds ``instructgym/EvolveInstruction-v0``, in which an LLM rewrites an instruction step by step.

    ## Action Space
    ``Discrete(6)`` by default: the operation that the rewriter applies to the instruction, in the order of
    ``operations``. ``info["action_mask"]`` marks the possible ones.

    ## Observation Space
    By default the one-hot of the last operation, ``Box(0, 1, (6,), float32)``; with ``observation`` also the embedding
    of the instruction, or its text.

    ## Rewards
    The reward's score of each edit, by default the judge's; 0 for an edit that an elimination rule rejects.

    ## Starting State
    A seed instruction, drawn in shuffled epochs; with ``carry_text`` the text that the last episode ended with.

    ## Episode End
    ``terminated`` is True after ``horizon`` edits, or when an edit breaks a rule of ``elimination``.

    See :class:`~instructgym.envs.edit.env.TextEditEnv` for the details.

    Args:
        **kwargs: the keyword arguments below.

    Keyword Args:
        preset: ``corrected`` or ``published``, see :data:`PRESETS`; the arguments below override it.
        seeds: seed instructions: a file, a list of texts, or None for the preset's.
        split: part of the seeds, fixed by a hash of the text: ``train``, ``validation`` or ``test``; None for all.
        horizon: largest number of edits of an episode, H.
        operations: names of the operations, in action order; None for the paper's six.
        no_op: whether to append an action that leaves the text alone and calls no LLM.
        candidates: number of rewrites sampled per edit; the most likely one is used.
        sampling: sampling parameters of the rewriter that replace the defaults.
        max_words: number of words beyond which only operations that need not lengthen a text are possible; None for
            the preset's.
        operator: an :class:`~instructgym.envs.edit.operators.Operator` to use instead of one made of ``operations``,
            ``no_op``, ``candidates``, ``sampling`` and ``max_words``.
        carry_text: whether an episode starts from the text that the last one ended with; None for the preset's.
        elimination: names of the string rules that eliminate an edit, which gets reward 0 and ends the episode; ``()``
            for none, None for the preset's.
        elimination_ends: False: the episode goes on after an eliminated edit, with the text as it was.
        on_invalid: what to do without a usable reply or a valid score: ``retry`` (once, then the running mean of the
            valid rewards) or ``raise``.
        backend, reward, judge_backend, observation, embedder, render_mode: see
            :class:`~instructgym.envs.edit.env.TextEditEnv`.

    Raises:
        ValueError: for an unknown preset, operation, rule, observation mode or part, and for counts below 1.
        SeedFileError: for a seed file that cannot be used.
    """
    return TextEditEnv(**_arguments(**kwargs))


def evolve_instruction_vector(num_envs: int = 1, **kwargs: Any) -> TextEditVectorEnv:
    """Builds the vector env for ``gymnasium.make_vec``.

    Args:
        num_envs: number of copies.
        **kwargs: the arguments of :func:`evolve_instruction`, and ``autoreset_mode`` of
            :class:`~instructgym.envs.edit.env.TextEditVectorEnv`.
    """
    return TextEditVectorEnv(num_envs, **_arguments(**kwargs))
