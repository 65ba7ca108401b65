"""Benchmarks of training with LoRA against TRL or the bare passes, each side in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from ...llm_backends import Tokenizer
from ...llm_backends.errors import InputError
from ...llm_backends.local.loading import resolved_dtype
from ..runs.options import Count
from .frame import RATIO, BenchOptions, alternate, publish, ratio_row, scratch_folder, spread
from .tiny import lora_targets, model_folder
from .workers.trl_environment import SHARED, installed, output_of, trl_python

START = Path(__file__).resolve().parent / "workers" / "start.py"

MEASURES = {
    "tokens_per_cpu_second": "response tokens per CPU-second",
    "tokens_per_second": "response tokens per second",
    "peak_mb": "peak memory, MB",
}


@dataclass
class SidesOptions(BenchOptions):
    """Options of a benchmark of training with LoRA against TRL or the bare passes."""

    against: Literal["trl", "floor"] = "trl"
    """Baseline of the comparison. trl: the trainer of TRL; floor: only the forward and backward passes of an update, in
    plain transformers calls."""
    model: str = "tiny"
    """Model to train: tiny (a GPT-2 of four layers with random weights), embedded, or the path of a model."""
    dtype: Literal["float32", "bfloat16", "default"] = "float32"
    """Floating-point type of the computation. float32; bfloat16: autocast; default: the default of each side (the floor
    takes that of this library)."""
    rounds: Count = 3
    """Measurements of each side, taken alternately, each in its own process."""
    threads: Count = 1
    """Number of threads of each process."""
    lora_rank: Count = 8
    """Rank of the LoRA adapters."""
    trl_python: str = ""
    """Python interpreter of an environment with trl 1.12.0. Empty: one is prepared in the cache folder."""


def measure(worker: str, python: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a worker once, in a process of its own, and returns its measurement.

    Args:
        worker: module that measures, as ``workers/start.py`` takes it.
        python: interpreter that runs it.
        spec: settings for the worker, including ``threads``.

    Returns:
        :data:`MEASURES`, ``start_mb`` (the memory before training), ``tokens`` and ``computes_in``, and more.

    Raises:
        InputError: if the process fails; the message ends with the last line that it wrote.
    """
    command, failure = [python, str(START), worker], f"the process that runs {worker} failed"
    # Libraries may print before: the result is the last line.
    return json.loads(output_of(command, failure, json.dumps(spec), spec["threads"]).splitlines()[-1])


def run_sides(
    options: SidesOptions,
    algorithm: Literal["ppo", "dpo"],
    make_data: Callable[[str], list[Any]],
    title: str,
    notes: Mapping[str, str],
    console: Console,
) -> dict[str, Any]:
    """Measures both sides alternately, publishes and returns the results.

    Args:
        options: options of the benchmark, with ``batch``, ``prompt_tokens`` and ``response_tokens``, which the workers
            get as well.
        algorithm: what the workers train by.
        make_data: returns the data of the training for the folder of a tokenizer.
        title: title of the table.
        notes: what the sides compute, by baseline.
        console: where to print.

    Returns:
        ``{"ours": ..., "theirs": ..., "ratio": ..., "settings": ...}``: medians of :data:`MEASURES` of each side, and
            medians of the ratios within a round with their minimum and maximum.

    Raises:
        InputError: if an option is out of range, the model cannot be used, or a side fails.
    """
    options.check()
    settings, against = options.settings(), options.against
    trl, baseline = settings.pop("trl_python"), f"workers.{against}_{algorithm}"
    python = trl_python(trl, console) if against == "trl" else sys.executable
    with scratch_folder() as scratch:
        folder = model_folder(options.model, scratch)
        needed, limit = settings["prompt_tokens"] + settings["response_tokens"], Tokenizer(folder).context_length
        if needed > limit:
            raise InputError(f"--prompt-tokens and --response-tokens make {needed} tokens, the model reads {limit}")
        lora = {"rank": options.lora_rank, "alpha": 2 * options.lora_rank, "targets": lora_targets(folder)}
        baseline_spec = settings | {"model": folder, "data": make_data(folder), "lora": lora}
        own_spec = baseline_spec | {
            "dtype": resolved_dtype("auto" if options.dtype == "default" else options.dtype, "cpu")
        }
        if against == "floor":
            # Without "micro" in its spec, the worker returns its fastest micro-batch.
            baseline_spec = own_spec | measure(baseline, python, own_spec)
        sides = {
            "ours": lambda _: measure(f"{__package__}.workers.{algorithm}", sys.executable, own_spec),
            "theirs": lambda _: measure(baseline, python, baseline_spec),
        }
        measured = alternate(sides, options.rounds, warm_up=0)
    figures: dict[str, Any] = {side: _medians(measurements) for side, measurements in measured.items()}
    # Ratios within a round: both sides are measured one right after the other.
    columns = {name: [[each[name] for each in rounds] for rounds in measured.values()] for name in MEASURES}
    figures["ratio"] = {key: value for name in MEASURES for key, value in spread(name, *columns[name]).items()}
    figures["settings"] = settings | {"note": notes[against], "versions": {name: version(name) for name in SHARED}}
    if against == "trl":
        figures["settings"]["their_versions"] = installed(python)
    mine, other = figures["ours"], figures["theirs"]
    rows = [
        ("", "ours", against, RATIO),
        *(ratio_row(row, name, figures, ".0f") for name, row in MEASURES.items()),
        ("memory before training, MB", f"{mine['start_mb']:.0f}", f"{other['start_mb']:.0f}", ""),
        ("tokens measured", str(mine["tokens"]), str(other["tokens"]), ""),
        ("computes in", mine["computes_in"], other["computes_in"], ""),
    ]
    return publish(options, figures, f"{title}, threads: {options.threads}", rows, console)


def _medians(measurements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the last measurement of a side with medians of rates and memory, and the rows of all rounds."""
    medians = {name: float(np.median([each[name] for each in measurements])) for name in (*MEASURES, "start_mb")}
    return {**measurements[-1], **medians, "rounds": [{name: each[name] for name in MEASURES} for each in measurements]}
