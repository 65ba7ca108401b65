"""REFINE-AF's quality reward: a linear rule over scores of an instruction's output, terminal.

The rule is Instruction Mining's predictor of a data set's loss (Cao et al., arXiv 2307.06290) with its sign turned, as
REFINE-AF's reward of one instance (Roy et al., arXiv 2505.06548).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...llm_backends import BackendError, Tokenizer, UnsupportedRequestError, resolve
from ..base import Reward, Sample, Score
from ..compose import WeightedSum
from .instance_format import Instance, read_pair
from .likelihood import EMBEDDED, Fluency, LikelihoodRatio, Likelihoods
from .scorers import NeighbourDistance, OutputLength


@dataclass(frozen=True)
class LinearRule:
    """A reward that is linear in named terms."""

    weights: Mapping[str, float]
    """By term; of weight 0 is a term that is logged, not paid."""
    constant: float = 0.0
    format_reward: float = -1.0
    """What malformed text earns; below whatever well-formed text can be expected to earn."""


_MINED = {"rew": 0.0078, "und": -0.4421, "nat": 0.3212, "coh": 0.1520}

PRESETS = {
    "instruction_mining": LinearRule(_MINED, -0.0274),
    "no_und": LinearRule({name: w for name, w in _MINED.items() if name != "und"}, -0.0274),
    "abs_weights": LinearRule({name: abs(w) for name, w in _MINED.items()}, -0.0274),
    "rm_only": LinearRule({"rew": _MINED["rew"]}, -0.0274),
    "earlier": LinearRule({"rew": 0.1498, "len_out": -8.257e-5, "knn_6": 0.9350}, -1.0694, format_reward=-3.0),
}
"""Rules by name. ``instruction_mining``: as published. ``no_und``, ``abs_weights``, ``rm_only``: the same without
understandability, with its weight positive, and with the reward model alone. ``earlier``: the rule of a first version,
log L ~ 1.0694 - 0.1498 Rew + 8.257e-5 Len_out - 0.9350 Knn_6, whose larger scale asks for a lower format reward."""


class LinearReward(Reward):
    """The sum of weighted scores of an instance's output and a constant; malformed text gets a fixed reward.

    A term is a reward of its own, injected or by default offline. Every one is logged under its name, unweighted; the
    score is invalid where one of other weight than 0 is. The published rule is::

        r = 0.0078 rew - 0.4421 und + 0.3212 nat + 0.1520 coh - 0.0274

    with an OpenAssistant reward model's logit and UniEval's understandability, naturalness and coherence in [0, 1].
    Three warnings. Understandability is paid *negatively*, an artefact of least squares on correlated regressors:
    ``no_und`` and ``abs_weights`` do without. The scale is small: 0.0037 for a logit of 0 and all else perfect, -0.0274
    for nothing, and ten logits more or less are 0.078; an agent has to whiten rewards. And it was fitted to the losses
    of models trained on whole data sets, so that paying single instances by it extrapolates.

    The response is read as one instance: ``metadata["opening"]`` of the sample is put before it, ``metadata["order"]``
    is that of its fields (``input_first`` if missing) and ``metadata["instruction"]`` the instruction (the prompt if
    missing). No scorer is asked about malformed text, nor about one with ``metadata["finish_reason"]`` ``length``,
    which was cut; the term ``well_formed`` is 1 or 0. A scorer sees the instruction, with the input after a blank line,
    as the prompt, and the output alone as the response.

    The offline scorers are a language model's log-probs (see :class:`~instructgym.rewards.LikelihoodRatio` and
    :class:`~instructgym.rewards.Fluency` for how good they are): ``rew`` the ratio in nats per token, ``coh`` the same
    squashed, ``nat`` and ``und`` the likelihood of the output. They share two passes over each output. On one core with
    bfloat16 in hardware, the embedded model takes 10 s of CPU time for 48 outputs of 60 tokens and 6 s for 48 of 30.

    Args:
        preset: the rule, one of :data:`PRESETS`.
        scorers: by term, a reward (as :func:`~instructgym.llm_backends.resolve` takes it); a term without one gets the
            offline scorer.
        weights: in place of the preset's, by term, or of further terms.
        constant: in place of the preset's.
        format_reward: of malformed text, in place of the preset's (ours: the paper does not say).
        parse: a function from the text, the opening included, to an :class:`Instance` or None, live only; by default
            :func:`~instructgym.rewards.quality.instance_format.read_pair`.
        backend: of the offline scorers, and of given ones that need a backend and name none.
        embedder: likewise for sentence embeddings.
        tokenizer: of the token ids that a term such as ``sequence-reward`` reads; by default the environment's.

    Raises:
        ValueError: for an unknown preset, a scorer without a weight, a term without a scorer, one that is not terminal,
            or a number that is not finite.
    """

    name = "quality"

    def __init__(
        self,
        preset: str = "instruction_mining",
        scorers: Mapping[str, Any] | None = None,
        weights: Mapping[str, float] | None = None,
        constant: float | None = None,
        format_reward: float | None = None,
        parse: Callable[[str], Instance | None] | None = None,
        backend: Any = EMBEDDED,
        embedder: Any = "minilm",
        tokenizer: Any = None,
    ) -> None:
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}: use one of {sorted(PRESETS)}")
        rule = PRESETS[preset]
        paid = {**rule.weights, **(weights or {})}
        self.constant = rule.constant if constant is None else float(constant)
        self.format_reward = rule.format_reward if format_reward is None else float(format_reward)
        if not np.isfinite([*paid.values(), self.constant, self.format_reward]).all():
            raise ValueError(f"weights {paid}, constant {constant} and format reward {format_reward} must be finite")
        self.parse = parse
        self.tokenizer: Tokenizer | None = None if tokenizer is None else resolve("tokenizer", tokenizer)
        backend = resolve("backend", backend)
        self.sum = WeightedSum(_with_defaults(scorers or {}, paid, backend, embedder), paid, backend, embedder)
        for name, term in self.sum.terms.items():
            if term.timing != "terminal":
                raise ValueError(f"term {name!r} is {term.timing}: a score of an output is terminal")
        self.calls_per_sample = self.sum.calls_per_sample

    def reset(self) -> None:
        self.sum.reset()

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = self.tokenizer or tokenizer
        self.sum.check_tokenizer(self.tokenizer)

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        read = [self._read(sample) for sample in samples]
        asked = [
            self._asked(sample, found)
            for sample, found in zip(samples, read, strict=True)
            if isinstance(found, Instance)
        ]
        scores = iter(self._scored(asked))
        return [next(scores) if isinstance(found, Instance) else self._malformed(found) for found in read]

    def _read(self, sample: Sample) -> Instance | str:
        """The instance, or what is wrong with the text."""
        if sample.metadata.get("finish_reason") == "length":
            return "cut"
        text = (sample.metadata.get("opening") or "") + sample.response
        if self.parse is not None:
            return self.parse(text) or "not parsed"
        return read_pair(text, sample.metadata.get("order") or "input_first", _instruction(sample))

    def _asked(self, sample: Sample, instance: Instance) -> Sample:
        prompt = "\n\n".join(filter(None, [_instruction(sample), instance.input]))
        ids = None
        if self.tokenizer is not None:
            end = sorted(self.tokenizer.eos_ids)[:1]
            ids = np.array(self.tokenizer.encode_continuation(instance.output) + end, np.int32)
        return replace(sample, prompt=prompt, response=instance.output, token_ids=ids, loss_mask=None)

    def _scored(self, samples: Sequence[Sample]) -> list[Score]:
        if not samples:
            return []
        try:
            scores = self.sum.reward(samples)
        except UnsupportedRequestError:
            raise  # no retry would help
        except BackendError as error:
            return [replace(Score.invalid(str(error)), terms={"well_formed": 1.0}) for _ in samples]
        return [
            replace(score, value=score.value + self.constant, terms=score.terms | {"well_formed": 1.0})
            for score in scores
        ]

    def _malformed(self, why: str) -> Score:
        return Score(self.format_reward, terms={"well_formed": 0.0}, feedback=f"malformed: {why}")


def _instruction(sample: Sample) -> str:
    return str(sample.metadata.get("instruction", sample.prompt))


def _with_defaults(
    scorers: Mapping[str, Any], weights: Mapping[str, float], backend: Any, embedder: Any
) -> dict[str, Any]:
    """A scorer for every weight, those of log-probs on one memory."""
    if unknown := sorted(set(scorers) - set(weights)):
        raise ValueError(f"scorers without a weight: {unknown}; a term of weight 0 is logged, not paid")
    shared = Likelihoods(backend)
    defaults: dict[str, Callable[[], Reward]] = {
        "rew": lambda: LikelihoodRatio(shared, squash=False),
        "coh": lambda: LikelihoodRatio(shared),
        "nat": lambda: Fluency(shared, "naturalness"),
        "und": lambda: Fluency(shared, "understandability"),
        "len_out": OutputLength,
        "knn_6": lambda: NeighbourDistance(6, embedder),
    }
    if missing := sorted(set(weights) - set(scorers) - set(defaults)):
        raise ValueError(f"terms without a scorer: {missing}; there is an offline one for {sorted(defaults)}")
    return {name: scorers[name] if name in scorers else defaults[name]() for name in weights}
