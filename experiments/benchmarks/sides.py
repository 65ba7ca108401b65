"""Alternating measurement of the two sides of a benchmark, each in its own process, and the table of both."""

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
from .workers.trl_environment import SHARED, clean_environment, installed

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
    """Baseline of the comparison. trl: the trainer of TRL; floor: only the forward and backward passes of an update, in
    plain transformers calls."""
    model: str = "tiny"
    """Model to train: tiny (a GPT-2 of four layers with random weights), embedded, or the path of a model."""
    dtype: Literal["float32", "bfloat16", "default"] = "float32"
    """Floating-point type of the computation. float32; bfloat16: autocast; default: the default of each side (the floor
    takes that of this library)."""
    rounds: int = 3
    """Measurements of each side, taken alternately, each in its own process."""
    threads: int = 1
    """Number of threads of each process."""
    lora_rank: int = 8
    """Rank of the LoRA adapters."""
    trl_python: str = ""
    """Python interpreter of an environment with trl 1.12.0. Empty: one is prepared in the cache folder."""
    json: str = ""
    """JSON file for the results. Empty: do not write one."""


def module_command(name: str) -> list[str]:
    """Returns the command that runs a module of ``workers/`` in this interpreter."""
    return [sys.executable, "-m", f"{__package__}.workers.{name}"]


def script_command(python: str, name: str) -> list[str]:
    """Returns the command that runs a file of ``workers/`` in any interpreter, without this library."""
    return [python, str(WORKERS / f"{name}.py")]


@dataclass(frozen=True)
class Side:
    """One side of a benchmark: a command that takes JSON as its argument and prints a line of JSON last.

    The line has the keys ``tokens``, ``cpu_seconds``, ``wall_seconds``, ``start_mb``, ``peak_mb`` and ``computes_in``.
    """

    name: str
    command: Sequence[str]
    spec: dict[str, Any]
    """Settings for the command, including ``threads``."""

    def measure(self) -> dict[str, Any]:
        """Runs the command once and returns the JSON of its last line.

        Raises:
            InputError: if the process fails; the message holds the last line that it wrote.
        """
        environment = clean_environment(self.spec["threads"])
        # Only a module of this library needs the path of this process.
        if "-m" in self.command and "PYTHONPATH" in os.environ:
            environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
        done = subprocess.run([*self.command, json.dumps(self.spec)], capture_output=True, text=True, env=environment)
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            last = lines[-1] if lines else done.returncode
            raise InputError(f"the process that measures {self.name!r} failed: {last}")
        # Libraries may print before: the result is the last line.
        return json.loads(done.stdout.splitlines()[-1])


def measure_sides(ours: Side, theirs: Side, rounds: int) -> dict[str, Any]:
    """Measures both sides alternately.

    Args:
        ours: side that is measured first.
        theirs: side that is measured second.
        rounds: measurements of each side.

    Returns:
        ``{"ours": ..., "theirs": ..., "ratio": ...}``: medians of :data:`MEASURES` of each side, and medians of the
            ratios within a round with their minimum and maximum.
    """
    measurements = [(ours.measure(), theirs.measure()) for _ in range(rounds)]
    our_measurements, their_measurements = [list(side) for side in zip(*measurements, strict=True)]
    figures = {"ours": _side(our_measurements), "theirs": _side(their_measurements), "ratio": {}}
    # Ratios within a round: both sides are measured one right after the other.
    for name in MEASURES:
        ratios = [_measures(a)[name] / _measures(b)[name] for a, b in measurements]
        figures["ratio"] |= {
            name: float(np.median(ratios)),
            f"{name}_min": float(min(ratios)),
            f"{name}_max": float(max(ratios)),
        }
    return figures


def settings_of(options: SidesOptions, python: str, note: str) -> dict[str, Any]:
    """Returns the ``settings`` of the results: options, a note on what the sides compute, and versions of packages."""
    settings = {key: value for key, value in vars(options).items() if key not in ("json", "trl_python")}
    settings |= {"note": note, "versions": {package: version(package) for package in SHARED}}
    return settings | ({"their_versions": installed(python)} if options.against == "trl" else {})


def check_fits(options: Any, folder: str) -> None:
    """Raises an InputError if ``prompt_tokens`` and ``response_tokens`` do not fit into the context of the model."""
    needed, limit = options.prompt_tokens + options.response_tokens, Tokenizer(folder).context_length
    if needed > limit:
        raise InputError(
            f"--prompt-tokens and --response-tokens make {needed} tokens, the model reads {limit}: lower one of them"
        )


def print_sides(title: str, against: str, figures: Mapping[str, Any], console: Console) -> None:
    """Prints the results of :func:`measure_sides`, which must have ``settings``, as a table."""
    ours, baseline, ratio = figures["ours"], figures["theirs"], figures["ratio"]
    table = Table(title=title, caption=figures["settings"]["note"])
    for column in ("", "ours", against, "ratio (median, min to max)"):
        table.add_column(column, overflow="fold")
    for name, measure in MEASURES.items():
        spread = f"{ratio[name]:.2f} ({ratio[f'{name}_min']:.2f} to {ratio[f'{name}_max']:.2f})"
        table.add_row(measure, f"{ours[name]:.0f}", f"{baseline[name]:.0f}", spread)
    table.add_row("memory before training, MB", f"{ours['start_mb']:.0f}", f"{baseline['start_mb']:.0f}", "")
    table.add_row("tokens measured", str(ours["tokens"]), str(baseline["tokens"]), "")
    table.add_row("computes in", ours["computes_in"], baseline["computes_in"], "")
    console.print(table)


def _measures(measurement: Mapping[str, Any]) -> dict[str, float]:
    """Returns the values of :data:`MEASURES` of one measurement."""
    return {
        "tokens_per_cpu_second": measurement["tokens"] / measurement["cpu_seconds"],
        "tokens_per_second": measurement["tokens"] / measurement["wall_seconds"],
        "peak_mb": measurement["peak_mb"],
    }


def _side(measurements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns medians over the measurements of a side, its other results, and the rows of all rounds."""
    rows = [_measures(measurement) for measurement in measurements]
    medians = {name: float(np.median([row[name] for row in rows])) for name in MEASURES}
    start = float(np.median([measurement["start_mb"] for measurement in measurements]))
    timed = ("cpu_seconds", "wall_seconds", "start_mb", "peak_mb")
    return (
        medians | {"start_mb": start} | {k: v for k, v in measurements[-1].items() if k not in timed} | {"rounds": rows}
    )
