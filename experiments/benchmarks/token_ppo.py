"""``instructgym bench token-ppo``: compares PPO of this library with TRL, or with the passes that no PPO can avoid."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ...llm_backends.errors import InputError
from ...llm_backends.local.loading import resolved_dtype
from ..runs.folder import write_json
from ..runs.options import check_counts, check_output
from .sides import (
    Side,
    SidesOptions,
    check_fits,
    measure_sides,
    module_command,
    print_sides,
    script_command,
    settings_of,
)
from .tiny import lora_targets, make_prompts, model_folder
from .workers.trl_environment import trl_python

NOTES = {
    "trl": "TRL scores with a reward model and has a value model of its own; ours counts a letter and has a value head",
    "floor": "generate, one policy and one reference pass without gradients, epochs of forward and backward; no more",
}


@dataclass
class BenchTokenPPO(SidesOptions):
    """Response tokens per CPU-second and peak memory of PPO with LoRA, ours and TRL's (or the bare passes)."""

    updates: int = 3
    """Number of measured updates, after one warm-up update."""
    batch: int = 32
    """Number of episodes per update."""
    prompt_tokens: int = 24
    """Number of tokens of every prompt."""
    response_tokens: int = 64
    """Number of tokens of every response. No end-of-sequence token shortens it."""
    epochs: int = 4
    """Epochs over the episodes of an update, with one optimiser step each."""


def run(options: BenchTokenPPO, console: Console | None = None) -> dict[str, Any]:
    """Measures both sides and returns ``{"ours": ..., "theirs": ..., "ratio": ..., "settings": ...}``.

    Raises:
        InputError: if an option is out of range, the model cannot be used, or a side fails.
    """
    console = console or Console()
    _check(options)
    python = trl_python(options.trl_python, console) if options.against == "trl" else sys.executable
    with tempfile.TemporaryDirectory(prefix="instructgym-bench-") as scratch:
        folder = model_folder(options.model, Path(scratch))
        check_fits(options, folder)
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
        baseline = Side(options.against, script_command(python, f"{options.against}_ppo"), spec)
        if options.against == "floor":
            dtype = resolved_dtype("auto" if options.dtype == "default" else options.dtype, "cpu")
            baseline = replace(baseline, spec=spec | {"dtype": dtype})
            # Without "micro" in its spec, the worker returns its fastest micro-batch.
            baseline = replace(baseline, spec=baseline.spec | baseline.measure())
        figures = measure_sides(Side("ours", module_command("ppo"), spec), baseline, options.rounds)
    figures["settings"] = settings_of(options, python, NOTES[options.against])
    title = f"PPO on {options.model}, {options.batch} x {options.response_tokens} tokens, threads: {options.threads}"
    print_sides(title, options.against, figures, console)
    if options.json:
        write_json(Path(options.json), figures)
    return figures


def _check(options: BenchTokenPPO) -> None:
    """Raises an InputError if an option is out of range."""
    check_counts(
        options, "rounds", "threads", "updates", "batch", "prompt_tokens", "response_tokens", "epochs", "lora_rank"
    )
    # TRL's side has micro-batches of 8 episodes.
    if options.against == "trl" and options.batch > 8 and options.batch % 8:
        raise InputError(f"--batch must be a multiple of 8 against TRL, got {options.batch}")
    if options.json:
        check_output(Path(options.json))
