"""Holds TextEditEnv and TextEditVectorEnv, the edit MDP as a Gymnasium environment and vector environment.

The MDP itself is in :mod:`~instructgym.envs.edit.process`, the meaning of an action in
:mod:`~instructgym.envs.edit.operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from gymnasium.vector import AutoresetMode

from ...llm_backends import Backend, resolve
from ...llm_backends.errors import check_at_least
from ...rewards import Reward
from ..process import ProcessEnv, ProcessVectorEnv, check_copies, check_on_invalid
from ..tasks.instruction.seeds import Instruction
from .operators import Operator
from .process import EditObserver, EditProcess, EditSettings, make_edit_observer

DEFAULT_SETTINGS = EditSettings()


def edit_parts(
    copies: int,
    instructions: Sequence[Instruction],
    operator: Operator,
    backend: Any = "embedded",
    reward: Any = "judge",
    judge_backend: Any = None,
    observation: str = "last_edit",
    embedder: Any = "minilm",
    settings: EditSettings = DEFAULT_SETTINGS,
) -> tuple[EditProcess, EditObserver]:
    """Builds process and observer from the arguments of :class:`TextEditEnv`."""
    check_at_least(1, horizon=settings.horizon)
    check_on_invalid(settings.on_invalid)
    rewriter: Backend = resolve("backend", backend)
    # The rewriter also judges unless another model is given, as in the paper.
    judge = backend if judge_backend is None else judge_backend
    # Reward and observation share one embedder and its cache: a text that one embedded the other need not.
    shared_embedder = resolve("embedder", embedder)
    scorer: Reward = resolve("reward", reward, backend=judge, embedder=shared_embedder)
    observer = make_edit_observer(observation, len(operator.operations), settings.horizon, shared_embedder)
    return EditProcess(copies, instructions, operator, rewriter, scorer, settings), observer


class _EditParts:
    """A base of the single and the vector env."""

    process: EditProcess
    observer: EditObserver
    build: ClassVar[Callable[..., tuple[EditProcess, EditObserver]]] = staticmethod(edit_parts)
    """Builds process and observer from the number of copies and the env's arguments."""

    @property
    def backend(self) -> Backend:
        """The rewriter LLM, with its usage counters."""
        return self.process.backend

    @property
    def reward(self) -> Reward:
        """The reward that scores edits."""
        return self.process.reward

    @property
    def operations(self) -> tuple[str, ...]:
        """Names of the operations, in the order of their indices."""
        return self.process.operator.operations


class TextEditEnv(_EditParts, ProcessEnv[EditProcess, EditObserver]):
    """A Gymnasium env whose episode edits one text, step by step, with a reward for every edit.

    ## Action Space
    That of the operator, for an LLMOperator ``Discrete(n)``: one operation per action. ``info["action_mask"]`` (int8)
    and ``action_masks()`` mark the possible actions; any other gets reward 0 and changes nothing, and the step still
    counts towards the horizon.

    ## Observation Space
    ``last_edit``: ``Box(0, 1, (n,), float32)``, one-hot of the last operation, zeros at the start. ``embedding``: a
    Dict of ``last_edit``, ``progress`` (float32, shape (1,), step / horizon) and ``embedding`` (float32, shape (d,),
    the text's sentence embedding; d is 384 for the default embedder). ``text``: the text itself (any string).

    ## Rewards
    The score that the reward gives to the pair of the text before and the text after the edit. 0, without a call to
    the reward, for a masked action, the no-op and an eliminated edit. If the judge or the rewriter returns nothing
    usable, the running mean of the valid rewards is given and ``info["reward_valid"]`` is False.

    ## Starting State
    A seed instruction, drawn in shuffled epochs. ``options={"index": i}`` selects one, ``{"prefix": text}`` starts from
    any text. ``reset(seed=)`` restarts everything, including the data order and the diversity pool.

    ## Episode End
    ``terminated`` is True after ``horizon`` edits or when an edit breaks an elimination rule; ``info["finish_reason"]``
    is ``horizon`` or the name of the rule. ``truncated`` is always False.

    Args:
        instructions: the texts that episodes start from.
        operator: defines the actions and how they edit a text.
        backend: id or live backend: the rewriter LLM.
        reward: id, ``"module:factory"``, Reward or function of the samples that scores edits.
        judge_backend: the LLM of a reward that needs one and names none; None for the rewriter, as in the paper.
        observation: ``last_edit``, ``embedding`` or ``text``.
        embedder: id or live embedder, which computes sentence embeddings for observations and rewards.
        settings: horizon, elimination rules, and what to do without a valid score.
        render_mode: ``ansi``, to render the episode so far, or None.

    Raises:
        ValueError: for a horizon below 1, and for an unknown ``on_invalid``, observation mode or part.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(self, render_mode: str | None = None, **kwargs: Any) -> None:
        self.process, self.observer = self.build(1, **kwargs)
        self.observation_space, self.action_space = self.observer.space, self.process.operator.action_space
        self.render_mode = render_mode

    def render(self) -> str | None:
        """Returns the episode so far in render mode ``ansi``, one line per edit; else, or before a reset, None."""
        episode = self.process.episodes[0]
        return "\n".join(episode.history) if self.render_mode == "ansi" and episode is not None else None


class TextEditVectorEnv(_EditParts, ProcessVectorEnv[EditProcess, EditObserver]):
    """A vector env of n copies of :class:`~instructgym.envs.edit.env.TextEditEnv` with one batched call per LLM role.

    A step makes one call to the rewriter and one to the reward for all copies together.

    Copy i seeded with s behaves as a single env seeded with s + i, except for what the copies share: the order of the
    examples (no example comes twice before all have come once) and the pool of a diversity reward (all copies are
    scored against its state at the start of the step, then their texts are inserted in index order).

    ``reset(options={"reset_mask": bool array})`` resets some of the copies; a seed passed with it reseeds the requests
    of those copies and leaves data order and pool alone. ``index`` and ``prefix`` may be passed per copy.

    Args:
        num_envs: number of copies, n.
        autoreset_mode: ``NextStep`` (Gymnasium's default), ``SameStep`` or ``Disabled``.
        Others: see :class:`~instructgym.envs.edit.env.TextEditEnv`.
    """

    def __init__(
        self,
        num_envs: int = 1,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        **kwargs: Any,
    ) -> None:
        check_copies(num_envs)
        self.process, self.observer = self.build(num_envs, **kwargs)
        self._setup(num_envs, self.process.operator.action_space, render_mode, autoreset_mode)

    def render(self) -> tuple[str, ...] | None:
        """Returns the episodes so far, one text per copy, in render mode ``ansi``, else None."""
        if self.render_mode != "ansi":
            return None
        return tuple("\n".join(e.history) if e is not None else "" for e in self.process.episodes)
