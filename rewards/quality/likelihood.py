"""Quality scores from a language model's log-probs: substitutes for learned scorers, without a judge or training.

A likely text need not be true or good: these scores favour common phrases over rare words, names and numbers, and a
response that repeats its prompt is likely given that prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ...llm_backends import Backend, BackendError, Prompt, UnsupportedRequestError, resolve
from ...llm_backends.base import PromptStyle
from ...llm_backends.errors import check_known
from ...llm_backends.parts import FixedValues, Lock
from ...llm_backends.prompting import build_prompt, fill, load_prompts, one_line
from ..base import Reward, Sample, Score
from ..judges.verdict import answer_separator, sigmoid

EMBEDDED = {"id": "embedded", "kwargs": {"dtype": "auto"}}
"""Default model: the embedded one, in bfloat16 if the hardware supports it, which is twice as fast."""

TAIL = 0.25
"""Share of a text's tokens, taken from the least likely ones, that determines its understandability."""


class Likelihoods:
    """Cached log-probs of responses, given their prompts or given only a neutral opening.

    Several scorers may share one instance, so that the model reads each text once per context.

    Args:
        backend: a language model that reports log-probs.
        memory: maximum number of cached rows; a text with its prompt and the text alone are two rows.
    """

    def __init__(self, backend: Any = EMBEDDED, memory: int = 4096) -> None:
        self.backend: Backend = resolve("backend", backend)
        self._memory: FixedValues[tuple[str | None, str], np.ndarray] = FixedValues()
        self._capacity = memory
        self._lock = Lock()

    @classmethod
    def of(cls, source: Any) -> Likelihoods:
        """Returns ``source`` if it is an instance already, else a new instance on the backend ``source``."""
        return source if isinstance(source, cls) else cls(source)

    def conditional_logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray | BackendError]:
        """Returns the log-probs of each response given its prompt.

        Returns:
            n float32 arrays, shape (tokens of the response,), in nats; an error in place of each array that failed.

        Raises:
            UnsupportedRequestError: if the backend reports no log-probs.
        """
        return self._ask([(sample.prompt, sample.response) for sample in samples])

    def unconditional_logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray | BackendError]:
        """Returns the log-probs of each response given a neutral opening instead of its prompt.

        Returns:
            n float32 arrays, shape (tokens of the response,), in nats; an error in place of each array that failed.

        Raises:
            UnsupportedRequestError: if the backend reports no log-probs.
        """
        return self._ask([(None, sample.response) for sample in samples])

    def _ask(self, keys: Sequence[tuple[str | None, str]]) -> list[np.ndarray | BackendError]:
        with self._lock:
            results: dict[tuple[str | None, str], np.ndarray | BackendError] = {
                key: self._memory[key] for key in keys if key in self._memory
            }
        results |= {key: BackendError("an empty response has no log-probs") for key in keys if not key[1]}
        # Equal requests are sent once.
        missing = [key for key in dict.fromkeys(keys) if key not in results]
        if missing:
            separator = answer_separator(self.backend)
            rows = self.backend.logprobs(
                [self._prompt(key[0]) for key in missing], [separator + key[1] for key in missing]
            )
            for key, row in zip(missing, rows, strict=True):
                if isinstance(row, UnsupportedRequestError):
                    raise row
                if not isinstance(row, BackendError) and not np.isfinite(row).all():
                    row = BackendError(f"the log-probs of {key[1][:40]!r} are not all finite")
                results[key] = row
        # Store and refresh in call order; the least recently used rows leave first. Errors are not cached.
        with self._lock:
            for key in keys:
                if not isinstance(row := results[key], BackendError):
                    self._memory[key] = row
                    self._memory.move_to_end(key)
            while len(self._memory) > self._capacity:
                self._memory.popitem(last=False)
        return [results[key] for key in keys]

    def _prompt(self, prompt: str | None) -> Prompt:
        """Returns what the backend reads before a response; None: the neutral opening."""
        style = self.backend.prompt_style
        if prompt or (prompt is not None and style == "completion"):
            return request_prompt(style, prompt)
        data = load_prompts(__package__, "quality")["likelihood"]  # also for an empty prompt: no chat message is empty
        return build_prompt(style, data["neutral_chat"], data["neutral"])


def request_prompt(style: PromptStyle, request: str) -> Prompt:
    """Returns a request in the prompt style of a backend, so that the text that follows is a response to it."""
    form = load_prompts(__package__, "quality")["likelihood"]["completion"]
    return build_prompt(style, request, fill(form, {"prompt": one_line(request)}))


class LikelihoodRatio(Reward):
    """How much the prompt raises the log-prob of the response: a substitute for coherence and a reward model's logit.

    The raw score is the mean over the response's tokens of log p(token | prompt, ...) - log p(token | ...), in nats:
    the pointwise mutual information of prompt and response per token. Squashed, it is
    1 / (1 + exp(-slope * (raw - center))). Center and slope are rounded results of logistic regression on 20 responses
    written for this purpose and the same responses paired with other prompts. With the embedded model the AUC between
    the two sets is 0.965 (responses of 3 to 22 words; ``tests/test_quality_scorers.py``); between the responses and the
    same with their words shuffled it is only 0.62. So the score measures relevance, hardly form, and not truth.

    Args:
        backend: a language model that reports log-probs, or a :class:`Likelihoods` to share.
        squash: True: map the ratio to (0, 1); False: return the unbounded ratio.
        center: ratio that is mapped to 1/2, in nats per token.
        slope: slope of the logistic function, per nat.
    """

    name = "likelihood-ratio"
    calls_per_sample = 2

    def __init__(self, backend: Any = EMBEDDED, squash: bool = True, center: float = 0.7, slope: float = 2.4) -> None:
        self.likelihoods = Likelihoods.of(backend)
        self.squash, self.center, self.slope = squash, center, slope

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        conditional = self.likelihoods.conditional_logprobs(samples)
        unconditional = self.likelihoods.unconditional_logprobs(samples)
        return [self._score(*rows) for rows in zip(conditional, unconditional, strict=True)]

    def _score(self, conditional: np.ndarray | BackendError, unconditional: np.ndarray | BackendError) -> Score:
        for row in (conditional, unconditional):
            if isinstance(row, BackendError):
                return Score.invalid(str(row), calls=2)
        raw = float(np.mean(conditional, dtype=np.float64) - np.mean(unconditional, dtype=np.float64))  # type: ignore[arg-type]
        value = sigmoid(self.slope * (raw - self.center)) if self.squash else raw
        return Score(value, terms={self.name: value, "log_ratio": raw}, calls=2)


class Fluency(Reward):
    """How likely the response is without its prompt: a substitute for naturalness and understandability.

    ``naturalness`` is the logistic function of the mean log-prob of the response's tokens after a neutral opening.
    ``understandability`` takes the mean over the least likely quarter of the tokens, because one unreadable spot spoils
    a text. Both read the response once and do not read the prompt. As likelihoods they are high for dull or repetitive
    text (``yes`` twelve times: 1.00) and low for a single rare word.

    Center and slope are rounded results of logistic regression on 20 responses written for this purpose and the same
    responses with their words shuffled. With the embedded model the AUC between the two sets is 1.00 for naturalness
    and 0.955 for understandability (``tests/test_quality_scorers.py``). Word order is an easy test, and the two aspects
    are strongly correlated.

    Args:
        backend: a language model that reports log-probs, or a :class:`Likelihoods` to share.
        aspect: ``naturalness`` or ``understandability``.
        center: log-prob that is mapped to 1/2, in nats per token; None: the fitted value for the aspect.
        slope: slope of the logistic function, per nat; None: the fitted value for the aspect.

    Raises:
        ValueError: for another aspect.
    """

    name = "fluency"
    calls_per_sample = 1

    def __init__(
        self,
        backend: Any = EMBEDDED,
        aspect: Literal["naturalness", "understandability"] = "naturalness",
        center: float | None = None,
        slope: float | None = None,
    ) -> None:
        check_known("aspect", aspect, _LOGISTIC)
        self.likelihoods, self.aspect = Likelihoods.of(backend), aspect
        default_center, default_slope = _LOGISTIC[aspect]
        self.center = default_center if center is None else center
        self.slope = default_slope if slope is None else slope

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        return [self._score(row) for row in self.likelihoods.unconditional_logprobs(samples)]

    def _score(self, row: np.ndarray | BackendError) -> Score:
        if isinstance(row, BackendError):
            return Score.invalid(str(row), calls=1)
        if self.aspect == "understandability":
            row = np.sort(row)[: math.ceil(len(row) * TAIL)]
        raw = float(np.mean(row, dtype=np.float64))
        value = sigmoid(self.slope * (raw - self.center))
        return Score(value, terms={self.name: value, "log_prob": raw}, calls=1)


# Center (nats per token) and slope (per nat) of each aspect, fitted on the embedded model.
_LOGISTIC = {"naturalness": (-6.0, 2.0), "understandability": (-10.5, 1.5)}
