"""What several processes of one ``accelerate launch`` have to agree on; all of it does nothing in a single process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ...llm_backends.errors import InputError


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
        mine = np.zeros(groups, dtype=bool)
        mine[np.array_split(np.arange(groups), self.count)[self.index]] = True
        return np.repeat(mine, group_size)

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
