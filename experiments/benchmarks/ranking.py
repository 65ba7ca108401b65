"""``instructgym bench ranking``: compares DPO of this library with TRL, or with the passes that no DPO can avoid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from ...llm_backends.errors import InputError
from ...llm_backends.local.loading import load_tokenizer
from ..runs.options import Count
from .sides import SidesOptions, run_sides
from .tiny import WORDS, make_prompts

NOTES = {
    "trl": "every pair is seen once; both compute its reference log-probs on the way, with the adapters switched off",
    "floor": "of every pair one reference pass without gradients, one policy pass forward and backward; no more",
}


@dataclass
class BenchRanking(SidesOptions):
    """Response tokens per CPU-second and peak memory of DPO with LoRA, ours and TRL's (or the bare passes)."""

    steps: Count = 4
    """Number of measured optimiser steps, after one warm-up step."""
    batch: Count = 16
    """Pairs per optimiser step."""
    prompt_tokens: Count = 48
    """Number of tokens of every prompt."""
    response_tokens: Count = 64
    """Number of tokens of the longest responses. The shortest have half as many."""
    seed: int = 0
    """Seed of the random words and lengths of the pairs."""
    trl_pairs: Count = 8
    """Pairs per micro-batch of TRL, at most --batch. Fewer pairs take less memory and, to a point, more time."""
    checkpointing: bool = False
    """Let TRL use gradient checkpointing, which takes less memory and more time. It is the default of TRL itself."""

    def check(self) -> None:
        super().check()
        if self.against == "trl" and self.batch % min(self.trl_pairs, self.batch):
            raise InputError(f"--batch must be a multiple of --trl-pairs ({self.trl_pairs}), got {self.batch}")
        if self.checkpointing and self.against != "trl":
            raise InputError("--checkpointing is an option of TRL: leave it out or add --against trl")


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


def run(options: BenchRanking, console: Console) -> dict[str, Any]:
    """Measures both sides and returns ``{"ours": ..., "theirs": ..., "ratio": ..., "settings": ...}``.

    Raises:
        InputError: if an option is out of range, the model cannot be used, or a side fails.
    """
    count, sizes = options.batch * (options.steps + 1), (options.prompt_tokens, options.response_tokens)
    title = f"DPO on {options.model}, {options.batch} pairs of {sizes[0]} + up to {sizes[1]} tokens"

    def pairs(folder: str) -> list[dict[str, list[int]]]:
        return make_pairs(folder, count, *sizes, options.seed)

    return run_sides(options, "dpo", pairs, title, NOTES, console)
