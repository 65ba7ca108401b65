"""Measures the passes that no DPO step can avoid, in plain transformers calls.

For every pair, a step has a pass of the reference policy without gradients and a forward and backward pass of the
policy. Pairs are sorted by length, rows are padded to the longest of their micro-batch, and logits are computed only
for response tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from .floor import Floor

BETA = 0.1


class DPOFloor(Floor):
    """A model with adapters and the passes of a DPO step.

    Args:
        spec: settings of the benchmark.
    """

    micro_batches = (2, 4, 8, 16)

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec, spec["steps"])
        self.losses: list[float] = []
        """Loss of each step, in nats."""
        self.chosen_logprobs: list[float] = []
        """Mean log-prob of the chosen responses of each step by the reference policy, in nats."""

    def update(self, number: int, micro: int) -> int:
        size = self.spec["batch"]
        pairs = self.spec["data"][number * size : (number + 1) * size]
        # Pairs of similar length share a micro-batch, which saves padding.
        ordered = sorted(pairs, key=lambda pair: max(len(pair["chosen"]), len(pair["rejected"])))
        loss_sum = chosen_sum = 0.0
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
            loss_sum += float(loss)
            chosen_sum += float(reference[: len(micro_batch)].sum()) / len(pairs)
        self.step()
        self.losses.append(loss_sum)
        self.chosen_logprobs.append(chosen_sum)
        return sum(len(pair["chosen"]) + len(pair["rejected"]) for pair in pairs)

    def trial(self, micro: int) -> None:
        self.update(1, micro)

    def results(self) -> dict[str, Any]:
        return {"steps": self.updates, "loss": self.losses[-1], "chosen_logprob": self.chosen_logprobs[0]}

    def _logprobs(self, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Returns the summed log-probs of the responses, float32, shape (rows,), in nats.

        The responses are in the last ``real.shape[1]`` columns. Rows are padded on the right, where causal attention
        ignores padding: no mask is needed, so attention uses its fastest kernel.

        Args:
            ids: token ids of prompts and responses, int64, shape (rows, columns).
            real: 1 for response tokens and 0 for padding, float32, shape (rows, longest response).
        """
        width = real.shape[1]
        with self.cast():
            logits = self.model(ids, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
        logprobs = torch.log_softmax(logits.float(), -1).gather(-1, ids[:, -width:, None]).squeeze(-1)
        return (logprobs * real).sum(dim=1)


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Measures the bare passes of DPO."""
    return DPOFloor(spec).measure()
