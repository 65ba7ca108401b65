"""Online learning from ranked samples of the policy: Tuna, DPO, IPO, SPIN, SPPO, TDPO and LiPO-lambda.

The losses are in :mod:`instructgym.agents.preferences.losses`; the optimiser steps, which offline training shares, are
in :mod:`instructgym.agents.preferences.trainer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from operator import itemgetter
from typing import Any, ClassVar

import numpy as np

from ...llm_backends.errors import InputError, check_at_least
from ..rollouts.agent import RolloutAgent, RolloutSettings
from ..rollouts.batch import TokenBatch
from .losses import LOSSES
from .trainer import PreparedList, RankingSettings, RankingTrainer, TokenizedRankedList

PREVIOUS = "previous"
"""Name of the frozen adapter that holds the previous iterate."""
DIGITS = 6
"""Decimal digits, relative to the largest absolute return, to which returns are rounded before they are ranked.

The sum of a reward that is split over tokens has rounding errors, which must not break ties.
"""


@dataclass(frozen=True)
class RankingAgentSettings(RankingSettings, RolloutSettings):
    """Settings of online training (``learn``) and offline training (``fit``).

    ``batch_size`` (lists per optimiser step) is used by ``fit`` only, ``minibatches`` (optimiser steps per epoch) by
    ``learn`` only. ``epochs`` is the number of passes over the lists of an update, or over the data of ``fit``.
    """

    refresh_reference: int = 0
    """Number of updates after which the current policy becomes the reference policy, beginning before the first update,
    as in SPIN and SPPO, whose opponent is the previous iterate; 0: the reference policy never changes."""
    reference_opening: str | None = None
    """Text between a prompt and its reference response; None: nothing if the prompt ends in white space, as chat
    templates do, a blank otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, refresh_reference=self.refresh_reference)
        if self.refresh_reference and not LOSSES[self.loss].needs_reference_policy:
            raise InputError(f"refresh_reference: the loss {self.loss} compares with no reference policy")

    @property
    def needs_references(self) -> bool:
        """Whether the loss needs a reference response in every list."""
        imitates = self.weight > 0 and self.imitate == "reference"
        return imitates or LOSSES[self.loss].pairing(self.loss_options()) == "reference"

    @property
    def uses_references(self) -> bool:
        """Whether the loss uses a reference response if there is one."""
        return self.needs_references or (self.weight > 0 and self.imitate == "all")


class RankingAgent(RolloutAgent):
    """An agent that samples responses, ranks those of each prompt by their returns, and trains on a ranking loss.

    The env needs ``group_size`` above 1. Any reward can rank; the reward ``rank`` leaves it to a ranker. The valid
    samples of a group form one list. Lists of one sample or of ties only are skipped and
    counted (with ``spin``, which compares samples with the reference response, none is skipped). Each update makes
    ``epochs`` passes over its lists, of ``minibatches`` optimiser steps each. :meth:`fit` trains on lists that exist
    already: it runs :class:`~instructgym.agents.preferences.trainer.RankingTrainer` on this agent's weights and
    optimiser.

    The reference response, to imitate or to prefer to the samples, is that of the example: ``info["reference"]`` at the
    end of an episode, followed by an end-of-sequence token and cut to the env's ``max_tokens``. Tuna's losses imitate
    it by default and are refused in an env without references: set ``imitate="best"`` or ``mle_weight=0`` there.

    Log-probs are over the whole vocabulary, even if the env constrains decoding.

    Logs the trainer's metrics as means over the optimiser steps of an update, ``train/pairs`` and
    ``train/lists_without_pairs`` of an update, and, for losses that keep log-probs under the reference policy,
    ``train/kl``: the mean log-ratio of sampler and reference policy, in nats per sample of the lists that are trained
    on.

    Args:
        env, policy, seed, engine, settings: those of :class:`~instructgym.agents.rollouts.agent.RolloutAgent`.
        **options: fields of :class:`RankingAgentSettings`.

    Raises:
        InputError: if the env has no groups, or lacks references that the loss needs; if the policy lacks the reference
            policy that the loss needs; and for the reasons of ``RolloutAgent``.
    """

    settings_class: ClassVar[type[RolloutSettings]] = RankingAgentSettings
    needs_groups: ClassVar[bool] = True
    name: ClassVar[str] = "ranking_agent"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ranking_options = {field.name: getattr(self.settings, field.name) for field in fields(RankingSettings)}
        self.trainer = RankingTrainer(self.policy, self.seed, **ranking_options)
        """The trainer that makes the optimiser steps of :meth:`learn` and :meth:`fit`."""
        # One optimiser, so that both ways to learn share its state and a checkpoint holds it.
        self.trainer.optimizer = self.optimizer
        self._fitting = False
        """Whether the trainer's steps belong to an unfinished :meth:`fit`, which a checkpoint then continues."""

    def _check_env(self) -> None:
        super()._check_env()
        if self.settings.needs_references and not self.env.has_references:
            loss = self.settings.loss
            raise InputError(
                f"the loss {loss} needs reference responses and some examples of this env have none: give them a "
                f"reference, or take another loss{'' if loss == 'spin' else ', imitate or mle_weight=0'}"
            )

    # --- offline -----------------------------------------------------------------------------------------------------

    def fit(
        self, lists: Sequence[TokenizedRankedList], callback: Callable[[RankingAgent], bool | None] | None = None
    ) -> RankingAgent:
        """Trains on ranked lists, without the env.

        Args:
            lists: ranked lists, at least one of them with candidates of different rank (for ``spin``: with a reference
                response).
            callback: called with this agent after every optimiser step; returning False stops training.

        Returns:
            This agent.

        Raises:
            InputError: if a list cannot be read or lacks what the loss needs, with the list's number; if no list has a
                pair to compare.
            TrainingDivergedError: after ten optimiser steps in a row without a finite gradient.
        """
        silent_logger, self._fitting = self.trainer.logger, True
        # Where a restored checkpoint stopped; 0 without one.
        self.trainer.steps = self.trainer.steps_before
        self.trainer.set_logger(self.logger)
        try:
            self.trainer.fit(lists, None if callback is None else lambda _: callback(self))
        finally:
            # Online, this agent logs means over an update; the trainer must not log its steps as well.
            self.trainer.set_logger(silent_logger)
        settings = self.trainer.settings
        # After the last step a checkpoint has no fit to continue; the next call starts a new one.
        self._fitting = self.trainer.steps < settings.epochs * -(-len(lists) // settings.batch_size)
        return self

    # --- online ------------------------------------------------------------------------------------------------------

    def update(self, progress: float = 0.0) -> None:
        if self.settings.refresh_reference and self.updates % self.settings.refresh_reference == 0:
            self.policy.freeze_reference(PREVIOUS)
        # An update ends an unfinished fit: a checkpoint after it continues online training.
        self._fitting, self.trainer.steps_before = False, 0
        super().update(progress)

    def _improve(self, batch: TokenBatch) -> None:
        start = time.perf_counter()
        lists, sampler_logprobs = self.ranked_lists(batch)
        for number, ranked in enumerate(lists):
            self.trainer.check(ranked, f"list {number} of update {self.updates}")
        prepared = [self.trainer.prepare(ranked) for ranked in lists]
        with_pairs = [k for k, ranked in enumerate(prepared) if ranked.pairs]
        self.logger.record("train/pairs", sum(ranked.pairs for ranked in prepared))
        self.logger.record("train/lists_without_pairs", len(prepared) - len(with_pairs))
        if with_pairs:
            self._train([prepared[k] for k in with_pairs], [sampler_logprobs[k] for k in with_pairs])
        self.logger.record("time/train", time.perf_counter() - start)

    def ranked_lists(self, batch: TokenBatch) -> tuple[list[TokenizedRankedList], list[np.ndarray]]:
        """Ranks the samples of all processes.

        Returns:
            One list per group, and for each list the sampler's log-probs of its candidates, float64, shape
                (candidates,), sums over tokens, in nats.
        """
        returns = batch.per_episode(batch.own_rewards.astype(np.float64))
        logprobs = batch.per_episode(batch.sampler_logprobs.astype(np.float64))
        places = batch.places
        local_samples = [
            (
                places[i],
                (batch.groups[i], tuple(batch.prompts[i].tolist())),
                batch.responses[i].tolist(),
                float(returns[i]),
                float(logprobs[i]),
                batch.infos[i].get("reference") if self.settings.uses_references else None,
            )
            for i in range(len(batch))
        ]
        groups: dict[tuple[str, tuple[int, ...]], list[tuple[Any, ...]]] = {}
        # Every process gets all samples in the order of a single process, and computes its share of every minibatch.
        for _, key, *sample in sorted(chain.from_iterable(self.processes.gather(local_samples)), key=itemgetter(0)):
            groups.setdefault(key, []).append(tuple(sample))
        lists, sampler_logprobs = [], []
        for (_, prompt), samples in groups.items():
            responses, scores, sums, references = zip(*samples, strict=True)
            reference = None if references[0] is None else self._reference(prompt, references[0])
            lists.append(TokenizedRankedList(prompt, responses, scores=_without_rounding(scores), reference=reference))
            sampler_logprobs.append(np.array(sums))
        return lists, sampler_logprobs

    def _reference(self, prompt: Sequence[int], text: str) -> list[int]:
        """Returns the token ids of a reference response as they would be in an episode."""
        opening = self.settings.reference_opening
        if opening is None:
            opening = "" if self.policy.lm.tokenizer.decode(list(prompt[-1:]))[-1:].isspace() else " "
        ids = self.policy.tokenizer.encode_continuation(opening + text)
        ends = [end for end in self.policy.tokenizer.closing() if end in self.env.generation.eos_ids]
        return [*ids, *ends][: self.env.generation.max_tokens]

    def _train(self, lists: Sequence[PreparedList], sampled: Sequence[np.ndarray]) -> None:
        """Makes the optimiser steps of an update and logs their mean metrics.

        Args:
            lists: the lists of all processes that have a pair to compare.
            sampled: for each list the sampler's log-probs of its candidates, shape (candidates,), in nats.
        """
        step_metrics: list[dict[str, float]] = []
        skipped, self.trainer.steps = self.optimizer.skipped, 0
        for epoch, minibatches in self._epochs(len(lists), min(self.settings.minibatches, len(lists))):
            for examples in minibatches:
                step_metrics.append(self.trainer.train_step(lists, examples))
            # After one epoch every list has been read, so its log-probs under the reference policy are there.
            if epoch == 0:
                self._log_kl(lists, sampled)
        self._end_training(len(step_metrics), skipped)
        for name in step_metrics[0]:
            self.logger.record(f"train/{name}", float(np.mean([metrics[name] for metrics in step_metrics])))

    def _log_kl(self, lists: Sequence[PreparedList], sampled: Sequence[np.ndarray]) -> None:
        """Logs the mean log-ratio of sampler and reference policy.

        A process adds the lists whose log-probs under the reference policy it has computed.
        """
        sums = np.zeros(2)
        for ranked, logprobs in zip(lists, sampled, strict=True):
            if ranked.reference_logprobs is not None:
                # Without the last row, a reference response, which was not sampled.
                reference = ranked.reference_logprobs[: len(logprobs)].double().cpu().numpy()
                sums += [float((logprobs - reference).sum()), len(logprobs)]
        total, count = self.processes.total(sums)
        if count:
            self.logger.record("train/kl", float(total / count))

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"fit_steps": self.trainer.steps if self._fitting else 0}

    def _take_state(self, state: Mapping[str, Any]) -> None:
        super()._take_state(state)
        self.trainer.seed = self.seed
        # An unfinished fit continues from its step.
        self.trainer.steps = self.trainer.steps_before = state["fit_steps"]
        self._fitting = state["fit_steps"] > 0


def _without_rounding(scores: Sequence[float]) -> list[float]:
    """Returns scores rounded to :data:`DIGITS` digits relative to the largest absolute score."""
    values = np.array(scores)
    unit = float(np.abs(values).max()) or 1.0
    return (np.round(values / unit, DIGITS) * unit).tolist()
