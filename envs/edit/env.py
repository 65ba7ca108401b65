"""TextEditEnv: the edit MDP as a Gymnasium environment, and its vector form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gymnasium.vector import AutoresetMode

from ...llm_backends import Backend, resolve
from ...rewards import Reward
from ..process import ProcessEnv, ProcessVectorEnv, check_copies, check_on_invalid
from ..tasks.instruction.seeds import Instruction
from .operators import Operator
from .process import EditObservation, EditProcess, EditSettings, make_observation

DEFAULT_SETTINGS = EditSettings()


class _EditParts:
    """What the single and the vector env have in common: building the process from arguments."""

    process: EditProcess
    observer: EditObservation

    def _build(
        self,
        copies: int,
        instructions: Sequence[Instruction],
        operator: Operator,
        backend: Any,
        reward: Any,
        judge_backend: Any,
        observation: str,
        embedder: Any,
        settings: EditSettings,
    ) -> None:
        if settings.horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {settings.horizon}")
        check_on_invalid(settings.on_invalid)
        rewriter: Backend = resolve("backend", backend)
        judge = backend if judge_backend is None else judge_backend
        shared = resolve("embedder", embedder)  # one memory: what the reward embedded the observation need not
        scorer: Reward = resolve("reward", reward, backend=judge, embedder=shared)
        self.process = EditProcess(copies, instructions, operator, rewriter, scorer, settings)
        self.observer = make_observation(observation, len(operator.operations), settings.horizon, shared)

    @property
    def backend(self) -> Backend:
        """The rewriter, with its usage counters."""
        return self.process.backend

    @property
    def reward(self) -> Reward:
        """The reward."""
        return self.process.reward

    @property
    def operations(self) -> tuple[str, ...]:
        """Names of the operations."""
        return self.process.operator.operations


class TextEditEnv(_EditParts, ProcessEnv[EditProcess, EditObservation]):
    """An episode edits one text, step by step, and is paid for every edit.

    ## Action Space
    The operator's, by default ``Discrete(n)``: one operation each.

    ## Observation Space
    ``last_edit``: ``Box(0, 1, (n,), float32)``, one-hot of the last operation, zeros at the start. ``embedding``: a
    Dict of that, ``progress`` (1,) and the text's sentence ``embedding`` (384,). ``text``: the text (any string).

    ## Rewards
    The reward's value of (text before, text after). 0 without an LLM call for a masked action, for the no-op and for an
    eliminated edit. Where judge or rewriter give nothing usable, the running mean of valid rewards is paid and
    ``info["reward_valid"]`` is False.

    ## Starting State
    A seed instruction, drawn in shuffled epochs; ``options={"index": i}`` chooses one, ``{"prefix": text}`` starts from
    any text. ``reset(seed=)`` restores everything, the data order and the diversity pool included.

    ## Episode End
    ``terminated`` after ``horizon`` edits or when an elimination rule strikes; ``info["finish_reason"]`` says which.

    Args:
        instructions: the texts episodes start from.
        operator: what actions mean.
        backend: the rewriter LLM.
        reward: scores edits.
        judge_backend: the LLM of rewards that need one and name none; the rewriter by default, as in the paper.
        observation: ``last_edit``, ``embedding`` or ``text``.
        embedder: sentence embeddings for observations and rewards.
        settings: horizon, elimination, what to do without a verdict.
        render_mode: ``ansi`` or None.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(
        self,
        instructions: Sequence[Instruction],
        operator: Operator,
        backend: Any = "embedded",
        reward: Any = "judge",
        judge_backend: Any = None,
        observation: str = "last_edit",
        embedder: Any = "minilm",
        settings: EditSettings = DEFAULT_SETTINGS,
        render_mode: str | None = None,
    ) -> None:
        self._build(1, instructions, operator, backend, reward, judge_backend, observation, embedder, settings)
        self.observation_space, self.action_space = self.observer.space, operator.action_space
        self.render_mode = render_mode

    def render(self) -> str | None:
        """The episode so far, one line per edit, in render mode ``ansi``."""
        episode = self.process.episodes[0]
        return "\n".join(episode.history) if self.render_mode == "ansi" and episode is not None else None


class TextEditVectorEnv(_EditParts, ProcessVectorEnv[EditProcess, EditObservation]):
    """n copies of :class:`TextEditEnv` that share one batched call per role and step.

    Copy i seeded with s behaves as a single env seeded with s + i, but for what the copies share: the order of the
    examples (no example twice before all came once) and a diversity reward's pool (all score against its state at the
    start of the step, then insert in index order).

    ``reset(options={"reset_mask": bool array})`` resets some copies; a seed given with it reseeds those copies'
    requests and leaves data order and pool alone. ``index`` and ``prefix`` may be given per copy.

    Args:
        num_envs: n.
        autoreset_mode: ``NextStep`` (Gymnasium's default), ``SameStep`` or ``Disabled``.
        Others: as of :class:`TextEditEnv`.
    """

    def __init__(
        self,
        num_envs: int,
        instructions: Sequence[Instruction],
        operator: Operator,
        backend: Any = "embedded",
        reward: Any = "judge",
        judge_backend: Any = None,
        observation: str = "last_edit",
        embedder: Any = "minilm",
        settings: EditSettings = DEFAULT_SETTINGS,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    ) -> None:
        check_copies(num_envs)
        self._build(num_envs, instructions, operator, backend, reward, judge_backend, observation, embedder, settings)
        self._setup(num_envs, operator.action_space, render_mode, autoreset_mode)

    def render(self) -> tuple[str, ...] | None:
        """The episodes so far, one text per copy, in render mode ``ansi``."""
        if self.render_mode != "ansi":
            return None
        return tuple("\n".join(e.history) if e is not None else "" for e in self.process.episodes)
