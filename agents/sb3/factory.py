"""Agents by name: stable-baselines3 and sb3-contrib algorithms with settings for short episodes, and baselines.

:func:`make_agent` builds an agent, :func:`make_sb3_env` the VecEnv for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.vec_env import VecEnv

from ...llm_backends.errors import InputError
from .baselines import RandomAgent, RoundRobinAgent, ScheduleAgent

NETWORK = {"net_arch": [64, 64], "activation_fn": torch.nn.ReLU}
"""TeaMs-RL's networks: two layers of 64 units with ReLU (stable-baselines3's default is tanh)."""

TRPO_PAPER = {
    "gamma": 0.995,
    "gae_lambda": 0.97,
    "target_kl": 0.01,
    "cg_damping": 0.1,
    "cg_max_steps": 10,
    "line_search_shrinking_factor": 0.5,
    "line_search_max_iter": 10,
}
"""TRPO settings of TeaMs-RL's released code. Here the policy is categorical, so ratio and KL are those of the executed
actions; the original evaluates a Gaussian at an argmax."""

ON_POLICY = {"gamma": 0.995, "gae_lambda": 0.97}
"""Discount and GAE lambda of the other on-policy algorithms, as in :data:`TRPO_PAPER`."""

BASELINES = {"random": RandomAgent, "round-robin": RoundRobinAgent, "schedule": ScheduleAgent}
"""Baselines by name."""


class UnknownAlgorithmError(InputError):
    """Raised if no agent has the given name."""


def _contrib(name: str) -> Any:
    """Returns an algorithm of sb3-contrib, which is imported only when one is used."""
    import sb3_contrib

    return getattr(sb3_contrib, name)


def _on_policy(rollout: int) -> dict[str, Any]:
    """Returns the settings that the PPO variants share, for rollouts of ``rollout`` transitions."""
    return ON_POLICY | {"learning_rate": 1e-3, "batch_size": rollout, "n_epochs": 10, "ent_coef": 0.01}


ALGORITHMS: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, Any]]]] = {
    "TRPO": (lambda: _contrib("TRPO"), lambda rollout: TRPO_PAPER | {"learning_rate": 1e-3, "batch_size": rollout}),
    "PPO": (lambda: PPO, _on_policy),
    "A2C": (lambda: A2C, lambda rollout: ON_POLICY | {"learning_rate": 2e-3, "ent_coef": 0.01}),
    "DQN": (
        lambda: DQN,
        lambda rollout: {
            "gamma": 0.995,
            "learning_rate": 1e-3,
            "buffer_size": 50_000,
            "learning_starts": rollout,
            "batch_size": 32,
            "train_freq": 1,
            "gradient_steps": -1,
            "target_update_interval": 2 * rollout,
            "exploration_fraction": 0.4,
            "exploration_final_eps": 0.05,
        },
    ),
    "MaskablePPO": (lambda: _contrib("MaskablePPO"), _on_policy),
    "RecurrentPPO": (lambda: _contrib("RecurrentPPO"), _on_policy),
}
"""Algorithms by name: a function that returns the class, and one that returns the settings for a rollout of the given
number of transitions."""


def algorithm_names() -> list[str]:
    """Returns every name that :func:`make_agent` takes."""
    return [*ALGORITHMS, *BASELINES]


def check_algorithm(name: str) -> str:
    """Returns the name of an agent in its canonical spelling; upper and lower case are ignored.

    Raises:
        UnknownAlgorithmError: if there is no such agent; the message lists all names.
    """
    for known in algorithm_names():
        if known.casefold() == name.casefold():
            return known
    raise UnknownAlgorithmError(f"unknown algorithm {name!r}: use {', '.join(algorithm_names())}")


def make_agent(algorithm: str, env: VecEnv, seed: int = 0, n_steps: int = 6, **kwargs: Any) -> Any:
    """Builds an agent for an env; every agent has ``learn``, ``predict``, ``get_env`` and ``set_logger``.

    Args:
        algorithm: one of :func:`algorithm_names`.
        env: a VecEnv, see :func:`~instructgym.agents.sb3.factory.make_sb3_env`.
        seed: seed of the agent and the env.
        n_steps: steps of each sub-environment per rollout (on-policy algorithms) or per row of the log (baselines);
            DQN only scales its buffer warm-up and target updates with it.
        kwargs: arguments of the algorithm, which override the settings in :data:`ALGORITHMS`.

    Raises:
        UnknownAlgorithmError: for an unknown name.
        ValueError: for an argument that the algorithm does not have.
    """
    name = check_algorithm(algorithm)
    if name in BASELINES:
        # The algorithms of stable-baselines3 seed their env on construction, baselines do not.
        env.seed(seed)
        return _construct(name, BASELINES[name], env, {"seed": seed, "n_steps": n_steps} | kwargs)
    load, settings = ALGORITHMS[name]
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    network: dict[str, Any] = dict(NETWORK)
    if name == "RecurrentPPO":
        policy = policy.replace("Policy", "LstmPolicy")
        network["lstm_hidden_size"] = 64
    options = settings(n_steps * env.num_envs) | {"seed": seed, "device": "cpu", "policy_kwargs": network}
    # DQN learns from a replay buffer: it has no rollout length.
    if name != "DQN":
        options["n_steps"] = n_steps
    return _construct(name, load(), env, {"policy": policy} | options | kwargs)


def _construct(name: str, factory: Any, env: VecEnv, kwargs: dict[str, Any]) -> Any:
    """Builds an agent; raises ValueError for an argument that its class does not have."""
    unknown = set(kwargs) - set(inspect.signature(factory).parameters)
    if unknown:
        raise ValueError(f"{name} has no argument {sorted(unknown)[0]!r}")
    return factory(env=env, **kwargs)


class VectorToVecEnv(VecEnv):
    """Presents a Gymnasium vector env in autoreset mode ``SAME_STEP`` as a stable-baselines3 VecEnv.

    Unlike DummyVecEnv, which steps its sub-environments one after the other, it keeps the vector env's batched step.
    The info of an episode's last step has ``terminal_observation`` and ``TimeLimit.truncated``; the info of the reset
    is in ``reset_infos``.

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
        # Reset options: from one dict per sub-environment to one dict of lists.
        keys = {key for env_options in self._options for key in env_options}
        options = {key: [env_options.get(key) for env_options in self._options] for key in keys}
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
            # In SAME_STEP mode observation and info of a last step are already those of the next episode.
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
        """Returns the vector env's attribute, which all sub-environments share, once per index."""
        return [getattr(self.env.unwrapped, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self.env.unwrapped, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Calls the vector env's batched method once and returns the row of each index."""
        rows = getattr(self.env.unwrapped, method_name)(*args, **kwargs)
        return [rows[i] for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))

    def get_images(self) -> Sequence[np.ndarray | None]:
        return [None] * self.num_envs


def make_sb3_env(env_id: str, n_envs: int = 8, **kwargs: Any) -> VectorToVecEnv:
    """Builds a VecEnv for stable-baselines3 that makes one batched call per role and step for all sub-environments.

    Args:
        env_id: one of this package's env ids.
        n_envs: number of sub-environments.
        kwargs: the env's arguments.
    """
    # No single env is built to check the arguments: its constructor checks nothing that the vector env's does not.
    return VectorToVecEnv(gym.make_vec(env_id, num_envs=n_envs, autoreset_mode="SameStep", **kwargs))


def _info_of(infos: dict[str, Any], i: int) -> dict[str, Any]:
    """Returns the info of sub-environment ``i`` from a vector env's dict of arrays."""
    info = {}
    # Gymnasium stores beside each array a bool mask "_KEY" of the sub-environments that have the key.
    for key, value in infos.items():
        mask = infos.get(f"_{key}")
        if mask is not None and mask[i]:
            info[key] = _info_of(value, i) if isinstance(value, dict) else _plain(value[i])
    return info


def _plain(value: Any) -> Any:
    """Returns a NumPy scalar as a Python number."""
    return value.item() if isinstance(value, np.generic) else value
