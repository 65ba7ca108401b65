"""The models that an experiment compares: a base model, and what was fine-tuned from it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...agents.policy.checkpoints import read_state
from ...agents.policy.language_model import SETTINGS
from ...envs.tasks.instruction.data import DATA_LAYOUTS, DataLayout, InstructionExample, request_text
from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ..runs.folder import read_json
from ..runs.stages import policy_folder
from .finetune import TRAIN

BASE = "base"


@dataclass(frozen=True)
class Arm:
    """One of the models that are compared."""

    name: str
    model: str
    """Its base model."""
    run: str = ""
    """Run folder of what was fine-tuned; empty for the base model as it is."""
    layout: DataLayout | None = None
    """In which it was trained, where the run says so."""


def find_arms(policy: str, model: str = "") -> list[Arm]:
    """The base model, then the policies in the order in which they are named.

    Args:
        policy: run folders separated by commas, each with a name if wanted: ``ours=runs/a,runs/b``.
        model: the base model; by default that of the first policy, or embedded.

    Raises:
        InputError: for a run folder without a policy, and a name that is unusable or comes twice.
    """
    arms: list[Arm] = []
    for piece in filter(None, (text.strip() for text in policy.split(","))):
        named = re.fullmatch(r"([\w.-]+)=(.+)", piece)
        folder = named[2] if named else piece
        name = named[1] if named else Path(folder).resolve().name
        if not re.fullmatch(r"[\w.-]+", name):
            raise InputError(f"--policy {piece}: {name!r} cannot name an arm, write NAME={folder}")
        if name == BASE or name in {arm.name for arm in arms}:
            raise InputError(f"--policy has two arms called {name!r} (base is the base model): write NAME={folder}")
        settings = read_state(policy_folder(folder, "--policy") / SETTINGS)
        arms.append(Arm(name, settings["model"], folder, _trained_layout(folder)))
    return [Arm(BASE, model or (arms[0].model if arms else "embedded")), *arms]


def _trained_layout(folder: str) -> DataLayout | None:
    config = read_json(Path(folder) / "config.json") or {}
    layout = (config.get("options") or {}).get("layout")
    return layout if layout in DATA_LAYOUTS else None


def common_layout(arms: Sequence[Arm], asked: str = "auto") -> DataLayout:
    """The one layout in which all arms are asked: that of their training, ``chat`` where no run says, or the one asked.

    Raises:
        InputError: if they were trained in different ones and none is asked for.
    """
    if asked != "auto":
        return asked  # type: ignore[return-value]
    trained = {arm.layout: arm.name for arm in arms if arm.layout is not None}
    if len(trained) > 1:
        which = ", ".join(f"{name} in {layout}" for layout, name in trained.items())
        raise InputError(f"the policies were trained in different layouts ({which}): choose one with --layout")
    return next(iter(trained), "chat")


def seen_in_training(arm: Arm, requests: Sequence[InstructionExample]) -> int | None:
    """How many of the requests are among those that the arm was fine-tuned on; None where its run does not say."""
    path = Path(arm.run) / TRAIN
    if not arm.run or not path.exists():
        return None
    trained = {request_text(InstructionExample(r["instruction"], r["input"], r["output"])) for r in read_records(path)}
    return sum(request_text(one) in trained for one in requests)
