"""Offline training of a policy on ranked candidate responses: Tuna, DPO, IPO, SPIN, SPPO, TDPO and LiPO-lambda.

The losses are in :mod:`instructgym.agents.preferences.losses`; lists of texts become lists of tokens in
:mod:`instructgym.agents.preferences.lists`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from scipy.special import expit
from scipy.stats import rankdata
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...llm_backends.errors import InputError, check_fields, check_known
from ...llm_backends.local.causal_lm import token_budget_chunks
from ...llm_backends.training.teacher_forcing import SHARED_PREFIX
from ..policy.language_model import LanguageModelPolicy
from ..supervised.trainer import SupervisedSettings, SupervisedTrainer
from .losses import LOSSES, UNRANKED, RankedListBatch, nll

OPTIONS = ("margin", "beta", "alpha", "label_smoothing", "pairs")
"""Settings that are passed to the loss function."""
LARGEST_SCORE = 32.0
"""Largest absolute score that LiPO accepts, because its gains are 2^score."""


@dataclass(frozen=True)
class TokenizedRankedList:
    """Candidate responses to one prompt as token ids, ordered by either ``ranks`` or ``scores``.

    The loss ``spin`` ignores the order: it takes all candidates as worse than the reference response.
    """

    prompt: Sequence[int]
    """Token ids of the prompt."""
    candidates: Sequence[Sequence[int]]
    """Token ids of each response, including the tokens that end it; at least one response."""
    ranks: Sequence[float] | None = None
    """One rank per candidate, smaller is better, equal ranks are ties; only the order is used. None: ``scores`` are
    set."""
    scores: Sequence[float] | None = None
    """One score per candidate, larger is better, equal scores are ties; LiPO and SPPO use the values. None: ``ranks``
    are set."""
    reference: Sequence[int] | None = None
    """Token ids of the data set's own response, to imitate; it is not ranked. None if there is none."""

    def order(self) -> np.ndarray:
        """Returns for each candidate the number of better candidates, int64, shape (candidates,)."""
        keys = np.asarray(self.ranks, np.float64) if self.scores is None else -np.asarray(self.scores, np.float64)
        return rankdata(keys, method="min").astype(np.int64) - 1

    def win_rates(self) -> np.ndarray:
        """Returns each candidate's mean probability of being preferred to the candidates, including itself.

        With scores, a preference has probability sigmoid(difference of scores), as in SPPO's code; with ranks it has
        probability 1, 1/2 (ties) or 0.

        Returns:
            float64, shape (candidates,).
        """
        if self.scores is not None:
            return expit(np.subtract.outer(np.asarray(self.scores, np.float64), self.scores)).mean(axis=1)
        ranks = np.asarray(self.ranks, np.float64)
        return ((ranks[:, None] < ranks) + 0.5 * (ranks[:, None] == ranks)).mean(axis=1)


@dataclass(frozen=True)
class RankingSettings(SupervisedSettings):
    """Settings of training on ranked candidates; ``batch_size`` is a number of lists."""

    loss: str = "tuna"
    """Name of the ranking loss, a key of :data:`~instructgym.agents.preferences.losses.LOSSES`."""
    margin: Annotated[float, Ge(0)] | None = None
    """Margin per rank of Tuna's losses, at least 0, in nats per token; None: the loss's default."""
    beta: Annotated[float, Gt(0)] | None = None
    """Strength of the pull towards the reference policy, in the losses that have one, above 0; None: the loss's
    default."""
    alpha: Annotated[float, Ge(0)] | None = None
    """Weight of the KL divergences to the reference policy in ``tdpo2``, at least 0; None: the loss's default."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] | None = None
    """Probability that a preference is wrong, in ``dpo``, in [0, 0.5); None: the loss's default."""
    pairs: Literal["all", "best_worst"] | None = None
    """Pairs that ``dpo``, ``ipo``, ``sppo`` and TDPO's losses compare: ``all`` or ``best_worst``; None: the loss's
    default."""
    mle_weight: Annotated[float, Ge(0)] | None = None
    """Weight of the negative log-likelihood per token of ``imitate``; None: 1 for Tuna's losses, 0 for the others."""
    imitate: Literal["reference", "best", "all"] = "reference"
    """Responses that the MLE term (their negative log-likelihood) imitates: ``reference``: the reference response, as
    in Tuna's paper; ``best``: the best candidates; ``all``: all candidates, and the reference response if there is one,
    as in Tuna's released code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known("loss", self.loss, LOSSES)
        check_fields(self)
        known = LOSSES[self.loss].defaults
        for name in self.loss_options():
            if name not in known:
                raise InputError(f"{name} is no option of the loss {self.loss}, which has {', '.join(known)}")

    def loss_options(self) -> dict[str, Any]:
        """Returns the options of the loss that are set; the others keep the loss's defaults."""
        return {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}

    @property
    def weight(self) -> float:
        """Weight of the MLE term."""
        return LOSSES[self.loss].mle_weight if self.mle_weight is None else self.mle_weight


@dataclass
class PreparedList:
    """A ranked list as the trainer reads it: the reference response, if the loss needs it, is the last row."""

    prompt: np.ndarray
    """Token ids of the prompt, int32."""
    responses: list[np.ndarray]
    """Token ids of each row's response, int32."""
    ranks: np.ndarray
    """int64, shape (rows,): number of better candidates; -1 for the reference response."""
    imitated: np.ndarray
    """bool, shape (rows,): True for the responses that the MLE term imitates."""
    scores: np.ndarray
    """float64, shape (rows,): scores; 0 for the reference response, and for all rows of a list without scores."""
    win_rates: np.ndarray
    """float64, shape (rows,): mean probabilities of being preferred; 0.5 for the reference response."""
    pairs: int = 0
    """Number of pairs that the loss compares."""
    reference_logprobs: Tensor | None = None
    """float32, shape (rows,): log-probs under the reference policy, in nats; None until they are computed."""

    @property
    def width(self) -> int:
        """Number of tokens of the longest row, prompt included."""
        return len(self.prompt) + max(map(len, self.responses))

    @property
    def tokens(self) -> int:
        """Number of tokens of the responses to imitate."""
        return sum(len(r) for r, imitated in zip(self.responses, self.imitated, strict=True) if imitated)


class RankingTrainer(SupervisedTrainer):
    """Trains a policy to give better candidates a higher probability than worse ones.

    The loss of a batch is the mean of the ranking loss over its lists that have a pair to compare, plus ``mle_weight``
    times the negative log-likelihood per token of the responses to imitate.

    Logs ``loss``, ``ranking_loss``, ``mle_loss`` (nats per token), ``accuracy`` (share of pairs in the right order: by
    log-prob per token for Tuna's losses, by log-ratio for the others), ``margin`` (mean difference of these values
    between better and worse, nats), ``pairs`` and ``lists_without_pairs`` of the batch; for TDPO's losses also
    ``reference_kl``, the mean over responses of KL(reference || policy) summed over their tokens (nats).

    Args:
        policy: the policy to train, in place. Its reference policy must not change during :meth:`fit`.
        seed: seed of the order of the lists.
        **options: fields of :class:`RankingSettings`.

    Raises:
        InputError: for settings out of range, or a policy without the reference policy that the loss needs.
    """

    name = "ranking"
    settings: RankingSettings

    def __init__(self, policy: LanguageModelPolicy, seed: int = 0, **options: Any) -> None:
        settings = RankingSettings(**options)
        self.policy, self._loss = policy, LOSSES[settings.loss]
        self.pairing = self._loss.pairing(settings.loss_options())
        """The pairs that the loss compares."""
        if self._loss.needs_reference_policy and policy.reference == "none":
            raise InputError(f"the loss {settings.loss} compares with a reference policy, this policy has none")
        super().__init__(policy, settings, seed)
        self.lists_without_pairs = 0
        """Number of lists of the last :meth:`fit` without a pair to compare: those of one candidate or of ties only."""

    def fit(
        self, lists: Sequence[TokenizedRankedList], callback: Callable[[RankingTrainer], bool | None] | None = None
    ) -> RankingTrainer:
        """Trains the policy on ranked lists.

        Args:
            lists: ranked lists, at least one of them with candidates of different rank (for ``spin``: with a reference
                response).
            callback: called with this trainer after every optimiser step; returning False stops training.

        Returns:
            This trainer.

        Raises:
            InputError: if a list cannot be read or lacks what the loss needs, with the list's number; if no list has a
                pair to compare.
            TrainingDivergedError: after ten optimiser steps in a row without a finite gradient.
        """
        for number, ranked in enumerate(lists):
            self.check(ranked, f"list {number}")
        prepared = [self.prepare(ranked) for ranked in lists]
        self.lists_without_pairs = sum(not prepared_list.pairs for prepared_list in prepared)
        if self.lists_without_pairs == len(prepared):
            raise InputError("there is nothing to rank: no list has candidates of different rank")
        self._run(len(prepared), lambda examples: self.train_step(prepared, examples), callback)
        return self

    # --- data --------------------------------------------------------------------------------------------------------

    def check(self, ranked: TokenizedRankedList, name: str) -> None:
        """Checks that a list can be read and has what the loss needs.

        Args:
            ranked: the list.
            name: name of the list in error messages.

        Raises:
            InputError: if it does not.
        """
        loss, limit, vocabulary = self.settings.loss, self.policy.lm.context_length, len(self.policy.lm.tokenizer)
        if not len(ranked.prompt):
            raise InputError(f"{name} has an empty prompt: give it at least one token")
        if not len(ranked.candidates):
            raise InputError(f"{name} has no candidates")
        named = [(f"candidate {k}", response) for k, response in enumerate(ranked.candidates)]
        if ranked.reference is not None:
            named.append(("reference", ranked.reference))
        for kind, response in named:
            if not len(response):
                raise InputError(f"{name}: the {kind} has no token, leave it out (an end-of-sequence token is one)")
            if len(ranked.prompt) + len(response) > limit:
                raise InputError(
                    f"{name}: prompt and {kind} have {len(ranked.prompt)} + {len(response)} tokens, "
                    f"{self.policy.lm.name} reads {limit}: shorten or leave it out"
                )
        ids = np.concatenate([np.asarray(ranked.prompt), *(np.asarray(response) for _, response in named)])
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise InputError(f"{name} has a token id outside 0 to {vocabulary - 1}: use the policy's own tokenizer")
        if (ranked.ranks is None) == (ranked.scores is None):
            raise InputError(f"{name} needs ranks or scores, not both")
        values = np.asarray(ranked.ranks if ranked.scores is None else ranked.scores, np.float64)
        if values.shape != (len(ranked.candidates),) or not np.isfinite(values).all():
            raise InputError(
                f"{name} needs one finite rank or score for each of its {len(ranked.candidates)} candidates"
            )
        if self._loss.needs_scores and (ranked.scores is None or np.abs(values).max() > LARGEST_SCORE):
            raise InputError(
                f"{name}: the loss {loss} needs scores, of {LARGEST_SCORE:g} at most in size: scale them to [0, 1]"
            )
        if ranked.reference is None and self.pairing == "reference":
            raise InputError(f"{name} has no reference response, over whose candidates the loss {loss} would prefer it")
        if ranked.reference is None and self.settings.weight and self.settings.imitate == "reference":
            raise InputError(f"{name} has no reference response to imitate: give one, or set imitate or mle_weight=0")

    def prepare(self, ranked: TokenizedRankedList) -> PreparedList:
        """Returns a checked list as arrays, with the reference response as its last row if the loss needs it."""
        count, imitate = len(ranked.candidates), self.settings.imitate if self.settings.weight else ""
        responses, ranks = [np.asarray(c, np.int32) for c in ranked.candidates], ranked.order()
        imitated = np.full(count, imitate == "all") | ((imitate == "best") & (ranks == 0))
        scores = np.zeros(count) if ranked.scores is None else np.asarray(ranked.scores, np.float64)
        wins = ranked.win_rates()
        if ranked.reference is not None and (imitate in ("reference", "all") or self.pairing == "reference"):
            responses.append(np.asarray(ranked.reference, np.int32))
            ranks, imitated = np.append(ranks, UNRANKED), np.append(imitated, imitate in ("reference", "all"))
            # Placeholders: losses that use scores or win rates compare no pair with the reference response.
            scores, wins = np.append(scores, 0.0), np.append(wins, 0.5)
        prepared = PreparedList(np.asarray(ranked.prompt, np.int32), responses, ranks, imitated, scores, wins)
        # Which pairs there are depends on the ranks alone, so any log-probs do.
        prepared.pairs = len(_lists([prepared], torch.zeros(len(ranks))).pairs(self.pairing)[0])
        return prepared

    def _micro_batches(self, lists: Sequence[PreparedList], examples: Sequence[int]) -> Iterator[list[int]]:
        """Yields micro-batches of lists of similar length within the token budget; a list above it is a batch alone."""
        chunk: list[int] = []
        for i in sorted(examples, key=lambda i: lists[i].width):
            # Widths rise, so every row of the micro-batch would be padded to the width of this list.
            widest = lists[i]
            rows = sum(len(lists[k].responses) for k in [*chunk, i])
            if chunk and rows * widest.width > self.settings.token_budget:
                yield chunk
                chunk = []
            chunk.append(i)
        if chunk:
            yield chunk

    def _shared(self, prepared: PreparedList) -> int:
        """Returns the number of prompt tokens that are read once for all candidates of a list."""
        # The last prompt token predicts the first token of each response, so it is read with every candidate.
        shared = len(prepared.prompt) - 1
        return shared if self.policy.lm.shares_prefixes and shared >= SHARED_PREFIX else 0

    # --- training ----------------------------------------------------------------------------------------------------

    def train_step(self, lists: Sequence[PreparedList], examples: np.ndarray) -> dict[str, float]:
        """Makes an optimiser step on a batch of lists and returns its metrics.

        Args:
            lists: all lists.
            examples: int64: indices of the lists of the batch, those of all processes.

        Returns:
            The metrics that the class names, without ``pairs`` and ``lists_without_pairs``, and ``grad_norm``.
        """
        # Denominators count the batch of all processes, so that the sum of their gradients is that of the whole batch.
        ranked_lists = sum(lists[i].pairs > 0 for i in examples)
        pairs, tokens = sum(lists[i].pairs for i in examples), sum(lists[i].tokens for i in examples)
        sums = dict.fromkeys(("loss", "ranking_loss", "mle_loss", "accuracy", "margin"), 0.0)
        if self._loss.needs_reference_kl:
            sums["reference_kl"] = 0.0
        responses = sum(len(lists[i].responses) for i in examples if lists[i].pairs or lists[i].tokens)
        # A list without a pair or a response to imitate adds nothing to the loss, so it is not read.
        local_lists = [int(i) for i in self._local_examples(examples) if lists[i].pairs or lists[i].tokens]
        for members in self._micro_batches(lists, local_lists):
            micro_batch = [lists[i] for i in members]
            batch = self._candidates(micro_batch)
            ranking = self._loss.function(batch, **self.settings.loss_options()).sum() / max(ranked_lists, 1)
            imitated = torch.from_numpy(np.concatenate([p.imitated for p in micro_batch])).to(batch.logprobs.device)
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
        self.logger.record("train/lists_without_pairs", len(examples) - ranked_lists)
        metrics = self._update(len(lists), sums)
        self.policy.clear_prefix_cache()
        return metrics

    def _candidates(self, lists: Sequence[PreparedList]) -> RankedListBatch:
        """Returns a micro-batch in the form that the loss takes; the policy's values are part of the autograd graph."""
        if self._loss.needs_reference_kl:
            logprobs, references, kls = self._read(lists)
            batch = _lists(lists, logprobs)
            batch.reference_logprobs, batch.reference_kls = references.detach(), kls
            return batch
        batch = _lists(lists, self._read(lists))
        if self._loss.needs_reference_policy:
            batch.reference_logprobs = torch.cat([self._reference(prepared) for prepared in lists])
        return batch

    def _read(self, lists: Sequence[PreparedList]) -> Tensor:
        """Computes log-probs of whole responses, and KL divergences if the loss needs them.

        A list above the token budget is read part by part, and each part again in the backward pass, so that no more
        than one part's activations are in memory at once.

        Returns:
            float32, part of the autograd graph, sums over tokens, in nats. Shape (rows,): log-probs; if the loss needs
                KL divergences, shape (3, rows): log-probs under the policy and under the reference policy, and
                KL(reference || policy).
        """
        prompts = [prepared.prompt for prepared in lists for _ in prepared.responses]
        responses = [response for prepared in lists for response in prepared.responses]

        def score(rows: Sequence[int], reference_hidden: Tensor | None) -> Tensor:
            chunk = [responses[k] for k in rows]
            chunk_prompts = [prompts[k] for k in rows]
            if reference_hidden is None:
                return _sums(self.policy.score(chunk_prompts, chunk, [None] * len(chunk), values=False).logprobs, chunk)
            return _sums(torch.stack(self.policy.compare(chunk_prompts, chunk, reference_hidden)), chunk)

        parts: list[tuple[list[int], Tensor | None]] = [(rows, None) for rows in self._parts(lists)]
        if self._loss.needs_reference_kl:
            # The reference weights are frozen: their states are computed once, not again in the backward pass.
            states = self.policy.reference_hidden
            parts = [(rows, states([prompts[k] for k in rows], [responses[k] for k in rows])) for rows, _ in parts]
        if len(parts) == 1:
            return score(*parts[0])
        return torch.cat([checkpoint(score, *part, use_reentrant=False) for part in parts], dim=-1)

    def _reference(self, prepared: PreparedList) -> Tensor:
        """Returns log-probs of a list's responses under the reference policy, float32, shape (rows,), in nats.

        They are computed once per list, and each list is read separately: then they do not depend, in the last bits, on
        the other lists of a batch, and resumed training, which computes them again, gets the same values.
        """
        if prepared.reference_logprobs is None:
            parts = [[prepared.responses[k] for k in rows] for rows in self._parts([prepared])]
            logprobs = [
                _sums(self.policy.reference_logprobs([prepared.prompt] * len(part), part, [None] * len(part)), part)
                for part in parts
            ]
            prepared.reference_logprobs = torch.cat(logprobs)
        return prepared.reference_logprobs

    def _parts(self, lists: Sequence[PreparedList]) -> list[list[int]]:
        """Splits the rows of a micro-batch into those read at once: all, unless one list is above the token budget."""
        widths = [len(prepared.prompt) + len(response) for prepared in lists for response in prepared.responses]
        if len(lists) > 1:
            return [list(range(len(widths)))]
        shared = self._shared(lists[0])
        return list(token_budget_chunks([width - shared for width in widths], self.settings.token_budget - shared))

    def _load(self, folder: Path) -> None:
        self.policy.load(folder)


def _lists(lists: Sequence[PreparedList], logprobs: Tensor) -> RankedListBatch:
    """Returns lists and the log-probs of their rows in the form that the losses take, on the log-probs' device."""

    def tensor(rows: list[np.ndarray] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.concatenate([np.atleast_1d(row) for row in rows]), dtype=dtype).to(logprobs.device)

    return RankedListBatch(
        logprobs=logprobs,
        lengths=tensor([len(r) for prepared in lists for r in prepared.responses], torch.int64),
        counts=tensor([len(prepared.responses) for prepared in lists], torch.int64),
        ranks=tensor([prepared.ranks for prepared in lists], torch.int64),
        scores=tensor([prepared.scores for prepared in lists], torch.float32),
        win_rates=tensor([prepared.win_rates for prepared in lists], torch.float32),
    )


def _sums(values: Tensor, responses: Sequence[np.ndarray]) -> Tensor:
    """Returns sums per response of per-token values, whose last dimension is the tokens."""
    parts = values.split([len(r) for r in responses], dim=-1)
    return torch.stack([part.sum(dim=-1) for part in parts], dim=-1)
