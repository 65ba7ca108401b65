"""Gymnasium's vector envs for stable-baselines3, which has a VecEnv of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv


class VectorToVecEnv(VecEnv):
    """A Gymnasium vector env in autoreset mode ``SAME_STEP`` as a stable-baselines3 VecEnv.

    Unlike DummyVecEnv, which steps its copies one after the other, this keeps the vector env's batched step. The info
    of a last step has ``terminal_observation`` and ``TimeLimit.truncated``; that of the reset is in ``reset_infos``.

    Args:
        env: the vector env; its observations must be arrays or flat dicts of arrays.

    Raises:
        ValueError: for another autoreset mode.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        if env.metadata.get("autoreset_mode") is not AutoresetMode.SAME_STEP:
            raise ValueError(
                "stable-baselines3 resets within the step: make the vector env with autoreset_mode='SameStep'"
            )
        self.env = env
        self._actions: np.ndarray | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> Any:
        seed = self._seeds if any(seed is not None for seed in self._seeds) else None
        keys = {key for mine in self._options for key in mine}
        options = {key: [mine.get(key) for mine in self._options] for key in keys}  # one entry per copy
        observations, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
        self.reset_infos = [_info_of(infos, i) for i in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        observations, rewards, terminated, truncated, batched = self.env.step(self._actions)
        dones = terminated | truncated
        infos = []
        for i in range(self.num_envs):
            info = _info_of(batched, i)
            if dones[i]:
                final = _info_of(batched["final_info"], i)
                self.reset_infos[i] = {k: v for k, v in info.items() if k not in ("final_obs", "final_info")}
                info = final | {"terminal_observation": batched["final_obs"][i]}
            info["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
            infos.append(info)
        return observations, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env.unwrapped, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self.env.unwrapped, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Calls the vector env's batched method once and hands each copy its row."""
        rows = getattr(self.env.unwrapped, method_name)(*args, **kwargs)
        return [rows[i] for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))

    def get_images(self) -> Sequence[np.ndarray | None]:
        return [None] * self.num_envs


def make_sb3_env(env_id: str, n_envs: int = 8, **kwargs: Any) -> VectorToVecEnv:
    """A VecEnv for stable-baselines3 in which all copies share one batched call per role and step.

    Args:
        env_id: one of this package's ids.
        n_envs: number of copies.
        kwargs: the env's arguments.
    """
    # The single env's constructor checks nothing that the vector one does not: no copy is made besides.
    return VectorToVecEnv(gym.make_vec(env_id, num_envs=n_envs, autoreset_mode="SameStep", **kwargs))


def _info_of(infos: dict[str, Any], i: int) -> dict[str, Any]:
    """Copy i's info out of a vector env's dict of arrays."""
    info = {}
    for key, value in infos.items():
        mask = infos.get(f"_{key}")
        if mask is not None and mask[i]:
            info[key] = _info_of(value, i) if isinstance(value, dict) else _plain(value[i])
    return info


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
