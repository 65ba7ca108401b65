"""``instructgym bench token-ppo``: our PPO against TRL's, or against the passes that no PPO can avoid."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from ...llm_backends import Tokenizer
from ...llm_backends.causal_lm import computes_in_bfloat16
from ...llm_backends.errors import InputError
from ..options import check_counts, check_output
from ..run_folder import write_json
from .tiny import lora_targets, make_prompts, model_folder
from .trl_environment import SHARED, clean_environment, installed, trl_python

HERE = Path(__file__).resolve().parent
OURS = f"{__package__}.ppo_worker"

MEASURES = {
    "tokens_per_cpu_second": "response tokens per CPU-second",
    "tokens_per_second": "response tokens per second",
    "peak_mb": "peak memory, MB",
}
NOTES = {
    "trl": "TRL scores with a reward model and has a value model of its own; ours counts a letter and has a value head",
    "floor": "generate, one policy and one reference pass without gradients, epochs of forward and backward; no more",
}


@dataclass
class BenchTokenPPO:
    """Response tokens per CPU-second and peak memory of PPO with LoRA, ours and TRL's (or the bare passes)."""

    against: Literal["trl", "floor"] = "trl"
    """trl: TRL's PPO; floor: the forwards and backwards of an update in plain transformers calls."""
    model: str = "tiny"
    """tiny (a GPT-2 of four layers with random weights), embedded, or the path of a model."""
    dtype: Literal["float32", "bfloat16", "default"] = "float32"
    """float32; bfloat16: autocast; default: what each side does unless told (the floor does as ours)."""
    rounds: int = 3
    """Measurements of each side, taken alternately, each in a process of its own."""
    threads: int = 1
    """Threads of each process."""
    updates: int = 3
    """Measured updates; one comes before them to warm up."""
    batch: int = 32
    """Episodes per update."""
    prompt_tokens: int = 24
    """Tokens of every prompt."""
    response_tokens: int = 64
    """Tokens of every response; there is no end of sequence."""
    epochs: int = 4
    """Passes over an update's episodes, with one optimiser step each."""
    lora_rank: int = 8
    """Rank of the adapters."""
    trl_python: str = ""
    """Interpreter of an environment with trl 1.12.0; by default one is prepared in the cache folder."""
    json: str = ""
    """File for the figures, as JSON."""


def run(options: BenchTokenPPO, console: Console | None = None) -> dict[str, Any]:
    """Measures and returns ``{"ours": ..., "theirs": ..., "ratio": ..., "settings": ...}``.

    Raises:
        InputError: for options out of range, a model that cannot be used, or a side that cannot be run.
    """
    console = console or Console()
    _check(options)
    python = trl_python(options.trl_python, console) if options.against == "trl" else sys.executable
    with tempfile.TemporaryDirectory(prefix="instructgym-bench-") as scratch:
        folder = model_folder(options.model, Path(scratch))
        _check_context(options, folder)
        spec = {
            "model": folder,
            "prompts": make_prompts(folder, options.batch * (options.updates + 1), options.prompt_tokens),
            "dtype": options.dtype,
            "threads": options.threads,
            "updates": options.updates,
            "batch": options.batch,
            "response_tokens": options.response_tokens,
            "epochs": options.epochs,
            "rank": options.lora_rank,
            "alpha": 2 * options.lora_rank,
            "targets": lora_targets(folder),
        }
        theirs_spec = dict(spec)
        if options.against == "floor":
            if options.dtype == "default":
                theirs_spec["dtype"] = "bfloat16" if computes_in_bfloat16("cpu") else "float32"
            theirs_spec |= _work([python, str(HERE / "floor_worker.py")], theirs_spec, "floor")
        ours, theirs = [], []
        for _ in range(options.rounds):
            ours.append(_work([sys.executable, "-m", OURS], spec, "ours"))
            theirs.append(_work([python, str(HERE / f"{options.against}_worker.py")], theirs_spec, options.against))
    figures = _figures(options, ours, theirs)
    figures["settings"]["versions"] = {package: version(package) for package in SHARED}
    if options.against == "trl":
        figures["settings"]["their_versions"] = installed(python)
    _print(options, figures, console)
    if options.json:
        write_json(Path(options.json), figures)
    return figures


def _check(options: BenchTokenPPO) -> None:
    check_counts(
        options, "rounds", "threads", "updates", "batch", "prompt_tokens", "response_tokens", "epochs", "lora_rank"
    )
    if options.against == "trl" and options.batch > 8 and options.batch % 8:
        raise InputError(f"--batch must be a multiple of 8 against TRL, got {options.batch}")
    if options.json:
        check_output(Path(options.json))


def _check_context(options: BenchTokenPPO, folder: str) -> None:
    wanted, reads = options.prompt_tokens + options.response_tokens, Tokenizer(folder).context_length
    if wanted > reads:
        raise InputError(
            f"--prompt-tokens and --response-tokens make {wanted} tokens, the model reads {reads}: lower one of them"
        )


def _work(command: Sequence[str], spec: dict[str, Any], side: str) -> dict[str, Any]:
    """Runs a worker and reads the line of JSON that it ends with."""
    environment = clean_environment(spec["threads"])
    if side == "ours" and "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    done = subprocess.run([*command, json.dumps(spec)], capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise InputError(f"the process that measures {side!r} failed: {lines[-1] if lines else done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _measures(work: dict[str, Any]) -> dict[str, float]:
    return {
        "tokens_per_cpu_second": work["tokens"] / work["cpu_seconds"],
        "tokens_per_second": work["tokens"] / work["wall_seconds"],
        "peak_mb": work["peak_mb"],
    }


def _figures(options: BenchTokenPPO, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    def side(works: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [_measures(work) for work in works]
        medians = {name: float(np.median([row[name] for row in rows])) for name in MEASURES}
        start = float(np.median([work["start_mb"] for work in works]))
        timed = ("cpu_seconds", "wall_seconds", "start_mb", "peak_mb")
        return medians | {"start_mb": start} | {k: v for k, v in works[-1].items() if k not in timed} | {"rounds": rows}

    figures = {"ours": side(ours), "theirs": side(theirs), "ratio": {}}
    for name in MEASURES:
        ratios = [_measures(a)[name] / _measures(b)[name] for a, b in zip(ours, theirs, strict=True)]
        figures["ratio"] |= {
            name: float(np.median(ratios)),
            f"{name}_min": float(min(ratios)),
            f"{name}_max": float(max(ratios)),
        }
    settings = {key: value for key, value in vars(options).items() if key not in ("json", "trl_python")}
    return figures | {"settings": settings | {"note": NOTES[options.against]}}


def _print(options: BenchTokenPPO, figures: dict[str, Any], console: Console) -> None:
    ours, theirs, ratio = figures["ours"], figures["theirs"], figures["ratio"]
    table = Table(
        title=f"PPO on {options.model}, {options.batch} x {options.response_tokens} tokens, threads: {options.threads}",
        caption=NOTES[options.against],
    )
    for title in ("", "ours", options.against, "ratio (median, min to max)"):
        table.add_column(title)
    for name, title in MEASURES.items():
        spread = f"{ratio[name]:.2f} ({ratio[f'{name}_min']:.2f} to {ratio[f'{name}_max']:.2f})"
        table.add_row(title, f"{ours[name]:.0f}", f"{theirs[name]:.0f}", spread)
    table.add_row("memory before training, MB", f"{ours['start_mb']:.0f}", f"{theirs['start_mb']:.0f}", "")
    table.add_row("tokens measured", str(ours["tokens"]), str(theirs["tokens"]), "")
    table.add_row("computes in", ours["computes_in"], theirs["computes_in"], "")
    console.print(table)
