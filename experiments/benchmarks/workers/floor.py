"""What the baselines of bare passes share: a model with adapters, its optimiser, and the measurement."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from .common import Meter, adapters


class Floor:
    """A model with adapters and the passes that no update can avoid, in plain transformers calls.

    As in training with this library, frozen weights have the dtype of the computation and adapters are float32.

    Args:
        spec: settings of the benchmark.
        updates: number of measured updates.
    """

    micro_batches: ClassVar[tuple[int, ...]]
    """Sizes of a micro-batch to try."""

    def __init__(self, spec: dict[str, Any], updates: int) -> None:
        torch.manual_seed(0)
        self.spec, self.updates = spec, updates
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]))
        self.model: Any = get_peft_model(model.eval(), adapters(spec))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], 1e-5)

    def cast(self) -> torch.autocast:
        """Returns the autocast context of the computation, which does nothing in float32."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.spec["dtype"] == "bfloat16")

    def step(self) -> None:
        """Takes an optimiser step."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def update(self, number: int, micro: int) -> int:
        """Runs an update and returns the number of its response tokens."""
        raise NotImplementedError

    def trial(self, micro: int) -> None:
        """Runs what is timed to choose the size of the micro-batches."""
        raise NotImplementedError

    def results(self) -> dict[str, Any]:
        """Returns results besides rates and memory."""
        return {}

    def measure(self) -> dict[str, Any]:
        """Measures updates after a warm-up; without ``micro`` in the spec returns the fastest micro-batch instead."""
        micro = self.spec.get("micro")
        if micro is None:
            sizes = sorted({min(size, self.spec["batch"]) for size in self.micro_batches})
            self.trial(sizes[0])  # warm-up
            return {"micro": min(sizes, key=self._trial_seconds)}
        meter = Meter()
        meter.start()
        for number in range(1 + self.updates):
            meter.tokens += self.update(number, micro)
            meter.mark()
        return meter.measurement(self.spec["dtype"], micro_batch=micro) | self.results()

    def _trial_seconds(self, micro: int) -> float:
        """Returns the CPU-seconds of a trial."""
        start = time.process_time()
        self.trial(micro)
        return time.process_time() - start
