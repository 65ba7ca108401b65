"""What all workers share: the clocks and the memory of a measurement, and adapters for peft.

Only the standard library and peft are imported, because the environment of TRL does not have this library.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any


def peak_mb() -> float:
    """Returns the peak memory of this process, in MB.

    ``ru_maxrss`` is used only if ``/proc`` is missing: in a child process Linux starts it at the memory of the parent.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Meter:
    """The clocks and the memory of a training, whose first step is a warm-up."""

    def __init__(self) -> None:
        self.tokens = 0
        """Response tokens so far, which the worker counts."""
        self._start_mb = 0.0
        self._marks: list[tuple[float, float, int]] = []

    def start(self) -> None:
        """Reads the memory; called right before the training."""
        self._start_mb = peak_mb()

    def mark(self) -> None:
        """Reads CPU time, wall time and tokens; called at the end of every step."""
        self._marks.append((time.process_time(), time.perf_counter(), self.tokens))

    def measurement(self, computes_in: str, **more: Any) -> dict[str, Any]:
        """Returns rates and memory of the steps after the warm-up; called right after the training.

        Args:
            computes_in: floating-point type of the computation.
            **more: further results. They must not cost memory, because they are computed before the memory is read.
        """
        (cpu, wall, before), (cpu_end, wall_end, tokens) = self._marks[0], self._marks[-1]
        return {
            "tokens_per_cpu_second": (tokens - before) / (cpu_end - cpu),
            "tokens_per_second": (tokens - before) / (wall_end - wall),
            "peak_mb": peak_mb(),
            "start_mb": self._start_mb,
            "tokens": tokens - before,
            "computes_in": computes_in,
            **more,
        }


def adapters(spec: dict[str, Any]) -> Any:
    """Returns the settings of the adapters for peft."""
    from peft import LoraConfig

    rank, alpha, targets = (spec["lora"][name] for name in ("rank", "alpha", "targets"))
    modules = targets if targets == "all-linear" else targets.split(",")
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, task_type="CAUSAL_LM")
