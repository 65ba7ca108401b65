"""Supervised fine-tuning of a language-model policy on given responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import Logger

from ..llm_backends import request_seed
from ..llm_backends.errors import InputError
from .checkpoints import read_checkpoint, write_checkpoint
from .distributed import Processes
from .language_model import LanguageModelPolicy
from .on_policy import TrainingDivergedError
from .optimization import Optimizer, OptimizerSettings
from .rollout import TokenBatch


@dataclass(frozen=True)
class SFTSettings(OptimizerSettings):
    """Settings of supervised fine-tuning."""

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


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response to imitate."""

    prompt: Sequence[int]
    """Token ids."""
    response: Sequence[int]
    """Token ids, what ends the response included."""
    allowed: list[np.ndarray] | None = None
    """Under constrained decoding the allowed tokens at each position: the loss is then among those."""


class SFT:
    """Maximises the likelihood of demonstrations; only response tokens count.

    Args:
        policy: what is trained, in place.
        seed: of the order of examples.
        **options: fields of :class:`SFTSettings`.
    """

    def __init__(self, policy: LanguageModelPolicy, seed: int = 0, **options: Any) -> None:
        self.policy, self.seed, self.settings = policy, seed, SFTSettings(**options)
        self.processes = Processes()
        self.optimizer = Optimizer(policy.parameters(), self.settings)
        self.logger = Logger(folder=None, output_formats=[])
        self.steps = 0
        """Optimiser steps of this :meth:`fit`."""
        self.loss = float("nan")
        """Of the last step, in nats per token."""
        self._done = 0

    def set_logger(self, logger: Logger) -> None:
        """Sends metrics to another logger."""
        self.logger = logger

    def fit(self, demonstrations: Sequence[Demonstration], callback: Callable[[SFT], bool | None] | None = None) -> SFT:
        """Trains.

        Args:
            demonstrations: none with an empty prompt or response.
            callback: called after every optimiser step; returning False stops training.

        Raises:
            InputError: for no demonstrations, or an empty prompt or response.
            TrainingDivergedError: after ten optimiser steps in a row without a finite gradient.
        """
        batch = _batch(demonstrations)
        self.processes.broadcast(self.policy.parameters().values())
        done, self._done = self._done, 0  # after :meth:`restore` the steps before are passed over
        self.steps = done
        size, epochs = self.settings.batch_size, self.settings.epochs
        total = epochs * -(-len(batch) // size)
        failures = 0
        for epoch in range(epochs):
            order = np.random.default_rng(request_seed(self.seed, "sft", epoch)).permutation(len(batch))
            for number, start in enumerate(range(0, len(batch), size)):
                if epoch * -(-len(batch) // size) + number < done:
                    continue
                self.optimizer.schedule(self.steps / total)
                skipped = self.optimizer.skipped
                self._step(batch, order[start : start + size])
                failures = failures + 1 if self.optimizer.skipped > skipped else 0
                if failures == 10:
                    raise TrainingDivergedError("ten steps without a finite gradient: lower the learning rate")
                self.logger.dump(self.steps)  # before the callback saves a checkpoint that stands behind it
                going = callback(self) if callback is not None else True
                if going is False:
                    return self
        return self

    def save(self, folder: str | Path) -> None:
        """Writes a checkpoint, from which :meth:`restore` and :meth:`fit` with the same demonstrations continue."""
        if self.processes.is_main:
            state = {"agent": "sft", "seed": self.seed, "settings": asdict(self.settings), "steps": self.steps}
            write_checkpoint(folder, self.policy, self.optimizer, state)
        self.processes.wait()

    def restore(self, folder: str | Path) -> None:
        """Continues from :meth:`save`.

        Raises:
            InputError: if the checkpoint is missing, broken, or of another agent.
        """
        self.steps = self._done = read_checkpoint(folder, self.policy, self.optimizer, "sft")["steps"]

    def _step(self, batch: TokenBatch, episodes: np.ndarray) -> None:
        mine = np.array_split(episodes, self.processes.count)[self.processes.index]
        tokens = float(batch.lengths[episodes].sum())
        loss = 0.0
        for members in batch.micro_batches(mine, self.settings.token_budget):
            scores = self.policy.score(
                [batch.prompts[i] for i in members],
                [batch.responses[i] for i in members],
                [batch.allowed[i] for i in members],
                values=False,
            )
            part = -scores.logprobs.sum() / tokens
            part.backward()
            loss += float(part.detach())
        self.processes.add_gradients(self.optimizer.parameters.values())
        norm = self.optimizer.step()
        self.policy.changed()
        self.steps += 1
        self.loss = float(self.processes.total(np.array([loss]))[0])
        self.logger.record("train/loss", self.loss)
        self.logger.record("train/grad_norm", norm)
        self.logger.record("train/learning_rate", self.optimizer.learning_rate)
        self.logger.record(
            "train/examples", min(self.steps * self.settings.batch_size, len(batch) * self.settings.epochs)
        )


def _batch(demonstrations: Sequence[Demonstration]) -> TokenBatch:
    if not demonstrations or any(not len(d.prompt) or not len(d.response) for d in demonstrations):
        raise InputError("supervised fine-tuning needs demonstrations with a prompt and a response each")
    lengths = [len(d.response) for d in demonstrations]
    return TokenBatch(
        prompts=[np.asarray(d.prompt, dtype=np.int32) for d in demonstrations],
        responses=[np.asarray(d.response, dtype=np.int32) for d in demonstrations],
        allowed=[d.allowed for d in demonstrations],
        rewards=np.zeros(sum(lengths), np.float32),
        sampler_logprobs=np.zeros(sum(lengths), np.float32),
        loss_mask=np.ones(sum(lengths), dtype=bool),
        terminated=np.ones(len(lengths), dtype=bool),
        groups=[str(i) for i in range(len(lengths))],
        on_policy=False,
    )
