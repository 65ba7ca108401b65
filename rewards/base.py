"""The reward contract: a batch of samples in, one score per sample out."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from ..llm_backends.base import request_seed
from ..llm_backends.errors import InputError
from ..llm_backends.local.tokenization import Tokenizer
from ..llm_backends.parts import Part

Timing = Literal["terminal", "causal", "whole"]
"""When a reward is known.

``terminal``: it is given once, when the text is complete; ``causal``: r_t is known when token t is written; ``whole``:
the split over tokens needs the whole response, so an env gives its sum at the last token and returns the split as
credit."""


KeyT = TypeVar("KeyT", bound=Hashable)


class NonFiniteRewardError(InputError):
    """Raised if a score that is marked as valid is NaN or infinite."""


@dataclass(frozen=True)
class Sample:
    """One text to score, with everything that a reward may need to know about it."""

    response: str
    """The text to score; for an edit, the text after it."""
    prompt: str = ""
    """The request that the response answers; for an edit, the text that the episode started from."""
    reference: str | None = None
    """Ground truth; None if there is none."""
    prompt_ids: np.ndarray | None = None
    """int32, shape (prompt tokens,): the prompt's tokens; None where only text is scored."""
    token_ids: np.ndarray | None = None
    """int32, shape (tokens,): the response's tokens; None where only text is scored."""
    loss_mask: np.ndarray | None = None
    """bool, shape (tokens,): True for the tokens that the policy wrote; None where only text is scored."""
    episode_id: str = ""
    """Stable id of the example."""
    group: str = ""
    """Samples of one group are compared with each other; if empty, equal episode ids form a group."""
    previous: str | None = None
    """For an edit: the text before it; None otherwise."""
    operation: str | None = None
    """For an edit: the name of the operation; None otherwise."""
    seed: int = 0
    """Seed of whatever the reward samples; a retry has a different one."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """More facts that some rewards read, e.g. ``choices``, ``finish_reason`` or ``attempt`` (the number of a retry)."""


@dataclass(frozen=True)
class Score:
    """The result of scoring one sample."""

    value: float
    """The reward; ignored unless ``valid``."""
    per_token: np.ndarray | None = None
    """float32, shape (tokens,): the split of ``value`` over the tokens that earned it; None without a split."""
    terms: dict[str, float] = field(default_factory=dict)
    """Named parts of the value, for logging."""
    feedback: str = ""
    """The reason for the value, in words, for optimisers that read text."""
    valid: bool = True
    """False if there is no verdict; such a score never counts silently as 0 (see ``on_invalid`` of the envs)."""
    calls: int = 0
    """Number of LLM requests that the score took (a logical count, cache hits included)."""

    def __post_init__(self) -> None:
        if self.valid and not math.isfinite(self.value):
            raise NonFiniteRewardError(f"a valid score must be finite, got {self.value} (terms {self.terms})")

    @classmethod
    def invalid(cls, feedback: str, calls: int = 0) -> Score:
        """Returns the score of a sample without a verdict.

        Args:
            feedback: the reason why there is none.
            calls: number of LLM requests that were spent on it.
        """
        return cls(0.0, feedback=feedback, valid=False, calls=calls)


class Reward(Part, ABC):
    """Scores samples in batches, because judges need concurrency. Scaling and whitening are left to the agent."""

    timing: ClassVar[Timing] = "terminal"
    name: str = "reward"
    """Name of the reward's term in logs."""
    calls_per_sample: int = 0
    """Maximum number of LLM requests per sample, retries excluded; a budget reserves this many."""

    @abstractmethod
    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores every sample, in order.

        A reward with memory (a diversity pool) scores all samples against its state at the start of the call and
        then inserts them in order.
        """

    def reset(self) -> None:
        """Forgets all samples seen so far; ``env.reset(seed=...)`` calls it."""

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Checks that the reward reads the token ids of this tokenizer.

        A token environment calls it when it is built, with the tokenizer of the token ids in its samples.

        Raises:
            InputError: if the reward reads the token ids of another tokenizer.
        """


class FunctionReward(Reward):
    """A reward that calls a plain function.

    Args:
        function: takes the list of samples and returns one float or :class:`Score` per sample.

    Raises:
        TypeError: if the function takes no argument.
        InputError: when scoring, if the function returns anything but a number or a :class:`Score` per sample.
    """

    def __init__(self, function: Callable[[Sequence[Sample]], Sequence[float | Score]]) -> None:
        if not len(inspect.signature(function).parameters):
            raise TypeError(f"a reward function takes the list of samples, {function!r} takes nothing")
        self.function = function
        self.name = getattr(function, "__name__", "function").strip("<>")

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        values = self.function(samples)
        if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
            raise InputError(
                f"reward {self.name!r} returned {values!r:.80}: it must return a list with a number or Score per sample"
            )
        scores = [self._score(value) for value in values]
        if len(scores) != len(samples):
            raise InputError(f"reward {self.name!r} returned {len(scores)} scores for {len(samples)} samples")
        return scores

    def _score(self, value: Any) -> Score:
        if isinstance(value, Score):
            return value
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"reward {self.name!r} returned {value!r:.80} for a sample: it must be a number or a Score; "
                "Score.invalid(reason) says that there is no verdict"
            ) from error
        return Score(number, terms={self.name: number})


def scores_of(reward: Reward, samples: Sequence[Sample]) -> list[Score]:
    """Returns a reward's scores, one per sample.

    Raises:
        InputError: if the reward returned anything else; the message names it.
    """
    scores = reward.reward(samples)
    if not isinstance(scores, list | tuple) or not all(isinstance(score, Score) for score in scores):
        raise InputError(f"reward {reward.name!r} returned {scores!r:.80}: it must return a Score per sample")
    if len(scores) != len(samples):
        raise InputError(f"reward {reward.name!r} returned {len(scores)} scores for {len(samples)} samples")
    return list(scores)


def retried_values(keys: Sequence[KeyT], samples: Sequence[Sample], latest: Mapping[KeyT, float]) -> dict[KeyT, float]:
    """Returns the values that samples got before they were retried, because another reward of a sum gave no verdict.

    A reward with a memory would find a retried sample there and compare it with itself.

    Args:
        keys: what the reward remembers of each sample.
        samples: the samples.
        latest: values of the last call by key.
    """
    return {
        key: latest[key]
        for key, sample in zip(keys, samples, strict=True)
        if sample.metadata.get("attempt") and key in latest
    }


def score_with_retries(reward: Reward, samples: Sequence[Sample], retries: int = 1) -> list[Score]:
    """Scores the samples, and scores those without a verdict again under a new seed.

    A retried sample has ``metadata["attempt"]``, which tells a judge to sample its reply.

    Args:
        reward: the reward.
        samples: the samples to score.
        retries: how often a sample without a verdict is scored again at most.

    Returns:
        One score per sample, with ``calls`` summed over all attempts; invalid if no attempt gave a verdict.
    """
    scores = scores_of(reward, samples)
    for attempt in range(1, retries + 1):
        missing = [i for i, score in enumerate(scores) if not score.valid]
        if not missing:
            break
        # A new seed: a journal would answer an equal request with the stored reply.
        seeds = [request_seed(samples[i].seed, "retry", attempt) for i in missing]
        retried = [
            replace(samples[i], seed=seed, metadata=samples[i].metadata | {"attempt": attempt})
            for i, seed in zip(missing, seeds, strict=True)
        ]
        for i, score in zip(missing, scores_of(reward, retried), strict=True):
            # The failed attempt has been spent, so its requests stay in the count.
            scores[i] = replace(score, calls=scores[i].calls + score.calls)
    return scores
