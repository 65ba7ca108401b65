"""Supervised fine-tuning (SFT): a language-model policy imitates the responses of a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...llm_backends.errors import InputError
from ..policy.language_model import LanguageModelPolicy
from ..rollouts.batch import TokenBatch
from .trainer import SupervisedSettings, SupervisedTrainer


@dataclass(frozen=True)
class SFTSettings(SupervisedSettings):
    """Settings of supervised fine-tuning; an example is a demonstration."""


@dataclass(frozen=True)
class TokenizedDemonstration:
    """A prompt and the response to imitate, as token ids."""

    prompt: Sequence[int]
    """Token ids of the prompt."""
    response: Sequence[int]
    """Token ids of the response, including the tokens that end it."""
    allowed: list[np.ndarray] | None = None
    """Ids of the allowed tokens at each position of the response, over which the loss then normalises probabilities, as
    in constrained decoding; None: the whole vocabulary."""


class SFT(SupervisedTrainer):
    """Maximises the likelihood of demonstrations; the loss is the mean over the response tokens of a batch.

    Args:
        policy: the policy to train, in place.
        seed: seed of the order of the demonstrations.
        **options: fields of :class:`SFTSettings`.
    """

    name = "sft"

    def __init__(self, policy: LanguageModelPolicy, seed: int = 0, **options: Any) -> None:
        self.policy = policy
        super().__init__(policy, SFTSettings(**options), seed)

    def fit(
        self, demonstrations: Sequence[TokenizedDemonstration], callback: Callable[[SFT], bool | None] | None = None
    ) -> SFT:
        """Trains the policy on demonstrations.

        Args:
            demonstrations: prompts and responses, none of them empty.
            callback: called with this trainer after every optimiser step; returning False stops training.

        Returns:
            This trainer.

        Raises:
            InputError: if there are no demonstrations, or a prompt or response is empty.
            TrainingDivergedError: after ten optimiser steps in a row without a finite gradient.
        """
        batch = _batch(demonstrations)
        self._run(len(batch), lambda episodes: self._step(batch, episodes), callback)
        return self

    def _step(self, batch: TokenBatch, episodes: np.ndarray) -> None:
        # Tokens of the batch of all processes, so that the sum of their gradients is that of the mean over the batch.
        tokens = float(batch.lengths[episodes].sum())
        loss = 0.0
        for members in batch.micro_batches(self._local_examples(episodes), self.settings.token_budget):
            scores = self.policy.score(
                [batch.prompts[i] for i in members],
                [batch.responses[i] for i in members],
                [batch.allowed[i] for i in members],
                values=False,
            )
            part = -scores.logprobs.sum() / tokens
            part.backward()
            loss += float(part.detach())
        self._update(len(batch), {"loss": loss})
        self.policy.clear_prefix_cache()

    def _load(self, folder: Path) -> None:
        self.policy.load(folder)


def _batch(demonstrations: Sequence[TokenizedDemonstration]) -> TokenBatch:
    """Returns demonstrations as a batch of episodes, for its micro-batches; its rewards and log-probs are unused."""
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
        # No groups: every demonstration is one of its own.
        groups=[str(i) for i in range(len(lengths))],
        on_policy=False,
    )
