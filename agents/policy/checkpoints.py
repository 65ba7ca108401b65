"""Checkpoints of token-level training: weights and optimiser state as safetensors, everything else as JSON."""

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
    """A model that can be trained and saved: a policy, a reward model."""

    lora: LoraSettings

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained weights by name."""

    def save(self, folder: str | Path) -> None:
        """Writes them into a folder."""


def write_checkpoint(folder: str | Path, policy: Trainable, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Writes a checkpoint into a folder; ``trainer.json`` comes last and says that it is whole."""
    folder = Path(folder)
    policy.save(folder / POLICY_FOLDER)
    tensors, settings = optimizer.state()
    save_file(tensors, folder / OPTIMIZER)
    rng = torch.get_rng_state().tolist() if policy.lora.dropout else None
    (folder / STATE).write_text(json.dumps(dict(state) | {"optimizer": settings, "torch_rng": rng}) + "\n", "utf-8")


def read_checkpoint(
    folder: str | Path, load: Callable[[Path], Any], optimizer: Optimizer, agent: str
) -> dict[str, Any]:
    """Restores policy and optimiser from :func:`write_checkpoint` and returns the rest of its state.

    Args:
        folder: the checkpoint.
        load: reads the policy's weights from a folder into the policy.
        optimizer: of the same weights.
        agent: name of the agent that wrote it.

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
    """Replaces the one checkpoint in a folder; a kill at any moment leaves the old or the new one, whole.

    Args:
        folder: what :func:`latest_checkpoint` is given.
        write: writes a checkpoint into the folder it gets.
        is_main: False in all processes but one, which only take part in ``write``.
    """
    if not is_main:
        write(folder / "writing")
        return
    scratch, last, old = folder / "writing", folder / "last", folder / "old"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    write(scratch)
    shutil.rmtree(old, ignore_errors=True)
    if last.exists():
        last.rename(old)
    scratch.rename(last)
    shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that :func:`replace_checkpoint` left, or None."""
    return next((folder / name for name in ("last", "old") if (folder / name / STATE).exists()), None)


def policy_from(folder: str | Path, **options: Any) -> LanguageModelPolicy:
    """A saved policy on the model it was trained on.

    Args:
        folder: what :meth:`LanguageModelPolicy.save` wrote.
        options: further arguments of :class:`LanguageModelPolicy`, ``model`` among them.
    """
    settings = read_state(Path(folder) / SETTINGS)
    built = {
        "model": settings["model"],
        "lora": LoraSettings(**settings["lora"]),
        "value": settings["value"],
        "reference": "none" if settings["reference"] == "none" else "base",
        "temperature": settings["temperature"],
    }
    policy = LanguageModelPolicy(**(built | options))
    policy.load(folder)
    return policy


def read_state(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
