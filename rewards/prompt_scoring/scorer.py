"""What a prompt is worth to a frozen language model: its label likelihoods on the examples of a task."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from ...llm_backends import Backend, BackendError, ContextLengthError, Prompt, UnsupportedRequestError, resolve
from ...llm_backends.errors import InputError
from ...llm_backends.parts import Part
from ...llm_backends.prompting import build_prompt, one_line
from ..base import Score
from .task_prompt import (
    BLOCK,
    TEMPLATE,
    Demonstration,
    LabelledExample,
    TaskPrompt,
    check_distinct,
    check_prompt,
    longest,
)

Calibration: TypeAlias = Literal["none", "contextual", "batch"]

CONTENT_FREE = ("N/A", "[MASK]", "")
"""The inputs that say nothing."""


def calibration_method(calibrate: bool | str) -> Calibration:
    """The method of a flag: True is ``contextual``, False ``none``.

    Raises:
        InputError: for an unknown name.
    """
    if isinstance(calibrate, bool):
        return "contextual" if calibrate else "none"
    if calibrate not in get_args(Calibration):
        raise InputError(f"unknown calibration {calibrate!r}: use {', '.join(get_args(Calibration))}")
    return calibrate  # type: ignore[return-value]


def check_batch(method: Calibration, examples: int) -> None:
    """Refuses ``batch`` for fewer than two examples with an InputError: their mean is all that there is of the one."""
    if method == "batch" and examples < 2:
        raise InputError("batch calibration of one example leaves no signal: score more, or use 'contextual'")


def normalised(logprobs: np.ndarray) -> np.ndarray:
    """Log-probs over the labels: float64, of the shape of ``logprobs`` (..., labels), their exponentials summing to 1.

    Raises nothing: a label of probability 0 (``-inf``) keeps it as long as another has more.
    """
    values = np.asarray(logprobs, dtype=np.float64)
    highest = values.max(axis=-1, keepdims=True)
    return values - highest - np.log(np.exp(values - highest).sum(axis=-1, keepdims=True))


def without_bias(logprobs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Label log-probs with the bias of a prompt removed.

    Args:
        logprobs: shape (examples, labels), in nats.
        reference: shape (inputs, labels): those of content-free inputs, or of the batch.

    Returns:
        Normalised over the labels, float64, shape (examples, labels).

    Raises:
        InputError: without a reference.
    """
    if not len(reference):
        raise InputError("calibration needs at least one reference input")
    bias = np.log(np.maximum(np.exp(normalised(reference)).mean(axis=0), np.finfo(np.float64).tiny))
    return normalised(normalised(logprobs) - bias)


__all__ = [
    "BLOCK",
    "TEMPLATE",
    "Demonstration",
    "LabelledExample",
    "TaskPrompt",
    "TaskResult",
    "TaskScorer",
    "make_scorer",
]

CHECKED_WORDS = 1024
CACHED_ROWS = 262_144
"""Pairs of prompt and example whose log-probs are kept; a pair takes some 200 bytes."""


@dataclass(frozen=True)
class TaskResult:
    """How one prompt did on the examples it was scored on."""

    accuracy: float
    """Share of examples whose label has the highest probability, in [0, 1]."""
    predictions: np.ndarray
    """int64, shape (examples,): the label of the highest probability, the first one of equals."""
    gaps: np.ndarray
    """float64, shape (examples,), in [-1, 1]: p(label) - the highest p of another one, of ``probabilities``."""
    logprobs: np.ndarray
    """float32, shape (examples, labels), in nats: of each verbalizer after the prompt, raw whatever the calibration."""
    probabilities: np.ndarray
    """float64, shape (examples, labels): normalised over the labels, calibrated where that was asked for."""
    prompt: TaskPrompt
    examples: tuple[LabelledExample, ...] = field(repr=False)
    calls: int = 0
    """Task-model calls: one per example and label, those of content-free inputs included (a logical count)."""

    @property
    def correct(self) -> np.ndarray:
        """bool, shape (examples,)."""
        return self.predictions == np.array([example.label for example in self.examples])

    def failures(self, limit: int = 3) -> str:
        """The wrong answers as text, the most confident ones first, for optimisers that read.

        Args:
            limit: wrong answers at most.
        """
        wrong = np.flatnonzero(~self.correct)
        worst = wrong[np.argsort(self.gaps[wrong], kind="stable")][:limit]
        words = self.prompt.verbalizers
        return "\n".join(
            f"Input: {one_line(self.examples[i].text)} / predicted {words[self.predictions[i]]}, "
            f"right {words[self.examples[i].label]}"
            for i in worst
        )


class TaskScorer(Part):
    """Scores prompts by the label likelihoods that a frozen model gives them (Brown et al. 2020, section 2.4).

    The likelihood of a label is the probability of its verbalizer (the sum of the log-probs of its tokens) after
    the prompt with the input filled in. All prompts and examples of a call are asked together; what the examples of a
    prompt share is read once by a model in this process. No pair of prompt and example that is remembered is asked
    again, so its score stays the same to the last digit. Asked anew (without cache, or by another scorer), a model in
    this process gives it the same log-probs up to rounding, which depends on the rest of the batch: some 1e-5 nats in
    float32, far more in bfloat16.

    Args:
        backend: the frozen model, one that reports log-probs.
        calibrate: remove the label bias: True or ``contextual``, or ``batch``; see :mod:`~.calibration`.
        cache: pairs of prompt and example to remember; 0 for none.
        content_free: the inputs of ``contextual``, in the form of the examples' texts.

    Raises:
        InputError: for an unknown calibration, a negative cache, and no content-free inputs.
        UnsupportedRequestError: if the backend reports no log-probs.
    """

    def __init__(
        self,
        backend: Any = "embedded",
        calibrate: bool | str = False,
        cache: int = CACHED_ROWS,
        content_free: Sequence[str] = CONTENT_FREE,
    ) -> None:
        if isinstance(content_free, str) or not content_free:
            raise InputError(
                f"content_free must be a list of at least one input that says nothing, got {content_free!r}"
            )
        if cache < 0:
            raise InputError(f"cache must be a number of pairs of at least 0, got {cache}")
        self.calibration: Calibration = calibration_method(calibrate)
        self.backend: Backend = resolve("backend", backend)
        if not self.backend.supports_logprobs:
            raise UnsupportedRequestError(
                f"backend {self.backend.name!r} reports no log-probs, by which prompts are scored: use another backend"
            )
        self.cache, self.content_free = cache, tuple(content_free)
        self._rows: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._checked: OrderedDict[tuple[str, ...], int] = OrderedDict()
        self._lock = threading.Lock()

    def label_logprobs(self, prompts: Sequence[TaskPrompt], examples: Sequence[LabelledExample]) -> np.ndarray:
        """The log-prob of every label's verbalizer, for all prompts and examples.

        Args:
            prompts: with as many verbalizers each as the task has labels.
            examples: the inputs; their labels are not looked at.

        Returns:
            float32, shape (prompts, examples, labels), in nats.

        Raises:
            InputError: as :meth:`check`.
            BackendError: for a request that the model could not serve, and log-probs that are not finite; what it did
                serve is remembered.
        """
        self.check(prompts, examples)
        return self._ask(prompts, [example.text for example in examples])

    def score(
        self,
        prompts: Sequence[TaskPrompt],
        examples: Sequence[LabelledExample],
        calibrate: bool | str | None = None,
    ) -> list[TaskResult]:
        """How every prompt does on the examples.

        Args:
            prompts: the prompts.
            examples: the examples, at least one.
            calibrate: instead of the scorer's own; raw and calibrated scores share the likelihoods.

        Raises:
            InputError: as :meth:`check`; for fewer than two examples under ``batch``, which would leave no signal.
            BackendError: as :meth:`label_logprobs`.
        """
        method = self.calibration if calibrate is None else calibration_method(calibrate)
        check_batch(method, len(examples))
        self.check(prompts, examples)
        texts = [example.text for example in examples]
        extra = list(self.content_free) if method == "contextual" else []
        rows = self._ask(prompts, texts + extra)
        return [
            _result(prompt, mine[: len(texts)], mine[len(texts) :], method, tuple(examples))
            for prompt, mine in zip(prompts, rows, strict=True)
        ]

    def score_each(
        self, prompts: Sequence[TaskPrompt], examples: Sequence[Sequence[LabelledExample]]
    ) -> list[TaskResult]:
        """How every prompt does on examples of its own; all are asked together.

        Args:
            prompts: n prompts.
            examples: for each prompt its examples, at least one.

        Raises:
            InputError: as :meth:`score`, and if there are not as many lists of examples as prompts.
            BackendError: as :meth:`label_logprobs`.
        """
        if len(prompts) != len(examples):
            raise InputError(f"{len(prompts)} prompts need as many lists of examples, got {len(examples)}")
        for prompt, mine in zip(prompts, examples, strict=True):
            check_batch(self.calibration, len(mine))
            self.check([prompt], mine)
        extra = list(self.content_free) if self.calibration == "contextual" else []
        texts = [[example.text for example in mine] + extra for mine in examples]
        pairs = [(prompt, text) for prompt, mine in zip(prompts, texts, strict=True) for text in mine]
        rows = iter(self._ask_pairs(pairs))
        results = []
        for prompt, mine in zip(prompts, examples, strict=True):
            found = [np.array([next(rows) for _ in part], np.float32) for part in (mine, extra)]
            results.append(_result(prompt, found[0], found[1], self.calibration, tuple(mine)))
        return results

    def reward_each(
        self,
        prompts: Sequence[TaskPrompt],
        examples: Sequence[Sequence[LabelledExample]],
        reward: Callable[[TaskResult], Score],
    ) -> list[Score]:
        """A reward for every prompt on examples of its own, invalid where the model could not serve a request.

        Args:
            prompts: n prompts.
            examples: for each prompt its examples, at least one.
            reward: of a result.

        Raises:
            InputError: as :meth:`score_each`, but for a prompt over the context.
        """
        try:
            return [reward(result) for result in self.score_each(prompts, examples)]
        except (BackendError, InputError) as error:
            if isinstance(error, InputError) and not isinstance(error.__cause__, ContextLengthError):
                raise
            reason = str(error)
        if len(prompts) == 1:
            return [Score.invalid(reason, self.calls_for(prompts[0], len(examples[0])))]
        # One prompt's failure is not that of the others, whose answers are remembered.
        return [self.reward_each([prompt], [mine], reward)[0] for prompt, mine in zip(prompts, examples, strict=True)]

    def calls_for(self, prompt: TaskPrompt, examples: int) -> int:
        """Task-model calls that a prompt's score on so many examples takes, as :attr:`TaskResult.calls` has them."""
        extra = len(self.content_free) if self.calibration == "contextual" else 0
        return (examples + extra) * len(prompt.verbalizers)

    def check(self, prompts: Sequence[TaskPrompt], examples: Sequence[LabelledExample]) -> None:
        """Refuses what cannot be scored, before a model is loaded where that can be seen without one.

        Raises:
            InputError: without prompts or examples; as :func:`~.task_prompt.check_prompt`; for prompts with different
                numbers of verbalizers, an example without text or with a label that has no verbalizer, verbalizers
                that are no tokens, the same tokens or the beginning of another one, and a prompt over the context.
        """
        if not prompts or not examples:
            raise InputError(f"scoring needs prompts and examples, got {len(prompts)} and {len(examples)}")
        labels = len(prompts[0].verbalizers)
        for number, prompt in enumerate(prompts):
            check_prompt(prompt, f"prompt {number}")
            if len(prompt.verbalizers) != labels:
                raise InputError(f"prompt {number} has {len(prompt.verbalizers)} verbalizers, prompt 0 has {labels}")
        for example in examples:
            if not 0 <= example.label < labels:
                raise InputError(
                    f"example {example.id!r} has the label {example.label}, the prompts have {labels} verbalizers: "
                    "give one verbalizer per label"
                )
            if not example.text.strip():
                raise InputError(f"example {example.id!r} has no text: leave it out")
        room = max(self._checked_tokens(words) for words in dict.fromkeys(prompt.verbalizers for prompt in prompts))
        for number, prompt in enumerate(prompts):
            for example in longest(examples):
                error = self.backend.context_error(self._built("".join(prompt.render(example.text))), room)
                if error is not None:
                    raise InputError(f"prompt {number} is too long: {error}") from error

    def _checked_tokens(self, words: tuple[str, ...]) -> int:
        """Tokens of the longest verbalizer; 1 where the backend does not know its tokenizer."""
        if words not in self._checked:
            tokens = self.backend.completion_ids([self._lead + word for word in words])
            for word, ids in zip(words, tokens or [], strict=False):
                if not ids:
                    raise InputError(f"the verbalizer {word!r} is no token of {self.backend.name}: use another word")
            check_distinct(tokens or [], words, "the task")
            self._checked[words] = max(map(len, tokens)) if tokens else 1
            while len(self._checked) > CHECKED_WORDS:
                self._checked.popitem(last=False)
        return self._checked[words]

    @property
    def _lead(self) -> str:
        """What stands before a verbalizer: a blank, where it goes on from the prompt's text."""
        return " " if self.backend.prompt_style == "completion" else ""

    def _built(self, text: str) -> Prompt:
        return build_prompt(self.backend.prompt_style, text, text)

    def _ask(self, prompts: Sequence[TaskPrompt], texts: Sequence[str]) -> np.ndarray:
        rows = self._ask_pairs([(prompt, text) for prompt in prompts for text in texts])
        return np.array(rows, np.float32).reshape(len(prompts), len(texts), len(prompts[0].verbalizers))

    def _ask_pairs(self, pairs: Sequence[tuple[TaskPrompt, str]]) -> list[np.ndarray]:
        """The labels' log-probs, float32, shape (labels,), for each pair of a prompt and an input."""
        keys: list[bytes] = []
        found: dict[bytes, np.ndarray] = {}
        wanted: dict[bytes, tuple[str, str, tuple[str, ...]]] = {}
        name = self.backend.name
        with self._lock:
            for prompt, text in pairs:
                head, rest = prompt.render(text)
                key = _key(name, head + rest, *prompt.verbalizers)
                keys.append(key)
                row = self._rows.get(key)
                if row is not None:
                    found[key] = row
                    self._rows.move_to_end(key)
                else:
                    wanted.setdefault(key, (head, rest, prompt.verbalizers))
        if wanted:
            found |= self._fresh(wanted)
        return [found[key] for key in keys]

    def _fresh(self, wanted: dict[bytes, tuple[str, str, tuple[str, ...]]]) -> dict[bytes, np.ndarray]:
        lead = self._lead
        rows = self.backend.choice_logprobs(
            [self._built(head + rest) for head, rest, _ in wanted.values()],
            [[lead + word for word in words] for _, _, words in wanted.values()],
            [self._built(head) if head else "" for head, _, _ in wanted.values()],
        )
        found: dict[bytes, np.ndarray] = {}
        failed: list[tuple[str, BackendError]] = []
        for (key, (head, rest, _)), row in zip(wanted.items(), rows, strict=True):
            if isinstance(row, BackendError):
                failed.append((head + rest, row))
            elif not np.isfinite(row).all():
                failed.append((head + rest, BackendError(f"the log-probs {row.tolist()} are not all finite")))
            else:
                found[key] = row
        with self._lock:
            self._rows |= found if self.cache else {}
            while len(self._rows) > self.cache:
                self._rows.popitem(last=False)
        if failed:
            text, error = failed[0]
            if isinstance(error, ContextLengthError):
                raise InputError(f"the prompt {one_line(text)[:60]!r} is too long: {error}") from error
            raise error
        return found


def make_scorer(scorer: TaskScorer | Mapping[str, Any] | None) -> TaskScorer:
    """A task scorer from what rewards take: one that is there, or the arguments of one; None for the defaults.

    Raises:
        InputError: for anything else, arguments that a scorer does not have, and as :class:`TaskScorer`.
    """
    if isinstance(scorer, TaskScorer):
        return scorer
    if not isinstance(scorer, Mapping | None):
        raise InputError(f"{scorer!r} is no scorer: pass a TaskScorer or its arguments, as {{'calibrate': True}}")
    try:
        return TaskScorer(**(scorer or {}))
    except TypeError as error:
        raise InputError(f"cannot build a task scorer from {scorer!r}: {error}") from error


def _key(*parts: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return digest.digest()


def _result(
    prompt: TaskPrompt, rows: np.ndarray, content_free: np.ndarray, method: Calibration, examples: tuple[Any, ...]
) -> TaskResult:
    if method == "none":
        decided = normalised(rows)
    else:
        decided = without_bias(rows, content_free if method == "contextual" else rows)
    probabilities = np.exp(decided)
    labels = np.array([example.label for example in examples])
    order = np.arange(len(labels))
    others = probabilities.copy()
    others[order, labels] = -math.inf
    predictions = probabilities.argmax(axis=1)
    return TaskResult(
        accuracy=float((predictions == labels).mean()),
        predictions=predictions,
        gaps=probabilities[order, labels] - others.max(axis=1),
        logprobs=rows,
        probabilities=probabilities,
        prompt=prompt,
        examples=examples,
        calls=(len(rows) + len(content_free)) * rows.shape[1],
    )


class CallLimitError(Exception):
    """The next request would need more task-model calls than are left."""


class LimitedScorer(TaskScorer):
    """As :class:`~.task_score.TaskScorer`, up to a number of task-model calls.

    A call is one label of one example after one prompt; what the cache answers counts as well, so that the number says
    what a method asked for, not in which order. Requests that fail do not count.

    Args:
        limit: calls at most.
        *args, **kwargs: as of :class:`~.task_score.TaskScorer`.

    Raises:
        InputError: for a limit below 1.
        CallLimitError: when scoring, before anything is asked that would go beyond the limit.
    """

    def __init__(self, limit: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if limit < 1:
            raise InputError(f"a limit of task-model calls must be at least 1, got {limit}")
        self.limit, self.calls = limit, 0

    @property
    def left(self) -> int:
        """Calls until the limit."""
        return self.limit - self.calls

    def _ask_pairs(self, pairs: Sequence[tuple[TaskPrompt, str]]) -> list[np.ndarray]:
        needed = sum(len(prompt.verbalizers) for prompt, _ in pairs)
        if needed > self.left:
            raise CallLimitError(f"{needed} task-model calls are needed, {self.left} of {self.limit} are left")
        self.calls += needed
        try:
            return super()._ask_pairs(pairs)
        except (BackendError, InputError):
            self.calls -= needed  # what was answered is counted when it is asked for again
            raise
