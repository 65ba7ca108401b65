"""Supervised training: epochs over examples in an order that the seed decides, and checkpoints that resume."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from stable_baselines3.common.logger import Logger

from ...llm_backends import request_seed
from ...llm_backends.errors import InputError
from ..policy.checkpoints import Trainable, read_checkpoint, write_checkpoint
from ..policy.optimization import Optimizer, OptimizerSettings, Processes, TrainingDivergedError


@dataclass(frozen=True)
class SupervisedSettings(OptimizerSettings):
    """Settings of training on examples."""

    batch_size: int = 32
    """Examples per optimiser step."""
    epochs: int = 1
    """Passes over the examples."""
    token_budget: int = 1024
    """Tokens of a micro-batch, padding included: bounds memory, does not change results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "epochs", "token_budget"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")


class SupervisedTrainer(ABC):
    """The loop over epochs and batches; a subclass knows the loss.

    Args:
        model: what is trained, in place.
        settings: how.
        seed: of the order of examples.
    """

    name: ClassVar[str]
    """In checkpoints, and in the seeds of the orders."""

    def __init__(self, model: Trainable, settings: SupervisedSettings, seed: int) -> None:
        self._trained, self.settings, self.seed = model, settings, seed
        self.processes = Processes()
        self.optimizer = Optimizer(model.parameters(), settings)
        self.logger = Logger(folder=None, output_formats=[])
        self.steps = 0
        """Optimiser steps of this ``fit``."""
        self.loss = float("nan")
        """Of the last step, in nats."""
        self.steps_before = 0
        """Steps of the next ``fit`` that a checkpoint holds already, and that it passes over."""

    def set_logger(self, logger: Logger) -> None:
        """Sends metrics to another logger."""
        self.logger = logger

    def _run(
        self, count: int, step: Callable[[np.ndarray], Any], callback: Callable[[Any], bool | None] | None
    ) -> None:
        """Calls ``step`` with the example numbers of each batch.

        Raises:
            TrainingDivergedError: after ten optimiser steps in a row without a finite gradient.
        """
        self.processes.broadcast(self._trained.parameters().values())
        done, self.steps_before = self.steps_before, 0
        self.steps = done
        size, epochs = self.settings.batch_size, self.settings.epochs
        per_epoch = -(-count // size)
        failures = 0
        for epoch in range(epochs):
            order = np.random.default_rng(request_seed(self.seed, self.name, epoch)).permutation(count)
            for number, start in enumerate(range(0, count, size)):
                if epoch * per_epoch + number < done:
                    continue
                self.optimizer.schedule(self.steps / (epochs * per_epoch))
                skipped = self.optimizer.skipped
                step(order[start : start + size])
                failures = failures + 1 if self.optimizer.skipped > skipped else 0
                if failures == 10:
                    raise TrainingDivergedError("ten steps without a finite gradient: lower the learning rate")
                self.logger.dump(self.steps)  # before the callback saves a checkpoint that stands behind it
                going = callback(self) if callback is not None else True
                if going is False:
                    return

    def _local_examples(self, examples: np.ndarray) -> np.ndarray:
        """Those of a batch that this process computes."""
        return np.array_split(examples, self.processes.count)[self.processes.index]

    def _update(self, count: int, sums: Mapping[str, float]) -> dict[str, float]:
        """The optimiser step behind a backward pass, and its metrics.

        Args:
            count: examples in all.
            sums: this process's summands of metrics, ``loss`` among them.

        Returns:
            The metrics and ``grad_norm``.
        """
        self.processes.add_gradients(self.optimizer.parameters.values())
        norm = self.optimizer.step()
        self.steps += 1
        totals = self.processes.total(np.array(list(sums.values())))
        metrics = {key: float(total) for key, total in zip(sums, totals, strict=True)}
        self.loss = metrics["loss"]
        for key, value in metrics.items():
            self.logger.record(f"train/{key}", value)
        self.logger.record("train/grad_norm", norm)
        self.logger.record("train/learning_rate", self.optimizer.learning_rate)
        self.logger.record("train/examples", min(self.steps * self.settings.batch_size, count * self.settings.epochs))
        return metrics | {"grad_norm": norm}

    def save(self, folder: str | Path) -> None:
        """Writes a checkpoint, from which :meth:`restore` and ``fit`` with the same examples continue."""
        if self.processes.is_main:
            state = {"agent": self.name, "seed": self.seed, "settings": asdict(self.settings), "steps": self.steps}
            state["loss"] = self.loss
            write_checkpoint(folder, self._trained, self.optimizer, state | self._more_state())
        self.processes.wait()

    def restore(self, folder: str | Path) -> None:
        """Continues from :meth:`save`.

        Raises:
            InputError: if the checkpoint is missing, broken, or of another agent.
        """
        state = read_checkpoint(folder, self._load, self.optimizer, self.name)
        self.steps = self.steps_before = state["steps"]
        self.loss = state["loss"]

    @abstractmethod
    def _load(self, folder: Path) -> None:
        """Reads the model's weights."""

    def _more_state(self) -> dict[str, Any]:
        return {}
