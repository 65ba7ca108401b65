"""Holds ``instructgym/EditPrompt-v0``: the edit MDP of prompts for a frozen model (TEMPERA, GrIPS).

The process is in :mod:`~instructgym.envs.prompt_edit.process`, the actions are in
:mod:`~instructgym.envs.prompt_edit.operators`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..llm_backends import resolve
from ..llm_backends.errors import InputError, check_at_least
from ..rewards.elimination import check_rules
from ..rewards.prompt_scoring.rewards import TaskGain
from ..rewards.prompt_scoring.scorer import TaskScorer
from ..rewards.prompt_scoring.task_prompt import TaskPrompt
from .edit.env import TextEditEnv, TextEditVectorEnv
from .edit.process import EditObserver, EditSettings, make_edit_observer
from .process import check_on_invalid
from .prompt_edit.operators import PromptOperator, verbalizer_sets
from .prompt_edit.process import PromptData, PromptProcess
from .tasks.prompt_search.tasks import PromptTask, load_prompt_task


def _parts(
    copies: int,
    task: str | PromptTask = "rotten-tomatoes",
    data_dir: str = "",
    limit: int | None = None,
    data_seed: int = 0,
    instructions: Sequence[str] | None = None,
    verbalizers: Sequence[Sequence[str]] | None = None,
    operator: Any = "edits",
    backend: Any = "embedded",
    scorer: TaskScorer | Mapping[str, Any] | None = None,
    metric: str = "gap",
    failures: int = 4,
    batch_size: int = 16,
    pool_size: int = 64,
    max_demonstrations: int = 4,
    horizon: int = 6,
    elimination: Sequence[str] = (),
    on_invalid: str = "retry",
    observation: str = "last_edit",
    embedder: Any = "minilm",
) -> tuple[PromptProcess, EditObserver]:
    """Returns the process of ``copies`` copies and its observer; see :class:`EditPromptEnv` for the arguments."""
    # Settings and ids are checked before data are read.
    check_at_least(1, horizon=horizon)
    check_on_invalid(on_invalid)
    rules = tuple(elimination)
    check_rules(rules)
    prompt_operator: PromptOperator = resolve("prompt-operator", operator)
    rewriter = resolve("backend", backend)
    embeddings = resolve("embedder", embedder)
    observer = make_edit_observer(
        observation, len(prompt_operator.operations), horizon, embeddings, prompt_operator.mask_size
    )
    if not isinstance(task, PromptTask):
        task = load_prompt_task(task, "train", limit, data_seed, data_dir)
    if scorer is None or isinstance(scorer, Mapping):
        scorer = {"content_free": task.content_free, **(scorer or {})}
    reward = TaskGain(scorer, metric, failures)
    texts = task.instructions if instructions is None else instructions
    if isinstance(texts, str) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"instructions must be a list of non-empty texts, got {texts!r}")
    sets = verbalizer_sets(task) if verbalizers is None else _sets(verbalizers)
    first = sets[0]
    if len(first) != len(task.labels):
        raise InputError(f"a set of verbalizers needs one word per label {task.labels}, got {first}")
    # A named task is loaded with its training split alone, a live one may hold others, which prompts must fit too.
    data = PromptData(
        tuple(TaskPrompt(text.strip(), (), first, task.template, task.block) for text in texts),
        task.examples("train"),
        sets,
        batch_size,
        pool_size,
        max_demonstrations,
        held_out=task.validation + task.test,
    )
    settings = EditSettings(horizon, elimination=rules, elimination_ends=False, on_invalid=on_invalid)
    return PromptProcess(copies, data, prompt_operator, rewriter, reward, settings), observer


def _sets(verbalizers: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    if not verbalizers or any(isinstance(words, str) or not words for words in verbalizers):
        raise InputError(f"verbalizers must be a list of lists, each with a word per label, got {verbalizers!r}")
    return tuple(dict.fromkeys(tuple(words) for words in verbalizers))


class EditPromptEnv(TextEditEnv):
    """``instructgym/EditPrompt-v0``: an env whose episode edits a prompt for a frozen model, scored on a labelled task.

    ## Action Space
    That of the operator. ``edits``: ``Discrete(8)``: LLM edits of the instruction, edits of demonstrations and
    verbalizers, and a no-op. ``phrases``: ``MultiDiscrete([4, positions])``: an operation and the position of a phrase.
    ``free-text``: any string. See :mod:`~instructgym.envs.prompt_edit.operators`. ``action_masks()`` excludes the
    impossible edits and no others; an impossible edit changes nothing, calls no model and gets reward 0; the step still
    counts towards the horizon.

    ## Observation Space
    That of :class:`~instructgym.envs.edit.env.TextEditEnv`, where the text is the whole prompt. ``embedding`` also has
    the ``action_mask``, because the text does not show which phrases were deleted.

    ## Rewards
    Task score after the edit minus task score before it, on the episode's minibatch, so that the rewards of an episode
    sum to the gain over the start prompt. 0, without a call to the task model, for the no-op, for an edit that changed
    nothing, and for an edit that is undone: by a rule of ``elimination``, or because its prompt does not fit into the
    task model's context with the longest example of any loaded split (``info["eliminated_by"] == "context"``). If the
    rewriter or the task model fails, the running mean of the valid rewards is given, ``info["reward_valid"]`` is False
    and the prompt stays as it was.

    ## Starting State
    A manual instruction of the task, drawn in shuffled epochs, without demonstrations, with the first set of
    verbalizers; a minibatch and a pool of demonstrations, which share no input, drawn from the training split.
    ``options={"index": i}`` selects the instruction, ``{"prefix": text}`` sets another one, and
    ``{"prefix": TaskPrompt}`` a whole prompt, whose demonstrations are neither in the minibatch nor in the pool.
    ``reset(seed=)`` restarts everything.

    ## Episode End
    ``terminated`` is True after ``horizon`` edits; ``truncated`` is always False.

    ## Info
    In addition to that of TextEditEnv: ``prompt`` (a TaskPrompt), ``score`` and ``start_score`` on the minibatch,
    ``feedback`` (the prompt's wrong answers, as text) and ``task_calls`` (task-model calls of this reset or step: one
    per example and label, including cache hits).

    Args:
        task: name of a task (``rotten-tomatoes`` works offline), path of a TOML file, or a
            :class:`~instructgym.envs.tasks.prompt_search.tasks.PromptTask`, which is used as it is: ``data_dir``,
            ``limit`` and ``data_seed`` are then ignored.
        data_dir: folder of the files of a named task.
        limit: largest number of training examples, drawn by ``data_seed``; None for all.
        data_seed: seed of that draw.
        instructions: instructions that episodes start from; None for the task's manual ones.
        verbalizers: sets of verbalizers, each with one word per label; the first is that of the start prompts. None for
            the task's own set and the package's alternatives.
        operator: ``edits``, ``phrases``, ``free-text``, or a live
            :class:`~instructgym.envs.prompt_edit.operators.PromptOperator`.
        backend: the rewriter LLM; phrase edits and free text of the caller do not use it.
        scorer: a :class:`~instructgym.rewards.prompt_scoring.scorer.TaskScorer`, or its arguments, e.g.
            ``{"calibrate": True}``; ``content_free`` defaults to the task's content-free inputs.
        metric: the task score: ``gap`` or ``accuracy``.
        failures: largest number of wrong answers that ``feedback`` lists.
        batch_size: number of examples of a minibatch.
        pool_size: largest number of demonstrations in an episode's pool.
        max_demonstrations: largest number of demonstrations of a prompt.
        horizon: number of edits per episode.
        elimination: names of the string rules that undo an edit, see :mod:`~instructgym.rewards.elimination`.
        on_invalid: what to do without a usable reply or a valid score: ``retry`` (once, then the running mean of the
            valid rewards) or ``raise``.
        observation: ``last_edit``, ``embedding`` or ``text``.
        embedder: id or live embedder, which computes sentence embeddings for observations.
        render_mode: ``ansi``, to render the episode so far, or None.

    Raises:
        ValueError: for unknown names and counts out of range.
        InputError: for data that cannot be used, prompts and verbalizers that cannot be scored, and batch calibration
            of one example.
    """

    process: PromptProcess
    """The edit MDP of prompts, with one copy."""
    build = staticmethod(_parts)


class EditPromptVectorEnv(TextEditVectorEnv):
    """A vector env of n copies of :class:`EditPromptEnv`.

    A step makes one call to the rewriter and one to the task model for all copies together. Copy i seeded with s
    behaves as a single env seeded with s + i, except for the order of the start instructions, which the copies share.

    Args:
        num_envs: number of copies, n.
        autoreset_mode: ``NextStep`` (Gymnasium's default), ``SameStep`` or ``Disabled``.
        Others: see :class:`EditPromptEnv`.
    """

    process: PromptProcess
    """The edit MDP of prompts, with ``num_envs`` copies."""
    build = staticmethod(_parts)
