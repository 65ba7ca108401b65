"""Checkpoints of token-level training: weights and optimiser state as safetensors, everything else as JSON.

Nothing is pickled, so that loading a checkpoint runs no code from it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...llm_backends.errors import InputError
from ...llm_backends.training.adapters import LoraSettings
from .language_model import SETTINGS, LanguageModelPolicy
from .optimization import Optimizer

STATE, OPTIMIZER, POLICY_FOLDER = "trainer.json", "optimizer.safetensors", "policy"


class Trainable(Protocol):
    """A model that can be trained and saved, for example a policy or a reward model."""

    lora: LoraSettings

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Returns the trained weights by name."""

    def save(self, folder: str | Path) -> None:
        """Writes the trained weights into a folder."""


def write_checkpoint(folder: str | Path, policy: Trainable, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Writes a checkpoint into a folder.

    Args:
        folder: where to write.
        policy: the trained model.
        optimizer: the optimiser of its weights.
        state: JSON-able state of the agent, its name under ``agent`` among it.
    """
    folder = Path(folder)
    policy.save(folder / POLICY_FOLDER)
    tensors, settings = optimizer.state()
    save_file(tensors, folder / OPTIMIZER)
    # Only dropout draws from torch's generator in training: all other draws are seeded by the counters in the state.
    rng = torch.get_rng_state().tolist() if policy.lora.dropout else None
    # Written last: a folder that has this file holds a complete checkpoint.
    (folder / STATE).write_text(json.dumps(dict(state) | {"optimizer": settings, "torch_rng": rng}) + "\n", "utf-8")


def read_checkpoint(
    folder: str | Path, load: Callable[[Path], Any], optimizer: Optimizer, agent: str
) -> dict[str, Any]:
    """Restores policy and optimiser from :func:`write_checkpoint` and returns the rest of its state.

    Args:
        folder: folder of the checkpoint.
        load: function that reads the policy's weights from a folder into the policy.
        optimizer: the optimiser of these weights, whose state is replaced.
        agent: name of the agent; it must be that of the agent that wrote the checkpoint.

    Raises:
        InputError: if the checkpoint is missing, broken, or of another agent.
    """
    folder = Path(folder)
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
        if state["agent"] != agent:
            raise InputError(f"{folder} is a checkpoint of {state['agent']}, not of {agent}")
        load(folder / POLICY_FOLDER)
        optimizer.load_state(load_file(folder / OPTIMIZER), state["optimizer"])
    except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise InputError(f"cannot read a checkpoint from {folder}: {' '.join(str(error).split())}") from error
    if state["torch_rng"] is not None:
        torch.set_rng_state(torch.tensor(state["torch_rng"], dtype=torch.uint8))
    return state


def replace_checkpoint(folder: Path, write: Callable[[Path], None], is_main: bool = True) -> None:
    """Replaces the only checkpoint in a folder; a kill at any moment leaves a complete one, the old or the new.

    Args:
        folder: folder that :func:`latest_checkpoint` reads from.
        write: function that writes a checkpoint into the folder it is called with.
        is_main: True in exactly one process; the others only call ``write``, which may be a collective operation.
    """
    if not is_main:
        write(folder / "writing")
        return
    # The last checkpoint is moved aside only when the new one is complete, and deleted only when that has its place.
    scratch, last, old = folder / "writing", folder / "last", folder / "old"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    write(scratch)
    if last.exists():  # else `old` is the only complete one: what a kill between the two renames below leaves
        shutil.rmtree(old, ignore_errors=True)
        last.rename(old)
    scratch.rename(last)
    shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint that :func:`replace_checkpoint` left in a folder, or None if there is none."""
    return next((folder / name for name in ("last", "old") if (folder / name / STATE).exists()), None)


def policy_from(folder: str | Path, **options: Any) -> LanguageModelPolicy:
    """Returns a saved policy, by default on the model that it was trained on.

    Args:
        folder: folder that :meth:`~instructgym.agents.policy.language_model.LanguageModelPolicy.save` wrote.
        options: arguments of :class:`~instructgym.agents.policy.language_model.LanguageModelPolicy` that replace those
            in the folder, for example ``model``, or are not in it, for example ``dtype``.
    """
    settings = read_state(Path(folder) / SETTINGS)
    arguments = {
        "model": settings["model"],
        "lora": LoraSettings(**settings["lora"]),
        "value": settings["value"],
        # A frozen reference is no argument: load() restores it.
        "reference": "none" if settings["reference"] == "none" else "base",
        "temperature": settings["temperature"],
    }
    policy = LanguageModelPolicy(**(arguments | options))
    policy.load(folder)
    return policy


def read_state(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        InputError: if the file cannot be read.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
