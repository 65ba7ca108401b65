"""``instructgym finetune``: supervised fine-tuning of a language model on a data set of instructions.

``instructgym evaluate`` then measures what the model has learned, ``instructgym privacy`` whether it gives its training
rows away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from rich.console import Console

from ...agents.supervised.sft import SFT, TokenizedDemonstration
from ...envs.tasks.instruction.data import (
    OPENINGS,
    DataLayout,
    InstructionData,
    InstructionExample,
    prompt_text,
    read_instruction_data,
)
from ...llm_backends import request_seed
from ...llm_backends.errors import InputError
from ...llm_backends.local.tokenization import Tokenizer
from ..runs.folder import write_once
from ..runs.options import Count, Positive, Required
from ..runs.training import (
    Run,
    TrainingOptions,
    new_policy,
    run_stage,
    tokenized_demonstrations,
    tokenizer_of,
    trainer_settings,
)

TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"
"""Files of the run folder: the rows trained on, and those withheld from training."""


@dataclass
class Finetune(TrainingOptions):
    """Fine-tune a language model on instruction data; the loss is on the responses alone."""

    data: Annotated[str, Required("a data set (JSONL, JSON or Parquet)")] = ""
    """File of the data set: JSONL, JSON or Parquet with instruction, input and output (or messages, or Self-Instruct's
    instances)."""
    model: str = "embedded"
    """Model to fine-tune: embedded, or a local path or hub id of a causal language model."""
    limit: int = 0
    """Train on exactly this number of rows, drawn at random by the seed, so that data sets are compared at equal size.
    0: all rows."""
    holdout: float = 0.0
    """Rows withheld from training, for membership inference: a share of all rows if below 1, else a number of rows."""
    layout: Literal["chat", "plain", "alpaca"] = "chat"
    """How requests are written. chat: in the model's chat template; plain: as a text to continue; alpaca: as in
    Stanford Alpaca."""
    epochs: Count = 3
    """Passes over the training rows."""
    batch_size: Count = 16
    """Rows per optimiser step."""
    learning_rate: Positive = 2e-4
    """Peak learning rate (cosine schedule, 10% warm-up)."""
    lora_rank: int = 16
    """Rank of the LoRA adapter. 0: train all weights."""
    context_length: Count = 512
    """Maximum tokens of request and response together; longer rows are dropped and counted."""

    def check(self) -> None:
        super().check()
        if self.holdout > 1 and self.holdout % 1:
            raise InputError(f"--holdout must be a share below 1 or a whole number, got {self.holdout}")


def demonstrations(
    examples: Sequence[InstructionExample], layout: DataLayout, tokenizer: Tokenizer
) -> list[TokenizedDemonstration]:
    """Tokenizes examples for fine-tuning; each response ends with an end-of-sequence token.

    Args:
        examples: the requests and their responses.
        layout: how the requests are written.
        tokenizer: tokenizer of the model.

    Raises:
        InputError: if the tokenizer has no end-of-sequence token or, for the layout ``chat``, no chat template.
    """
    prompts = [prompt_text(example, layout, tokenizer) for example in examples]
    responses = [f"{OPENINGS[layout]}{example.output}" for example in examples]
    return tokenized_demonstrations(prompts, responses, tokenizer, layout == "chat")


@dataclass(frozen=True)
class RowSplit:
    """The split of a data set's rows."""

    train: list[int]
    """Indices of the rows to train on."""
    held_out: list[int]
    """Indices of the rows withheld from training."""
    too_long: int
    """Number of rows that do not fit the context."""
    unused: int
    """Number of rows beyond the limit."""


def split_rows(lengths: Sequence[int], options: Finetune) -> RowSplit:
    """Draws the rows to train on and those to withhold, by the seed, from the rows that fit the context.

    Args:
        lengths: tokens of each row.
        options: options with limit, holdout, context length and seed.

    Raises:
        InputError: if too few rows are left to train on, naming the option.
    """
    fitting = [i for i, length in enumerate(lengths) if length <= options.context_length]
    if not fitting:
        raise InputError(f"no row of {options.data} fits --context-length {options.context_length}")
    rng = np.random.default_rng(request_seed(options.seed, "finetune rows"))
    order = [fitting[i] for i in rng.permutation(len(fitting))]
    # The withheld rows come first in the drawn order: the limit does not change them.
    withheld = round(options.holdout * len(order)) if options.holdout < 1 else int(options.holdout)
    left = len(order) - withheld
    if left < max(options.limit, 1):
        kept = f"; --holdout {options.holdout:g} withholds {withheld} and leaves {max(left, 0)}" if withheld else ""
        reason = f"--limit {options.limit} needs as many" if options.limit else "none may be withheld"
        raise InputError(
            f"{options.data} has {len(order)} usable rows of {len(lengths)}{kept}, but {reason}: lower it, or make more"
        )
    train = sorted(order[withheld:][: options.limit or None])
    return RowSplit(train, sorted(order[:withheld]), len(lengths) - len(order), left - len(train))


def usable_rows(options: Finetune) -> int:
    """Returns how many rows of the data set can be trained on: those that fit the context, duplicates counted once.

    Raises:
        InputError: for data that cannot be used.
    """
    return sum(length <= options.context_length for length in _lengths(_read(options)[1]))


def _read(options: Finetune) -> tuple[InstructionData, list[TokenizedDemonstration]]:
    """Returns the data set, and its rows as token ids."""
    data = read_instruction_data(options.data, "--data")
    tokenizer = tokenizer_of(options.model, options.context_length)
    return data, demonstrations(data.examples, options.layout, tokenizer)


def _lengths(tokenized: Sequence[TokenizedDemonstration]) -> list[int]:
    """Returns the tokens of prompt and response of each row."""
    return [len(row.prompt) + len(row.response) for row in tokenized]


def run(options: Finetune, console: Console | None = None) -> dict[str, Any]:
    """Fine-tunes the model, or resumes it, saves the policy and returns the results.

    The run folder gets ``policy/``, and the rows trained on and withheld in ``train.jsonl`` and ``held_out.jsonl``.

    Raises:
        InputError: for bad input, before a model is loaded.
    """
    console = console or Console()
    options.check()
    data, tokenized = _read(options)
    rows = split_rows(_lengths(tokenized), options)

    def work(opened: Run) -> dict[str, Any]:
        # Written before training: a resumed run raises an error if the data have changed.
        for name, numbers in ((TRAIN, rows.train), (HELD_OUT, rows.held_out)):
            write_once(opened.folder.file(name), [data.examples[i].row() for i in numbers])
        policy = new_policy(options, value="shared")
        trainer = SFT(policy, options.seed, **trainer_settings(options, "batch_size"))
        training_rows = [tokenized[i] for i in rows.train]
        opened.supervised(trainer, training_rows, f"fine-tuning on {Path(options.data).name}")
        opened.save_policy(policy)
        console.print(f"trained on {len(training_rows)} rows in {opened.seconds:.0f} s, loss {trainer.loss:.3f}")
        counts = {
            "train": len(rows.train),
            "held_out": len(rows.held_out),
            "unused": rows.unused,
            "dropped": {"too long": rows.too_long, "duplicates": data.duplicates},
            "response_tokens": sum(len(row.response) for row in training_rows),
            "steps": trainer.steps,
        }
        return opened.finish({"loss": trainer.loss}, counts)

    plan = f"train on {len(rows.train)} rows of {options.data} and withhold {len(rows.held_out)}"
    return run_stage(options, "finetune", console, work, plan=plan)
