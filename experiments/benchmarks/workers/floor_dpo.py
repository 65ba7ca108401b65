"""Measures the passes that no DPO step can avoid, in plain transformers calls, and prints a line of JSON.

Usage: ``python -m instructgym.experiments.benchmarks.workers.floor_dpo JSON``. For every pair, a step has a pass of the
reference policy without gradients and a forward and backward pass of the policy. Pairs are sorted by length, rows are
padded to the longest of their micro-batch, and logits are computed only for response tokens.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from .floor_ppo import adapted, peak_mb

MICRO_BATCHES = (2, 4, 8, 16)
"""Numbers of pairs of a micro-batch to try."""
BETA = 0.1


class DPOFloor:
    """A model with adapters and the passes of a DPO step.

    Args:
        spec: settings of the benchmark.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.dtype = spec["dtype"]
        self.model, self.optimizer = adapted(spec)

    def _logprobs(self, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Returns the summed log-probs of the responses, float32, shape (rows,), in nats.

        The responses are in the last ``real.shape[1]`` columns. Rows are padded on the right, where causal attention
        ignores padding: no mask is needed, so attention uses its fastest kernel.

        Args:
            ids: token ids of prompts and responses, int64, shape (rows, columns).
            real: 1 for response tokens and 0 for padding, float32, shape (rows, longest response).
        """
        width = real.shape[1]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            logits = self.model(ids, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
        logprobs = torch.log_softmax(logits.float(), -1).gather(-1, ids[:, -width:, None]).squeeze(-1)
        return (logprobs * real).sum(dim=1)

    def step(self, pairs: list[dict[str, list[int]]], micro: int) -> tuple[float, float]:
        """Takes one optimiser step.

        Args:
            pairs: token ids of pairs whose prompts have the same length.
            micro: number of pairs of a micro-batch.

        Returns:
            The loss, and the mean log-prob of the chosen responses by the reference policy, both in nats.
        """
        # Pairs of similar length share a micro-batch, which saves padding.
        ordered = sorted(pairs, key=lambda pair: max(len(pair["chosen"]), len(pair["rejected"])))
        losses = chosen_logprobs = 0.0
        for start in range(0, len(pairs), micro):
            micro_batch = ordered[start : start + micro]
            responses = [pair[side] for side in ("chosen", "rejected") for pair in micro_batch]
            rows = [pair["prompt"] for pair in micro_batch] * 2
            ids = pad_sequence([torch.tensor(a + b) for a, b in zip(rows, responses, strict=True)], batch_first=True)
            real = pad_sequence([torch.ones(len(response)) for response in responses], batch_first=True)
            # Without its adapter, the policy is the reference policy.
            with torch.no_grad(), self.model.disable_adapter():
                reference = self._logprobs(ids, real)
            chosen, rejected = (self._logprobs(ids, real) - reference).chunk(2)
            loss = -logsigmoid(BETA * (chosen - rejected)).sum() / len(pairs)
            loss.backward()
            losses += float(loss)
            chosen_logprobs += float(reference[: len(micro_batch)].sum()) / len(pairs)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses, chosen_logprobs


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Measures steps after a warm-up step; without ``micro`` in ``spec`` returns the fastest micro-batch instead."""
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    floor, size = DPOFloor(spec), spec["batch"]
    pairs = json.loads(Path(spec["pairs"]).read_text("utf-8"))
    batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    if not spec.get("micro"):
        sizes = sorted({min(micro, size) for micro in MICRO_BATCHES})
        floor.step(batches[0], sizes[0])
        seconds = {}
        for micro in sizes:
            start = time.process_time()
            floor.step(batches[1], micro)
            seconds[micro] = time.process_time() - start
        return {"micro": min(seconds, key=lambda micro: seconds[micro])}
    before = peak_mb()
    _, chosen_logprob = floor.step(batches[0], spec["micro"])
    cpu, wall = time.process_time(), time.perf_counter()
    losses = [floor.step(batch, spec["micro"])[0] for batch in batches[1:]]
    cpu_seconds, wall_seconds = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "tokens": sum(len(pair[side]) for batch in batches[1:] for pair in batch for side in ("chosen", "rejected")),
        "cpu_seconds": cpu_seconds,
        "wall_seconds": wall_seconds,
        "start_mb": before,
        "peak_mb": peak_mb(),
        "computes_in": spec["dtype"],
        "micro_batch": spec["micro"],
        "steps": len(losses),
        "loss": losses[-1],
        "chosen_logprob": chosen_logprob,
    }


if __name__ == "__main__":
    print("\n" + json.dumps(measure(json.loads(sys.argv[1]))))
