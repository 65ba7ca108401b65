"""``instructgym fine-grained reward-model``: trains a reward model, per token or per response, on pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console

from ...agents.supervised.reward_modelling import RewardTrainer, TokenizedPair, evaluate_reward_model, tokenize_pairs
from ...llm_backends.errors import InputError
from ...llm_backends.training.adapters import LoraSettings
from ...rewards.learned.edits import read_pairs
from ...rewards.learned.reward_model import RewardModel
from ..runs.options import Count, Required, named
from ..runs.training import Run, run_stage, tokenizer_of, trainer_settings
from .common import StageOptions
from .heat_map import HeatRow, plot_heat_map, token_texts, write_html

HELD_OUT = 0.15
"""Share of the pairs that is withheld from training for the metrics, chosen by a hash of their prompts."""

HTML_PAIRS, PLOT_PAIRS = 40, 5
"""Number of held-out pairs on the HTML page and in the picture of token rewards."""

LOSSES = {"token": ("mean_bt", "edited_only_bt", "tlcr_ce"), "sequence": ("sequence_bt",)}


@dataclass
class FineGrainedRewardModel(StageOptions):
    """Train a reward model on edited or on preferred responses."""

    pairs: Annotated[str, Required("a JSONL file of edited pairs")] = ""
    """File of pairs: JSONL with 'prompt', 'original' and 'edited', such as edits.jsonl or preferences.jsonl of
    'fine-grained edit'."""
    model: str = "embedded"
    """Base model of the reward model: embedded, or a local path or hub id of a causal language model."""
    level: Literal["token", "sequence"] = "token"
    """What gets a reward. token: every token; sequence: the response as a whole, at its last token."""
    loss: str = ""
    """Loss of the training. For --level token: mean_bt (as in the paper), edited_only_bt or tlcr_ce; for sequence:
    sequence_bt. Empty: mean_bt or sequence_bt."""
    unchanged_penalty: float = 0.1
    """Weight of the mean square of the rewards of unchanged tokens, for --level token. Without it, unchanged tokens get
    a part of the credit of the edit before them. 0: no penalty, as published."""
    epochs: Count = 2
    """Epochs over the pairs."""
    batch_size: Count = 16
    """Pairs per optimiser step."""
    learning_rate: float = 5e-4
    """Peak learning rate (cosine, 10% warm-up)."""
    lora_rank: Count = 8
    """Rank of the LoRA adapter of the reward model."""
    limit: int = 0
    """Maximum number of pairs. 0: all."""

    def check(self) -> None:
        super().check()
        self.loss = self.loss or LOSSES[self.level][0]
        if self.loss not in LOSSES[self.level]:
            raise InputError(
                f"--loss {self.loss} is not for --level {self.level}: use {' or '.join(LOSSES[self.level])}"
            )


def run(options: FineGrainedRewardModel, console: Console | None = None) -> dict[str, Any]:
    """Trains (or resumes), evaluates on held-out pairs, and returns the results.

    Raises:
        InputError: if the input is invalid, before a model is loaded.
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

    def work(opened: Run) -> dict[str, Any]:
        lora = LoraSettings(rank=options.lora_rank)
        model = RewardModel(options.model, lora, **named(options, "level", "dtype", "seed"))
        settings = trainer_settings(options, "batch_size")
        if options.level == "token":
            settings["unchanged_penalty"] = options.unchanged_penalty
        trainer = RewardTrainer(model, options.loss, options.seed, **settings)
        opened.supervised(trainer, train, f"{options.level} reward model")
        model.save(opened.folder.file("model", "config.json").parent)
        metrics = evaluate_reward_model(model, held_out)
        if options.level == "token":
            _draw(model, held_out, opened.folder.file("figures", "tokens.png").parent)
        opened.show(metrics)
        left_out = dict(dropped) | dict(read.dropped)
        return opened.finish(metrics, {"pairs": len(train), "held_out": len(held_out), "dropped": left_out})

    plan = f"train on {len(train)} pairs and measure on {len(held_out)}"
    return run_stage(options, "fine-grained reward-model", console, work, plan=plan)


def _draw(model: RewardModel, pairs: Sequence[TokenizedPair], folder: Path) -> None:
    """Draws heat maps of the token rewards of some original and edited responses."""
    rows = []
    for pair in pairs[:HTML_PAIRS]:  # two rows per pair: original and edited
        for name, ids in (("original", pair.original), ("edited", pair.edited)):
            [rewards] = model.score([pair.prompt], [ids])
            rows.append(HeatRow(token_texts(ids.tolist(), model.tokenizer), rewards.tolist(), name))
    write_html(rows, folder / "tokens.html")
    plot_heat_map(rows[: 2 * PLOT_PAIRS], folder / "tokens.png")


def split_pairs(pairs: Sequence[TokenizedPair]) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    """Splits pairs into training and held-out pairs by a hash of the prompt; at least one prompt is held out."""
    hashes = [int.from_bytes(hashlib.sha256(pair.prompt.tobytes()).digest()[:4]) / 2**32 for pair in pairs]
    # All pairs of a prompt are on one side. If no hash is small enough, the prompt with the smallest is held out.
    limit = max(HELD_OUT, min(hashes, default=0.0))
    train = [pair for pair, value in zip(pairs, hashes, strict=True) if value > limit]
    return train, [pair for pair, value in zip(pairs, hashes, strict=True) if value <= limit]
