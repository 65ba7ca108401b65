"""REFINE-AF's quality reward: a linear rule over scores of an instruction's output, given once per response.

REFINE-AF (Roy et al., arXiv 2505.06548) rewards one instance with Instruction Mining's predictor of the loss of a data
set (Cao et al., arXiv 2307.06290), with the opposite sign.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...llm_backends import BackendError, Tokenizer, UnsupportedRequestError, resolve
from ...llm_backends.errors import check_known
from ..base import Reward, Sample, Score
from ..compose import WeightedSum
from .instance_format import Instance, parse_instance_or_reason
from .likelihood import EMBEDDED, Fluency, LikelihoodRatio, Likelihoods
from .scorers import NeighbourDistance, OutputLength


@dataclass(frozen=True)
class LinearRule:
    """A reward that is linear in named terms."""

    weights: Mapping[str, float]
    """Weights by term; a term of weight 0 is logged but does not count in the reward."""
    constant: float = 0.0
    format_reward: float = -1.0
    """Reward of malformed text; below any reward that well-formed text can be expected to get."""


_MINED = {"rew": 0.0078, "und": -0.4421, "nat": 0.3212, "coh": 0.1520}

PRESETS = {
    "instruction_mining": LinearRule(_MINED, -0.0274),
    "no_und": LinearRule({name: w for name, w in _MINED.items() if name != "und"}, -0.0274),
    "abs_weights": LinearRule({name: abs(w) for name, w in _MINED.items()}, -0.0274),
    "rm_only": LinearRule({"rew": _MINED["rew"]}, -0.0274),
    "earlier": LinearRule({"rew": 0.1498, "len_out": -8.257e-5, "knn_6": 0.9350}, -1.0694, format_reward=-3.0),
}
"""Rules by name. ``instruction_mining``: the published rule. ``no_und``: without understandability. ``abs_weights``:
with a positive weight for understandability. ``rm_only``: with the reward model alone. ``earlier``: the rule of a first
version, log L ~ 1.0694 - 0.1498 Rew + 8.257e-5 Len_out - 0.9350 Knn_6; its larger scale needs a lower format reward."""


class LinearReward(Reward):
    """A weighted sum of scores of an instance's output plus a constant; malformed text gets a fixed reward.

    Each term is a reward: one that the caller passes, or an offline default. Every term is logged under its name,
    unweighted. The score is invalid if a term with a weight other than 0 is invalid. The published rule is::

        r = 0.0078 rew - 0.4421 und + 0.3212 nat + 0.1520 coh - 0.0274

    where ``rew`` is an OpenAssistant reward model's logit and ``und``, ``nat`` and ``coh`` are UniEval's
    understandability, naturalness and coherence, in [0, 1]. Three warnings:

    * Understandability has a *negative* weight, an artefact of least squares on correlated regressors; ``no_und`` and
      ``abs_weights`` avoid it.
    * The scale is small: 0.0037 if the logit is 0 and all else perfect, -0.0274 if all scores are 0, and 10 more in the
      logit add only 0.078. An agent has to whiten rewards.
    * The rule was fitted to the losses of models trained on whole data sets, so to reward single instances with it is
      an extrapolation.

    The response is parsed as one instance: ``metadata["opening"]`` of the sample is put before it,
    ``metadata["order"]`` is the order of its fields (``input_first`` if missing) and ``metadata["instruction"]`` the
    instruction (the prompt if missing). Malformed text is not passed to the scorers, nor is text that was cut
    (``metadata["finish_reason"]`` is ``length``); the term ``well_formed`` is 1 or 0. A scorer sees the instruction,
    with the input after a blank line, as the prompt, and only the output as the response.

    The offline scorers use a language model's log-probs; their quality is documented in
    :class:`~instructgym.rewards.LikelihoodRatio` and :class:`~instructgym.rewards.Fluency`. ``rew`` is the log ratio in
    nats per token, ``coh`` the same squashed, ``nat`` and ``und`` are the likelihood of the output. They share two
    passes over each output. On one core with bfloat16 in hardware, the embedded model takes 10 s of CPU time for 48
    outputs of 60 tokens and 6 s for 48 outputs of 30 tokens.

    Args:
        preset: name of the rule, one of :data:`PRESETS`.
        scorers: maps a term to its reward (anything that :func:`~instructgym.llm_backends.resolve` accepts); a term
            without a reward gets the offline scorer. None: offline scorers only.
        weights: maps terms to weights, which replace those of the preset or add terms. None: those of the preset.
        constant: constant of the rule; None: that of the preset.
        format_reward: reward of malformed text; None: that of the preset (the paper specifies none).
        parse: function from the text, the opening included, to an
            :class:`~instructgym.rewards.quality.instance_format.Instance` or None, as a Python object only; None:
            :func:`~instructgym.rewards.quality.instance_format.parse_instance_or_reason`.
        backend: backend of the offline scorers, and of passed scorers that need one and name none.
        embedder: sentence embedder of the offline scorers, and of passed scorers that need one and name none.
        tokenizer: tokenizer of the token ids that a term such as ``sequence-reward`` reads; None: the environment's.

    Raises:
        ValueError: for an unknown preset, a scorer without a weight, a term without a scorer, a term that is not
            terminal, or a number that is not finite.
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
        check_known("preset", preset, PRESETS)
        rule = PRESETS[preset]
        term_weights = {**rule.weights, **(weights or {})}
        self.constant = rule.constant if constant is None else float(constant)
        self.format_reward = rule.format_reward if format_reward is None else float(format_reward)
        if not np.isfinite([*term_weights.values(), self.constant, self.format_reward]).all():
            raise ValueError(
                f"weights {term_weights}, constant {constant} and format reward {format_reward} must be finite"
            )
        self.parse = parse
        self.tokenizer: Tokenizer | None = None if tokenizer is None else resolve("tokenizer", tokenizer)
        backend = resolve("backend", backend)
        self.sum = WeightedSum(
            _with_defaults(scorers or {}, term_weights, backend, embedder), term_weights, backend, embedder
        )
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
        # Only well-formed instances are scored, in one call; the results are put back in order.
        parsed = [self._read(sample) for sample in samples]
        scorer_samples = [
            self._scorer_sample(sample, result)
            for sample, result in zip(samples, parsed, strict=True)
            if isinstance(result, Instance)
        ]
        scores = iter(self._score_instances(scorer_samples))
        return [next(scores) if isinstance(result, Instance) else self._malformed(result) for result in parsed]

    def _read(self, sample: Sample) -> Instance | str:
        """Returns the instance, or the reason why the text is malformed."""
        if sample.metadata.get("finish_reason") == "length":
            return "cut"
        text = (sample.metadata.get("opening") or "") + sample.response
        if self.parse is not None:
            return self.parse(text) or "not parsed"
        return parse_instance_or_reason(text, sample.metadata.get("order") or "input_first", _instruction(sample))

    def _scorer_sample(self, sample: Sample, instance: Instance) -> Sample:
        """Returns the sample that the scorers see: instruction and input as the prompt, output as the response."""
        prompt = "\n\n".join(filter(None, [_instruction(sample), instance.input]))
        ids = None
        if self.tokenizer is not None:
            ids = np.array(self.tokenizer.encode_continuation(instance.output) + self.tokenizer.closing(), np.int32)
        return replace(sample, prompt=prompt, prompt_ids=None, response=instance.output, token_ids=ids, loss_mask=None)

    def _score_instances(self, samples: Sequence[Sample]) -> list[Score]:
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

    def _malformed(self, reason: str) -> Score:
        return Score(self.format_reward, terms={"well_formed": 0.0}, feedback=f"malformed: {reason}")


def _instruction(sample: Sample) -> str:
    return str(sample.metadata.get("instruction", sample.prompt))


def _with_defaults(
    scorers: Mapping[str, Any], weights: Mapping[str, float], backend: Any, embedder: Any
) -> dict[str, Any]:
    """Returns a scorer for every weight; the offline ones share one cache of log-probs."""
    if unknown := sorted(set(scorers) - set(weights)):
        raise ValueError(f"scorers without a weight: {unknown}; a term of weight 0 is logged, not added")
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
