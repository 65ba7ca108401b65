"""Training stages in run folders: their options, opening and resuming them, and the policies that they leave."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ...agents.policy.optimization import Processes
from ...agents.policy.language_model import SETTINGS
from ...llm_backends.errors import InputError
from ...llm_backends.local.tokenization import (EmbeddedTokenizer, Tokenizer)
from .options import (check_counts, check_run)
from .folder import RunFolder
from .token_training import TokenTraining
from .tracking import Tracker


@dataclass
class Stage:
    """Options of every stage."""

    run_dir: str = ""
    """Folder of this stage. A folder with an unfinished run of the same options is resumed."""
    seed: int = 0
    """Of everything that is drawn: the order of data, tokens, weights."""
    minutes: float = 0.0
    """Stop cleanly after so many minutes; the same command goes on from there. 0: no limit."""
    track: str = "none"
    """none or wandb."""
    dry_run: bool = False
    """Check everything, load no model."""

    def check(self) -> None:
        """Refuses what can be refused without looking at files.

        Raises:
            InputError: naming the option.
        """
        check_run(self)


@dataclass
class TrainingOptions(Stage):
    """Options of every stage that trains a model, or evaluates a trained one."""

    token_budget: int = 1024
    """Tokens of a micro-batch in training."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic; auto: bfloat16 where the hardware computes in it."""

    def check(self) -> None:
        super().check()
        check_counts(self, "token_budget")


@contextmanager
def stage(
    options: Stage, command: str, console: Console, distributed: bool = True, **identity: str
) -> Iterator[TokenTraining | dict[str, Any]]:
    """Opens the run of a stage; gives the results instead where it is finished.

    Args:
        options: of the stage.
        command: its name, as a user types it.
        console: for progress.
        distributed: whether several processes can share its work.
        **identity: what else makes a run the same run: digests of data and weights that the options only name.

    Raises:
        InputError: if the folder holds another run or is in use, and for several processes where one has to do.
    """
    processes = Processes()
    if processes.count > 1 and not distributed:
        raise InputError(f"'{command}' runs in one process: start it without torchrun or accelerate")
    path, config = Path(options.run_dir), asdict(options) | identity
    if (results := RunFolder(path, config, command).finished(console)) is not None:
        yield results
        return
    if not processes.is_main:  # of several, one writes the run; the others keep a scratch folder within it
        path, console = path / "ranks" / str(processes.index), Console(quiet=True)
    folder = RunFolder(path, config, command)
    with folder.opened(), Tracker(folder, options.track if processes.is_main else "none") as tracker:
        checkpoints = Path(options.run_dir) / "checkpoints"
        yield TokenTraining(folder, tracker, console, processes, checkpoints, options.minutes)


def tokenizer_of(model: str) -> Tokenizer:
    """The tokenizer of a model by its name, without the model."""
    return EmbeddedTokenizer() if model == "embedded" else Tokenizer(model)


def digest(value: Any) -> str:
    """A short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def weights_digest(folder: Path) -> str:
    """A short hash of a policy's weights: what was made with them must not be resumed with others."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:12]


def policy_folder(folder: str, option: str) -> Path:
    """Where a stage left its policy; a policy's own folder is taken as it is.

    Raises:
        InputError: if there is none, naming the option.
    """
    if not folder:
        raise InputError(f"{option} is missing: name the run folder of a stage that trained a policy")
    for path in (Path(folder) / "policy", Path(folder)):
        if (path / SETTINGS).exists():
            return path
    raise InputError(f"{option} {folder} holds no policy: has that stage finished?")
