"""Training of a policy on ranked candidate responses: Tuna, DPO and their relatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.special import expit
from scipy.stats import rankdata
from torch.utils.checkpoint import checkpoint

from ...llm_backends.errors import InputError, check_at_least_zero, check_choice
from ...llm_backends.local.causal_lm import token_budget_chunks
from ...llm_backends.training.teacher_forcing import SHARED_PREFIX
from ..policy.language_model import LanguageModelPolicy
from ..supervised.trainer import SupervisedSettings, SupervisedTrainer
from .losses import LOSSES, PAIRINGS, UNRANKED, Pairing, RankedListBatch, nll

OPTIONS = ("margin", "beta", "alpha", "label_smoothing", "pairs")
"""Settings that are handed to the loss."""
LARGEST_SCORE = 32.0
"""Of LiPO, whose gains are 2^score."""


@dataclass(frozen=True)
class TokenizedRankedList:
    """Candidate responses to one prompt, and which are better; ``ranks`` or ``scores`` say so, not both.

    The loss ``spin`` takes no notice of which: all of them are worse than the reference.
    """

    prompt: Sequence[int]
    """Token ids."""
    candidates: Sequence[Sequence[int]]
    """Token ids of each response, what ends it included; at least one."""
    ranks: Sequence[float] | None = None
    """One per candidate, smaller is better, equal ones are ties; only their order counts."""
    scores: Sequence[float] | None = None
    """One per candidate, larger is better, equal ones are ties; LiPO uses their values."""
    reference: Sequence[int] | None = None
    """Token ids of a response to imitate that is not ranked: the data set's own."""

    def order(self) -> np.ndarray:
        """int64, shape (candidates,): how many candidates are better."""
        keys = np.asarray(self.ranks, np.float64) if self.scores is None else -np.asarray(self.scores, np.float64)
        return rankdata(keys, method="min").astype(np.int64) - 1

    def win_rates(self) -> np.ndarray:
        """float64, shape (candidates,): mean probabilities of being preferred to the candidates, oneself included.

        A preference has probability sigmoid(difference of scores), as in SPPO's code; of ranks, 1, 1/2 (ties) or 0.
        """
        if self.scores is not None:
            return expit(np.subtract.outer(np.asarray(self.scores, np.float64), self.scores)).mean(axis=1)
        ranks = np.asarray(self.ranks, np.float64)
        return ((ranks[:, None] < ranks) + 0.5 * (ranks[:, None] == ranks)).mean(axis=1)


@dataclass(frozen=True)
class RankingSettings(SupervisedSettings):
    """Settings of training on ranked candidates; ``batch_size`` counts lists."""

    loss: str = "tuna"
    """One of :data:`~instructgym.agents.preferences.losses.LOSSES`."""
    margin: float | None = None
    """Of Tuna's losses, per rank, in nats per token. This and the other options of losses: None takes the loss's."""
    beta: float | None = None
    """Of the losses with a reference policy, above 0."""
    alpha: float | None = None
    """Of ``tdpo2``, at least 0: weight of the KL divergences to the reference policy."""
    label_smoothing: float | None = None
    """Of ``dpo``, in [0, 0.5)."""
    pairs: Pairing | None = None
    """Of ``dpo``, ``ipo``, ``sppo`` and TDPO's losses: ``all`` or ``best_worst``."""
    mle_weight: float | None = None
    """Weight of the negative log-likelihood per token of ``imitate``; None: 1 for Tuna's losses, 0 for the others."""
    imitate: Literal["reference", "best", "all"] = "reference"
    """Responses of the MLE term: the reference, as in Tuna's paper; the best candidates; all candidates, and the
    reference where there is one, as in Tuna's released code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "loss", tuple(LOSSES))
        check_choice(self, "imitate", ("reference", "best", "all"))
        known = LOSSES[self.loss].defaults
        for name in self.given():
            if name not in known:
                raise InputError(f"{name} is no option of the loss {self.loss}, which has {', '.join(known)}")
        limited = ("margin", "alpha", "mle_weight")
        check_at_least_zero(self, *(name for name in limited if getattr(self, name) is not None))
        if self.pairs is not None:
            check_choice(self, "pairs", PAIRINGS)
        if self.beta is not None and not self.beta > 0:
            raise InputError(f"beta must be above 0, got {self.beta}")
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")

    def given(self) -> dict[str, Any]:
        """Options of the loss that are not left to it."""
        return {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}

    @property
    def weight(self) -> float:
        """Of the MLE term."""
        return LOSSES[self.loss].mle_weight if self.mle_weight is None else self.mle_weight


@dataclass
class PreparedList:
    """A list as it is computed: its reference, if it is needed, is the last row."""

    prompt: np.ndarray
    responses: list[np.ndarray]
    ranks: np.ndarray
    """int64: -1 for the reference."""
    imitated: np.ndarray
    """bool."""
    scores: np.ndarray
    win_rates: np.ndarray
    pairs: int = 0
    """That the loss compares."""
    reference_logprobs: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Tokens of its longest sequence."""
        return len(self.prompt) + max(map(len, self.responses))

    @property
    def tokens(self) -> int:
        """Of the responses to imitate."""
        return sum(len(r) for r, imitated in zip(self.responses, self.imitated, strict=True) if imitated)


class RankingTrainer(SupervisedTrainer):
    """Trains a policy to give better candidates more probability than worse ones.

    The loss of a batch is the mean of the ranking loss over its lists that have a pair to compare, plus ``mle_weight``
    times the negative log-likelihood per token of the responses to imitate.

    Logs ``loss``, ``ranking_loss``, ``mle_loss`` (nats per token), ``accuracy`` (share of pairs in the right order: by
    log-prob per token for Tuna's losses, else by log-ratio), ``margin`` (mean difference between the two, nats),
    ``pairs`` and ``lists_without_pairs`` of the batch; for TDPO's losses also ``reference_kl``, the mean over responses
    of KL(reference || policy) summed over their tokens (nats).

    Args:
        policy: what is trained, in place. Its reference policy must stay as it is during :meth:`fit`.
        seed: of the order of lists.
        **options: fields of :class:`RankingSettings`.

    Raises:
        InputError: for settings out of range, or a policy without the reference policy that the loss needs.
    """

    name = "ranking"
    settings: RankingSettings

    def __init__(self, policy: LanguageModelPolicy, seed: int = 0, **options: Any) -> None:
        settings = RankingSettings(**options)
        self.policy, self._loss = policy, LOSSES[settings.loss]
        self.pairing = self._loss.pairing(settings.given())
        """Which pairs are compared."""
        if self._loss.needs_reference_policy and policy.reference == "none":
            raise InputError(f"the loss {settings.loss} compares with a reference policy, this policy has none")
        super().__init__(policy, settings, seed)
        self.lists_without_pairs = 0
        """Of the last :meth:`fit`: lists without a ranking loss, as those of one candidate or of ties alone."""

    def fit(
        self, lists: Sequence[TokenizedRankedList], callback: Callable[[RankingTrainer], bool | None] | None = None
    ) -> RankingTrainer:
        """Trains.

        Args:
            lists: at least one of them with candidates of different rank (for ``spin``: with a reference).
            callback: called after every optimiser step; returning False stops training.

        Raises:
            InputError: for lists that cannot be read or lack what the loss needs, naming the list; for none to rank.
            TrainingDivergedError: after ten optimiser steps in a row without a finite gradient.
        """
        for number, one in enumerate(lists):
            self.check(one, f"list {number}")
        prepared = [self.prepare(one) for one in lists]
        self.lists_without_pairs = sum(not one.pairs for one in prepared)
        if self.lists_without_pairs == len(prepared):
            raise InputError("there is nothing to rank: no list has candidates of different rank")
        self._run(len(prepared), lambda examples: self.train_step(prepared, examples), callback)
        return self

    # --- data --------------------------------------------------------------------------------------------------------

    def check(self, one: TokenizedRankedList, name: str) -> None:
        loss, limit, vocabulary = self.settings.loss, self.policy.lm.context_length, len(self.policy.lm.tokenizer)
        if not len(one.prompt):
            raise InputError(f"{name} has an empty prompt: give it at least one token")
        if not len(one.candidates):
            raise InputError(f"{name} has no candidates")
        named = [(f"candidate {k}", response) for k, response in enumerate(one.candidates)]
        if one.reference is not None:
            named.append(("reference", one.reference))
        for kind, response in named:
            if not len(response):
                raise InputError(f"{name}: the {kind} has no token, leave it out (an end-of-sequence token is one)")
            if len(one.prompt) + len(response) > limit:
                raise InputError(
                    f"{name}: prompt and {kind} have {len(one.prompt)} + {len(response)} tokens, "
                    f"{self.policy.lm.name} reads {limit}: shorten or leave it out"
                )
        ids = np.concatenate([np.asarray(one.prompt), *(np.asarray(response) for _, response in named)])
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise InputError(f"{name} has a token id outside 0 to {vocabulary - 1}: use the policy's own tokenizer")
        if (one.ranks is None) == (one.scores is None):
            raise InputError(f"{name} needs ranks or scores, not both")
        values = np.asarray(one.ranks if one.scores is None else one.scores, np.float64)
        if values.shape != (len(one.candidates),) or not np.isfinite(values).all():
            raise InputError(f"{name} needs one finite rank or score for each of its {len(one.candidates)} candidates")
        if self._loss.needs_scores and (one.scores is None or np.abs(values).max() > LARGEST_SCORE):
            raise InputError(
                f"{name}: the loss {loss} needs scores, of {LARGEST_SCORE:g} at most in size: scale them to [0, 1]"
            )
        if one.reference is None and self.pairing == "reference":
            raise InputError(f"{name} has no reference response, over whose candidates the loss {loss} would prefer it")
        if one.reference is None and self.settings.weight and self.settings.imitate == "reference":
            raise InputError(f"{name} has no reference response to imitate: give one, or set imitate or mle_weight=0")

    def prepare(self, one: TokenizedRankedList) -> PreparedList:
        count, imitate = len(one.candidates), self.settings.imitate if self.settings.weight else ""
        responses, ranks = [np.asarray(c, np.int32) for c in one.candidates], one.order()
        imitated = np.full(count, imitate == "all") | ((imitate == "best") & (ranks == 0))
        scores = np.zeros(count) if one.scores is None else np.asarray(one.scores, np.float64)
        wins = one.win_rates()
        if one.reference is not None and (imitate in ("reference", "all") or self.pairing == "reference"):
            responses.append(np.asarray(one.reference, np.int32))
            ranks, imitated = np.append(ranks, UNRANKED), np.append(imitated, imitate in ("reference", "all"))
            scores, wins = np.append(scores, 0.0), np.append(wins, 0.5)
        prepared = PreparedList(np.asarray(one.prompt, np.int32), responses, ranks, imitated, scores, wins)
        prepared.pairs = len(_lists([prepared], torch.zeros(len(ranks))).pairs(self.pairing)[0])
        return prepared

    def _micro_batches(self, lists: Sequence[PreparedList], examples: Sequence[int]) -> Iterator[list[int]]:
        """Splits lists into micro-batches of like lengths within the token budget; one too long is by itself."""
        chunk: list[int] = []
        for i in sorted(examples, key=lambda i: lists[i].width):
            one = lists[i]
            rows = sum(len(lists[k].responses) for k in [*chunk, i])
            if chunk and rows * one.width > self.settings.token_budget:
                yield chunk
                chunk = []
            chunk.append(i)
        if chunk:
            yield chunk

    def _shared(self, one: PreparedList) -> int:
        """Tokens of a list's prompt that are read once for all of its candidates."""
        shared = len(one.prompt) - 1
        return shared if self.policy.lm.plain_attention and shared >= SHARED_PREFIX else 0

    # --- training ----------------------------------------------------------------------------------------------------

    def train_step(self, lists: Sequence[PreparedList], examples: np.ndarray) -> dict[str, float]:
        """An optimiser step on some of the lists; returns its metrics."""
        ranked = sum(lists[i].pairs > 0 for i in examples)
        pairs, tokens = sum(lists[i].pairs for i in examples), sum(lists[i].tokens for i in examples)
        sums = dict.fromkeys(("loss", "ranking_loss", "mle_loss", "accuracy", "margin"), 0.0)
        if self._loss.needs_reference_kl:
            sums["reference_kl"] = 0.0
        responses = sum(len(lists[i].responses) for i in examples if lists[i].pairs or lists[i].tokens)
        mine = [int(i) for i in self._local_examples(examples) if lists[i].pairs or lists[i].tokens]
        for members in self._micro_batches(lists, mine):
            chosen = [lists[i] for i in members]
            batch = self._candidates(chosen)
            ranking = self._loss.function(batch, **self.settings.given()).sum() / max(ranked, 1)
            imitated = torch.from_numpy(np.concatenate([one.imitated for one in chosen])).to(batch.logprobs.device)
            mle = nll(batch, imitated).sum() / max(tokens, 1)
            loss = ranking + self.settings.weight * mle
            loss.backward()
            with torch.no_grad():
                winners, losers = batch.pairs(self.pairing)
                values = self._loss.values(batch)
                differences = values[winners] - values[losers]
                sums["loss"] += float(loss)
                sums["ranking_loss"] += float(ranking)
                sums["mle_loss"] += float(mle)
                sums["accuracy"] += float((differences > 0).sum()) / max(pairs, 1)
                sums["margin"] += float(differences.sum()) / max(pairs, 1)
                if batch.reference_kls is not None:
                    sums["reference_kl"] += float(batch.reference_kls.sum()) / responses
        self.logger.record("train/pairs", pairs)
        self.logger.record("train/lists_without_pairs", len(examples) - ranked)
        metrics = self._update(len(lists), sums)
        self.policy.clear_prefix_cache()
        return metrics

    def _candidates(self, lists: Sequence[PreparedList]) -> RankedListBatch:
        """A micro-batch as the loss takes it, with a graph."""
        if self._loss.needs_reference_kl:
            logprobs, references, kls = self._read(lists)
            batch = _lists(lists, logprobs)
            batch.reference_logprobs, batch.reference_kls = references.detach(), kls
            return batch
        batch = _lists(lists, self._read(lists))
        if self._loss.needs_reference_policy:
            batch.reference_logprobs = torch.cat([self._reference(one) for one in lists])
        return batch

    def _read(self, lists: Sequence[PreparedList]) -> torch.Tensor:
        """Sums over tokens, float32, with a graph.

        Shape (rows,): log-probs; where the loss needs the latter, shape (3, rows): log-probs by the policy and by the
        reference policy, and KL divergences between them.

        A list over the token budget is read part by part, and each part again in the backward pass, so that no more
        than one part's activations are in memory at once.
        """
        prompts = [one.prompt for one in lists for _ in one.responses]
        responses = [response for one in lists for response in one.responses]

        def score(rows: Sequence[int], reference_hidden: torch.Tensor | None) -> torch.Tensor:
            some = [responses[k] for k in rows]
            given = [prompts[k] for k in rows]
            if reference_hidden is None:
                return _sums(self.policy.score(given, some, [None] * len(some), values=False).logprobs, some)
            return _sums(torch.stack(self.policy.compare(given, some, reference_hidden)), some)

        parts: list[tuple[list[int], torch.Tensor | None]] = [(rows, None) for rows in self._parts(lists)]
        if self._loss.needs_reference_kl:  # of frozen weights: not to be read again in the backward pass
            states = self.policy.reference_hidden
            parts = [(rows, states([prompts[k] for k in rows], [responses[k] for k in rows])) for rows, _ in parts]
        if len(parts) == 1:
            return score(*parts[0])
        return torch.cat([checkpoint(score, *part, use_reentrant=False) for part in parts], dim=-1)

    def _reference(self, one: PreparedList) -> torch.Tensor:
        """float32, shape (rows,): log-probs of a list by the reference policy, computed once.

        Lists are read one by one, so that the last bits do not depend on what else is in a batch: training that is
        resumed computes them again.
        """
        if one.reference_logprobs is None:
            parts = [[one.responses[k] for k in rows] for rows in self._parts([one])]
            logprobs = [
                _sums(self.policy.reference_logprobs([one.prompt] * len(some), some, [None] * len(some)), some)
                for some in parts
            ]
            one.reference_logprobs = torch.cat(logprobs)
        return one.reference_logprobs

    def _parts(self, lists: Sequence[PreparedList]) -> list[list[int]]:
        """Rows of a micro-batch that are read at once: all, unless a single list is over the token budget."""
        widths = [len(one.prompt) + len(response) for one in lists for response in one.responses]
        if len(lists) > 1:
            return [list(range(len(widths)))]
        shared = self._shared(lists[0])
        return list(token_budget_chunks([width - shared for width in widths], self.settings.token_budget - shared))

    def _load(self, folder: Path) -> None:
        self.policy.load(folder)


def _lists(lists: Sequence[PreparedList], logprobs: torch.Tensor) -> RankedListBatch:
    def tensor(rows: list[np.ndarray] | list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(np.concatenate([np.atleast_1d(row) for row in rows]), dtype=dtype).to(logprobs.device)

    return RankedListBatch(
        logprobs=logprobs,
        lengths=tensor([len(r) for one in lists for r in one.responses], torch.int64),
        counts=tensor([len(one.responses) for one in lists], torch.int64),
        ranks=tensor([one.ranks for one in lists], torch.int64),
        scores=tensor([one.scores for one in lists], torch.float32),
        win_rates=tensor([one.win_rates for one in lists], torch.float32),
    )


def _sums(values: torch.Tensor, responses: Sequence[np.ndarray]) -> torch.Tensor:
    """Per response, of per-token values, which are the last dimension."""
    parts = values.split([len(r) for r in responses], dim=-1)
    return torch.stack([part.sum(dim=-1) for part in parts], dim=-1)
