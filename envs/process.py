"""Holds what both MDPs share: a process wrapped as a Gymnasium ``Env`` or ``VectorEnv``, reset options, data order.

A :class:`Process` implements an MDP for n copies (Gymnasium's sub-environments) at once, so that all of them share one
batched LLM call. :class:`ProcessEnv` wraps one copy and :class:`ProcessVectorEnv` wraps n. The two processes are
:class:`~instructgym.envs.edit.process.EditProcess` and :class:`~instructgym.envs.tokens.process.TokenProcess`.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
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

from ..llm_backends.errors import InputError, RunError, check_at_least, check_known
from ..llm_backends.parts import copy_with_parts


class SavableSpec(EnvSpec):
    """An env spec whose JSON export refuses live objects and names the argument that holds one."""

    def to_json(self) -> str:
        """Returns the spec as JSON.

        Raises:
            ValueError: if an argument holds a live object; the message names the argument and the forms that can be
                saved.
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


class SavableSpecMixin:
    """A mixin for envs that turns the spec which Gymnasium assigns into a :class:`SavableSpec`.

    A deep copy of the env has a reward, a running mean and caches of its own, and shares models and backends.
    """

    _spec: EnvSpec | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy_with_parts(self, memo)

    @property
    def spec(self) -> EnvSpec | None:
        """The spec that the env was made from; None before Gymnasium has assigned one."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        # gymnasium.make assigns a plain EnvSpec after the constructor has run: only a setter can replace it.
        self._spec = (
            spec
            if spec is None or isinstance(spec, SavableSpec)
            else SavableSpec(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init})
        )


ON_INVALID = ("retry", "raise")
"""What an env does when there is no valid score: ask once more and then impute the reward, or raise."""
RESET_OPTIONS = ("index", "prefix", "reset_mask")
"""Keys that the ``options`` of ``reset`` may have."""


class InvalidRewardError(RunError):
    """An error of envs with ``on_invalid="raise"``: the rewriter or the reward returned nothing usable."""


@dataclass(frozen=True)
class Transition:
    """The outcome of one step of one copy."""

    reward: float
    terminated: bool
    info: dict[str, Any]


@dataclass
class RunningMean:
    """A running mean of the valid rewards, which an env gives as the reward of a step without a valid score."""

    total: float = 0.0
    """Sum of the rewards so far."""
    count: int = 0
    """Number of rewards so far."""

    def add(self, value: float) -> None:
        """Adds one reward."""
        self.total, self.count = self.total + value, self.count + 1

    @property
    def value(self) -> float:
        """The mean; 0 before the first reward."""
        return self.total / self.count if self.count else 0.0


def check_options(options: Mapping[str, Any]) -> None:
    """Checks the names of reset options.

    Raises:
        ValueError: for a name that is not in :data:`RESET_OPTIONS`.
    """
    for option in options:
        check_known("reset option", option, RESET_OPTIONS)


def check_on_invalid(on_invalid: str) -> None:
    """Checks the setting ``on_invalid``.

    Raises:
        ValueError: unless it is one of :data:`ON_INVALID`.
    """
    if on_invalid not in ON_INVALID:
        raise ValueError(f"on_invalid must be one of {', '.join(ON_INVALID)}, got {on_invalid!r}")


def copy_option(options: Mapping[str, Any], key: str, copy: int, copies: int) -> Any:
    """Returns the value of a reset option for one copy; None if the option is not set.

    Args:
        options: the options of ``reset``.
        key: name of the option.
        copy: index of the copy.
        copies: number of copies of the env.

    Returns:
        The copy's entry if the option is a list, tuple or array (one entry per copy), else the value itself.

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
    """Checks ``options["index"]`` against the number of examples; None, for a drawn example, passes.

    Raises:
        ValueError: unless 0 <= index < size.
    """
    if index is not None and not 0 <= int(index) < size:
        raise ValueError(f"options['index'] must be in [0, {size}), got {index}")


def check_ids(examples: Iterable[tuple[str, str]]) -> None:
    """Checks that an id names one text.

    Args:
        examples: id and text of each example.

    Raises:
        InputError: for an id with two texts.
    """
    texts: dict[str, str] = {}
    for example_id, text in examples:
        if texts.setdefault(example_id, text) != text:
            raise InputError(
                f"two examples have the id {example_id!r} and different texts, {texts[example_id][:40]!r} and "
                f"{text[:40]!r}: give each its own id"
            )


class Process(Protocol):
    """An MDP that runs n copies of itself at once.

    ``copies`` in the methods are the indices of the copies that a call is about.
    """

    generators: list[np.random.Generator]
    """Random generator of each copy."""

    def restart(self, seed: int) -> None:
        """Resets everything that outlives an episode to what it is after seeding with ``seed``."""

    def begin(self, copies: Sequence[int], options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Starts an episode in each of the copies and returns one info per copy."""

    def step(self, actions: Sequence[Any], copies: Sequence[int]) -> list[Transition]:
        """Applies one action per copy and returns one transition per copy."""

    def mask(self, copy: int) -> np.ndarray:
        """Returns an int8 mask, 1 for each action that is possible in the copy."""

    def state(self, copy: int) -> Any:
        """Returns the state from which an :class:`Observer` makes the copy's observation."""


class Observer(Protocol):
    """An object that turns states into observations."""

    space: spaces.Space[Any]
    """Space of one observation."""

    def encode(self, states: Sequence[Any]) -> list[Any]:
        """Returns one observation per state; no two share memory."""


ProcessT = TypeVar("ProcessT", bound=Process)
ObserverT = TypeVar("ObserverT", bound=Observer)


class ProcessEnv(SavableSpecMixin, gym.Env[Any, Any], Generic[ProcessT, ObserverT]):
    """A Gymnasium env that wraps one copy of a process.

    The constructor of a subclass sets ``process``, ``observer`` and the spaces.
    """

    process: ProcessT
    observer: ObserverT

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode and returns its first observation and info.

        Args:
            seed: restarts the process, e.g. its data order, as the docstring of the env tells; None goes on with it.
            options: ``index`` and ``prefix``, as the docstring of the env tells.

        Raises:
            ValueError: for ``reset_mask``, and as ``begin`` of the process.
        """
        super().reset(seed=seed)
        if options and "reset_mask" in options:
            raise ValueError("options['reset_mask'] is for the vector form")
        # The process draws from the env's own generator, so that Gymnasium's seeding covers both.
        self.process.generators[0] = self.np_random
        if seed is not None:
            self.process.restart(seed)
        [info] = self.process.begin([0], options)
        return self._observation(), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Applies an action; returns observation, reward, terminated, truncated (always False) and info."""
        [transition] = self.process.step([action], [0])
        return self._observation(), transition.reward, transition.terminated, False, transition.info

    def action_masks(self) -> np.ndarray:
        """Returns the actions that are possible now: bool, shape (n,), in the form that MaskablePPO calls for."""
        return self.process.mask(0).astype(bool)

    def _observation(self) -> Any:
        return self.observer.encode([self.process.state(0)])[0]


class ProcessVectorEnv(SavableSpecMixin, VectorEnv[Any, Any, np.ndarray], Generic[ProcessT, ObserverT]):
    """A Gymnasium vector env that wraps n copies of a process.

    The constructor of a subclass sets ``process`` and ``observer``, then calls ``_setup``.
    """

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
        self._seeds = [-1] * num_envs

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The random generators of the copies, as in Gymnasium's SyncVectorEnv."""
        return tuple(self.process.generators)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each copy's generator, as in Gymnasium's SyncVectorEnv; -1 if it was never seeded."""
        return tuple(self._seeds)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts an episode in every copy, or in the copies that ``options["reset_mask"]`` selects.

        Args:
            seed: copy i gets the seed ``seed + i``; a sequence holds the seed of each copy, or None to leave it alone.
                If all copies are reset, the seed of copy 0 also restarts what the copies share, e.g. the data order.
            options: ``reset_mask`` (bool array, shape (num_envs,)); ``index`` and ``prefix``, one value or one per
                copy, as the docstring of the env tells.

        Returns:
            The batched observation of all copies, and the infos of those that were reset.

        Raises:
            MaskTypeError: for a mask that is not a bool array.
            ValueError: for an unknown option, a mask of another shape or without a copy, another number of seeds than
                copies, and as ``begin`` of the process.
        """
        infos = self.start(seed=seed, options=options)
        return self._batch(self._observations()), infos

    def start(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Does what :meth:`reset` does without building observations, and returns the infos."""
        options = dict(options or {})
        check_options(options)
        selected = self._reset_mask(options.pop("reset_mask", None))
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int | np.integer) else list(seed or [])
        if seeds and len(seeds) != self.num_envs:
            raise ValueError(f"one seed per copy is needed ({self.num_envs}), got {len(seeds)}")
        copies = [int(copy) for copy in np.flatnonzero(selected)]
        for copy in copies:
            if seeds and seeds[copy] is not None:
                self.process.generators[copy], self._seeds[copy] = seeding.np_random(int(seeds[copy]))  # type: ignore[arg-type]
        # A reset of some copies must not restart what the others are still using.
        if seeds and seeds[0] is not None and selected.all():
            self.process.restart(int(seeds[0]))
        infos: dict[str, Any] = {}
        for copy, info in zip(copies, self.process.begin(copies, options), strict=True):
            infos = self._add_info(infos, info, copy)
        self._done[selected] = False
        return infos

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Applies one action per copy.

        In autoreset mode ``NextStep`` a copy whose episode has ended is reset instead and gets reward 0.

        Returns:
            Batched observations, rewards (float64, shape (num_envs,)), terminated and truncated (bool, shape
            (num_envs,), the latter all False) and infos.

        Raises:
            RuntimeError: in autoreset mode ``Disabled``, if the episode of a copy has ended.
            ValueError: if there are more or fewer actions than copies.
        """
        if self.autoreset_mode is AutoresetMode.DISABLED:
            self._refuse_ended(self._done)
        rewards, terminated = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=bool)
        ended = [int(copy) for copy in np.flatnonzero(self._done)]
        running = [copy for copy in range(self.num_envs) if not self._done[copy]]
        per_copy: dict[int, dict[str, Any]] = {}
        # One call steps all running copies, so that the process can batch its LLM calls.
        if running:
            per_action = unbatch(actions, self.num_envs)
            for copy, transition in zip(
                running, self.process.step([per_action[copy] for copy in running], running), strict=True
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
        # In mode SameStep ``final`` holds the infos of the last steps, and ``per_copy`` those of the resets after them.
        infos: dict[str, Any] = {}
        for copy in range(self.num_envs):
            if copy in final:
                infos = self._add_info(infos, final[copy], copy)
            infos = self._add_info(infos, per_copy[copy], copy)
        return self._batch(observations), rewards, terminated, np.zeros(self.num_envs, dtype=bool), infos

    def action_masks(self) -> np.ndarray:
        """Returns the actions that are possible now: bool, shape (num_envs, n)."""
        return np.stack([self.process.mask(copy) for copy in range(self.num_envs)]).astype(bool)

    def _refuse_ended(self, ended: np.ndarray) -> None:
        if ended.any():
            raise RuntimeError(
                f"copies {np.flatnonzero(ended).tolist()} have ended: call reset(options={{'reset_mask': mask}})"
            )

    def _reset_ended(
        self, terminated: np.ndarray, per_copy: dict[int, dict[str, Any]]
    ) -> tuple[list[Any], dict[int, dict[str, Any]]]:
        """Resets the copies that have ended and adds the infos of their resets to ``per_copy``.

        Returns:
            One observation per copy, and ``final_obs`` and ``final_info`` of each copy that has ended.
        """
        ended = [int(copy) for copy in np.flatnonzero(terminated)]
        # ``begin`` replaces the last states, so they are read before it; all states are encoded in one call.
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
    """Stacks observations of a single space into one observation of the batched space."""
    return concatenate(space, observations, create_empty_array(space, len(observations)))  # type: ignore[arg-type]


class MaskTypeError(TypeError, ValueError):
    """A mask that is no bool array: a TypeError, as in Gymnasium's vector envs, and a ValueError, as any bad option."""


def check_mask(mask: Any, count: int, name: str) -> None:
    """Checks a mask over the copies; ``name`` is its name in the error message.

    Raises:
        MaskTypeError: unless it is a bool array.
        ValueError: unless its shape is (count,).
    """
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise MaskTypeError(f"{name} must be a bool array of shape ({count},), got {mask!r}")
    if mask.shape != (count,):
        raise ValueError(f"{name} must be a bool array of shape ({count},), got {mask!r}")


def check_copies(num_envs: int) -> None:
    """Checks the number of copies of a vector env.

    Raises:
        ValueError: if it is below 1.
    """
    check_at_least(1, num_envs=num_envs)


def unbatch(actions: Any, count: int) -> list[Any]:
    """Returns the batched actions of a vector env as a list with one action per copy.

    Raises:
        ValueError: if there are more or fewer than ``count``.
    """
    per_copy = list(actions)
    if len(per_copy) != count:
        raise ValueError(f"one action per copy is needed ({count}), got {len(per_copy)}")
    return per_copy


class EpisodeSource:
    """A sampler of example indices in shuffled epochs: no index comes twice before all have come once.

    Args:
        size: number of examples.

    Raises:
        ValueError: if ``size`` is below 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError("an episode source needs at least one example")
        self.size = size
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Goes back to the first epoch, in the order that the seed determines."""
        self._seed, self._epoch, self._position = int(seed), 0, 0
        self._order = self._shuffled()

    def draw(self) -> int:
        """Returns the index of the next example."""
        if self._position == self.size:
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffled()
        self._position += 1
        return int(self._order[self._position - 1])

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the data order: seed, epoch and draws in the epoch, as JSON-able integers."""
        return {"seed": self._seed, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the position that :meth:`state_dict` returned."""
        self._seed, self._epoch, self._position = state["seed"], state["epoch"], state["position"]
        self._order = self._shuffled()

    def _shuffled(self) -> np.ndarray:
        # The order depends on seed and epoch alone, so that three integers restore the source.
        return np.random.default_rng([self._seed, self._epoch]).permutation(self.size)


_ALPHABET = string.ascii_letters + string.digits + " .,?!'-\n"
"""Characters of the random strings of :class:`Unicode`."""


class Unicode(Space[str]):
    """A Gymnasium space that contains every string.

    Gymnasium's ``Text`` refuses the empty string, blanks and letters outside its character set.

    Args:
        sample_length: length of the longest string that ``sample`` returns, in characters.
        seed: seed, or random generator, of ``sample``.

    Raises:
        ValueError: if ``sample_length`` is below 1.
    """

    def __init__(self, sample_length: int = 32, seed: int | np.random.Generator | None = None) -> None:
        check_at_least(1, sample_length=sample_length)
        self.sample_length = sample_length
        super().__init__(dtype=str, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        """False: strings have no array form of fixed size."""
        return False

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Returns a random string of letters, digits, blanks, line ends and some punctuation; ignores its arguments."""
        length = int(self.np_random.integers(self.sample_length + 1))
        return "".join(self.np_random.choice(list(_ALPHABET), size=length))

    def contains(self, x: Any) -> bool:
        """Returns whether ``x`` is a string."""
        return isinstance(x, str)

    def __repr__(self) -> str:
        return "Unicode()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unicode)

    def __hash__(self) -> int:
        # All instances are equal, so they must have the same hash.
        return hash(Unicode)


class InvalidRewardRateError(RunError):
    """An error of training: so many rewards are imputed that the agent would learn from made-up numbers."""
