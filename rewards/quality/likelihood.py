"""Quality of a response by a language model's own log-probs: no judge and no training, stand-ins for learned scorers.

What a language model finds likely is neither true nor good: these scores favour common phrases over rare words, names
and numbers, and a response that repeats its prompt is likely given it.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ...llm_backends import Backend, BackendError, Prompt, UnsupportedRequestError, resolve
from ...llm_backends.base import PromptStyle
from ...llm_backends.prompting import build_prompt, fill, load_prompts, one_line
from ..base import Reward, Sample, Score
from ..judges.verdict import lead, sigmoid

EMBEDDED = {"id": "embedded", "kwargs": {"dtype": "auto"}}
"""The default model: the embedded one, in bfloat16 where the hardware computes in it, which is two times as fast."""

TAIL = 0.25
"""The share of a text's tokens, the least likely ones, by which its understandability is scored."""


class Likelihoods:
    """Log-probs of responses, given their prompts and given only a neutral opening; the last ones are remembered.

    Several scorers may share one, so that each text is read once in either way.

    Args:
        backend: a language model that reports log-probs.
        memory: texts to remember, in either way.
    """

    def __init__(self, backend: Any = EMBEDDED, memory: int = 4096) -> None:
        self.backend: Backend = resolve("backend", backend)
        self._memory: OrderedDict[tuple[str | None, str], np.ndarray] = OrderedDict()
        self._capacity = memory
        self._lock = threading.Lock()

    @classmethod
    def of(cls, source: Any) -> Likelihoods:
        """What is shared already, or new ones on a backend."""
        return source if isinstance(source, cls) else cls(source)

    def given(self, samples: Sequence[Sample]) -> list[np.ndarray | BackendError]:
        """Log-probs of each response given its prompt.

        Returns:
            n float32 arrays, shape (tokens of the response,), in nats; or an error in one's place.

        Raises:
            UnsupportedRequestError: if the backend reports no log-probs.
        """
        return self._ask([(sample.prompt, sample.response) for sample in samples])

    def alone(self, samples: Sequence[Sample]) -> list[np.ndarray | BackendError]:
        """Likewise given a neutral opening instead of the prompt."""
        return self._ask([(None, sample.response) for sample in samples])

    def _ask(self, keys: Sequence[tuple[str | None, str]]) -> list[np.ndarray | BackendError]:
        with self._lock:
            found: dict[tuple[str | None, str], np.ndarray | BackendError] = {
                key: self._memory[key] for key in keys if key in self._memory
            }
        found |= {key: BackendError("an empty response has no log-probs") for key in keys if not key[1]}
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        if missing:
            blank = lead(self.backend)
            rows = self.backend.logprobs([self._prompt(key[0]) for key in missing], [blank + key[1] for key in missing])
            for key, row in zip(missing, rows, strict=True):
                if isinstance(row, UnsupportedRequestError):
                    raise row
                if not isinstance(row, BackendError) and not np.isfinite(row).all():
                    row = BackendError(f"the log-probs of {key[1][:40]!r} are not all finite")
                found[key] = row
        with self._lock:
            for key in keys:
                if not isinstance(row := found[key], BackendError):
                    self._memory[key] = row
                    self._memory.move_to_end(key)
            while len(self._memory) > self._capacity:
                self._memory.popitem(last=False)
        return [found[key] for key in keys]

    def _prompt(self, prompt: str | None) -> Prompt:
        style = self.backend.prompt_style
        if prompt is not None:
            return request_prompt(style, prompt)
        data = load_prompts(__package__, "quality")["likelihood"]
        return build_prompt(style, data["neutral_chat"], data["neutral"])


def request_prompt(style: PromptStyle, request: str) -> Prompt:
    """A request in the form that a backend asks for, such that what it writes next is a response to it."""
    data = load_prompts(__package__, "quality")["likelihood"]
    return build_prompt(style, request or data["neutral_chat"], fill(data["completion"], {"prompt": one_line(request)}))


class LikelihoodRatio(Reward):
    """How much likelier the prompt makes the response: a stand-in for coherence, and for a reward model's logit.

    The raw score is the mean over the response's tokens of log p(token | prompt, ...) - log p(token | ...), in nats:
    the pointwise mutual information of prompt and response per token. Squashed, it is
    1 / (1 + exp(-slope * (raw - center))). Center and slope are those of logistic regression, rounded, on 20 responses
    written for the purpose and the same responses to others' prompts. The embedded model tells these apart with an AUC
    of 0.965 (responses of 3 to 22 words; ``tests/test_quality_scorers.py``), and responses from the same with
    their words shuffled with 0.62 only: it judges relevance, not truth and hardly form.

    Args:
        backend: a language model that reports log-probs, or :class:`Likelihoods` to share.
        squash: map the ratio to (0, 1); else the value is the ratio, which has no bounds.
        center: the ratio that is worth a half, in nats per token.
        slope: of the logistic, per nat.
    """

    name = "likelihood-ratio"
    calls_per_sample = 2

    def __init__(self, backend: Any = EMBEDDED, squash: bool = True, center: float = 0.7, slope: float = 2.4) -> None:
        self.likelihoods = Likelihoods.of(backend)
        self.squash, self.center, self.slope = squash, center, slope

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        both = zip(self.likelihoods.given(samples), self.likelihoods.alone(samples), strict=True)
        return [self._score(given, alone) for given, alone in both]

    def _score(self, given: np.ndarray | BackendError, alone: np.ndarray | BackendError) -> Score:
        for row in (given, alone):
            if isinstance(row, BackendError):
                return Score.invalid(str(row), calls=2)
        raw = float(np.mean(given, dtype=np.float64) - np.mean(alone, dtype=np.float64))  # type: ignore[arg-type]
        value = sigmoid(self.slope * (raw - self.center)) if self.squash else raw
        return Score(value, terms={self.name: value, "log_ratio": raw}, calls=2)


class Fluency(Reward):
    """How likely the response is by itself: a stand-in for naturalness and understandability.

    ``naturalness`` squashes the mean log-prob of the response's tokens after a neutral opening, ``understandability``
    that of the least likely quarter of them, as one unreadable spot spoils a text. Both read the response once, and
    neither reads the prompt. They are likelihoods: dull text scores high, and so does text that
    repeats itself (twelve times ``yes``: 1.00), while a single rare word scores low.
    Center and slope are those of logistic regression, rounded, on 20 responses written for the purpose and the same
    with their words shuffled, which the embedded model tells apart with an AUC of 1.00 by naturalness and 0.955
    by understandability (``tests/test_quality_scorers.py``). Word order is an easy test; both are strongly correlated.

    Args:
        backend: a language model that reports log-probs, or :class:`Likelihoods` to share.
        aspect: ``naturalness`` or ``understandability``.
        center: the log-prob that is worth a half, in nats per token; by default what suits aspect and embedded model.
        slope: of the logistic, per nat; likewise.

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
        if aspect not in _LOGISTIC:
            raise ValueError(f"aspect must be naturalness or understandability, got {aspect!r}")
        self.likelihoods, self.aspect = Likelihoods.of(backend), aspect
        known_center, known_slope = _LOGISTIC[aspect]
        self.center = known_center if center is None else center
        self.slope = known_slope if slope is None else slope

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        return [self._score(row) for row in self.likelihoods.alone(samples)]

    def _score(self, row: np.ndarray | BackendError) -> Score:
        if isinstance(row, BackendError):
            return Score.invalid(str(row), calls=1)
        if self.aspect == "understandability":
            row = np.sort(row)[: math.ceil(len(row) * TAIL)]
        raw = float(np.mean(row, dtype=np.float64))
        value = sigmoid(self.slope * (raw - self.center))
        return Score(value, terms={self.name: value, "log_prob": raw}, calls=1)


_LOGISTIC = {"naturalness": (-6.0, 2.0), "understandability": (-10.5, 1.5)}
