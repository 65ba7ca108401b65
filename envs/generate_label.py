"""Holds ``instructgym/GenerateLabel-v0``: language understanding as a token MDP (RL4GLUE).

The response is the label of an input, written between judgement tags. The env is a
:class:`~instructgym.envs.tokens.env.TokenEnv`; this file turns its arguments into prompts, reward and settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .tasks.nlu.data import load_examples
from .tasks.nlu.tasks import STOPS, check_layout
from .tokens.env import TokenEnv, TokenVectorEnv
from .tokens.episode import PromptExample
from .tokens.process import take_settings

MAX_TOKENS = 12
"""Default length of a response, in tokens: an answer and the closing tag have at most nine with SmolLM2's tokenizer."""


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
    **others: Any,
) -> dict[str, Any]:
    # Also with ready-made examples the layout selects the stop string.
    check_layout(layout)
    settings = take_settings(others, fixed=("stop",), max_tokens=MAX_TOKENS, stop=(STOPS[layout],))
    if examples is None:
        examples = load_examples(task, split, data_dir, limit, shots, layout, data_seed)  # type: ignore[arg-type]
    reward = {"id": "ground-truth", "kwargs": {"preset": preset}} if reward is None else reward
    return dict(others, examples=examples, reward=reward, settings=settings)


def generate_label(**kwargs: Any) -> TokenEnv:
    """Builds ``instructgym/GenerateLabel-v0``, in which a policy writes the label of an input, token by token.

    ## Action Space
    ``Discrete(vocabulary)``: the id of the next token. With ``constrained``, ``info["action_mask"]`` marks the tokens
    that are allowed, and any other one ends the episode.

    ## Observation Space
    Prompt and answer so far, by default as padded token ids and their mask.

    ## Rewards
    At the last token the points of the answer by ``preset``: right, wrong or malformed; 0 before.

    ## Starting State
    The prompt of an example of the tasks, drawn in shuffled epochs.

    ## Episode End
    ``terminated`` is True after the closing tag (layout ``tagged``) or the line end (``plain``), an end-of-sequence
    token or ``max_tokens``; with ``constrained``, after a complete choice or a token that is not allowed.

    See :class:`~instructgym.envs.tokens.env.TokenEnv` for the details.

    Args:
        **kwargs: the keyword arguments below.

    Keyword Args:
        task: a GLUE or SuperGLUE task, ``rotten-tomatoes`` (works offline), or several, separated by commas.
        split: ``train``, ``validation`` (held out of train by hash) or ``test`` (the published dev set).
        data_dir: folder of GLUE's TSV or SuperGLUE's JSONL files; by default the ``datasets`` library downloads them.
        limit: number of rows per task; None for all.
        shots: number of solved examples before every prompt.
        layout: form of the answer. ``tagged``: in judgement tags, as in the paper; ``plain``: after a cue, up to the
            end of the line.
        data_seed: seed by which the rows of ``limit`` and the shots are drawn.
        examples: prompts to use instead of those that the arguments above select.
        preset: points for right, wrong and malformed answers: ``paper`` (1, 0, -1) or ``code`` (1, -1, -3).
        reward: a reward to use instead of the comparison with the right answer; ``preset`` is then ignored.
        max_tokens, context_length, constrained, group_size, on_invalid: the fields of
            :class:`~instructgym.envs.tokens.process.TokenSettings`, with ``max_tokens=12`` by default.
        tokenizer, observation, backend, embedder, render_mode: see :class:`~instructgym.envs.tokens.env.TokenEnv`.

    Raises:
        InputError: for unknown tasks, files that cannot be used, and prompts that do not fit.
    """
    return TokenEnv(**_arguments(**kwargs))


def generate_label_vector(num_envs: int = 1, **kwargs: Any) -> TokenVectorEnv:
    """Builds the vector env for ``gymnasium.make_vec``.

    Args:
        num_envs: number of copies.
        **kwargs: the arguments of :func:`generate_label`, and ``autoreset_mode`` of
            :class:`~instructgym.envs.tokens.env.TokenVectorEnv`.
    """
    return TokenVectorEnv(num_envs, **_arguments(**kwargs))
