"""Training of reward models on pairs of a response and its minimal edit, and what it has learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...llm_backends.errors import InputError
from ...llm_backends.local.causal_lm import token_budget_chunks
from ...llm_backends.local.tokenization import Tokenizer
from ...rewards.learned.edits import EditedPair, edit_labels
from ...rewards.learned.reward_model import RewardModel
from ..policy.optimization import check_at_least_zero, check_choice
from ..supervised.trainer import SupervisedSettings, SupervisedTrainer
from .losses import LOSSES, Side, unchanged_penalty

STATISTICS_PAIRS = 1024
"""Pairs at most whose originals give a trained model its mean score."""


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as the reward model reads it."""

    prompt: np.ndarray
    """int32, token ids."""
    original: np.ndarray
    """int32, the less preferred response, EOS included where it ended."""
    edited: np.ndarray
    """int32, likewise the preferred one."""
    removed: np.ndarray
    """bool, shape (len(original),): tokens that the edit took away."""
    written: np.ndarray
    """bool, shape (len(edited),): tokens that the edit put in."""
    id: str = ""
    """Of the pair."""


def tokenize_pairs(
    pairs: Sequence[EditedPair], tokenizer: Tokenizer, context_length: int
) -> tuple[list[TokenizedPair], dict[str, int]]:
    """Token ids and edit labels of pairs.

    A finished pair gets the EOS token behind both sides, as unchanged. An ordinary preference pair is one as well, with
    the rejected response as the original and the chosen one as its edit.

    Args:
        pairs: at least one.
        tokenizer: the reward model's.
        context_length: tokens of prompt and response at most.

    Returns:
        The pairs that can teach something, in order, and how many were left out, by reason: ``empty`` (a response
            without tokens), ``identical`` (no token differs), ``too_long``.

    Raises:
        InputError: for no pairs, an empty prompt, or a finished pair where the tokenizer has no EOS token.
    """
    if not pairs:
        raise InputError("there are no pairs of responses: give at least one")
    eos = tokenizer.hf.eos_token_id
    kept: list[TokenizedPair] = []
    dropped: Counter[str] = Counter(empty=0, identical=0, too_long=0)
    for number, pair in enumerate(pairs):
        name = f"pair {number} ({pair.id})" if pair.id else f"pair {number}"
        prompt = tokenizer.encode(pair.prompt) if pair.prompt.strip() else []
        if not prompt:
            raise InputError(f"{name} has an empty prompt: a reward is of a response to something")
        if pair.finished and eos is None:
            raise InputError(f"{name} is finished, but {tokenizer.name!r} has no EOS token: set finished=False")
        original, edited = (tokenizer.encode_continuation(text) for text in (pair.original, pair.edited))
        end = [eos] if pair.finished else []
        if not original or not edited:
            dropped["empty"] += 1
        elif original == edited:
            dropped["identical"] += 1
        elif len(prompt) + max(len(original), len(edited)) + len(end) > context_length:
            dropped["too_long"] += 1
        else:
            labels = edit_labels(original, edited)
            kept.append(
                TokenizedPair(
                    prompt=np.array(prompt, np.int32),
                    original=np.array(original + end, np.int32),
                    edited=np.array(edited + end, np.int32),
                    removed=np.append(labels.removed, np.zeros(len(end), bool)),
                    written=np.append(labels.written, np.zeros(len(end), bool)),
                    id=pair.id,
                )
            )
    return kept, dict(dropped)


def pair_micro_batches(pairs: Sequence[TokenizedPair], examples: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Splits pairs, both sides of which are read together, into micro-batches of like lengths.

    Args:
        pairs: all of them.
        examples: int64, the numbers of those to split.
        budget: tokens of a micro-batch, padding included.

    Yields:
        Parts of ``examples``.
    """
    sizes = [len(pairs[i].prompt) + max(len(pairs[i].original), len(pairs[i].edited)) for i in examples]
    order = np.argsort(sizes, kind="stable")
    for chunk in token_budget_chunks([2 * sizes[k] for k in order], budget):
        yield examples[order[chunk]]


@dataclass(frozen=True)
class RewardSettings(SupervisedSettings):
    """Settings of the training of a reward model."""

    loss: str = "mean_bt"
    """One of :data:`~instructgym.agents.reward_modelling.losses.LOSSES`."""
    unchanged_penalty: float = 0.0
    """Weight of the mean square of the head's output over unchanged tokens, for token-level losses.

    0 is published. ``mean_bt`` then also credits unchanged tokens behind an edit, whose states have seen it: on tiny
    models and known bad tokens the AUC per token stays at 0.5 to 0.9, with 0.03 to 0.1 it is above 0.98."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "loss", tuple(LOSSES))
        check_at_least_zero(self, "unchanged_penalty")
        if self.unchanged_penalty and LOSSES[self.loss].level != "token":
            raise InputError(f"unchanged_penalty needs a token-level loss, {self.loss} is of level sequence")


class RewardTrainer(SupervisedTrainer):
    """Trains a reward model to prefer edited responses to their originals.

    Args:
        model: what is trained, in place; from here on its output is that of the loss (see
            :attr:`~instructgym.rewards.learned.reward_model.RewardModel.transform`).
        loss: ``mean_bt``, ``edited_only_bt``, ``tlcr_ce`` (models of level token) or ``sequence_bt`` (level sequence).
        seed: of the order of pairs.
        **options: further fields of :class:`RewardSettings`; ``value_learning_rate`` is the head's.

    Raises:
        InputError: for settings out of range, or a loss of another level than the model's.
    """

    name = "reward"
    settings: RewardSettings

    def __init__(self, model: RewardModel, loss: str = "mean_bt", seed: int = 0, **options: Any) -> None:
        settings = RewardSettings(loss=loss, **options)
        self.model, self._loss = model, LOSSES[loss]
        if model.level != self._loss.level:
            raise InputError(f"{loss} trains models of level {self._loss.level}, this one is of level {model.level}")
        super().__init__(model, settings, seed)
        model.loss, model.transform = loss, self._loss.transform
        model.free_level = self._loss.free_level and not settings.unchanged_penalty
        model.mean = model.std = None

    def fit(
        self, pairs: Sequence[TokenizedPair], callback: Callable[[RewardTrainer], bool | None] | None = None
    ) -> RewardTrainer:
        """Trains, and then scores originals for the model's ``mean`` and ``std``, 1,024 at most.

        Args:
            pairs: as of :func:`tokenize_pairs`.
            callback: called after every optimiser step; returning False stops training.

        Raises:
            InputError: for no pairs, or one that the model cannot read.
            TrainingDivergedError: after ten optimiser steps in a row without a finite gradient.
        """
        pairs = list(pairs)
        if not pairs:
            raise InputError("a reward model needs pairs to be trained on, there are none")
        for side in ([pair.edited for pair in pairs], [pair.original for pair in pairs]):
            self.model.check([pair.prompt for pair in pairs], side)
        self._run(len(pairs), lambda examples: self._step(pairs, examples), callback)
        some = pairs[:: -(-len(pairs) // STATISTICS_PAIRS)]
        scores = self.model.sequence_scores([p.prompt for p in some], [p.original for p in some])
        self.model.mean, self.model.std = float(scores.mean(dtype=np.float64)), float(scores.std(dtype=np.float64))
        return self

    def _step(self, pairs: Sequence[TokenizedPair], examples: np.ndarray) -> None:
        sums = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
        for members in pair_micro_batches(pairs, self._mine(examples), self.settings.token_budget):
            edited, original = _sides(self.model, [pairs[i] for i in members])
            losses = self._loss.function(edited, original)
            if self.settings.unchanged_penalty:
                losses = losses + self.settings.unchanged_penalty * unchanged_penalty(edited, original)
            part = losses.sum() / len(examples)
            part.backward()
            with torch.no_grad():
                sums["loss"] += float(part)
                margins = edited.score() - original.score()
                sums["accuracy"] += float((margins > 0).sum()) / len(examples)
                sums["margin"] += float(margins.sum()) / len(examples)
        self._update(len(pairs), sums)

    def _load(self, folder: Path) -> None:
        self.model.restore(folder)


def _sides(model: RewardModel, pairs: Sequence[TokenizedPair]) -> tuple[Side, Side]:
    """Edited and original responses, scored in one pass."""
    prompts = [pair.prompt for pair in pairs]
    responses = [pair.edited for pair in pairs] + [pair.original for pair in pairs]
    logits = model.logits(prompts + prompts, responses)
    device = logits.device
    lengths = torch.tensor([len(r) for r in responses], device=device).split(len(pairs))
    split = [len(pairs)] * 2 if model.level == "sequence" else [int(part.sum()) for part in lengths]
    changed = [np.concatenate([p.written for p in pairs]), np.concatenate([p.removed for p in pairs])]
    edited, original = (
        Side(part, count, torch.from_numpy(mark).to(device))
        for part, count, mark in zip(logits.split(split), lengths, changed, strict=True)
    )
    return edited, original


def evaluate_reward_model(model: RewardModel, pairs: Sequence[TokenizedPair]) -> dict[str, float]:
    """How well a reward model tells edited responses from originals, and changed tokens from unchanged ones.

    Args:
        model: of either level.
        pairs: held-out ones.

    Returns:
        ``accuracy`` (R(edited) > R(original); a tie counts half), ``margin`` (mean of R(edited) - R(original)),
            ``margin_std``, ``pairs``; of a token-level model also ``removed_auc`` (originals: removed against unchanged
            tokens, by -r), ``written_auc`` (edited responses: written against unchanged tokens, by r), both over the
            tokens of all pairs and left out where one kind is missing, and ``removed_reward``, ``written_reward``,
            ``unchanged_reward``, the mean reward of each kind.

    Raises:
        InputError: for no pairs.
    """
    if not pairs:
        raise InputError("a reward model is evaluated on pairs, there are none")
    prompts = [pair.prompt for pair in pairs]
    edited = model.score(prompts, [pair.edited for pair in pairs])
    original = model.score(prompts, [pair.original for pair in pairs])
    margins = np.array([e.mean() - o.mean() for e, o in zip(edited, original, strict=True)], np.float64)
    measures = {
        "pairs": float(len(pairs)),
        "accuracy": float(((margins > 0) + 0.5 * (margins == 0)).mean()),
        "margin": float(margins.mean()),
        "margin_std": float(margins.std()),
    }
    if model.level == "sequence":
        return measures
    before, after = np.concatenate(original), np.concatenate(edited)
    removed, written = np.concatenate([p.removed for p in pairs]), np.concatenate([p.written for p in pairs])
    kinds = {
        "removed": before[removed],
        "written": after[written],
        "unchanged": np.concatenate([before[~removed], after[~written]]),
    }
    aucs = {"removed_auc": _auc(-before, removed), "written_auc": _auc(after, written)}
    measures |= {name: value for name, value in aucs.items() if value is not None}
    return measures | {f"{kind}_reward": float(values.mean()) for kind, values in kinds.items() if len(values)}


def _auc(values: np.ndarray, positive: np.ndarray) -> float | None:
    """The area under the ROC curve, ties counted half; None where there are no positives or no negatives."""
    from scipy.stats import mannwhitneyu

    if positive.all() or not positive.any():
        return None
    ahead, behind = values[positive], values[~positive]
    return float(mannwhitneyu(ahead, behind, method="asymptotic").statistic / (len(ahead) * len(behind)))
