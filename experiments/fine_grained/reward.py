"""``instructgym fine-grained reward-model``: a reward per token, or one per response, learned from pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ...agents.supervised.reward_modelling import RewardTrainer, TokenizedPair, evaluate_reward_model, tokenize_pairs
from ...llm_backends.errors import InputError
from ...llm_backends.training.adapters import LoraSettings
from ...rewards.learned.edits import read_pairs
from ...rewards.learned.reward_model import RewardModel
from ..runs.options import check_counts
from ..runs.training import stage, tokenizer_of
from .common import StageOptions
from .heat_map import HeatRow, plot_heat_map, token_texts, write_html

HELD_OUT = 0.15
"""Share of the pairs that are kept for measuring, chosen by a hash of their prompts."""

SHOWN, DRAWN = 40, 5
"""Held-out pairs on the page and in the picture of token rewards."""

LOSSES = {"token": ("mean_bt", "edited_only_bt", "tlcr_ce"), "sequence": ("sequence_bt",)}


@dataclass
class FineGrainedRewardModel(StageOptions):
    """Train a reward model on edited or on preferred responses."""

    pairs: str = ""
    """JSONL with 'prompt', 'original' and 'edited': edits.jsonl or preferences.jsonl of 'fine-grained edit', or
    ready-made."""
    model: str = "embedded"
    """embedded, or a local path or hub id of a causal language model."""
    level: Literal["token", "sequence"] = "token"
    """token: a reward per token; sequence: one per response, at its last token."""
    loss: str = ""
    """token: mean_bt (the paper's, default), edited_only_bt or tlcr_ce; sequence: sequence_bt."""
    unchanged_penalty: float = 0.1
    """Token level: weight of the mean square of the rewards of unchanged tokens, which else share in the credit of the
    edit before them; 0 as published."""
    epochs: int = 2
    """Passes over the pairs."""
    batch_size: int = 16
    """Pairs per optimiser step."""
    learning_rate: float = 5e-4
    """Peak learning rate (cosine, 10% warm-up)."""
    lora_rank: int = 8
    """Rank of the adapter."""
    limit: int = 0
    """Pairs at most; 0 for all."""

    def check(self) -> None:
        super().check()
        check_counts(self, "epochs", "batch_size", "lora_rank")
        if not self.pairs:
            raise InputError("--pairs is missing: name a JSONL file of edited pairs")
        self.loss = self.loss or LOSSES[self.level][0]
        if self.loss not in LOSSES[self.level]:
            raise InputError(
                f"--loss {self.loss} is not for --level {self.level}: use {' or '.join(LOSSES[self.level])}"
            )


def run(options: FineGrainedRewardModel, console: Console | None = None) -> dict[str, Any]:
    """Trains (or resumes), measures on held-out pairs, and returns the results.

    Raises:
        InputError: for bad input, before a model is loaded.
    """
    console = console or Console()
    options.check()
    read = read_pairs(options.pairs)
    tokenizer = tokenizer_of(options.model)
    pairs, dropped = tokenize_pairs(read[: options.limit or None], tokenizer, options.context_length)
    train, held_out = split_pairs(pairs)
    if not train:
        raise InputError(
            f"{options.pairs} has {len(pairs)} usable pairs, too few to train on some and measure on others"
        )
    if options.dry_run:
        console.print(f"would train on {len(train)} pairs and measure on {len(held_out)}, in {options.run_dir}")
        return {}
    with stage(options, "fine-grained reward-model", console) as opened:
        if isinstance(opened, dict):
            return opened
        model = RewardModel(
            options.model,
            LoraSettings(rank=options.lora_rank),
            level=options.level,
            dtype=options.dtype,
            seed=options.seed,
        )
        trainer = RewardTrainer(
            model,
            options.loss,
            options.seed,
            learning_rate=options.learning_rate,
            schedule="cosine",
            warmup=0.1,
            batch_size=options.batch_size,
            epochs=options.epochs,
            token_budget=options.token_budget,
            unchanged_penalty=options.unchanged_penalty if options.level == "token" else 0.0,
        )
        done = opened.supervised(trainer, train, f"{options.level} reward model")
        if (results := opened.unfinished(done)) is not None:
            return results
        model.save(opened.folder.file("model", "config.json").parent)
        measured = evaluate_reward_model(model, held_out)
        if options.level == "token":
            _draw(model, held_out, opened.folder.file("figures", "tokens.png").parent)
        results = opened.folder.finish(
            measured,
            {
                "pairs": len(train),
                "held_out": len(held_out),
                "dropped": dict(dropped) | dict(read.dropped),
                "seconds": opened.seconds,
            },
        )
        opened.tracker.summary(results)
        console.print("  ".join(f"{name} {value:.3f}" for name, value in measured.items()), highlight=False)
        return results


def _draw(model: RewardModel, pairs: Sequence[TokenizedPair], folder: Path) -> None:
    """The token rewards of some originals and their edits, to look at."""
    rows = []
    for pair in pairs[:SHOWN]:
        for name, ids in (("original", pair.original), ("edited", pair.edited)):
            [rewards] = model.score([pair.prompt], [ids])
            rows.append(HeatRow(token_texts(ids.tolist(), model.tokenizer), rewards.tolist(), name))
    write_html(rows, folder / "tokens.html")
    plot_heat_map(rows[: 2 * DRAWN], folder / "tokens.png")


def split_pairs(pairs: Sequence[TokenizedPair]) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    """Pairs to train on, and those to measure on: by a hash of the prompt, one prompt at least."""
    hashes = [int.from_bytes(hashlib.sha256(pair.prompt.tobytes()).digest()[:4]) / 2**32 for pair in pairs]
    limit = max(HELD_OUT, min(hashes, default=0.0))
    kept = [pair for pair, value in zip(pairs, hashes, strict=True) if value > limit]
    return kept, [pair for pair, value in zip(pairs, hashes, strict=True) if value <= limit]
