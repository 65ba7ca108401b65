"""Agents that do not learn: the comparisons that TeaMs-RL's reviewers missed. Same interface as stable-baselines3's."""

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
    """An agent with a fixed rule. ``learn`` only acts and logs, so that baselines cost and report what learners do.

    Args:
        env: a VecEnv whose action space is ``Discrete`` (for the random agent also ``MultiDiscrete``) and that has
            ``operations``.
        seed: of the agent's own draws.
        n_steps: steps per copy between two rows of the log.
        verbose: 1 prints the log.
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
        """One action per copy.

        Args:
            steps: int64, shape (n,): edits done so far in each copy's episode.
            masks: bool, shape (n, operations): the possible ones; for ``MultiDiscrete`` (n, sum of ``nvec``).
        """

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Actions for a batch of observations; ``state`` counts each episode's steps, as for a recurrent policy."""
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
        """Acts for ``total_timesteps`` env steps; a row of the log every ``n_steps`` steps of each copy."""
        if not isinstance(self.env, VecMonitor):
            self.env = VecMonitor(self.env)
        callbacks = callback if isinstance(callback, BaseCallback) else CallbackList(list(callback or []))
        callbacks.init_callback(self)  # type: ignore[arg-type]
        if reset_num_timesteps:
            self.num_timesteps = 0
        observation, state = self.env.reset(), None
        starts = np.ones(self.env.num_envs, dtype=bool)
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
        """The env."""
        return self.env

    def set_logger(self, logger: Logger) -> None:
        """Where ``learn`` logs."""
        self.logger = logger

    def _log(self, seconds: float) -> None:
        if self.ep_info_buffer:
            self.logger.record("rollout/ep_rew_mean", safe_mean([e["r"] for e in self.ep_info_buffer]))
            self.logger.record("rollout/ep_len_mean", safe_mean([e["l"] for e in self.ep_info_buffer]))
        self.logger.record("time/total_timesteps", self.num_timesteps)
        self.logger.record("time/fps", int(self.num_timesteps / max(seconds, 1e-9)))
        self.logger.dump(step=self.num_timesteps)


class RandomAgent(BaselineAgent):
    """Every possible operation with equal probability: Evol-Instruct's choice; of ``MultiDiscrete`` each dimension."""

    def act(self, steps: np.ndarray, masks: np.ndarray) -> np.ndarray:
        return random_actions(self.rng, masks, self.env.action_space)


def random_actions(rng: np.random.Generator, masks: np.ndarray, space: spaces.Space[Any]) -> np.ndarray:
    """One possible action per copy, drawn uniformly; of ``MultiDiscrete`` each dimension by itself.

    Args:
        rng: draws.
        masks: bool, shape (n, operations), or for ``MultiDiscrete`` (n, sum of ``nvec``).
        space: the actions of one copy.
    """
    if not isinstance(space, spaces.MultiDiscrete):
        return np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
    parts = [np.split(mask, np.cumsum(space.nvec)[:-1]) for mask in masks]
    return np.array([[rng.choice(np.flatnonzero(part)) for part in mine] for mine in parts])


class RoundRobinAgent(BaselineAgent):
    """The operations in turn, one per step of an episode; impossible ones are passed over."""

    def act(self, steps: np.ndarray, masks: np.ndarray) -> np.ndarray:
        count = masks.shape[1]
        turns = [(step + np.arange(count)) % count for step in steps]
        return np.array([turn[mask[turn]][0] for turn, mask in zip(turns, masks, strict=True)])


class ScheduleAgent(BaselineAgent):
    """The overrides that TeaMs-RL's generation script puts over its policy, here over a uniform draw.

    Breadth at steps t = 1 and t = 4 (counted from 0) and nowhere else: where breadth comes up at another step,
    add_constraints is taken.

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
