"""The reward contract: a batch of samples in, one score per sample out."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from ..llm_backends.base import request_seed
from ..llm_backends.errors import InputError
from ..llm_backends.local.tokenization import Tokenizer
from ..llm_backends.parts import Part

Timing = Literal["terminal", "causal", "whole"]
"""``terminal``: paid once, when the text is complete; ``causal``: r_t is known when token t is written; ``whole``: the
split over tokens needs the whole response: an env pays its sum at the last token and hands the split out as credit."""


class NonFiniteRewardError(InputError):
    """A reward returned NaN or infinity for a sample it called valid."""


@dataclass(frozen=True)
class Sample:
    """One text to be scored, with everything a reward may need to know about it."""

    response: str
    """The text to score; for an edit, the new text."""
    prompt: str = ""
    """What the response answers; for an edit, the text the episode started from."""
    reference: str | None = None
    """Ground truth, where there is one."""
    token_ids: np.ndarray | None = None
    """int32, shape (tokens,): the response's tokens."""
    loss_mask: np.ndarray | None = None
    """bool, shape (tokens,): which of them the policy wrote."""
    episode_id: str = ""
    """Stable id of the example."""
    group: str = ""
    """Samples of one group are compared with each other; equal episode ids form a group by default."""
    previous: str | None = None
    """For an edit: the text before it."""
    operation: str | None = None
    """For an edit: the name of the operation."""
    seed: int = 0
    """Seed for whatever the reward draws; a retry comes with another one."""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """What a sample is worth."""

    value: float
    """The reward; ignored unless ``valid``."""
    per_token: np.ndarray | None = None
    """float32, shape (tokens,): the split of ``value`` over the tokens that earned it."""
    terms: dict[str, float] = field(default_factory=dict)
    """Named parts of the value, for logging."""
    feedback: str = ""
    """Why, in words, for optimisers that read."""
    valid: bool = True
    """False where no verdict could be had; such a score is never a silent zero (see ``on_invalid`` of the envs)."""
    calls: int = 0
    """LLM requests this score took (a logical count, cache hits included)."""

    def __post_init__(self) -> None:
        if self.valid and not math.isfinite(self.value):
            raise NonFiniteRewardError(f"a valid score must be finite, got {self.value} (terms {self.terms})")

    @classmethod
    def invalid(cls, feedback: str, calls: int = 0) -> Score:
        """A score for a sample on which there is no verdict."""
        return cls(0.0, feedback=feedback, valid=False, calls=calls)


class Reward(Part, ABC):
    """Scores samples in batches, because judges need concurrency. Scaling and whitening belong to the agent."""

    timing: ClassVar[Timing] = "terminal"
    name: str = "reward"
    """The name of its term in logs."""
    calls_per_sample: int = 0
    """LLM requests per sample at most, retries aside; what a budget has to reserve."""

    @abstractmethod
    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores every sample, in order.

        A reward with memory (a diversity pool) scores all samples against its state at the start of the call and
        then inserts them in order.
        """

    def reset(self) -> None:
        """Forgets everything seen; called by ``env.reset(seed=...)``."""

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Called by a token environment when it is built, with the tokenizer of the token ids in its samples.

        Raises:
            InputError: if the reward reads other token ids.
        """


class FunctionReward(Reward):
    """A plain function of the samples as a reward.

    Args:
        function: takes the list of samples and returns one float or :class:`Score` per sample.
    """

    def __init__(self, function: Callable[[Sequence[Sample]], Sequence[float | Score]]) -> None:
        if not len(inspect.signature(function).parameters):
            raise TypeError(f"a reward function takes the list of samples, {function!r} takes nothing")
        self.function = function
        self.name = getattr(function, "__name__", "function").strip("<>")

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        scores = [
            value if isinstance(value, Score) else Score(float(value), terms={self.name: float(value)})
            for value in self.function(samples)
        ]
        if len(scores) != len(samples):
            raise InputError(f"reward {self.name!r} returned {len(scores)} scores for {len(samples)} samples")
        return scores


def score_with_retries(reward: Reward, samples: Sequence[Sample], retries: int = 1) -> list[Score]:
    """Scores the samples and asks again, under a new seed, for those without a verdict.

    A retried sample carries ``metadata["attempt"]``, by which a judge knows to sample its reply.

    Args:
        reward: the reward.
        samples: what to score.
        retries: how often to ask again.

    Returns:
        One score per sample, ``calls`` of all attempts added up; still invalid where no attempt gave a verdict.
    """
    scores = reward.reward(samples)
    for attempt in range(1, retries + 1):
        missing = [i for i, score in enumerate(scores) if not score.valid]
        if not missing:
            break
        again = [
            replace(
                samples[i],
                seed=request_seed(samples[i].seed, "retry", attempt),
                metadata=samples[i].metadata | {"attempt": attempt},
            )
            for i in missing
        ]
        for i, score in zip(missing, reward.reward(again), strict=True):
            scores[i] = replace(score, calls=scores[i].calls + score.calls)
    return scores
