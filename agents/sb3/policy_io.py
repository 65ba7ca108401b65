"""Saving and loading of trained policies without pickle: settings in JSON, weights in safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from ...llm_backends.errors import InputError
from ...llm_backends.records import replaced
from .baselines import BaselineAgent
from .factory import make_agent

SETTINGS, WEIGHTS = "agent.json", "policy.safetensors"
CLIP = 5.0
"""Absolute value that normalised observations are clipped to, as in TeaMs-RL's observation filter."""


class PolicyFileError(InputError):
    """Raised if a saved policy is missing, or does not fit the env."""


def normalize_observations(env: VecEnv) -> VecNormalize:
    """Wraps an env so that observations are normalised by running mean and deviation, and clipped; rewards are not."""
    return VecNormalize(env, norm_reward=False, clip_obs=CLIP)


def save_policy(agent: Any, folder: str | Path, algorithm: str, n_steps: int, **kwargs: Any) -> None:
    """Saves what acting needs: algorithm, arguments, weights, and the observation normaliser if there is one.

    Args:
        agent: the agent to save.
        folder: folder to write to, created if missing; each file is replaced in one move.
        algorithm: name of the algorithm, see :func:`~instructgym.agents.sb3.factory.algorithm_names`.
        n_steps: the ``n_steps`` that the agent was built with.
        kwargs: further arguments that the agent was built with, JSON-able.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    env = agent.get_env()
    normalizer = unwrap_vec_normalize(env)
    tensors: dict[str, torch.Tensor] = {}
    if not isinstance(agent, BaselineAgent):
        tensors |= {f"policy.{k}": v.detach().contiguous().clone() for k, v in agent.policy.state_dict().items()}
    if normalizer is not None:
        for name, statistics, part in _statistics(normalizer):
            tensors[name] = torch.as_tensor(np.asarray(getattr(statistics, part)))
    settings = {
        "algorithm": algorithm,
        "n_steps": n_steps,
        "kwargs": kwargs,
        "normalize_observation": normalizer is not None,
        "operations": list(env.get_attr("operations")[0]),
        "observation": observation_shapes(env.observation_space),
        "timesteps": int(agent.num_timesteps),
    }
    # The settings are written last: a folder that holds them holds the weights as well.
    with replaced(folder / WEIGHTS) as scratch:
        save_file(tensors, scratch)
    with replaced(folder / SETTINGS) as scratch:
        scratch.write_text(json.dumps(settings, indent=2) + "\n")


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Returns the settings of a saved policy.

    Raises:
        PolicyFileError: if there is no saved policy, or its settings are broken.
    """
    path = Path(folder) / SETTINGS
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise PolicyFileError(f"no trained policy in {folder}: {error}") from error


def load_policy(folder: str | Path, env: VecEnv, seed: int = 0) -> Any:
    """Returns the agent saved in a folder, on a new env; its ``get_env()`` normalises observations as in training.

    Args:
        folder: folder that :func:`save_policy` has written.
        env: the new env, without normalised observations.
        seed: seed of the agent and the env.

    Raises:
        PolicyFileError: if files are missing, or operations or observations of the env differ from those in training.
    """
    settings = read_settings(folder)
    for name, current in (
        ("operations", list(env.get_attr("operations")[0])),
        ("observation", observation_shapes(env.observation_space)),
    ):
        if settings[name] != current:
            raise PolicyFileError(
                f"the policy in {folder} was trained with {name} {settings[name]}, the env has {current}"
            )
    try:
        tensors = load_file(Path(folder) / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise PolicyFileError(f"no weights in {folder}: {error}") from error
    if settings["normalize_observation"]:
        env = normalize_observations(env)
        env.training = False  # the statistics stay as they were saved
        for name, statistics, part in _statistics(env):
            setattr(statistics, part, tensors[name].numpy())
    agent = make_agent(settings["algorithm"], env, seed, settings["n_steps"], **settings["kwargs"])
    if not isinstance(agent, BaselineAgent):
        weights = {k.removeprefix("policy."): v for k, v in tensors.items() if k.startswith("policy.")}
        try:
            agent.policy.load_state_dict(weights)
        except RuntimeError as error:  # torch's message has many lines
            raise PolicyFileError(f"the weights in {folder} do not fit: {' '.join(str(error).split())}") from error
    return agent


def observation_shapes(space: spaces.Space[Any]) -> dict[str, list[int]]:
    """Returns the shape of every part of an observation by name; a single array is named ``observation``."""
    if isinstance(space, spaces.Dict):
        return {key: list(part.shape or ()) for key, part in space.spaces.items()}
    return {"observation": list(space.shape or ())}


def _statistics(env: VecNormalize) -> Iterator[tuple[str, RunningMeanStd, str]]:
    """Yields each number of a normaliser: the name of its tensor, and the object and attribute that hold it."""
    by_key = env.obs_rms if isinstance(env.obs_rms, dict) else {"observation": env.obs_rms}
    for key, statistics in by_key.items():
        yield from ((f"normalizer.{key}.{part}", statistics, part) for part in ("mean", "var", "count"))
