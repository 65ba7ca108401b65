"""The Gymnasium faces of a process: one copy as an ``Env``, n copies as a ``VectorEnv``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from .core import Transition, check_options
from .specs import HasPartSpec


class Process(Protocol):
    """n copies of an MDP."""

    generators: list[np.random.Generator]

    def restart(self, seed: int) -> None:
        """Restores everything that outlives an episode."""

    def begin(self, copies: Sequence[int], options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Starts an episode in each of the copies; one info each."""

    def step(self, actions: Sequence[Any], copies: Sequence[int]) -> list[Transition]:
        """Applies one action per copy."""

    def mask(self, copy: int) -> np.ndarray:
        """int8 mask of the actions that are possible in a copy."""

    def state(self, copy: int) -> Any:
        """What an observation of the copy is made of."""


class Observer(Protocol):
    """Turns states into observations."""

    space: spaces.Space[Any]

    def encode(self, states: Sequence[Any]) -> list[Any]:
        """One observation per state; no two share memory."""


ProcessT = TypeVar("ProcessT", bound=Process)
ObserverT = TypeVar("ObserverT", bound=Observer)


class ProcessEnv(HasPartSpec, gym.Env[Any, Any], Generic[ProcessT, ObserverT]):
    """One copy of a process. A subclass's constructor sets ``process``, ``observer`` and the spaces."""

    process: ProcessT
    observer: ObserverT

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
        """Takes one step."""
        [transition] = self.process.step([action], [0])
        return self._observation(), transition.reward, transition.terminated, False, transition.info

    def action_masks(self) -> np.ndarray:
        """bool, shape (n,): the actions that are possible now (what MaskablePPO asks for)."""
        return self.process.mask(0).astype(bool)

    def _observation(self) -> Any:
        return self.observer.encode([self.process.state(0)])[0]


class ProcessVectorEnv(HasPartSpec, VectorEnv[Any, Any, np.ndarray], Generic[ProcessT, ObserverT]):
    """n copies of a process. A subclass's constructor sets ``process`` and ``observer``, then calls ``_setup``."""

    process: ProcessT
    observer: ObserverT

    def _setup(
        self,
        num_envs: int,
        action_space: spaces.Space[Any],
        render_mode: str | None,
        autoreset_mode: AutoresetMode | str,
    ) -> None:
        self.num_envs, self.render_mode = num_envs, render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {"render_modes": ["ansi"], "autoreset_mode": self.autoreset_mode}
        self.single_observation_space, self.single_action_space = self.observer.space, action_space
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
        """Steps all copies; rewards are float64, shape (num_envs,)."""
        if self.autoreset_mode is AutoresetMode.DISABLED:
            self._refuse_ended(self._done)
        rewards, terminated = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=bool)
        ended = [int(copy) for copy in np.flatnonzero(self._done)]
        running = [copy for copy in range(self.num_envs) if not self._done[copy]]
        per_copy: dict[int, dict[str, Any]] = {}
        if running:
            taken = unbatch(actions, self.num_envs)
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
        """bool, shape (num_envs, n): the actions that are possible now."""
        return np.stack([self.process.mask(copy) for copy in range(self.num_envs)]).astype(bool)

    def _refuse_ended(self, ended: np.ndarray) -> None:
        if ended.any():
            raise RuntimeError(
                f"copies {np.flatnonzero(ended).tolist()} have ended: call reset(options={{'reset_mask': mask}})"
            )

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
        check_mask(mask, self.num_envs, "options['reset_mask']")
        if not mask.any():
            raise ValueError("options['reset_mask'] selects no copy")
        return mask

    def _observations(self) -> list[Any]:
        return self.observer.encode([self.process.state(copy) for copy in range(self.num_envs)])

    def _batch(self, observations: list[Any]) -> Any:
        return batch(self.single_observation_space, observations)


def batch(space: spaces.Space[Any], observations: Sequence[Any]) -> Any:
    """Observations of a single space as one of the vector form's."""
    return concatenate(space, observations, create_empty_array(space, len(observations)))  # type: ignore[arg-type]


def check_mask(mask: Any, count: int, name: str) -> None:
    """Refuses anything but a bool array of shape (count,) with a ValueError."""
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (count,):
        raise ValueError(f"{name} must be a bool array of shape ({count},), got {mask!r}")


def check_copies(num_envs: int) -> None:
    """Refuses a vector env without copies with a ValueError."""
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")


def unbatch(actions: Any, count: int) -> list[Any]:
    """The actions of a vector env as a list, one per copy.

    Raises:
        ValueError: if there are more or fewer.
    """
    taken = list(actions)
    if len(taken) != count:
        raise ValueError(f"one action per copy is needed ({count}), got {len(taken)}")
    return taken
