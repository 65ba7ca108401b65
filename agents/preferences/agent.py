"""Learning from the ranks of one's own samples: the online form of Tuna, DPO, IPO, SPIN, SPPO, TDPO and LiPO-lambda."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from ...llm_backends.errors import InputError, check_at_least_zero
from ..rollouts.agent import RolloutAgent, RolloutSettings
from ..rollouts.batch import TokenBatch
from .losses import LOSSES
from .trainer import PreparedList, RankingSettings, RankingTrainer, TokenizedRankedList

PREVIOUS = "previous"
"""Name of the frozen adapter that an earlier iterate is kept in."""
DIGITS = 6
"""Returns that differ by less than 1e-6 of the largest in size are ties: sums of a split reward are not exact."""


@dataclass(frozen=True)
class RankingAgentSettings(RankingSettings, RolloutSettings):
    """Settings of both ways to learn; ``batch_size`` (lists per step) is of ``fit``, ``minibatches`` of ``learn``.

    ``epochs`` are passes over the lists of an update, or over the data of ``fit``.
    """

    refresh_reference: int = 0
    """Every so many updates, the first included, the policy as it is becomes the reference policy, as in SPIN and SPPO,
    whose opponent is the previous iterate; 0 leaves the reference policy as it is."""
    reference_opening: str | None = None
    """What stands between a prompt and its reference response. None: nothing behind a prompt that ends in white space,
    as chat templates do, else a blank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_zero(self, "refresh_reference")
        if self.refresh_reference and not LOSSES[self.loss].needs_reference_policy:
            raise InputError(f"refresh_reference: the loss {self.loss} compares with no reference policy")

    @property
    def needs_references(self) -> bool:
        """Whether a list without a reference response cannot be learned from."""
        imitates = self.weight > 0 and self.imitate == "reference"
        return imitates or LOSSES[self.loss].pairing(self.given()) == "reference"

    @property
    def uses_references(self) -> bool:
        """Whether a reference response counts where there is one."""
        return self.needs_references or (self.weight > 0 and self.imitate == "all")


class RankingAgent(RolloutAgent):
    """Samples, ranks and updates: the samples of a prompt are ranked by their returns, and a ranking loss is stepped.

    The env needs ``group_size`` above 1. Any reward ranks; ``rank`` lets a ranker do it. The valid samples of a prompt
    that were scored together are one list; lists of one sample or of ties alone are passed over and counted (for
    ``spin``, which compares samples with the reference response, none is). Each update makes ``epochs`` passes over
    its lists, of ``minibatches`` optimiser steps each. :meth:`fit` trains on lists that are there already; it is
    :class:`~instructgym.agents.preferences.trainer.RankingTrainer`, on this agent's weights and optimiser.

    The reference response to imitate, or to prefer to the samples, is the example's own: ``info["reference"]`` at the
    end of an episode, followed by the end of sequence and cut to the env's ``max_tokens``. Tuna's losses imitate by
    default and are refused in an env without references: set ``imitate="best"`` or ``mle_weight=0`` there.

    Log-probs are over the whole vocabulary, also where the env constrains what is written.

    Logs, besides what the trainer logs (means over the steps of an update): ``train/pairs`` and
    ``train/lists_without_pairs`` of an update, and ``train/kl`` of losses that keep log-probs by the reference policy:
    nats per sample of the lists that are learned from, by the sampler's log-probs.

    Args:
        env, policy, seed, engine, settings: as of :class:`~instructgym.agents.rollouts.agent.RolloutAgent`.
        **options: fields of :class:`RankingAgentSettings`.

    Raises:
        InputError: also for an env without groups, or without the references that the loss needs; for a policy without
            the reference policy that it needs.
    """

    settings_class: ClassVar[type[RolloutSettings]] = RankingAgentSettings
    needs_groups: ClassVar[bool] = True
    name: ClassVar[str] = "ranking_agent"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own = {field.name: getattr(self.settings, field.name) for field in fields(RankingSettings)}
        self.trainer = RankingTrainer(self.policy, self.seed, **own)
        """The core that both ways to learn share."""
        self.trainer.optimizer = self.optimizer
        self._fitting = False
        """Whether the trainer's steps are of a :meth:`fit`, which a checkpoint then continues."""

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
        """Trains on ranked candidates, without the env.

        Args:
            lists: as of :meth:`RankingTrainer.fit <instructgym.agents.preferences.trainer.RankingTrainer.fit>`.
            callback: called with this agent after every optimiser step; returning False stops training.

        Raises:
            InputError: for lists that cannot be read or lack what the loss needs, naming the list; for none to rank.
            TrainingDivergedError: after ten optimiser steps in a row without a finite gradient.
        """
        silent, self._fitting = self.trainer.logger, True
        self.trainer.steps = self.trainer.steps_before
        self.trainer.set_logger(self.logger)
        try:
            self.trainer.fit(lists, None if callback is None else lambda _: callback(self))
        finally:
            self.trainer.set_logger(silent)
        settings = self.trainer.settings
        # A checkpoint behind the last step has nothing to go on with: the next fit is another one.
        self._fitting = self.trainer.steps < settings.epochs * -(-len(lists) // settings.batch_size)
        return self

    # --- online ------------------------------------------------------------------------------------------------------

    def update(self, progress: float = 0.0) -> None:
        if self.settings.refresh_reference and self.updates % self.settings.refresh_reference == 0:
            self.policy.freeze_reference(PREVIOUS)
        self._fitting, self.trainer.steps_before = False, 0
        super().update(progress)

    def _improve(self, batch: TokenBatch) -> None:
        begun = time.perf_counter()
        lists, sampled = self._ranked(batch)
        for number, one in enumerate(lists):
            self.trainer.check(one, f"list {number} of update {self.updates}")
        prepared = [self.trainer.prepare(one) for one in lists]
        chosen = [k for k, one in enumerate(prepared) if one.pairs]
        self.logger.record("train/pairs", sum(one.pairs for one in prepared))
        self.logger.record("train/lists_without_pairs", len(prepared) - len(chosen))
        if chosen:
            self._train([prepared[k] for k in chosen], [sampled[k] for k in chosen])
        self.logger.record("time/train", time.perf_counter() - begun)

    def _ranked(self, batch: TokenBatch) -> tuple[list[TokenizedRankedList], list[np.ndarray]]:
        """The lists of all processes, and the log-probs of their candidates by the sampler, sums over tokens."""
        returns = batch.per_episode(batch.own_rewards.astype(np.float64))
        logprobs = batch.per_episode(batch.sampler_logprobs.astype(np.float64))
        own = [
            (
                (batch.resets[i], batch.groups[i], tuple(batch.prompts[i].tolist())),
                batch.responses[i].tolist(),
                float(returns[i]),
                float(logprobs[i]),
                batch.infos[i].get("reference") if self.settings.uses_references else None,
            )
            for i in range(len(batch))
        ]
        groups: dict[tuple[int, str, tuple[int, ...]], list[tuple[Any, ...]]] = {}
        for part in self.processes.gather(own):
            for key, *sample in part:
                groups.setdefault(key, []).append(tuple(sample))
        lists, sampled = [], []
        for (_, _, prompt), samples in groups.items():
            responses, scores, sums, references = zip(*samples, strict=True)
            reference = None if references[0] is None else self._reference(prompt, references[0])
            lists.append(TokenizedRankedList(prompt, responses, scores=_without_rounding(scores), reference=reference))
            sampled.append(np.array(sums))
        return lists, sampled

    def _reference(self, prompt: Sequence[int], text: str) -> list[int]:
        """Token ids of a reference response, as an episode would have them."""
        opening = self.settings.reference_opening
        if opening is None:
            opening = "" if self.policy.lm.tokenizer.decode(list(prompt[-1:]))[-1:].isspace() else " "
        ids = self.policy.tokenizer.encode_continuation(opening + text)
        return [*ids, *sorted(self.env.generation.eos_ids)[:1]][: self.env.generation.max_tokens]

    def _train(self, lists: Sequence[PreparedList], sampled: Sequence[np.ndarray]) -> None:
        steps: list[dict[str, float]] = []
        skipped, self.trainer.steps = self.optimizer.skipped, 0
        for epoch, minibatches in self._epochs(len(lists), min(self.settings.minibatches, len(lists))):
            for examples in minibatches:
                steps.append(self.trainer.train_step(lists, examples))
            if epoch == 0:
                self._log_kl(lists, sampled)
        self._end_training(len(steps), skipped)
        for name in steps[0]:
            self.logger.record(f"train/{name}", float(np.mean([step[name] for step in steps])))

    def _log_kl(self, lists: Sequence[PreparedList], sampled: Sequence[np.ndarray]) -> None:
        """The mean log-ratio of sampler and reference policy, of lists whose reference log-probs are computed here."""
        found = np.zeros(2)
        for one, logprobs in zip(lists, sampled, strict=True):
            if one.reference_logprobs is not None:
                reference = one.reference_logprobs[: len(logprobs)].double().cpu().numpy()
                found += [float((logprobs - reference).sum()), len(logprobs)]
        total, count = self.processes.total(found)
        if count:
            self.logger.record("train/kl", float(total / count))

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"fit_steps": self.trainer.steps if self._fitting else 0}

    def _take_state(self, state: Mapping[str, Any]) -> None:
        super()._take_state(state)
        self.trainer.seed = self.seed
        # A fit that was under way goes on from there.
        self.trainer.steps = self.trainer.steps_before = state["fit_steps"]
        self._fitting = state["fit_steps"] > 0


def _without_rounding(scores: Sequence[float]) -> list[float]:
    values = np.array(scores)
    unit = float(np.abs(values).max()) or 1.0
    return (np.round(values / unit, DIGITS) * unit).tolist()
