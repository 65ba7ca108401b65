"""FIGA: trains a policy to imitate the tokens that an edit wrote and to unlearn those that it removed.

The method is that of Guo et al. 2023, arXiv 2311.04072.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...llm_backends.errors import InputError, check_at_least_zero
from ..policy.language_model import LanguageModelPolicy
from .reward_modelling import TokenizedPair, pair_micro_batches
from .trainer import SupervisedSettings, SupervisedTrainer


@dataclass(frozen=True)
class FIGASettings(SupervisedSettings):
    """Settings of FIGA; the defaults are those of its published code."""

    learning_rate: float = 1e-5
    """Learning rate, constant."""
    batch_size: int = 128
    """Number of pairs per optimiser step."""
    epochs: int = 5
    """Number of passes over the pairs."""
    written_weight: float = 1.0
    """Weight of the tokens that the edit wrote, and of the end-of-sequence token of the edited response; at least 0."""
    removed_weight: float = 0.5
    """Weight with which the tokens that the edit removed are unlearned (the loss subtracts it); at least 0."""
    nll_limit: float = 0.6
    """Largest negative log-likelihood, in nats, of removed tokens that are unlearned: less likely ones get weight 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_zero(self, "written_weight", "removed_weight", "nll_limit")
        if not self.written_weight and not self.removed_weight:
            raise InputError("written_weight and removed_weight are both 0: nothing would be learned")


def figa_weights(
    pair: TokenizedPair, eos: int | None, settings: FIGASettings, original_nll: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the weight of each token's cross-entropy.

    Args:
        pair: a response and its edit.
        eos: id of the end-of-sequence token, which counts as written at the end of the edited response; None: the
            tokenizer has none.
        settings: the weights and the likelihood limit.
        original_nll: float, shape (original tokens,): the policy's negative log-likelihoods of the original response,
            in nats.

    Returns:
        float32, shapes (edited tokens,) and (original tokens,): ``written_weight`` for written tokens and the
            end-of-sequence token, ``-removed_weight`` for removed tokens that are likely enough; 0 for the others.
    """
    written = pair.written.copy()
    written[-1] |= int(pair.edited[-1]) == eos
    removed = pair.removed & (original_nll <= settings.nll_limit)
    return (
        np.where(written, settings.written_weight, 0.0).astype(np.float32),
        np.where(removed, -settings.removed_weight, 0.0).astype(np.float32),
    )


class FIGA(SupervisedTrainer):
    """Trains a policy on minimal edits without a reward model, by cross-entropy with a weight per token.

    The loss of a batch is the sum of weight times negative log-likelihood over the tokens of both responses of each
    pair (:func:`figa_weights`), divided by the number of weights that are not 0.

    Args:
        policy: the policy to train, in place.
        seed: seed of the order of the pairs.
        **options: fields of :class:`FIGASettings`.

    Raises:
        InputError: if a setting is out of range.
    """

    name = "figa"
    settings: FIGASettings

    def __init__(self, policy: LanguageModelPolicy, seed: int = 0, **options: Any) -> None:
        self.policy = policy
        super().__init__(policy, FIGASettings(**options), seed)

    def fit(self, pairs: Sequence[TokenizedPair], callback: Callable[[FIGA], bool | None] | None = None) -> FIGA:
        """Trains the policy on pairs.

        Args:
            pairs: pairs from :func:`~instructgym.agents.supervised.reward_modelling.tokenize_pairs`, with the policy's
                tokenizer.
            callback: called with this trainer after every optimiser step; returning False stops training.

        Returns:
            This trainer.

        Raises:
            InputError: if there are no pairs.
            TrainingDivergedError: after ten optimiser steps in a row without a finite gradient.
        """
        pairs = list(pairs)
        if not pairs:
            raise InputError("FIGA needs pairs of a response and its edit, there are none")
        self._run(len(pairs), lambda examples: self._step(pairs, examples), callback)
        return self

    def _step(self, pairs: Sequence[TokenizedPair], examples: np.ndarray) -> None:
        loss, written, removed = 0.0, 0, 0
        for members in pair_micro_batches(pairs, self._local_examples(examples), self.settings.token_budget):
            part, weights = self._loss([pairs[i] for i in members])
            part.backward()
            loss += float(part.detach())
            written += int((weights > 0).sum())
            removed += int((weights < 0).sum())
        # Weights depend on the forward passes, so the number that are not 0 is known only now: the gradients so far are
        # those of the sum, and are divided here.
        total, written, removed = self.processes.total(np.array([written + removed, written, removed], np.float64))
        for parameter in self.optimizer.parameters.values():
            if parameter.grad is not None:
                parameter.grad /= max(total, 1.0)
        self._update(len(pairs), {"loss": loss / max(total, 1.0)})
        self.logger.record("train/written_tokens", written)
        self.logger.record("train/removed_tokens", removed)
        self.policy.clear_prefix_cache()

    def _loss(self, pairs: Sequence[TokenizedPair]) -> tuple[torch.Tensor, np.ndarray]:
        """Computes the weighted cross-entropy of a micro-batch.

        Returns:
            The sum over tokens, in nats, part of the autograd graph; and the weights, float32, shape (tokens,), those
                of the edited responses before those of the original ones.
        """
        responses = [pair.edited for pair in pairs] + [pair.original for pair in pairs]
        prompts = [pair.prompt for pair in pairs] * 2
        nll = -self.policy.score(prompts, responses, [None] * len(responses), values=False).logprobs
        # Likelihoods only choose weights, so they are detached.
        rows = np.split(nll.detach().float().cpu().numpy(), np.cumsum([len(r) for r in responses])[:-1])
        ends = self.policy.lm.eos_token_ids
        sides = [
            figa_weights(pair, last if (last := int(pair.edited[-1])) in ends else None, self.settings, row)
            for pair, row in zip(pairs, rows[len(pairs) :], strict=True)
        ]
        weights = np.concatenate([edited for edited, _ in sides] + [original for _, original in sides])
        return (nll * torch.from_numpy(weights).to(nll.device)).sum(), weights

    def _load(self, folder: Path) -> None:
        self.policy.load(folder)
