"""Where metrics go: always to ``metrics.jsonl``, and to wandb where asked."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import KVWriter, Logger

from ...llm_backends.errors import InputError
from .folder import (RowWriter, RunFolder)

TRACKERS = ("none", "wandb")


class Tracker(KVWriter):
    """A stable-baselines3 log writer: a row of ``metrics.jsonl`` per update, the same to wandb.

    Rows that a resumed run replays are written to neither a second time. Without a key wandb runs offline.

    Args:
        folder: the run.
        track: ``"none"`` or ``"wandb"``.
        step_name: what a row's step counts.

    Raises:
        InputError: for another tracker, or if wandb is not installed.
    """

    def __init__(self, folder: RunFolder, track: str = "none", step_name: str = "timesteps") -> None:
        check_tracker(track)
        self.step_name = step_name
        self._rows = RowWriter(folder.file("metrics.jsonl"), compare=False)
        self._run: Any = _start_wandb(folder) if track == "wandb" else None

    def logger(self) -> Logger:
        """A logger that writes here only."""
        return Logger(folder=None, output_formats=[self])

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        row = {self.step_name: int(step)} | {key: _number(value) for key, value in sorted(key_values.items())}
        if self._rows.write(row) and self._run is not None:
            self._run.log(row, step=step)

    def skip(self, rows: int) -> None:
        """Says that a checkpoint stands behind the first ``rows`` rows."""
        self._rows.skip(rows)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends rows with the same keys to wandb as a table."""
        if self._run is not None and rows:
            import wandb

            columns: list[str | int] = list(rows[0])
            self._run.log({name: wandb.Table(columns=columns, data=[list(row.values()) for row in rows])})

    def image(self, name: str, path: Path) -> None:
        """Sends a picture to wandb."""
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Image(str(path))})

    def summary(self, results: Mapping[str, Any]) -> None:
        """Sends the results to wandb."""
        if self._run is not None:
            self._run.summary.update(dict(results))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def check_tracker(track: str) -> None:
    """Refuses an unknown tracker."""
    if track not in TRACKERS:
        raise InputError(f"unknown tracker {track!r}: use {' or '.join(TRACKERS)}")


def _start_wandb(folder: RunFolder) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise InputError("--track wandb needs wandb: pip install wandb") from error
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").exists()
    try:
        return _init_wandb(wandb, folder, "online" if has_key else "offline")
    except wandb.errors.Error as error:
        raise InputError(f"wandb refused the run: {error}") from error


def _init_wandb(wandb: Any, folder: RunFolder, mode: str) -> Any:
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", "instructgym"),
        name=folder.path.name,
        id=hashlib.sha1(str(folder.path.resolve()).encode()).hexdigest()[:16],
        resume="allow",
        dir=str(folder.path),
        config=folder.config,
        mode=os.environ.get("WANDB_MODE") or mode,
    )


def _number(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
