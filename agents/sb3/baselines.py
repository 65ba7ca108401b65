"""Agents with a fixed rule: baselines that TeaMs-RL's reviewers missed, with the interface of stable-baselines3."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.utils import safe_mean
from stable_baselines3.common.vec_env import VecEnv, VecMonitor


class BaselineAgent(ABC):
    """Base class of agents with a fixed rule.

    ``learn`` only acts and logs, so that baselines make the same calls and reports as agents that learn.

    Args:
        env: a VecEnv with the attribute ``operations`` and a ``Discrete`` action space (for the random agent also
            ``MultiDiscrete``).
        seed: seed of the agent's random choices.
        n_steps: steps of each sub-environment between two rows of the log.
        verbose: 1 prints the log, 0 does not.
    """

    def __init__(self, env: VecEnv, seed: int | None = 0, n_steps: int = 6, verbose: int = 0) -> None:
        self.env = env
        self.operations: Sequence[str] = env.get_attr("operations")[0]
        self.seed, self.n_steps, self.verbose = seed, n_steps, verbose
        self.rng = np.random.default_rng(seed)
        self.num_timesteps = 0
        self.ep_info_buffer: deque[dict[str, float]] = deque(maxlen=100)
        self.logger: Logger = configure(None, ["stdout"] if verbose else [])

    @abstractmethod
    def act(self, steps: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """Returns one action per sub-environment.

        Args:
            steps: number of edits so far in each sub-environment's episode; int64, shape (n,).
            masks: True for operations that are possible; bool, shape (n, operations), for ``MultiDiscrete`` (n, sum of
                ``nvec``).
        """

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Returns actions for one observation or a batch of them, and the next state.

        Args:
            observation: an array or dict of arrays, with or without a batch dimension.
            state: the state that the last call returned, as for a recurrent policy: the number of steps in each
                episode; None: 0.
            episode_start: True where an episode starts; bool, shape (n,); None: nowhere.
            deterministic: has no effect.
            action_masks: True for operations that are possible, as in :meth:`act`; None: all.
        """
        rows = next(iter(observation.values())) if isinstance(observation, dict) else observation
        single = np.ndim(rows) == 1
        count = 1 if single else len(rows)
        steps = np.zeros(count, dtype=np.int64) if state is None else state[0].copy()
        if episode_start is not None:
            steps[np.asarray(episode_start, dtype=bool)] = 0
        width = int(np.sum(getattr(self.env.action_space, "nvec", len(self.operations))))
        masks = np.ones((count, width), bool) if action_masks is None else np.atleast_2d(action_masks)
        actions = self.act(steps, masks.astype(bool))
        return (actions[0] if single else actions), (steps + 1,)

    def learn(
        self,
        total_timesteps: int,
        callback: BaseCallback | list[BaseCallback] | None = None,
        log_interval: int = 1,
        tb_log_name: str = "baseline",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> BaselineAgent:
        """Acts for ``total_timesteps`` env steps and logs a row every ``n_steps`` steps of each sub-environment.

        Args:
            total_timesteps: env steps, summed over the sub-environments.
            callback: one callback or a list of them; one that returns False stops the agent.
            log_interval: only every so many-th row is written.
            tb_log_name: has no effect.
            reset_num_timesteps: whether to count steps from 0, not from the end of the last call.
            progress_bar: has no effect.
        """
        if not isinstance(self.env, VecMonitor):
            self.env = VecMonitor(self.env)
        callbacks = callback if isinstance(callback, BaseCallback) else CallbackList(list(callback or []))
        callbacks.init_callback(self)  # type: ignore[arg-type]
        if reset_num_timesteps:
            self.num_timesteps = 0
        observation, state = self.env.reset(), None
        starts = np.ones(self.env.num_envs, dtype=bool)
        # Callbacks read infos, rewards and dones from these local variables by stable-baselines3's names.
        callbacks.on_training_start(locals(), globals())
        begun, iteration, going = time.perf_counter(), 0, True
        while going and self.num_timesteps < total_timesteps:
            callbacks.on_rollout_start()
            for _ in range(self.n_steps):
                masks = np.stack(self.env.env_method("action_masks"))
                actions, state = self.predict(observation, state, starts, action_masks=masks)
                observation, rewards, dones, infos = self.env.step(actions)
                starts = dones
                self.num_timesteps += self.env.num_envs
                self.ep_info_buffer.extend(info["episode"] for info in infos if "episode" in info)
                callbacks.update_locals(locals())
                going = callbacks.on_step()
                if not going:
                    break
            callbacks.on_rollout_end()
            iteration += 1
            if going and iteration % log_interval == 0:
                self._log(time.perf_counter() - begun)
        callbacks.on_training_end()
        return self

    def get_env(self) -> VecEnv:
        """Returns the env."""
        return self.env

    def set_logger(self, logger: Logger) -> None:
        """Sets the logger that ``learn`` writes to."""
        self.logger = logger

    def _log(self, seconds: float) -> None:
        """Writes a row of the log; ``seconds`` is the time since the start of ``learn``."""
        if self.ep_info_buffer:
            self.logger.record("rollout/ep_rew_mean", safe_mean([e["r"] for e in self.ep_info_buffer]))
            self.logger.record("rollout/ep_len_mean", safe_mean([e["l"] for e in self.ep_info_buffer]))
        self.logger.record("time/total_timesteps", self.num_timesteps)
        self.logger.record("time/fps", int(self.num_timesteps / max(seconds, 1e-9)))
        self.logger.dump(step=self.num_timesteps)


class RandomAgent(BaselineAgent):
    """An agent that draws uniformly among the possible operations, as Evol-Instruct does.

    In a ``MultiDiscrete`` space each dimension is drawn independently.
    """

    def act(self, steps: np.ndarray, masks: np.ndarray) -> np.ndarray:
        return random_actions(self.rng, masks, self.env.action_space)


def random_actions(rng: np.random.Generator, masks: np.ndarray, space: spaces.Space[Any]) -> np.ndarray:
    """Returns one possible action per sub-environment, drawn uniformly.

    Args:
        rng: generator to draw from.
        masks: True for actions that are possible; bool, shape (n, operations), for ``MultiDiscrete`` (n, sum of
            ``nvec``).
        space: action space of one sub-environment; in a ``MultiDiscrete`` each dimension is drawn independently.
    """
    if not isinstance(space, spaces.MultiDiscrete):
        return np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
    parts = [np.split(mask, np.cumsum(space.nvec)[:-1]) for mask in masks]
    return np.array([[rng.choice(np.flatnonzero(part)) for part in split_mask] for split_mask in parts])


class RoundRobinAgent(BaselineAgent):
    """An agent that applies the operations in turn, one per step of an episode, and skips impossible ones."""

    def act(self, steps: np.ndarray, masks: np.ndarray) -> np.ndarray:
        count = masks.shape[1]
        # All operations in cyclic order, starting with the one whose turn it is: take the first possible one.
        turns = [(step + np.arange(count)) % count for step in steps]
        return np.array([turn[mask[turn]][0] for turn, mask in zip(turns, masks, strict=True)])


class ScheduleAgent(BaselineAgent):
    """An agent with the overrides of TeaMs-RL's generation script, applied to uniformly drawn operations.

    At steps t = 1 and t = 4 (counted from 0) the operation is ``breadth``. At other steps a drawn ``breadth`` is
    replaced by ``add_constraints`` if that is possible.

    Raises:
        ValueError: if the env lacks one of the two operations.
    """

    def __init__(self, env: VecEnv, seed: int | None = 0, n_steps: int = 6, verbose: int = 0) -> None:
        super().__init__(env, seed, n_steps, verbose)
        missing = {"breadth", "add_constraints"} - set(self.operations)
        if missing:
            raise ValueError(
                f"the schedule needs the operations breadth and add_constraints; missing: {sorted(missing)}"
            )
        self._breadth = self.operations.index("breadth")
        self._constraints = self.operations.index("add_constraints")

    def act(self, steps: np.ndarray, masks: np.ndarray) -> np.ndarray:
        actions = np.array([self.rng.choice(np.flatnonzero(mask)) for mask in masks])
        forced = np.isin(steps, (1, 4))
        actions[forced] = self._breadth
        replaced = ~forced & (actions == self._breadth) & masks[:, self._constraints]
        actions[replaced] = self._constraints
        return actions
