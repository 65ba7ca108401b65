"""``instructgym fine-grained figa``: trains a policy to imitate minimal edits, without a reward model.

The loss is a weighted cross-entropy: see :class:`~instructgym.agents.supervised.figa.FIGA`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from rich.console import Console

from ...agents.supervised.figa import FIGA
from ...agents.supervised.reward_modelling import tokenize_pairs
from ...llm_backends.errors import InputError
from ...rewards.learned.edits import read_pairs
from ..runs.options import Count, Required
from ..runs.training import Run, run_stage, tokenizer_of, trainer_settings
from .common import PolicyOptions


@dataclass
class FineGrainedFIGA(PolicyOptions):
    """Train a policy on edited pairs directly (FIGA)."""

    pairs: Annotated[str, Required("a JSONL file of edited pairs")] = ""
    """File of edited pairs: JSONL with 'prompt', 'original' and 'edited', such as edits.jsonl of 'fine-grained
    edit'."""
    epochs: Count = 5
    """Epochs over the pairs."""
    batch_size: Count = 32
    """Pairs per optimiser step."""
    learning_rate: float = 1e-4
    """Constant learning rate. The code of FIGA uses 1e-5 for all weights of a model; here only an adapter is
    trained."""


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
        policy = options.load(start)
        if opened.saved is None:
            policy.freeze_reference("sft")  # not used in training; evaluation measures the KL to it
        constant = {"schedule": "constant", "warmup": 0.0}
        trainer = FIGA(policy, options.seed, **trainer_settings(options, "batch_size") | constant)
        opened.supervised(trainer, pairs, f"figa on {len(pairs)} pairs")
        opened.save_policy(policy)
        counts = {"pairs": len(pairs), "dropped": dict(dropped) | dict(read.dropped), "steps": trainer.steps}
        return opened.finish({"loss": trainer.loss}, counts)

    return run_stage(options, "fine-grained figa", console, work, plan=f"train on {len(pairs)} pairs")
