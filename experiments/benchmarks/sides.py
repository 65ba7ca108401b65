"""Two sides of a benchmark, each measured in a process of its own, alternately: figures and the table of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from ...llm_backends import Tokenizer
from ...llm_backends.errors import InputError
from .trl_environment import SHARED, clean_environment, installed

WORKERS = Path(__file__).resolve().parent / "workers"

MEASURES = {
    "tokens_per_cpu_second": "response tokens per CPU-second",
    "tokens_per_second": "response tokens per second",
    "peak_mb": "peak memory, MB",
}


@dataclass
class SidesOptions:
    """Options of a benchmark of training with LoRA against TRL or the bare passes."""

    against: Literal["trl", "floor"] = "trl"
    """trl: TRL's trainer; floor: the forwards and backwards of an update in plain transformers calls."""
    model: str = "tiny"
    """tiny (a GPT-2 of four layers with random weights), embedded, or the path of a model."""
    dtype: Literal["float32", "bfloat16", "default"] = "float32"
    """float32; bfloat16: autocast; default: what each side does unless told (the floor does as ours)."""
    rounds: int = 3
    """Measurements of each side, taken alternately, each in a process of its own."""
    threads: int = 1
    """Threads of each process."""
    lora_rank: int = 8
    """Rank of the adapters."""
    trl_python: str = ""
    """Interpreter of an environment with trl 1.12.0; by default one is prepared in the cache folder."""
    json: str = ""
    """File for the figures, as JSON."""


def module_command(name: str) -> list[str]:
    """The command that runs a module of ``workers/`` in this interpreter."""
    return [sys.executable, "-m", f"{__package__}.workers.{name}"]


def script_command(python: str, name: str) -> list[str]:
    """The command that runs a file of ``workers/``, which imports nothing of this library, in any interpreter."""
    return [python, str(WORKERS / f"{name}.py")]


@dataclass(frozen=True)
class Side:
    """What measures one side: a command that takes JSON and ends with a line of JSON.

    That line has ``tokens``, ``cpu_seconds``, ``wall_seconds``, ``start_mb``, ``peak_mb`` and ``computes_in``.
    """

    name: str
    command: Sequence[str]
    spec: dict[str, Any]
    """Settings for the command; ``threads`` is among them."""

    def work(self) -> dict[str, Any]:
        """Measures once.

        Raises:
            InputError: if the process fails, with the last line that it wrote.
        """
        environment = clean_environment(self.spec["threads"])
        if "-m" in self.command and "PYTHONPATH" in os.environ:
            environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
        done = subprocess.run([*self.command, json.dumps(self.spec)], capture_output=True, text=True, env=environment)
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            last = lines[-1] if lines else done.returncode
            raise InputError(f"the process that measures {self.name!r} failed: {last}")
        return json.loads(done.stdout.splitlines()[-1])


def measure_sides(ours: Side, theirs: Side, rounds: int) -> dict[str, Any]:
    """Measures both sides alternately.

    Args:
        ours: measured first.
        theirs: measured second.
        rounds: measurements of each.

    Returns:
        ``{"ours": ..., "theirs": ..., "ratio": ...}``: medians of :data:`MEASURES`, of the ratios with their spread.
    """
    works = [(ours.work(), theirs.work()) for _ in range(rounds)]
    mine, others = [list(side) for side in zip(*works, strict=True)]
    figures = {"ours": _side(mine), "theirs": _side(others), "ratio": {}}
    for name in MEASURES:
        ratios = [_measures(a)[name] / _measures(b)[name] for a, b in works]
        figures["ratio"] |= {
            name: float(np.median(ratios)),
            f"{name}_min": float(min(ratios)),
            f"{name}_max": float(max(ratios)),
        }
    return figures


def settings_of(options: SidesOptions, python: str, note: str) -> dict[str, Any]:
    """The ``settings`` of a benchmark's figures: its options, a note on what the sides do, and versions."""
    settings = {key: value for key, value in vars(options).items() if key not in ("json", "trl_python")}
    settings |= {"note": note, "versions": {package: version(package) for package in SHARED}}
    return settings | ({"their_versions": installed(python)} if options.against == "trl" else {})


def check_fits(options: Any, folder: str) -> None:
    """Refuses ``prompt_tokens`` and ``response_tokens`` that do not fit into a model's context."""
    wanted, reads = options.prompt_tokens + options.response_tokens, Tokenizer(folder).context_length
    if wanted > reads:
        raise InputError(
            f"--prompt-tokens and --response-tokens make {wanted} tokens, the model reads {reads}: lower one of them"
        )


def print_sides(title: str, against: str, figures: Mapping[str, Any], console: Console) -> None:
    """Prints the figures of :func:`measure_sides` with their ``settings``."""
    ours, theirs, ratio = figures["ours"], figures["theirs"], figures["ratio"]
    table = Table(title=title, caption=figures["settings"]["note"])
    for column in ("", "ours", against, "ratio (median, min to max)"):
        table.add_column(column)
    for name, measure in MEASURES.items():
        spread = f"{ratio[name]:.2f} ({ratio[f'{name}_min']:.2f} to {ratio[f'{name}_max']:.2f})"
        table.add_row(measure, f"{ours[name]:.0f}", f"{theirs[name]:.0f}", spread)
    table.add_row("memory before training, MB", f"{ours['start_mb']:.0f}", f"{theirs['start_mb']:.0f}", "")
    table.add_row("tokens measured", str(ours["tokens"]), str(theirs["tokens"]), "")
    table.add_row("computes in", ours["computes_in"], theirs["computes_in"], "")
    console.print(table)


def _measures(work: Mapping[str, Any]) -> dict[str, float]:
    return {
        "tokens_per_cpu_second": work["tokens"] / work["cpu_seconds"],
        "tokens_per_second": work["tokens"] / work["wall_seconds"],
        "peak_mb": work["peak_mb"],
    }


def _side(works: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [_measures(work) for work in works]
    medians = {name: float(np.median([row[name] for row in rows])) for name in MEASURES}
    start = float(np.median([work["start_mb"] for work in works]))
    timed = ("cpu_seconds", "wall_seconds", "start_mb", "peak_mb")
    return medians | {"start_mb": start} | {k: v for k, v in works[-1].items() if k not in timed} | {"rounds": rows}
