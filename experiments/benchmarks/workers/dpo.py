"""Measures DPO of this library once."""

from __future__ import annotations

from typing import Any

import numpy as np

from ....agents.policy.language_model import LanguageModelPolicy
from ....agents.preferences.trainer import RankingTrainer, TokenizedRankedList
from ....llm_backends.local.causal_lm import CausalLM
from ....llm_backends.training.adapters import LoraSettings
from .common import Meter


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains on one batch as a warm-up, then on the measured batches, and returns the measurement."""
    lm = CausalLM.from_pretrained(spec["model"], spec["dtype"], "cpu")
    policy = LanguageModelPolicy(lm, LoraSettings(**spec["lora"]), value="none", dtype=spec["dtype"], device="cpu")
    lists = [
        TokenizedRankedList(pair["prompt"], [pair["chosen"], pair["rejected"]], ranks=[1, 2]) for pair in spec["data"]
    ]
    trainer = RankingTrainer(policy, loss="dpo", beta=0.1, batch_size=spec["batch"], learning_rate=1e-5)
    meter = Meter()
    meter.start()
    first, rest = lists[: spec["batch"]], lists[spec["batch"] :]
    for part in (first, rest):
        trainer.fit(part)
        meter.tokens += sum(len(response) for ranked in part for response in ranked.candidates)
        meter.mark()
    measured = meter.measurement(
        spec["dtype"], token_budget=trainer.settings.token_budget, steps=trainer.steps, loss=trainer.loss
    )
    # After the memory was read, because it takes memory of its own.
    return measured | {"chosen_logprob": chosen_logprob(policy, first)}


def chosen_logprob(policy: LanguageModelPolicy, lists: list[TokenizedRankedList]) -> float:
    """Returns the mean log-prob of the better responses by the reference policy, in nats: equal on all sides."""
    prompts = [np.array(ranked.prompt) for ranked in lists]
    chosen = [np.array(ranked.candidates[0]) for ranked in lists]
    return float(policy.reference_logprobs(prompts, chosen, [None] * len(lists)).sum()) / len(lists)
