"""Scorers of prompts by the label likelihoods that a frozen language model gives on the examples of a task."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from ...llm_backends import Backend, BackendError, ContextLengthError, Prompt, UnsupportedRequestError, resolve
from ...llm_backends.errors import InputError, check_at_least, check_known
from ...llm_backends.parts import FixedValues, Lock, Part
from ...llm_backends.prompting import build_prompt, one_line
from ..base import Score
from ..judges.verdict import answer_separator
from .task_prompt import LabelledExample, TaskPrompt, check_prefix_free, check_prompt, longest_examples

Calibration: TypeAlias = Literal["none", "contextual", "batch"]
"""How the label bias of a prompt is removed: a frozen model prefers some labels whatever the input, and prompts move
that bias. Both methods divide the probability of each label, normalised over the labels, by a bias and normalise
again.

* ``contextual`` (Zhao et al. 2021, arXiv 2102.09690, section 5): the bias is the mean of the label probabilities of
  content-free inputs, by default the paper's three. It is the default where calibration is on: the score of an
  example depends on the prompt and the example alone, so a minibatch of one has a score and scores can be cached.
* ``batch`` (Zhou et al. 2023, arXiv 2309.17249, section 3): it is their mean over the examples that are scored
  together. It is read from real inputs and costs no calls of the model, but it depends on the batch, and it removes a
  part of the signal where the labels of a batch are not balanced.
"""

CONTENT_FREE = ("N/A", "[MASK]", "")
"""Default content-free inputs of contextual calibration."""


def calibration_method(calibrate: bool | str) -> Calibration:
    """Returns the calibration method of a name or flag; True is ``contextual``, False is ``none``.

    Raises:
        InputError: for an unknown name.
    """
    if isinstance(calibrate, bool):
        return "contextual" if calibrate else "none"
    check_known("calibration", calibrate, get_args(Calibration))
    return calibrate  # type: ignore[return-value]


def check_batch(method: Calibration, examples: int) -> None:
    """Checks that ``batch`` calibration has at least two examples; one example equals the mean of its batch.

    Raises:
        InputError: for ``batch`` with fewer than two examples.
    """
    if method == "batch" and examples < 2:
        raise InputError("batch calibration of one example leaves no signal: score more, or use 'contextual'")


def normalised(logprobs: np.ndarray) -> np.ndarray:
    """Returns log-probs normalised over the labels, so that their exponentials sum to 1.

    A label of probability 0 (``-inf``) stays at 0 if another label has more.

    Args:
        logprobs: shape (..., labels), in nats.

    Returns:
        float64, shape (..., labels), in nats.
    """
    values = np.asarray(logprobs, dtype=np.float64)
    # Log-sum-exp relative to the highest value, which cannot overflow or become the log of 0.
    highest = values.max(axis=-1, keepdims=True)
    return values - highest - np.log(np.exp(values - highest).sum(axis=-1, keepdims=True))


def without_bias(logprobs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Returns label log-probs without the bias of their prompt: each label's mean probability on reference inputs.

    Args:
        logprobs: label log-probs, shape (examples, labels), in nats.
        reference: label log-probs of content-free inputs or of the batch, shape (inputs, labels), in nats.

    Returns:
        Log-probs normalised over the labels, float64, shape (examples, labels), in nats.

    Raises:
        InputError: if ``reference`` has no inputs.
    """
    if not len(reference):
        raise InputError("calibration needs at least one reference input")
    # The floor keeps the log finite for a label whose mean probability underflows to 0.
    bias = np.log(np.maximum(np.exp(normalised(reference)).mean(axis=0), np.finfo(np.float64).tiny))
    return normalised(normalised(logprobs) - bias)


CHECKED_WORDS = 1024
"""Sets of verbalizers whose token counts are cached."""
CACHED_ROWS = 262_144
"""Pairs of prompt and example whose log-probs are cached; a pair takes about 200 bytes."""


@dataclass(frozen=True)
class TaskResult:
    """Predictions and accuracy of one prompt on the examples that it was scored on."""

    accuracy: float
    """Share of examples whose label has the highest probability, in [0, 1]."""
    predictions: np.ndarray
    """Label of the highest probability, the first one among equals, int64, shape (examples,)."""
    gaps: np.ndarray
    """p(label) - the highest p of another label, by ``probabilities``, float64, shape (examples,), in [-1, 1]."""
    logprobs: np.ndarray
    """Log-prob of each verbalizer after the prompt, never calibrated, float32, shape (examples, labels), in nats."""
    probabilities: np.ndarray
    """Label probabilities that sum to 1, calibrated if requested, float64, shape (examples, labels)."""
    prompt: TaskPrompt
    examples: tuple[LabelledExample, ...] = field(repr=False)
    calls: int = 0
    """Task-model calls: one per label and input, content-free inputs and cache hits included."""

    @property
    def correct(self) -> np.ndarray:
        """Whether each prediction is the right label, bool, shape (examples,)."""
        return self.predictions == np.array([example.label for example in self.examples])

    def failures(self, limit: int = 3) -> str:
        """Returns the wrong answers as text, the most confident ones first, for optimisers that read feedback.

        Args:
            limit: maximum number of wrong answers.
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
    the prompt with the input filled in. All prompts and examples of a call are one backend call; a model in this
    process reads the text that the examples of a prompt share only once. A cached pair of prompt and example is not
    requested again, so its log-probs stay the same to the last digit. A new request (without cache, or by another
    scorer) to a model in this process gives the same log-probs up to rounding, which depends on the rest of the batch:
    about 1e-5 nats in float32, far more in bfloat16.

    Args:
        backend: the frozen model; must report log-probs.
        calibrate: how the label bias of a prompt is removed (:func:`without_bias`). True or ``contextual``: by the mean
            label probabilities on ``content_free`` inputs; ``batch``: by those on the scored examples; False or
            ``none``: not at all.
        cache: maximum number of cached pairs of prompt and example; 0: no cache.
        content_free: inputs of ``contextual``, in the form of the examples' texts.

    Raises:
        InputError: for an unknown calibration, a negative cache, or no content-free inputs.
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
        check_at_least(0, cache=cache)
        self.calibration: Calibration = calibration_method(calibrate)
        self.backend: Backend = resolve("backend", backend)
        if not self.backend.supports_logprobs:
            raise UnsupportedRequestError(
                f"backend {self.backend.name!r} reports no log-probs, by which prompts are scored: use another backend"
            )
        self.cache, self.content_free = cache, tuple(content_free)
        self.rows: FixedValues[bytes, np.ndarray] = FixedValues()
        self._checked: FixedValues[tuple[str, ...], int] = FixedValues()
        self._lock = Lock()

    def label_logprobs(self, prompts: Sequence[TaskPrompt], examples: Sequence[LabelledExample]) -> np.ndarray:
        """Returns the log-prob of every label's verbalizer, for all prompts and examples.

        Args:
            prompts: prompts with one verbalizer per label of the task.
            examples: the inputs; their labels do not change the result.

        Returns:
            float32, shape (prompts, examples, labels), in nats.

        Raises:
            InputError: for prompts or examples that :meth:`check` refuses.
            BackendError: if the model could not serve a request or gave log-probs that are not finite; the other
                results are cached.
        """
        self.check(prompts, examples)
        rows = self.pair_logprobs([(prompt, example.text) for prompt in prompts for example in examples])
        return np.array(rows, np.float32).reshape(len(prompts), len(examples), len(prompts[0].verbalizers))

    def score(
        self, prompts: Sequence[TaskPrompt], examples: Sequence[LabelledExample], calibrate: bool | str | None = None
    ) -> list[TaskResult]:
        """Scores every prompt on the same examples.

        Args:
            prompts: the prompts.
            examples: the examples, at least one.
            calibrate: calibration of this call, as in the constructor; None: that of the scorer. Raw and calibrated
                scores use the same cached likelihoods.

        Returns:
            One result per prompt, in order.

        Raises:
            InputError: for prompts or examples that :meth:`check` refuses, and for fewer than two examples with
                ``batch``, which would leave no signal.
            BackendError: if the model could not serve a request or gave log-probs that are not finite.
        """
        method = self.calibration if calibrate is None else calibration_method(calibrate)
        check_batch(method, len(examples))
        self.check(prompts, examples)
        return self._results(prompts, [examples] * len(prompts), method)

    def score_each(
        self, prompts: Sequence[TaskPrompt], examples: Sequence[Sequence[LabelledExample]]
    ) -> list[TaskResult]:
        """Scores every prompt on its own examples, in one backend call.

        Args:
            prompts: n prompts.
            examples: the examples of each prompt, at least one.

        Returns:
            One result per prompt, in order.

        Raises:
            InputError: as in :meth:`score`, and if the numbers of prompts and of lists of examples differ.
            BackendError: if the model could not serve a request or gave log-probs that are not finite.
        """
        if len(prompts) != len(examples):
            raise InputError(f"{len(prompts)} prompts need as many lists of examples, got {len(examples)}")
        for prompt, own_examples in zip(prompts, examples, strict=True):
            check_batch(self.calibration, len(own_examples))
            self.check([prompt], own_examples)
        return self._results(prompts, examples, self.calibration)

    def _results(
        self, prompts: Sequence[TaskPrompt], examples: Sequence[Sequence[LabelledExample]], method: Calibration
    ) -> list[TaskResult]:
        """Scores prompts on their own examples, all of which have been checked."""
        extra = self._extra(method)
        texts = [[*(example.text for example in own_examples), *extra] for own_examples in examples]
        pairs = [(prompt, text) for prompt, own_examples in zip(prompts, texts, strict=True) for text in own_examples]
        # All pairs are one backend call; the rows come back in the order of the pairs.
        rows = iter(self.pair_logprobs(pairs))
        results = []
        for prompt, own_examples in zip(prompts, examples, strict=True):
            parts = [np.array([next(rows) for _ in part], np.float32) for part in (own_examples, extra)]
            results.append(_result(prompt, parts[0], parts[1], method, tuple(own_examples)))
        return results

    def reward_each(
        self,
        prompts: Sequence[TaskPrompt],
        examples: Sequence[Sequence[LabelledExample]],
        reward: Callable[[TaskResult], Score],
    ) -> list[Score]:
        """Returns a reward for every prompt on its own examples.

        Args:
            prompts: n prompts.
            examples: the examples of each prompt, at least one.
            reward: function from a result to its score.

        Returns:
            One score per prompt; invalid if the model could not serve a request or the prompt is longer than the
            context.

        Raises:
            InputError: as in :meth:`score_each`, except for a prompt longer than the context.
        """
        try:
            return [reward(result) for result in self.score_each(prompts, examples)]
        except (BackendError, InputError) as error:
            if isinstance(error, InputError) and not isinstance(error.__cause__, ContextLengthError):
                raise
            reason = str(error)
        if len(prompts) == 1:
            return [Score.invalid(reason, self.calls_for(prompts[0], len(examples[0])))]
        # Score prompt by prompt, so that one failure does not affect the others; their results are cached.
        return [
            self.reward_each([prompt], [own_examples], reward)[0]
            for prompt, own_examples in zip(prompts, examples, strict=True)
        ]

    def calls_for(self, prompt: TaskPrompt, examples: int) -> int:
        """Returns the task-model calls that a prompt's score takes, counted as in :attr:`TaskResult.calls`."""
        return (examples + len(self._extra(self.calibration))) * len(prompt.verbalizers)

    def _extra(self, method: Calibration) -> tuple[str, ...]:
        """Returns the inputs that are scored besides the examples."""
        return self.content_free if method == "contextual" else ()

    def check(self, prompts: Sequence[TaskPrompt], examples: Sequence[LabelledExample]) -> None:
        """Checks that prompts and examples can be scored, before the model is loaded if possible.

        Raises:
            InputError: if there are no prompts or no examples; for a prompt that
                :func:`~instructgym.rewards.prompt_scoring.task_prompt.check_prompt` refuses; for prompts with different
                numbers of verbalizers; for an example without text or whose label has no verbalizer; for verbalizers
                that have no tokens, have the same tokens as another or begin another; for a prompt that is longer than
                the context.
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
        # The longest examples decide whether a prompt fits; the longest verbalizer must fit after it.
        room = max(self._checked_tokens(words) for words in dict.fromkeys(prompt.verbalizers for prompt in prompts))
        for number, prompt in enumerate(prompts):
            for example in longest_examples(examples):
                error = self.backend.context_error(self._built("".join(prompt.render(example.text))), room)
                if error is not None:
                    raise InputError(f"prompt {number} is too long: {error}") from error

    def _checked_tokens(self, words: tuple[str, ...]) -> int:
        """Returns the tokens of the longest verbalizer; 1 if the backend does not know its tokenizer."""
        if words not in self._checked:
            tokens = self.backend.completion_ids([answer_separator(self.backend) + word for word in words])
            for word, ids in zip(words, tokens or [], strict=False):
                if not ids:
                    raise InputError(f"the verbalizer {word!r} is no token of {self.backend.name}: use another word")
            check_prefix_free(tokens or [], words, "the task")
            self._checked[words] = max(map(len, tokens)) if tokens else 1
            while len(self._checked) > CHECKED_WORDS:
                self._checked.popitem(last=False)
        return self._checked[words]

    def _built(self, text: str) -> Prompt:
        return build_prompt(self.backend.prompt_style, text, text)

    def pair_logprobs(self, pairs: Sequence[tuple[TaskPrompt, str]]) -> list[np.ndarray]:
        """Returns the labels' log-probs, float32, shape (labels,), for each pair of a prompt and an input."""
        keys: list[bytes] = []
        results: dict[bytes, np.ndarray] = {}
        missing: dict[bytes, tuple[str, str, tuple[str, ...]]] = {}
        name = self.backend.name
        # Look every pair up in the cache; equal pairs that are missing are requested once.
        with self._lock:
            for prompt, text in pairs:
                head, rest = prompt.render(text)
                key = _key(name, head + rest, *prompt.verbalizers)
                keys.append(key)
                row = self.rows.get(key)
                if row is not None:
                    results[key] = row
                    self.rows.move_to_end(key)
                else:
                    missing.setdefault(key, (head, rest, prompt.verbalizers))
        if missing:
            results |= self._request_missing(missing)
        return [results[key] for key in keys]

    def _request_missing(self, missing: dict[bytes, tuple[str, str, tuple[str, ...]]]) -> dict[bytes, np.ndarray]:
        """Requests the log-probs of pairs that are not cached, caches what succeeds and raises the first error."""
        separator = answer_separator(self.backend)
        rows = self.backend.choice_logprobs(
            [self._built(head + rest) for head, rest, _ in missing.values()],
            [[separator + word for word in words] for _, _, words in missing.values()],
            [self._built(head) if head else "" for head, _, _ in missing.values()],
        )
        results: dict[bytes, np.ndarray] = {}
        failed: list[tuple[str, BackendError]] = []
        for (key, (head, rest, _)), row in zip(missing.items(), rows, strict=True):
            if isinstance(row, BackendError):
                failed.append((head + rest, row))
            elif not np.isfinite(row).all():
                failed.append((head + rest, BackendError(f"the log-probs {row.tolist()} are not all finite")))
            else:
                results[key] = row
        # Cache what succeeded before raising, so that a repeated call requests only the rest.
        with self._lock:
            self.rows |= results if self.cache else {}
            while len(self.rows) > self.cache:
                self.rows.popitem(last=False)
        if failed:
            text, error = failed[0]
            if isinstance(error, ContextLengthError):
                raise InputError(f"the prompt {one_line(text)[:60]!r} is too long: {error}") from error
            raise error
        return results


def make_scorer(scorer: TaskScorer | Mapping[str, Any] | None) -> TaskScorer:
    """Returns a task scorer from the ``scorer`` argument of a reward.

    Args:
        scorer: a scorer, which is returned as it is, or the arguments of one as a mapping; None: the defaults.

    Raises:
        InputError: for any other type, for arguments that a scorer does not have, and for those that
            :class:`TaskScorer` refuses.
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
    """Returns a hash of the texts that identifies a row of the cache."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        # The length before each text keeps ("ab", "c") and ("a", "bc") apart.
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return digest.digest()


def _result(
    prompt: TaskPrompt, rows: np.ndarray, content_free: np.ndarray, method: Calibration, examples: tuple[Any, ...]
) -> TaskResult:
    """Returns the result of one prompt from its label log-probs.

    Args:
        prompt: the prompt.
        rows: float32, shape (examples, labels), in nats: log-probs of the examples.
        content_free: float32, shape (inputs, labels), in nats: those of the content-free inputs; empty if not used.
        method: calibration.
        examples: the examples.
    """
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
    """Raised if the next request needs more task-model calls than are left."""


class LimitedScorer(TaskScorer):
    """A :class:`TaskScorer` with a limit on its task-model calls.

    A call is one label of one example after one prompt. Cache hits count as well, so that the number of calls depends
    on what a method requests and not on the order. Failed requests do not count.

    Args:
        limit: maximum number of calls.
        *args, **kwargs: arguments of :class:`TaskScorer`.

    Raises:
        InputError: for a limit below 1.
        CallLimitError: when scoring, before a request that would exceed the limit.
    """

    def __init__(self, limit: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_at_least(1, limit=limit)
        self.limit, self.calls = limit, 0

    @property
    def remaining(self) -> int:
        """Number of calls until the limit."""
        return self.limit - self.calls

    def pair_logprobs(self, pairs: Sequence[tuple[TaskPrompt, str]]) -> list[np.ndarray]:
        needed = sum(len(prompt.verbalizers) for prompt, _ in pairs)
        if needed > self.remaining:
            raise CallLimitError(f"{needed} task-model calls are needed, {self.remaining} of {self.limit} are left")
        self.calls += needed
        try:
            return super().pair_logprobs(pairs)
        except (BackendError, InputError):
            self.calls -= needed  # the results that succeeded are cached and count when they are requested again
            raise
