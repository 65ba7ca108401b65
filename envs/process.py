"""The Gymnasium faces of a process: one copy as an ``Env``, n copies as a ``VectorEnv``."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, Protocol, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Space
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from ..llm_backends.errors import RunError


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


class HasPartSpec:
    """Makes the spec that Gymnasium hands to an env a :class:`PartSpec`."""

    _spec: EnvSpec | None = None

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


ON_INVALID = ("retry", "raise")
RESET_OPTIONS = frozenset({"index", "prefix", "reset_mask"})


class InvalidRewardError(RunError):
    """The rewriter or the judge gave no usable answer, and the env was told to raise."""


@dataclass(frozen=True)
class Transition:
    """What one copy's step gave."""

    reward: float
    terminated: bool
    info: dict[str, Any]


@dataclass
class RunningMean:
    """The mean of the valid rewards so far: what is paid where there is no verdict."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Takes one more reward in."""
        self.total, self.count = self.total + value, self.count + 1

    @property
    def value(self) -> float:
        """The mean; 0 before any reward."""
        return self.total / self.count if self.count else 0.0


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses unknown reset options with a ValueError."""
    unknown = set(options) - RESET_OPTIONS
    if unknown:
        raise ValueError(f"unknown reset option {sorted(unknown)[0]!r}: use {', '.join(sorted(RESET_OPTIONS))}")


def check_on_invalid(on_invalid: str) -> None:
    """Refuses anything but :data:`ON_INVALID` with a ValueError."""
    if on_invalid not in ON_INVALID:
        raise ValueError(f"on_invalid must be one of {', '.join(ON_INVALID)}, got {on_invalid!r}")


def copy_option(options: Mapping[str, Any], key: str, copy: int, copies: int) -> Any:
    """A reset option's value for one copy: its entry where a list, tuple or array holds one per copy.

    Raises:
        ValueError: if there are more or fewer entries than copies.
    """
    value = options.get(key)
    if isinstance(value, list | tuple | np.ndarray):
        if len(value) != copies:
            raise ValueError(f"options[{key!r}] needs one entry per copy ({copies}), got {len(value)}")
        return value[copy]
    return value


def check_index(index: Any, size: int) -> None:
    """Refuses ``options["index"]`` outside the examples with a ValueError; None is no choice."""
    if index is not None and not 0 <= int(index) < size:
        raise ValueError(f"options['index'] must be in [0, {size}), got {index}")


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
        infos = self.start(seed=seed, options=options)
        return self._batch(self._observations()), infos

    def start(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Does what :meth:`reset` does but for the observations, which are not built, and returns the infos."""
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
        return infos

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


class EpisodeSource:
    """Draws indices of n examples in shuffled epochs: none comes twice before all have come once.

    Args:
        size: number of examples.

    Raises:
        ValueError: if there are none.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError("an episode source needs at least one example")
        self.size = size
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Starts again, in the order that belongs to the seed."""
        self._seed, self._epoch, self._position = int(seed), 0, 0
        self._order = self._shuffled()

    def draw(self) -> int:
        """Index of the next example."""
        if self._position == self.size:
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffled()
        self._position += 1
        return int(self._order[self._position - 1])

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands, JSON-able."""
        return {"seed": self._seed, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""
        self._seed, self._epoch, self._position = state["seed"], state["epoch"], state["position"]
        self._order = self._shuffled()

    def _shuffled(self) -> np.ndarray:
        return np.random.default_rng([self._seed, self._epoch]).permutation(self.size)


_ALPHABET = string.ascii_letters + string.digits + " .,?!'-\n"


class Unicode(Space[str]):
    """Any string. Gymnasium's ``Text`` refuses the empty string, blanks and letters outside its character set.

    Args:
        sample_length: longest string that ``sample`` returns.
        seed: of ``sample``.
    """

    def __init__(self, sample_length: int = 32, seed: int | np.random.Generator | None = None) -> None:
        if sample_length < 1:
            raise ValueError(f"sample_length must be at least 1, got {sample_length}")
        self.sample_length = sample_length
        super().__init__(dtype=str, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """A random string over letters, digits and some punctuation; takes no mask."""
        length = int(self.np_random.integers(self.sample_length + 1))
        return "".join(self.np_random.choice(list(_ALPHABET), size=length))

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)

    def __repr__(self) -> str:
        return "Unicode()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unicode)

    def __hash__(self) -> int:
        return hash(Unicode)


class InvalidRewardRateError(RunError):
    """Too many rewards were imputed for want of a verdict; the agent would learn from made-up numbers."""
