"""Optimisers, learning-rate schedules, and their state without pickles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ...llm_backends.errors import InputError, RunError, check_at_least_zero, check_choice

HEADS = ("value_head.", "reward_head.")
"""What the names of scalar heads' weights begin with."""


@dataclass(frozen=True)
class OptimizerSettings:
    """How weights are updated."""

    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adamw, or adafactor (less memory; the NLU paper's)."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What becomes of the learning rate after warm-up."""
    warmup: float = 0.0
    """Share of training in which the learning rate rises linearly from a tenth of its peak."""
    final: float = 0.1
    """Learning rate at the end of linear and cosine schedules, as a share of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 turns it off."""
    value_learning_rate: float = 0.0
    """Peak learning rate of the value head (of a reward model: its head); 0 takes that of the other weights."""

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
        """The learning rate at a share of training in [0, 1], as a share of its peak."""
        if progress < self.warmup:
            return 0.1 + 0.9 * progress / self.warmup
        if self.schedule == "constant":
            return 1.0
        rest = min((progress - self.warmup) / (1.0 - self.warmup), 1.0)
        shape = 1.0 - rest if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * rest))
        return self.final + (1.0 - self.final) * shape


class Optimizer:
    """One optimiser with its schedule, gradient clipping and a guard against non-finite gradients.

    Args:
        parameters: the trained weights by name.
        settings: how.
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
            self.inner = torch.optim.Adafactor(groups, eps=(None, 1.0), weight_decay=settings.weight_decay)
        self.skipped = 0
        """Steps left out because a gradient was not finite."""

    @property
    def learning_rate(self) -> float:
        """The current one of the policy."""
        return float(self.inner.param_groups[0]["lr"])

    def schedule(self, progress: float) -> None:
        """Sets the learning rates for a share of training in [0, 1]."""
        for group in self.inner.param_groups:
            group["lr"] = group["peak"] * self.settings.factor(progress)

    def step(self) -> float:
        """Clips the gradients, updates the weights and clears the gradients; returns the norm before clipping.

        A step with a non-finite gradient changes nothing and is counted.
        """
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
        """Its state: tensors by name for a safetensors file, and JSON-able settings."""
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
        """Continues from :meth:`state`."""
        state: dict[int, dict[str, Any]] = {}
        for name, value in [*tensors.items(), *settings["scalars"].items()]:
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        self.inner.load_state_dict({"state": state, "param_groups": self.inner.state_dict()["param_groups"]})
        self.skipped = int(settings["skipped"])


class Processes:
    """The processes of this training run."""

    def __init__(self) -> None:
        from accelerate import PartialState

        self._state = PartialState(cpu=not torch.cuda.is_available())
        self.count: int = self._state.num_processes
        self.index: int = self._state.process_index

    @property
    def is_main(self) -> bool:
        """Whether this one writes files and logs."""
        return self.index == 0

    def share(self, copies: int, group_size: int = 1) -> np.ndarray:
        """bool, shape (copies,): the consecutive env copies that this process plays, in whole groups.

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
        """The element-wise sum over processes, float64."""
        if self.count == 1:
            return values
        tensor = torch.as_tensor(values, dtype=torch.float64, device=self._state.device)
        torch.distributed.all_reduce(tensor)
        return tensor.cpu().numpy()

    def gather(self, value: Any) -> list[Any]:
        """One small JSON-able value per process, on all of them."""
        if self.count == 1:
            return [value]
        gathered: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sums the gradients over processes, in one message."""
        if self.count == 1:
            return
        parameters = list(parameters)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
        torch.distributed.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def broadcast(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Gives all processes the weights of the first."""
        if self.count > 1:
            for parameter in parameters:
                torch.distributed.broadcast(parameter.data, 0)

    def wait(self) -> None:
        """Until all have come here."""
        self._state.wait_for_everyone()


class TrainingDivergedError(RunError):
    """Every optimiser step of an update had a non-finite gradient."""
