"""``instructgym bench token-ppo``: compares PPO of this library with TRL, or with the passes that no PPO can avoid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console

from ...llm_backends.errors import InputError
from ..runs.options import Count
from .sides import SidesOptions, run_sides
from .tiny import make_prompts

NOTES = {
    "trl": "TRL scores with a reward model and has a value model of its own; ours counts a letter and has a value head",
    "floor": "generate, one policy and one reference pass without gradients, epochs of forward and backward; no more",
}


@dataclass
class BenchTokenPPO(SidesOptions):
    """Response tokens per CPU-second and peak memory of PPO with LoRA, ours and TRL's (or the bare passes)."""

    updates: Count = 3
    """Number of measured updates, after one warm-up update."""
    batch: Count = 32
    """Number of episodes per update."""
    prompt_tokens: Count = 24
    """Number of tokens of every prompt."""
    response_tokens: Count = 64
    """Number of tokens of every response. No end-of-sequence token shortens it."""
    epochs: Count = 4
    """Epochs over the episodes of an update, with one optimiser step each."""

    def check(self) -> None:
        super().check()
        # TRL's side has micro-batches of 8 episodes.
        if self.against == "trl" and self.batch > 8 and self.batch % 8:
            raise InputError(f"--batch must be a multiple of 8 against TRL, got {self.batch}")


def run(options: BenchTokenPPO, console: Console) -> dict[str, Any]:
    """Measures both sides and returns ``{"ours": ..., "theirs": ..., "ratio": ..., "settings": ...}``.

    Raises:
        InputError: if an option is out of range, the model cannot be used, or a side fails.
    """
    prompts = partial(make_prompts, count=options.batch * (options.updates + 1), length=options.prompt_tokens)
    title = f"PPO on {options.model}, {options.batch} x {options.response_tokens} tokens"
    return run_sides(options, "ppo", prompts, title, NOTES, console)
