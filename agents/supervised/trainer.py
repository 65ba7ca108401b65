"""The base of supervised trainers: epochs over examples in an order fixed by the seed, and resumable checkpoints."""

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
    """Settings of training on a fixed set of examples."""

    batch_size: int = 32
    """Number of examples per optimiser step."""
    epochs: int = 1
    """Number of passes over the examples."""
    token_budget: int = 1024
    """Largest number of tokens of a micro-batch, padding included; it limits memory and does not change results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "epochs", "token_budget"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")


class SupervisedTrainer(ABC):
    """A trainer that loops over epochs and batches; subclasses implement the loss.

    Args:
        model: the model to train, in place.
        settings: settings of the training and its optimiser.
        seed: seed of the order of examples.
    """

    name: ClassVar[str]
    """Name of the trainer in checkpoints, and part of the seeds that shuffle the examples."""

    def __init__(self, model: Trainable, settings: SupervisedSettings, seed: int) -> None:
        self._trained, self.settings, self.seed = model, settings, seed
        self.processes = Processes()
        self.optimizer = Optimizer(model.parameters(), settings)
        self.logger = Logger(folder=None, output_formats=[])
        self.steps = 0
        """Number of optimiser steps of the current ``fit``, those before its checkpoint included."""
        self.loss = float("nan")
        """Loss of the last step, in nats; NaN before the first."""
        self.steps_before = 0
        """Number of steps that a restored checkpoint has already made, which the next ``fit`` skips."""

    def set_logger(self, logger: Logger) -> None:
        """Replaces the logger that metrics are recorded in."""
        self.logger = logger

    def _run(
        self, count: int, step: Callable[[np.ndarray], Any], callback: Callable[[Any], bool | None] | None
    ) -> None:
        """Calls ``step`` for every batch of every epoch, from where a restored checkpoint stopped.

        Args:
            count: number of examples.
            step: trains on a batch, given the indices of its examples, int64.
            callback: called with this trainer after every step; returning False stops training.

        Raises:
            TrainingDivergedError: after ten optimiser steps in a row without a finite gradient.
        """
        self.processes.broadcast(self._trained.parameters().values())
        # Taken once: a further fit begins at its first step.
        done, self.steps_before = self.steps_before, 0
        self.steps = done
        size, epochs = self.settings.batch_size, self.settings.epochs
        per_epoch = -(-count // size)
        failures = 0
        for epoch in range(epochs):
            # Each epoch has a seed of its own, so resumed training finds its place without replaying earlier epochs.
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
                # Before the callback: it may save a checkpoint, after which this row is not written again.
                self.logger.dump(self.steps)
                proceed = callback(self) if callback is not None else True
                if proceed is False:
                    return

    def _local_examples(self, examples: np.ndarray) -> np.ndarray:
        """Returns the part of a batch that this process computes."""
        return np.array_split(examples, self.processes.count)[self.processes.index]

    def _update(self, count: int, sums: Mapping[str, float]) -> dict[str, float]:
        """Makes the optimiser step after the backward passes of a batch, and records its metrics.

        Args:
            count: number of examples of the data set.
            sums: for each metric, ``loss`` among them, the part of this process; the metric is the sum over processes.

        Returns:
            The metrics and ``grad_norm``, the norm of the gradient before clipping.
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
        """Writes a checkpoint; :meth:`restore`, then ``fit`` with the same examples, continue from it."""
        if self.processes.is_main:
            state = {"agent": self.name, "seed": self.seed, "settings": asdict(self.settings), "steps": self.steps}
            state["loss"] = self.loss
            write_checkpoint(folder, self._trained, self.optimizer, state | self._more_state())
        self.processes.wait()

    def restore(self, folder: str | Path) -> None:
        """Restores the state that :meth:`save` wrote.

        Raises:
            InputError: if the checkpoint is missing, broken, or was written by a trainer with another name.
        """
        state = read_checkpoint(folder, self._load, self.optimizer, self.name)
        self.steps = self.steps_before = state["steps"]
        self.loss = state["loss"]

    @abstractmethod
    def _load(self, folder: Path) -> None:
        """Reads the model's weights from a folder."""

    def _more_state(self) -> dict[str, Any]:
        """Returns what a subclass adds to the state of a checkpoint, JSON-able."""
        return {}
