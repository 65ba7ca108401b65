"""Training and evaluation of reward models on pairs of a response and its minimal edit.

:class:`RewardTrainer` minimises one of :data:`LOSSES`; three of them are at token level and compare the tokens that an
edit removed and wrote (Xu et al. 2024, arXiv 2406.02756; TLCR, Yoon et al. 2024, arXiv 2407.16574).
:func:`evaluate_reward_model` measures a trained model on held-out pairs. The models are
:class:`~instructgym.rewards.learned.reward_model.RewardModel`, the pairs come from
:mod:`~instructgym.rewards.learned.edits`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from ...llm_backends.errors import InputError, check_at_least_zero, check_choice
from ...llm_backends.local.causal_lm import token_budget_chunks
from ...llm_backends.local.tokenization import Tokenizer
from ...rewards.learned.edits import EditedPair, edit_labels
from ...rewards.learned.reward_model import Level, RewardModel, Transform
from ...rewards.rank_statistics import auc
from .trainer import SupervisedSettings, SupervisedTrainer


@dataclass
class PairSide:
    """One side of n pairs: either the original responses or the edited ones."""

    logits: torch.Tensor
    """Output of the reward head for each token, response after response, float32, shape (tokens,); for models of level
    sequence one output per response, shape (n,)."""
    lengths: torch.Tensor
    """Number of tokens of each response, int64, shape (n,)."""
    changed: torch.Tensor
    """True for tokens that the edit removed (originals) or wrote (edited responses), bool, shape (tokens,)."""

    def score(self) -> torch.Tensor:
        """Returns the score R of each response before any transform, shape (n,)."""
        # With one logit per response this is the score at level sequence, and equals the mean at level token.
        return self.logits if len(self.logits) == len(self.lengths) else self.mean()

    def mean(self, values: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the mean of per-token values in each response, shape (n,).

        Args:
            values: shape (tokens,); None: the logits.
            mask: True for tokens that are averaged, bool, shape (tokens,); None: all. A response without any gets 0.
        """
        values = self.logits if values is None else values
        if mask is None:
            return torch.segment_reduce(values, "mean", lengths=self.lengths)
        counts = torch.segment_reduce(mask.to(values.dtype), "sum", lengths=self.lengths)
        return torch.segment_reduce(values.where(mask, 0.0), "sum", lengths=self.lengths) / counts.clamp(min=1.0)


def mean_bt(edited: PairSide, original: PairSide) -> torch.Tensor:
    """Computes -log sigmoid(R(edited) - R(original)), with R the mean over all tokens (Xu et al. 2024).

    Rewards of tokens that both responses share nearly cancel, so that learning concentrates on the changed tokens. R is
    the exact mean, not that of the paper's approximation for responses of equal length. Source: arXiv 2406.02756.

    Args:
        edited: n preferred responses.
        original: the n responses that were edited.

    Returns:
        The loss of each pair, float32, shape (n,), in nats.
    """
    return -logsigmoid(edited.mean() - original.mean())


def edited_only_bt(edited: PairSide, original: PairSide) -> torch.Tensor:
    """Computes -log sigmoid(R(edited) - R(original)), with R the mean over changed tokens only, 0 if there are none.

    Args:
        edited: n preferred responses.
        original: the n responses that were edited.

    Returns:
        The loss of each pair, float32, shape (n,), in nats.
    """
    return -logsigmoid(edited.mean(mask=edited.changed) - original.mean(mask=original.changed))


def tlcr_ce(edited: PairSide, original: PairSide) -> torch.Tensor:
    """Computes the cross-entropy of token labels (TLCR, Yoon et al. 2024, arXiv 2407.16574).

    The probability that a token is good is sigmoid(logit). Its label is 0 for removed tokens, 1 for written ones and
    0.5 for unchanged ones of both sides. The loss is the sum of the means over removed, written and unchanged tokens;
    a pair without tokens of one kind leaves that term out. The paper's two-way head is a single logit here, the
    difference of its two logits.

    Args:
        edited: n preferred responses.
        original: the n responses that were edited.

    Returns:
        The loss of each pair, float32, shape (n,), in nats.
    """
    labels = torch.full_like(edited.logits, 0.5).where(~edited.changed, 1.0)
    good = binary_cross_entropy_with_logits(edited.logits, labels, reduction="none")
    labels = torch.full_like(original.logits, 0.5).where(~original.changed, 0.0)
    bad = binary_cross_entropy_with_logits(original.logits, labels, reduction="none")
    unchanged = _unchanged_mean(edited, original, good, bad)
    return edited.mean(good, edited.changed) + original.mean(bad, original.changed) + unchanged


def sequence_bt(edited: PairSide, original: PairSide) -> torch.Tensor:
    """Computes the Bradley-Terry loss on one score per response, -log sigmoid(s(edited) - s(original)).

    Args:
        edited: n preferred responses, whose logits are their scores.
        original: n other responses to the same prompts.

    Returns:
        The loss of each pair, float32, shape (n,), in nats.
    """
    return -logsigmoid(edited.logits - original.logits)


def unchanged_penalty(edited: PairSide, original: PairSide) -> torch.Tensor:
    """Computes the mean square of the head's output over the unchanged tokens of both sides, shape (n,).

    After the first edit the contexts of both sides differ, so the rewards of unchanged tokens do not cancel exactly in
    a token-level loss; the penalty keeps them near 0.
    """
    return _unchanged_mean(edited, original, edited.logits.square(), original.logits.square())


def _unchanged_mean(edited: PairSide, original: PairSide, after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Returns the mean of per-token values over the unchanged tokens of both sides together, shape (n,)."""
    total, count = torch.zeros_like(edited.lengths, dtype=after.dtype), torch.zeros_like(edited.lengths)
    for side, values in ((edited, after), (original, before)):
        unchanged = (~side.changed).to(values.dtype)
        total = total + torch.segment_reduce(values * unchanged, "sum", lengths=side.lengths)
        count = count + torch.segment_reduce(unchanged, "sum", lengths=side.lengths)
    return total / count.clamp(min=1.0)


class RewardLoss(NamedTuple):
    """A loss and the models that it trains."""

    function: Callable[[PairSide, PairSide], torch.Tensor]
    """Returns the loss of each pair, given edited and original responses."""
    level: Level
    """Level of the models that it trains."""
    transform: Transform
    """Transform from the head's output to rewards."""
    shift_invariant: bool
    """Whether adding a constant to all rewards leaves the loss the same, at least if both sides have changed tokens."""


LOSSES = {
    "mean_bt": RewardLoss(mean_bt, "token", "identity", True),
    "edited_only_bt": RewardLoss(edited_only_bt, "token", "identity", True),
    "tlcr_ce": RewardLoss(tlcr_ce, "token", "signed-probability", False),
    "sequence_bt": RewardLoss(sequence_bt, "sequence", "identity", True),
}
"""Losses by name."""


STATISTICS_PAIRS = 1024
"""Maximum number of pairs whose original responses the mean and deviation of a trained model's scores come from."""


@dataclass(frozen=True)
class TokenizedPair:
    """A pair of responses as token ids, with the tokens that the edit changed."""

    prompt: np.ndarray
    """Token ids of the prompt, int32."""
    original: np.ndarray
    """Token ids of the less preferred response, int32; includes EOS if the pair is finished."""
    edited: np.ndarray
    """Token ids of the preferred response, int32; includes EOS if the pair is finished."""
    removed: np.ndarray
    """True for tokens that the edit removed, bool, shape (len(original),)."""
    written: np.ndarray
    """True for tokens that the edit wrote, bool, shape (len(edited),)."""
    id: str = ""
    """Id of the pair."""


def tokenize_pairs(
    pairs: Sequence[EditedPair], tokenizer: Tokenizer, context_length: int
) -> tuple[list[TokenizedPair], dict[str, int]]:
    """Computes the token ids and edit labels of pairs.

    A finished pair gets an unchanged EOS token at the end of both sides. An ordinary preference pair can be passed as
    well, with the rejected response as the original and the chosen one as its edit.

    Args:
        pairs: at least one pair.
        tokenizer: the reward model's tokenizer.
        context_length: maximum number of tokens of prompt and response.

    Returns:
        The pairs that a model can learn from, in order, and the numbers of those left out, by reason: ``empty`` (a
            response without tokens), ``identical`` (no token differs), ``too_long``.

    Raises:
        InputError: for no pairs, an empty prompt, or a finished pair where the tokenizer has no EOS token.
    """
    if not pairs:
        raise InputError("there are no pairs of responses: give at least one")
    tokenized: list[TokenizedPair] = []
    dropped: Counter[str] = Counter(empty=0, identical=0, too_long=0)
    for number, pair in enumerate(pairs):
        name = f"pair {number} ({pair.id})" if pair.id else f"pair {number}"
        prompt = tokenizer.encode(pair.prompt, pair.markup) if pair.prompt.strip() else []
        if not prompt:
            raise InputError(f"{name} has an empty prompt: a reward needs a prompt")
        end = tokenizer.closing(pair.markup) if pair.finished else []
        if pair.finished and not end:
            raise InputError(f"{name} is finished, but {tokenizer.name!r} has no EOS token: set finished=False")
        original, edited = (tokenizer.encode_continuation(text) for text in (pair.original, pair.edited))
        if not original or not edited:
            dropped["empty"] += 1
        elif original == edited:
            dropped["identical"] += 1
        elif len(prompt) + max(len(original), len(edited)) + len(end) > context_length:
            dropped["too_long"] += 1
        else:
            labels = edit_labels(original, edited)
            tokenized.append(
                TokenizedPair(
                    prompt=np.array(prompt, np.int32),
                    original=np.array(original + end, np.int32),
                    edited=np.array(edited + end, np.int32),
                    removed=np.append(labels.removed, np.zeros(len(end), bool)),
                    written=np.append(labels.written, np.zeros(len(end), bool)),
                    id=pair.id,
                )
            )
    return tokenized, dict(dropped)


def pair_micro_batches(pairs: Sequence[TokenizedPair], examples: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Splits pairs, both sides of which are read together, into micro-batches of similar lengths.

    Args:
        pairs: all pairs.
        examples: indices of the pairs to split, int64.
        budget: maximum number of tokens of a micro-batch, padding included.

    Yields:
        Parts of ``examples``.
    """
    # Both sides of a pair are rows of the batch, padded to the longer one: the size is that of two such rows.
    sizes = [len(pairs[i].prompt) + max(len(pairs[i].original), len(pairs[i].edited)) for i in examples]
    # Stable, so that the order of ties does not depend on the sorting algorithm.
    order = np.argsort(sizes, kind="stable")
    for chunk in token_budget_chunks([2 * sizes[k] for k in order], budget):
        yield examples[order[chunk]]


@dataclass(frozen=True)
class RewardSettings(SupervisedSettings):
    """Settings for training a reward model."""

    loss: str = "mean_bt"
    """Name of the loss, one of :data:`~instructgym.agents.supervised.reward_modelling.LOSSES`."""
    unchanged_penalty: float = 0.0
    """Weight of the mean square of the head's output over unchanged tokens, for token-level losses.

    The published value is 0. With it, ``mean_bt`` also credits unchanged tokens after an edit, whose hidden states
    depend on the edit: on tiny models and known bad tokens the AUC per token stays at 0.5 to 0.9; with weights of 0.03
    to 0.1 it is above 0.98."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "loss", tuple(LOSSES))
        check_at_least_zero(self, "unchanged_penalty")
        if self.unchanged_penalty and LOSSES[self.loss].level != "token":
            raise InputError(f"unchanged_penalty needs a token-level loss, {self.loss} is of level sequence")


class RewardTrainer(SupervisedTrainer):
    """Trains a reward model to prefer edited responses to their originals.

    Args:
        model: the reward model, which is trained in place; it gets the loss's transform to rewards at once (see
            :attr:`~instructgym.rewards.learned.reward_model.RewardModel.transform`).
        loss: ``mean_bt``, ``edited_only_bt``, ``tlcr_ce`` (models of level token) or ``sequence_bt`` (level sequence).
        seed: seed of the order of pairs.
        **options: further fields of :class:`RewardSettings`; ``value_learning_rate`` is the learning rate of the head.

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
        # The penalty pulls rewards of unchanged tokens towards 0, so no constant can be added to all rewards.
        model.free_level = self._loss.shift_invariant and not settings.unchanged_penalty
        model.mean = model.std = None

    def fit(
        self, pairs: Sequence[TokenizedPair], callback: Callable[[RewardTrainer], bool | None] | None = None
    ) -> RewardTrainer:
        """Trains the model, and then sets its ``mean`` and ``std`` from the scores of at most 1,024 originals.

        Args:
            pairs: pairs from :func:`tokenize_pairs`.
            callback: called after every optimiser step; training stops if it returns False.

        Returns:
            The trainer itself.

        Raises:
            InputError: if there are no pairs, or the model cannot read one.
            TrainingDivergedError: after ten optimiser steps in a row without a finite gradient.
        """
        pairs = list(pairs)
        if not pairs:
            raise InputError("a reward model needs pairs to be trained on, there are none")
        for side in ([pair.edited for pair in pairs], [pair.original for pair in pairs]):
            self.model.check([pair.prompt for pair in pairs], side)
        self._run(len(pairs), lambda examples: self._step(pairs, examples), callback)
        # The stride is rounded up: a sample over all pairs, of STATISTICS_PAIRS at most.
        sample = pairs[:: -(-len(pairs) // STATISTICS_PAIRS)]
        scores = self.model.sequence_scores([p.prompt for p in sample], [p.original for p in sample])
        self.model.mean, self.model.std = float(scores.mean(dtype=np.float64)), float(scores.std(dtype=np.float64))
        return self

    def _step(self, pairs: Sequence[TokenizedPair], examples: np.ndarray) -> None:
        """Takes one optimiser step on the pairs with the given indices."""
        sums = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
        for members in pair_micro_batches(pairs, self._local_examples(examples), self.settings.token_budget):
            edited, original = _sides(self.model, [pairs[i] for i in members])
            losses = self._loss.function(edited, original)
            if self.settings.unchanged_penalty:
                losses = losses + self.settings.unchanged_penalty * unchanged_penalty(edited, original)
            # Divided by the pairs of all processes and micro-batches: their gradients are added up to a mean.
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


def _sides(model: RewardModel, pairs: Sequence[TokenizedPair]) -> tuple[PairSide, PairSide]:
    """Returns the edited and the original responses, scored in one pass."""
    prompts = [pair.prompt for pair in pairs]
    responses = [pair.edited for pair in pairs] + [pair.original for pair in pairs]
    logits = model.logits(prompts + prompts, responses)
    device = logits.device
    lengths = torch.tensor([len(r) for r in responses], device=device).split(len(pairs))
    # Logits are flat, edited responses first: split them by tokens, or by responses at level sequence.
    split = [len(pairs)] * 2 if model.level == "sequence" else [int(part.sum()) for part in lengths]
    changed = [np.concatenate([p.written for p in pairs]), np.concatenate([p.removed for p in pairs])]
    edited, original = (
        PairSide(part, count, torch.from_numpy(mark).to(device))
        for part, count, mark in zip(logits.split(split), lengths, changed, strict=True)
    )
    return edited, original


def evaluate_reward_model(model: RewardModel, pairs: Sequence[TokenizedPair]) -> dict[str, float]:
    """Measures how well a reward model separates edited responses from originals, and changed tokens from unchanged.

    Args:
        model: a reward model of either level.
        pairs: held-out pairs.

    Returns:
        ``accuracy`` (share of pairs with R(edited) > R(original); a tie counts half), ``margin`` (mean of
            R(edited) - R(original)), ``margin_std`` (its standard deviation) and ``pairs`` (their number). For a
            token-level model also ``removed_auc`` (originals: removed against unchanged tokens, by -r) and
            ``written_auc`` (edited responses: written against unchanged tokens, by r), both over the tokens of all
            pairs, and ``removed_reward``, ``written_reward`` and ``unchanged_reward``, the mean reward of each kind;
            each is left out if there are no tokens of a kind that it needs.

    Raises:
        InputError: if there are no pairs.
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
    aucs = {"removed_auc": auc(-before, removed), "written_auc": auc(after, written)}
    measures |= {name: value for name, value in aucs.items() if value is not None}
    return measures | {f"{kind}_reward": float(values.mean()) for kind, values in kinds.items() if len(values)}
