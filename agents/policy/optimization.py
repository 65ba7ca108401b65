"""Optimisers, learning-rate schedules, and training in several processes.

:class:`Optimizer` updates the weights; :class:`Processes` sums gradients and counts over the processes of a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ...llm_backends.errors import InputError, RunError, check_at_least_zero, check_choice

HEADS = ("value_head.", "reward_head.")
"""Prefixes of the names of scalar heads' weights, which may have a learning rate of their own."""


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of the optimiser and its learning-rate schedule."""

    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """Optimiser of the trained weights: adamw, or adafactor (less memory; that of the NLU paper)."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up: constant, or a linear or cosine decay to ``final``."""
    warmup: float = 0.0
    """Warm-up: share of training, in [0, 1), in which the learning rate rises linearly from a tenth of its peak."""
    final: float = 0.1
    """Learning rate at the end of linear and cosine schedules, as a share of the peak, in [0, 1]."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the trained weights."""
    max_grad_norm: float = 1.0
    """Global norm that gradients are clipped to; 0: no clipping."""
    value_learning_rate: float = 0.0
    """Peak learning rate of the value head (for a reward model: of its head); 0: that of the other weights."""

    def __post_init__(self) -> None:
        check_choice(self, "optimizer", ("adamw", "adafactor"))
        check_choice(self, "schedule", ("constant", "linear", "cosine"))
        check_at_least_zero(self, "weight_decay", "max_grad_norm", "value_learning_rate")
        if not self.learning_rate > 0 or not 0 <= self.warmup < 1 or not 0 <= self.final <= 1:
            raise InputError(
                "learning_rate must be above 0, warmup in [0, 1) and final in [0, 1], got "
                f"{self.learning_rate}, {self.warmup} and {self.final}"
            )

    def factor(self, progress: float) -> float:
        """Returns the learning rate, as a share of its peak, after ``progress`` of training, a share in [0, 1]."""
        if progress < self.warmup:
            return 0.1 + 0.9 * progress / self.warmup
        if self.schedule == "constant":
            return 1.0
        decayed = min((progress - self.warmup) / (1.0 - self.warmup), 1.0)
        shape = 1.0 - decayed if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * decayed))
        return self.final + (1.0 - self.final) * shape


class Optimizer:
    """An optimiser with a learning-rate schedule, gradient clipping and a guard against non-finite gradients.

    Args:
        parameters: the trained weights by name; those whose names begin with one of :data:`HEADS` form a group.
        settings: settings of the optimiser.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], settings: OptimizerSettings) -> None:
        self.parameters, self.settings = dict(parameters), settings
        head = [p for name, p in parameters.items() if name.startswith(HEADS)]
        rest = [p for name, p in parameters.items() if not name.startswith(HEADS)]
        peak = settings.learning_rate
        groups = [{"params": rest, "lr": peak, "peak": peak}]
        if head:
            value_peak = settings.value_learning_rate or peak
            groups.append({"params": head, "lr": value_peak, "peak": value_peak})
        if settings.optimizer == "adamw":
            self.inner: torch.optim.Optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        else:
            # No scaling by the weights: torch multiplies the step by max(eps2, RMS of the weight), which would be tiny
            # for value heads and for the half of each adapter that starts at zero.
            self.inner = torch.optim.Adafactor(groups, eps=(None, 1.0), weight_decay=settings.weight_decay)
        self.skipped = 0
        """Number of steps that were skipped because a gradient was not finite."""

    @property
    def learning_rate(self) -> float:
        """Current learning rate of the weights outside the head."""
        return float(self.inner.param_groups[0]["lr"])

    def schedule(self, progress: float) -> None:
        """Sets the learning rates for ``progress``, the share of training that is done, in [0, 1]."""
        for group in self.inner.param_groups:
            group["lr"] = group["peak"] * self.settings.factor(progress)

    def step(self) -> float:
        """Clips the gradients, updates the weights, clears the gradients and returns their norm before clipping.

        A step with a non-finite gradient is skipped and counted.
        """
        # An infinite limit clips nothing, but the norm is still computed.
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.parameters.values() if p.grad is not None], self.settings.max_grad_norm or math.inf
        )
        if bool(torch.isfinite(norm)):
            self.inner.step()
        else:
            self.skipped += 1
        self.inner.zero_grad(set_to_none=True)
        return float(norm)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Returns the optimiser's state: tensors by name for a safetensors file, and JSON-able settings."""
        state = self.inner.state_dict()
        tensors, scalars = {}, {}
        for index, entries in state["state"].items():
            for key, value in entries.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{index}.{key}"] = value.detach().cpu().contiguous().clone()
                else:
                    scalars[f"{index}.{key}"] = value
        return tensors, {"scalars": scalars, "skipped": self.skipped}

    def load_state(self, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`state` returned, tensors and settings."""
        state: dict[int, dict[str, Any]] = {}
        for name, value in [*tensors.items(), *settings["scalars"].items()]:
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        # The parameter groups stay as they were built; their learning rates are set by schedule() before the next step.
        self.inner.load_state_dict({"state": state, "param_groups": self.inner.state_dict()["param_groups"]})
        self.skipped = int(settings["skipped"])


class Processes:
    """The processes of a training run, of which there may be only this one.

    Every process must call :meth:`total`, :meth:`gather`, :meth:`add_gradients`, :meth:`broadcast` and :meth:`wait` the
    same number of times and in the same order, as each call waits for all processes.
    """

    def __init__(self) -> None:
        from accelerate import PartialState

        self._state = PartialState(cpu=not torch.cuda.is_available())
        self.count: int = self._state.num_processes
        self.index: int = self._state.process_index

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and logs of the run."""
        return self.index == 0

    def share(self, copies: int, group_size: int = 1) -> np.ndarray:
        """Returns which env copies this process steps: consecutive ones, in whole groups; bool, shape (copies,).

        Args:
            copies: number of env copies of all processes.
            group_size: consecutive copies that answer the same prompt. A group stays in one process, as its samples are
                compared there.

        Raises:
            InputError: if there are fewer groups than processes.
        """
        groups = copies // group_size
        if groups < self.count:
            raise InputError(
                f"{self.count} processes need at least {self.count} groups of env copies, got {groups} of {group_size}"
            )
        local_groups = np.zeros(groups, dtype=bool)
        local_groups[np.array_split(np.arange(groups), self.count)[self.index]] = True
        return np.repeat(local_groups, group_size)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Returns the element-wise sum of an array over processes, float64; in a single process the array itself."""
        if self.count == 1:
            return values
        tensor = torch.as_tensor(values, dtype=torch.float64, device=self._state.device)
        torch.distributed.all_reduce(tensor)
        return tensor.cpu().numpy()

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, in their order, to each of them; a value is small and JSON-able."""
        if self.count == 1:
            return [value]
        gathered: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sums the gradients over processes, in one message.

        The sum is the gradient of the whole minibatch if every process divides its loss by a total over all processes.
        """
        if self.count == 1:
            return
        parameters = list(parameters)
        # A process without episodes in this minibatch has no gradients; it adds zeros, as every process must take part.
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
        torch.distributed.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def broadcast(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Copies the weights of the first process to all others."""
        if self.count > 1:
            for parameter in parameters:
                torch.distributed.broadcast(parameter.data, 0)

    def wait(self) -> None:
        """Waits until all processes have called this method."""
        self._state.wait_for_everyone()


class TrainingDivergedError(RunError):
    """The error of training in which no optimiser step of an update had a finite gradient."""
