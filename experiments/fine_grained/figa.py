"""``instructgym fine-grained figa``: trains a policy to imitate minimal edits, without a reward model.

The loss is a weighted cross-entropy: see :class:`~instructgym.agents.supervised.figa.FIGA`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ...agents.supervised.figa import FIGA
from ...agents.supervised.reward_modelling import tokenize_pairs
from ...llm_backends.errors import InputError
from ...rewards.learned.edits import read_pairs
from ..runs.options import Count
from ..runs.training import Run, tokenizer_of
from .common import PolicyOptions, load_stage_policy


@dataclass
class FineGrainedFIGA(PolicyOptions):
    """Train a policy on edited pairs directly (FIGA)."""

    pairs: str = ""
    """File of edited pairs: JSONL with 'prompt', 'original' and 'edited', such as edits.jsonl of 'fine-grained
    edit'."""
    epochs: Count = 5
    """Epochs over the pairs."""
    batch_size: Count = 32
    """Pairs per optimiser step."""
    learning_rate: float = 1e-4
    """Constant learning rate. The code of FIGA uses 1e-5 for all weights of a model; here only an adapter is
    trained."""

    def check(self) -> None:
        super().check()
        if not self.pairs:
            raise InputError("--pairs is missing: name a JSONL file of edited pairs")


def run(options: FineGrainedFIGA, console: Console | None = None) -> dict[str, Any]:
    """Trains (or resumes), saves the policy and returns the results.

    Raises:
        InputError: if the input is invalid, before a model is loaded.
    """
    console = console or Console()
    options.check()
    start, model = options.start()
    read = read_pairs(options.pairs)
    pairs, dropped = tokenize_pairs(read, tokenizer_of(model), options.context_length)
    if not pairs:
        raise InputError(f"{options.pairs} has no pair that can be used: {dropped}")

    def work(opened: Run) -> dict[str, Any]:
        policy = load_stage_policy(options, start)
        if opened.saved is None:
            policy.freeze_reference("sft")  # not used in training; evaluation measures the KL to it
        trainer = FIGA(
            policy,
            options.seed,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
            epochs=options.epochs,
            token_budget=options.token_budget,
        )
        opened.supervised(trainer, pairs, f"figa on {len(pairs)} pairs")
        policy.save(opened.folder.file("policy", "policy.json").parent)
        return opened.folder.finish(
            {"loss": trainer.loss},
            {
                "pairs": len(pairs),
                "dropped": dict(dropped) | dict(read.dropped),
                "steps": trainer.steps,
                "seconds": opened.seconds,
            },
        )

    return options.run("fine-grained figa", console, f"train on {len(pairs)} pairs", work)
