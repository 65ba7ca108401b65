"""TextEditEnv: the edit MDP as a Gymnasium environment, and its vector form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from ..llm_backends import Backend, resolve
from ..rewards import Reward
from .edit_process import ON_INVALID, EditProcess, EditSettings, check_options
from .observations import make_observation
from .operators import Operator
from .tasks.instructions import Instruction

DEFAULT_SETTINGS = EditSettings()


class PartSpec(EnvSpec):
    """An env's spec that, asked for JSON, names the argument that holds a live object."""

    def to_json(self) -> str:
        """The spec as JSON.

        Raises:
            ValueError: naming the argument and the form that can be saved.
        """
        for key, value in self.kwargs.items():
            if not _is_json(value):
                raise ValueError(
                    f"{self.id} cannot be saved as JSON: argument {key!r} holds a live {type(value).__name__}; "
                    f'pass {key}="id", {key}="module:factory" or {key}={{"id": ..., "kwargs": {{...}}}} instead'
                )
        return super().to_json()


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | int | float | bool)


class _EditParts:
    """What the single and the vector env have in common: building the process from arguments."""

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
        if settings.on_invalid not in ON_INVALID:
            raise ValueError(f"on_invalid must be one of {', '.join(ON_INVALID)}, got {settings.on_invalid!r}")
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

    @property
    def spec(self) -> EnvSpec | None:
        """The spec the env was made from."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = (
            spec
            if spec is None or isinstance(spec, PartSpec)
            else PartSpec(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init})
        )

    _spec: EnvSpec | None = None


class TextEditEnv(_EditParts, gym.Env[Any, Any]):
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

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode; see the class for options and what a seed restores."""
        super().reset(seed=seed)
        if options and "reset_mask" in options:
            raise ValueError("options['reset_mask'] is for the vector form")
        self.process.generators[0] = self.np_random
        if seed is not None:
            self.process.restart(seed)
        [info] = self.process.begin([0], options)
        return self._observation(), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Edits the text once."""
        [transition] = self.process.step([action], [0])
        return self._observation(), transition.reward, transition.terminated, False, transition.info

    def action_masks(self) -> np.ndarray:
        """bool, shape (n,): the operations that are possible now (what MaskablePPO asks for)."""
        return self.process.mask(0).astype(bool)

    def render(self) -> str | None:
        """The episode so far, one line per edit, in render mode ``ansi``."""
        episode = self.process.episodes[0]
        return "\n".join(episode.history) if self.render_mode == "ansi" and episode is not None else None

    def _observation(self) -> Any:
        return self.observer.encode([self.process.state(0)])[0]


class TextEditVectorEnv(_EditParts, VectorEnv[Any, Any, np.ndarray]):
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
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self._build(num_envs, instructions, operator, backend, reward, judge_backend, observation, embedder, settings)
        self.num_envs, self.render_mode = num_envs, render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {"render_modes": ["ansi"], "autoreset_mode": self.autoreset_mode}
        self.single_observation_space, self.single_action_space = self.observer.space, operator.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._done = np.zeros(num_envs, dtype=bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts an episode in every copy, or in those of ``options["reset_mask"]``."""
        options = dict(options or {})
        check_options(options)
        chosen = self._reset_mask(options.pop("reset_mask", None))
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int | np.integer) else list(seed or [])
        if seeds and len(seeds) != self.num_envs:
            raise ValueError(f"one seed per copy is needed ({self.num_envs}), got {len(seeds)}")
        copies = [int(copy) for copy in np.flatnonzero(chosen)]
        for copy in copies:
            if seeds and seeds[copy] is not None:
                self.process.generators[copy], _ = seeding.np_random(int(seeds[copy]))  # type: ignore[arg-type]
        if seeds and seeds[0] is not None and chosen.all():
            self.process.restart(int(seeds[0]))
        infos: dict[str, Any] = {}
        for copy, info in zip(copies, self.process.begin(copies, options), strict=True):
            infos = self._add_info(infos, info, copy)
        self._done[chosen] = False
        return self._batch(self._observations()), infos

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Edits all texts; rewards are float64, shape (num_envs,)."""
        if self.autoreset_mode is AutoresetMode.DISABLED and self._done.any():
            raise RuntimeError(
                f"copies {np.flatnonzero(self._done).tolist()} have ended: call reset(options={{'reset_mask': mask}})"
            )
        rewards, terminated = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=bool)
        ended = [int(copy) for copy in np.flatnonzero(self._done)]
        running = [copy for copy in range(self.num_envs) if not self._done[copy]]
        per_copy: dict[int, dict[str, Any]] = {}
        if running:
            taken = _unbatch(actions, self.num_envs)
            for copy, transition in zip(
                running, self.process.step([taken[copy] for copy in running], running), strict=True
            ):
                rewards[copy], terminated[copy] = transition.reward, transition.terminated
                per_copy[copy] = transition.info
        if ended:  # autoreset mode NEXT_STEP: this step is their reset, its action is ignored
            per_copy |= dict(zip(ended, self.process.begin(ended), strict=True))
        final: dict[int, dict[str, Any]] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            observations, final = self._reset_ended(terminated, per_copy)
        else:
            observations = self._observations()
        self._done = np.zeros_like(terminated) if self.autoreset_mode is AutoresetMode.SAME_STEP else terminated.copy()
        infos: dict[str, Any] = {}
        for copy in range(self.num_envs):
            if copy in final:
                infos = self._add_info(infos, final[copy], copy)
            infos = self._add_info(infos, per_copy[copy], copy)
        return self._batch(observations), rewards, terminated, np.zeros(self.num_envs, dtype=bool), infos

    def action_masks(self) -> np.ndarray:
        """bool, shape (num_envs, n): the operations that are possible now."""
        return np.stack([self.process.mask(copy) for copy in range(self.num_envs)]).astype(bool)

    def render(self) -> tuple[str, ...] | None:
        """The episodes so far, one text per copy, in render mode ``ansi``."""
        if self.render_mode != "ansi":
            return None
        return tuple("\n".join(e.history) if e is not None else "" for e in self.process.episodes)

    def _reset_ended(
        self, terminated: np.ndarray, per_copy: dict[int, dict[str, Any]]
    ) -> tuple[list[Any], dict[int, dict[str, Any]]]:
        """Resets the copies that ended; last and first observations are encoded in one call."""
        ended = [int(copy) for copy in np.flatnonzero(terminated)]
        last_states = [self.process.state(copy) for copy in ended]
        infos = self.process.begin(ended) if ended else []
        states = [self.process.state(copy) for copy in range(self.num_envs)]
        encoded = self.observer.encode([*states, *last_states])
        observations, last = encoded[: self.num_envs], encoded[self.num_envs :]
        final = {
            copy: {"final_obs": observation, "final_info": per_copy[copy]}
            for copy, observation in zip(ended, last, strict=True)
        }
        per_copy |= dict(zip(ended, infos, strict=True))
        return observations, final

    def _reset_mask(self, mask: Any) -> np.ndarray:
        if mask is None:
            return np.ones(self.num_envs, dtype=bool)
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (self.num_envs,):
            raise ValueError(f"options['reset_mask'] must be a bool array of shape ({self.num_envs},), got {mask!r}")
        if not mask.any():
            raise ValueError("options['reset_mask'] selects no copy")
        return mask

    def _observations(self) -> list[Any]:
        return self.observer.encode([self.process.state(copy) for copy in range(self.num_envs)])

    def _batch(self, observations: list[Any]) -> Any:
        space = self.single_observation_space
        return concatenate(space, observations, create_empty_array(space, self.num_envs))  # type: ignore[arg-type]


def _unbatch(actions: Any, count: int) -> list[Any]:
    taken = list(actions)
    if len(taken) != count:
        raise ValueError(f"one action per copy is needed ({count}), got {len(taken)}")
    return taken
