"""``instructgym bench ranking``: compares DPO of this library with TRL, or with the passes that no DPO can avoid."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...llm_backends.errors import InputError
from ...llm_backends.local.loading import load_tokenizer, resolved_dtype
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
from .tiny import WORDS, lora_targets, make_prompts, model_folder
from .workers.trl_environment import trl_python

NOTES = {
    "trl": "every pair is seen once; both compute its reference log-probs on the way, with the adapters switched off",
    "floor": "of every pair one reference pass without gradients, one policy pass forward and backward; no more",
}


@dataclass
class BenchRanking(SidesOptions):
    """Response tokens per CPU-second and peak memory of DPO with LoRA, ours and TRL's (or the bare passes)."""

    steps: int = 4
    """Number of measured optimiser steps, after one warm-up step."""
    batch: int = 16
    """Pairs per optimiser step."""
    prompt_tokens: int = 48
    """Number of tokens of every prompt."""
    response_tokens: int = 64
    """Number of tokens of the longest responses. The shortest have half as many."""
    seed: int = 0
    """Seed of the random words and lengths of the pairs."""
    trl_pairs: int = 8
    """Pairs per micro-batch of TRL, at most --batch. Fewer pairs take less memory and, to a point, more time."""
    checkpointing: bool = False
    """Let TRL use gradient checkpointing, which takes less memory and more time. It is the default of TRL itself."""


def make_pairs(
    folder: str, count: int, prompt_tokens: int, response_tokens: int, seed: int
) -> list[dict[str, list[int]]]:
    """Returns pairs of responses of random words to different prompts.

    Args:
        folder: folder of a tokenizer.
        count: number of pairs.
        prompt_tokens: number of tokens of every prompt.
        response_tokens: number of tokens of the longest responses; lengths are uniform from half of it to all of it.
        seed: seed of words and lengths.

    Returns:
        Token ids under ``prompt``, ``chosen`` and ``rejected``.

    Raises:
        InputError: if the tokenizer gives too few different prompts of that length.
    """
    tokenizer, rng = load_tokenizer(folder), np.random.default_rng(seed)

    def response() -> list[int]:
        length = int(rng.integers(-(-response_tokens // 2), response_tokens + 1))
        text = "".join(f" {word}" for word in rng.choice(WORDS, length))
        return tokenizer(text, add_special_tokens=False)["input_ids"][:length]

    return [
        {"prompt": tokenizer(prompt)["input_ids"], "chosen": response(), "rejected": response()}
        for prompt in make_prompts(folder, count, prompt_tokens)
    ]


def run(options: BenchRanking, console: Console | None = None) -> dict[str, Any]:
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
        # Both sides read the same pairs from one file.
        pairs, pair_count = Path(scratch) / "pairs.json", options.batch * (options.steps + 1)
        sizes = (options.prompt_tokens, options.response_tokens)
        pairs.write_text(json.dumps(make_pairs(folder, pair_count, *sizes, options.seed)), "utf-8")
        spec = {
            "model": folder,
            "pairs": str(pairs),
            "dtype": options.dtype,
            "threads": options.threads,
            "batch": options.batch,
            "rank": options.lora_rank,
            "alpha": 2 * options.lora_rank,
            "targets": lora_targets(folder),
        }
        if options.against == "floor":
            dtype = resolved_dtype("auto" if options.dtype == "default" else options.dtype, "cpu")
            baseline = Side("floor", module_command("floor_dpo"), spec | {"dtype": dtype})
            # Without "micro" in its spec, the worker returns its fastest micro-batch.
            baseline = replace(baseline, spec=baseline.spec | baseline.measure())
        else:
            trl_options = {"micro": min(options.trl_pairs, options.batch), "checkpointing": options.checkpointing}
            baseline = Side("trl", script_command(python, "trl_dpo"), spec | trl_options)
        figures = measure_sides(Side("ours", module_command("dpo"), spec), baseline, options.rounds)
    figures["settings"] = settings_of(options, python, NOTES[options.against])
    title = f"DPO on {options.model}, {options.batch} pairs of {sizes[0]} + up to {sizes[1]} tokens"
    print_sides(f"{title}, threads: {options.threads}", options.against, figures, console)
    if options.json:
        write_json(Path(options.json), figures)
    return figures


def _check(options: BenchRanking) -> None:
    """Raises an InputError if an option is out of range."""
    check_counts(
        options, "rounds", "threads", "steps", "batch", "prompt_tokens", "response_tokens", "lora_rank", "trl_pairs"
    )
    if not options.seed >= 0:
        raise InputError(f"--seed must be at least 0, got {options.seed}")
    if options.against == "trl" and options.batch % min(options.trl_pairs, options.batch):
        raise InputError(f"--batch must be a multiple of --trl-pairs ({options.trl_pairs}), got {options.batch}")
    if options.checkpointing and options.against != "trl":
        raise InputError("--checkpointing is an option of TRL: leave it out or add --against trl")
    if options.json:
        check_output(Path(options.json))
