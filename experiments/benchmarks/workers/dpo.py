"""Measures DPO of this library once and prints a line of JSON.

Usage: ``python -m instructgym.experiments.benchmarks.workers.dpo JSON``. The JSON is the ``spec`` of
:func:`~instructgym.experiments.benchmarks.ranking.run`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....agents.policy.language_model import LanguageModelPolicy
from ....agents.preferences.trainer import RankingTrainer, TokenizedRankedList
from ....llm_backends.local.causal_lm import CausalLM
from ....llm_backends.local.loading import resolved_dtype
from ....llm_backends.training.adapters import LoraSettings
from ..tiny import peak_mb


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains on one batch as a warm-up, then on the measured batches, and returns the measurement."""
    torch.set_num_threads(spec["threads"])
    dtype = resolved_dtype("auto" if spec["dtype"] == "default" else spec["dtype"], "cpu")
    policy = LanguageModelPolicy(
        CausalLM.from_pretrained(spec["model"], dtype, "cpu"),
        LoraSettings(rank=spec["rank"], alpha=spec["alpha"], targets=spec["targets"]),
        value="none",
        dtype=dtype,
        device="cpu",
    )
    lists = [
        TokenizedRankedList(pair["prompt"], [pair["chosen"], pair["rejected"]], ranks=[1, 2])
        for pair in json.loads(Path(spec["pairs"]).read_text("utf-8"))
    ]
    trainer = RankingTrainer(policy, loss="dpo", beta=0.1, batch_size=spec["batch"], learning_rate=1e-5)
    before = peak_mb()
    first, rest = lists[: spec["batch"]], lists[spec["batch"] :]
    trainer.fit(first)  # warm-up
    cpu, wall = time.process_time(), time.perf_counter()
    trainer.fit(rest)
    cpu_seconds, wall_seconds = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "tokens": sum(len(response) for ranked in rest for response in ranked.candidates),
        "cpu_seconds": cpu_seconds,
        "wall_seconds": wall_seconds,
        "start_mb": before,
        "peak_mb": peak_mb(),
        "computes_in": dtype,
        "token_budget": trainer.settings.token_budget,
        "steps": trainer.steps,
        "loss": trainer.loss,
        "chosen_logprob": chosen_logprob(policy, first),
    }


def chosen_logprob(policy: LanguageModelPolicy, lists: list[TokenizedRankedList]) -> float:
    """Returns the mean log-prob of the better responses by the reference policy, in nats: equal on all sides."""
    prompts = [np.array(ranked.prompt) for ranked in lists]
    chosen = [np.array(ranked.candidates[0]) for ranked in lists]
    return float(policy.reference_logprobs(prompts, chosen, [None] * len(lists)).sum()) / len(lists)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
