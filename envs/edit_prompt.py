"""EditPrompt: the edit MDP of prompts for a frozen model (TEMPERA, GrIPS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gymnasium.vector import AutoresetMode

from ..llm_backends import resolve
from ..llm_backends.errors import InputError
from ..rewards.elimination import check_rules
from ..rewards.prompt_scoring.rewards import TaskGain
from ..rewards.prompt_scoring.scorer import TaskScorer
from ..rewards.prompt_scoring.task_prompt import TaskPrompt
from .edit.env import TextEditEnv, TextEditVectorEnv
from .edit.process import EditObservation, EditSettings, make_observation
from .process import check_copies, check_on_invalid
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
) -> tuple[PromptProcess, EditObservation]:
    """The process and the observer of ``copies`` copies; see :class:`EditPromptEnv`."""
    if horizon < 1:
        raise InputError(f"horizon must be at least 1, got {horizon}")
    check_on_invalid(on_invalid)
    rules = tuple(elimination)
    check_rules(rules)
    chosen: PromptOperator = resolve("prompt-operator", operator)
    rewriter = resolve("backend", backend)
    shared = resolve("embedder", embedder)
    observer = make_observation(observation, len(chosen.operations), horizon, shared, chosen.mask_size)
    if not isinstance(task, PromptTask):
        task = load_prompt_task(task, "train", limit, data_seed, data_dir)
    if scorer is None or isinstance(scorer, Mapping):
        scorer = {"content_free": task.content_free, **(scorer or {})}
    reward = TaskGain(scorer, metric, failures)
    written = task.instructions if instructions is None else instructions
    if isinstance(written, str) or not all(isinstance(text, str) and text.strip() for text in written):
        raise InputError(f"instructions must be a list of non-empty texts, got {written!r}")
    sets = verbalizer_sets(task) if verbalizers is None else _sets(verbalizers)
    first = sets[0]
    if len(first) != len(task.labels):
        raise InputError(f"a set of verbalizers needs one word per label {task.labels}, got {first}")
    data = PromptData(
        tuple(TaskPrompt(text.strip(), (), first, task.template, task.block) for text in written),
        task.examples("train"),
        sets,
        batch_size,
        pool_size,
        max_demonstrations,
        held_out=task.validation + task.test,
    )
    settings = EditSettings(horizon, elimination=rules, elimination_ends=False, on_invalid=on_invalid)
    return PromptProcess(copies, data, chosen, rewriter, reward, settings), observer


def _sets(verbalizers: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    if not verbalizers or any(isinstance(words, str) or not words for words in verbalizers):
        raise InputError(f"verbalizers must be a list of lists, each with a word per label, got {verbalizers!r}")
    return tuple(dict.fromkeys(tuple(words) for words in verbalizers))


class EditPromptEnv(TextEditEnv):
    """``instructgym/EditPrompt-v0``: an episode edits a prompt for a frozen model and is paid by the labelled task.

    ## Action Space
    The operator's. ``edits``: ``Discrete(8)``, LLM edits of the instruction, edits of demonstrations and verbalizers,
    and a no-op. ``phrases``: ``MultiDiscrete([4, positions])``, an operation and a position. ``free-text``: any string.
    See :mod:`~instructgym.envs.prompt_edit.operators`. ``action_masks()`` marks impossible edits and nothing else; one
    taken anyway changes nothing, costs no call and is paid 0, but time goes by.

    ## Observation Space
    That of :class:`~instructgym.envs.edit.env.TextEditEnv`; the text is the whole prompt. ``embedding`` has the
    ``action_mask`` as well, because the text does not tell which phrases were deleted.

    ## Rewards
    Task score after the edit minus task score before it, on the episode's minibatch, so that rewards add up to the gain
    over the start prompt. 0 without a call of the task model for the no-op, for an edit that changed nothing, and for
    one that is undone: by a rule of ``elimination``, or because its prompt does not fit into the task model's context
    with the longest example of any loaded split (``info["eliminated_by"] == "context"``). Where rewriter or task model
    fail, the running mean of valid rewards is paid, ``info["reward_valid"]`` is False and the prompt stays what it was.

    ## Starting State
    A manual instruction of the task, drawn in shuffled epochs, without demonstrations, under the first set of
    verbalizers; a minibatch and a pool of demonstrations, which share no input, drawn from the training split.
    ``options={"index": i}`` chooses the instruction, ``{"prefix": text}`` gives another one, ``{"prefix": TaskPrompt}``
    a whole prompt, whose demonstrations are in neither. ``reset(seed=)`` restores everything.

    ## Episode End
    ``terminated`` after ``horizon`` edits.

    ## Info
    Beside that of TextEditEnv: ``prompt`` (a TaskPrompt), ``score`` and ``start_score`` on the minibatch, ``feedback``
    (the prompt's failures as text) and ``task_calls`` (of this reset or step: one per example and label, cache hits
    included).

    Args:
        task: a name (``rotten-tomatoes`` is offline), the path of a TOML file, or a
            :class:`~instructgym.envs.tasks.prompt_search.tasks.PromptTask`, which is taken as it is: ``data_dir``,
            ``limit`` and ``data_seed`` then do nothing.
        data_dir: folder of a named task's files.
        limit: training examples at most, drawn by ``data_seed``; None for all.
        data_seed: of that choice.
        instructions: texts to start from; None for the task's manual ones.
        verbalizers: sets of a word per label, the start's first; None for the task's and the packaged alternatives.
        operator: ``edits``, ``phrases``, ``free-text``, or a live
            :class:`~instructgym.envs.prompt_edit.operators.PromptOperator`.
        backend: the rewriter LLM; phrase edits and a caller's free text never ask it.
        scorer: a :class:`~instructgym.rewards.TaskScorer`, or its arguments, e.g. ``{"calibrate": True}``; the task's
            content-free inputs are among them unless others are given.
        metric: ``gap`` or ``accuracy``.
        failures: wrong answers that ``feedback`` tells at most.
        batch_size: examples of a minibatch.
        pool_size: demonstrations set aside per episode, at most.
        max_demonstrations: of a prompt, at most.
        horizon: edits per episode.
        elimination: string rules that undo an edit, see ``rewards.elimination``.
        on_invalid: ``retry`` or ``raise``.
        observation: ``last_edit``, ``embedding`` or ``text``.
        embedder: sentence embeddings for observations.
        render_mode: ``ansi`` or None.

    Raises:
        ValueError: for unknown names and counts out of range.
        InputError: for data that cannot be used, prompts and verbalizers that cannot be scored, and batch calibration
            of one example.
    """

    process: PromptProcess

    def __init__(self, render_mode: str | None = None, **kwargs: Any) -> None:
        self.process, self.observer = _parts(1, **kwargs)
        self.observation_space, self.action_space = self.observer.space, self.process.operator.action_space
        self.render_mode = render_mode


class EditPromptVectorEnv(TextEditVectorEnv):
    """n copies of :class:`EditPromptEnv` that share one batched call per role and step.

    Copy i seeded with s behaves as a single env seeded with s + i, but for the order of the start instructions, which
    the copies share.

    Args:
        num_envs: n.
        autoreset_mode: ``NextStep`` (Gymnasium's default), ``SameStep`` or ``Disabled``.
        Others: as of :class:`EditPromptEnv`.
    """

    process: PromptProcess

    def __init__(
        self,
        num_envs: int = 1,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        **kwargs: Any,
    ) -> None:
        check_copies(num_envs)
        self.process, self.observer = _parts(num_envs, **kwargs)
        self._setup(num_envs, self.process.operator.action_space, render_mode, autoreset_mode)
