"""The backend contract: batched, order-preserving text generation and scoring by a language model.

:class:`Backend` is the base class. ``local/`` implements it for models in this process, ``serving/`` for servers and
``replies/`` for stored replies; ``scripted.py`` is the shortest implementation.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sys
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import numpy as np

from .errors import RunError
from .parts import Part

Message: TypeAlias = Mapping[str, str]
"""One chat message: ``{"role": "system" | "user" | "assistant", "content": str}``."""

Prompt: TypeAlias = str | Sequence[Message] | Sequence[int]
"""A prompt is a plain string, a list of chat messages, or a list of token ids."""

PromptStyle: TypeAlias = Literal["chat", "completion"]
"""``chat``: for models that follow instructions; ``completion``: few-shot text to continue, for small base models."""


class BackendError(RunError):
    """The error of a request that a backend could not serve, returned in place of that request's result."""


class ContextLengthError(BackendError):
    """The error of a prompt that, with its completion, does not fit into the model's context."""


class UnsupportedRequestError(BackendError):
    """The error of a kind of request that a backend lacks, for example log-probs on a server that reports none."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one request; together with the prompt they determine the reply.

    Raises:
        ValueError: on construction, if a value is out of range.
    """

    max_tokens: int = 64
    """Largest number of tokens to generate."""
    temperature: float = 1.0
    """Softmax temperature; 0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the smallest set of tokens whose total probability reaches this; 1 turns it off."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 turns it off."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion; they are cut from ``text``, but their tokens stay in ``token_ids``."""
    n: int = 1
    """Number of completions per prompt."""
    choices: tuple[str, ...] = ()
    """Constrained decoding: the whole completion is one of these texts; empty for free text."""
    seed: int = 0
    """Seed of this request (see :func:`request_seed`), so that the reply does not depend on the rest of the batch."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "choices", tuple(self.choices))
        # 1 and 1.0 must be the same request, also in the key under which a journal stores the reply.
        for name in ("temperature", "top_p"):
            object.__setattr__(self, name, float(getattr(self, name)))
        for name, valid, rule in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("n", self.n >= 1, "at least 1"),
            ("stop", all(self.stop), "free of empty strings"),
            ("choices", all(self.choices), "free of empty strings"),
        ):
            if not valid:
                raise ValueError(f"Sampling.{name} must be {rule}, got {getattr(self, name)!r}")

    def with_seed(self, seed: int) -> Sampling:
        """Returns the same parameters with another request seed."""
        return replace(self, seed=seed)


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt."""

    text: str
    """Decoded text without special tokens, cut before the stop string."""
    token_ids: list[int]
    """Generated token ids, including the end-of-sequence token and the tokens of a stop string."""
    logprobs: list[float]
    """Log-probs of ``token_ids`` in nats, by the model at temperature 1, before truncation by top-p and top-k."""
    finish_reason: Literal["stop", "length"]
    """``stop``: ended by an end-of-sequence token or a stop string; ``length``: by ``max_tokens`` or a full context."""

    @property
    def mean_logprob(self) -> float:
        """Length-normalised log-prob in nats per token; ``-inf`` for an empty completion."""
        return float(np.mean(self.logprobs)) if self.logprobs else float("-inf")


Result: TypeAlias = list[Completion] | BackendError
"""The result of one prompt: its completions, or the error of that prompt alone."""

ResultT = TypeVar("ResultT")

REASONING_TOKENS = 2048
"""Number of tokens that a model may reason for before its answer, besides those of the answer."""


def answer_text(text: str) -> str | None:
    """Returns a reply without the reasoning before its answer, which ends with ``</think>``.

    Servers with a reasoning parser leave it out themselves. Some chat templates write ``<think>``, so that a reply has
    only the end.

    Returns:
        The answer; None if the reply is cut off before it.
    """
    opened = text.lstrip().startswith("<think>")
    reasoning, closed, answer = text.partition("</think>")
    if closed and (opened or "<think>" not in reasoning):
        return answer.lstrip()
    return None if opened else text


def _answer(result: Result, stop: Sequence[str]) -> Result:
    """Returns the completions with the texts of their answers, or an error if one has none.

    Args:
        result: result of a request.
        stop: strings that end an answer, which were not part of the request.
    """
    if isinstance(result, BackendError):
        return result
    answers = []
    for completion in result:
        answer = answer_text(completion.text)
        if answer is None:
            return BackendError(f"the model was still reasoning after {len(completion.token_ids)} tokens")
        answer = answer[: min((at for text in stop if (at := answer.find(text)) >= 0), default=len(answer))]
        answers.append(completion if answer == completion.text else replace(completion, text=answer))
    return answers


@dataclass
class Usage:
    """Counters of the requests to a backend since it was built."""

    calls: int = 0
    """Batched calls of ``generate``, ``logprobs`` and ``choice_logprobs``."""
    requests: int = 0
    """Prompts in those calls; ``choice_logprobs`` counts one per continuation."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cache_hits: int = 0
    """Requests answered from a journal or cache, without running the model."""
    errors: int = 0
    """Requests whose result is a :class:`BackendError`."""
    cost: float = 0.0
    """Money spent, in the backend's currency; 0 for local models."""

    def __sub__(self, other: Usage) -> Usage:
        return Usage(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    def as_dict(self) -> dict[str, float]:
        """Returns the counters by name."""
        return asdict(self)


def request_seed(*parts: Any) -> int:
    """Returns a seed for one request: a 63-bit hash of its identity, e.g. ``(run seed, row, step, role, attempt)``."""
    digest = hashlib.sha256(json.dumps(parts, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # below 2**63, so that it fits a signed 64-bit integer


def last_message_text(prompt: Prompt) -> str:
    """Returns the text of a string prompt, or of the last message of a chat prompt, for logs and error messages."""
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1] if len(prompt) else ""
    return str(last["content"]) if isinstance(last, Mapping) else f"{len(prompt)} token ids"


def _without_half_characters(result: Result) -> Result:
    """Returns a result, or an error in place of completions of which one holds a lone surrogate.

    A server's JSON can escape half of a character; neither UTF-8 nor a tokenizer can encode it.
    """
    if isinstance(result, BackendError):
        return result
    for completion in result:
        try:
            completion.text.encode()
        except UnicodeEncodeError as error:
            return BackendError(f"the reply holds a lone surrogate ({error.object[error.start]!a}), half a character")
    return result


class Backend(Part, ABC):
    """A language model behind two batched, order-preserving calls.

    Subclasses implement :meth:`_generate` (or :meth:`_generate_each`, if results arrive one by one) and, if the model
    reports log-probs, :meth:`_logprobs`. They get lists of equal length and return one result per prompt. A prompt that
    fails has a :class:`BackendError` in its place, never an empty string. The async methods run the same code in a
    thread.
    """

    name: str = "backend"
    """Identifies the model. Part of the key of every stored reply, so two models never share replies."""
    prompt_style: PromptStyle = "chat"
    """Form of prompt that this model needs."""
    counts_result_tokens: ClassVar[bool] = True
    """Whether ``usage`` gets the completion tokens of each result; False where a server or wrapped backend counts."""

    @property
    def supports_logprobs(self) -> bool:
        """Whether :meth:`logprobs` is implemented."""
        return type(self)._logprobs is not Backend._logprobs

    @property
    def supports_choices(self) -> bool:
        """Whether ``Sampling.choices`` (constrained decoding) is implemented."""
        return False

    def own_copy(self, memo: dict[int, Any]) -> Part:
        return self  # one model, or one server with its budget and journal

    @cached_property
    def usage(self) -> Usage:
        """Counters since this object was built."""
        return Usage()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] = Sampling()) -> list[Result]:
        """Completes every prompt.

        Args:
            prompts: n prompts.
            sampling: one set of parameters for all prompts, or one per prompt.

        Returns:
            n results in the order of the prompts, each a list of ``sampling.n`` completions or a :class:`BackendError`.

        Raises:
            ValueError: if the numbers of prompts and sampling parameters differ, or a prompt is empty.
            UnsupportedRequestError: if ``choices`` are set and the backend lacks constrained decoding.
        """
        prompts = list(prompts)
        results: dict[int, Result] = dict(self.generate_each(prompts, sampling))
        return [results[index] for index in range(len(prompts))]

    def generate_each(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] = Sampling()
    ) -> Iterator[tuple[int, Result]]:
        """Completes every prompt and yields (index, result) as soon as a result is known, in any order.

        A caller that stores each reply as it arrives loses none when a long batch is interrupted. Arguments and errors
        are those of :meth:`generate`.
        """
        prompts, samplings = list(prompts), self._per_prompt(list(prompts), sampling)
        # A separate generator: bad arguments raise in the call, not at the first result.
        return self._counted(prompts, samplings) if prompts else iter(())

    def _counted(self, prompts: list[Prompt], samplings: list[Sampling]) -> Iterator[tuple[int, Result]]:
        self.usage.calls += 1
        for index, result in self._without_reasoning(prompts, samplings):
            result = _without_half_characters(result)
            self.usage.requests += 1
            if isinstance(result, BackendError):
                self.usage.errors += 1
            elif self.counts_result_tokens:
                self.usage.completion_tokens += sum(len(completion.token_ids) for completion in result)
            yield index, result

    def _without_reasoning(self, prompts: list[Prompt], samplings: list[Sampling]) -> Iterator[tuple[int, Result]]:
        """Yields (index, result) in any order, without the reasoning of models that reason aloud before an answer.

        A caller asks for the tokens of an answer, and sets the strings that end it. A reply that one of both cut off
        while the model still reasoned is asked for again, with room for that and without stop strings.
        """
        again = []
        for index, result in self._generate_each(prompts, samplings):
            if isinstance(result, BackendError) or all(answer_text(reply.text) is not None for reply in result):
                yield index, _answer(result, ())
            else:
                again.append(index)
        if again:
            longer = [
                replace(samplings[i], max_tokens=samplings[i].max_tokens + REASONING_TOKENS, stop=()) for i in again
            ]
            for k, result in self._generate_each([prompts[i] for i in again], longer):
                yield again[k], _answer(result, samplings[again[k]].stop)

    def logprobs(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[np.ndarray | BackendError]:
        """Returns the log-probs of given completions.

        Args:
            prompts: n prompts.
            completions: n texts; each is tokenised by itself and appended to its prompt's tokens.

        Returns:
            n results in the order of the prompts, each a float32 array of shape (tokens of the completion,), in nats at
            temperature 1, or a :class:`BackendError`.

        Raises:
            ValueError: if the lengths differ, or a prompt or completion is empty.
        """
        prompts, completions = list(prompts), list(completions)
        if len(prompts) != len(completions):
            raise ValueError(f"logprobs got {len(prompts)} prompts but {len(completions)} completions")
        if not all(map(len, prompts)) or not all(completions):
            raise ValueError("logprobs needs non-empty prompts and completions")
        if not prompts:
            return []
        results = self._logprobs(prompts, completions)
        self.usage.calls += 1
        self.usage.requests += len(results)
        self.usage.errors += sum(isinstance(result, BackendError) for result in results)
        return results

    def choice_logprobs(
        self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]], heads: Sequence[Prompt] | None = None
    ) -> list[np.ndarray | BackendError]:
        """Returns the log-probs of a few possible continuations of each prompt, e.g. of a task's verbalizers.

        Args:
            prompts: n prompts.
            choices: the continuations of each prompt, tokenised as in :meth:`logprobs`.
            heads: for each prompt the beginning that it shares with others, empty for none; None: no beginnings are
                named. Results do not depend on it; a model in this process reads a shared beginning once.

        Returns:
            n results in the order of the prompts, each a float32 array of shape (choices,), summed over the tokens of
            each continuation, in nats, or a :class:`BackendError`.

        Raises:
            ValueError: if the lengths differ, or a prompt or continuation is empty.
        """
        if len(prompts) != len(choices) or not all(choices) or (heads is not None and len(heads) != len(prompts)):
            raise ValueError("choice_logprobs needs choices for every prompt, and a head for every one or for none")
        if not all(map(len, prompts)) or not all(choice for continuations in choices for choice in continuations):
            raise ValueError("choice_logprobs needs non-empty prompts and continuations")
        if not prompts:
            return []
        prompt_list, choice_lists = list(prompts), [list(continuations) for continuations in choices]
        # Without heads _logprobs scores every continuation, and a backend's own prefix cache still serves it.
        if heads is None:
            results = Backend._choice_logprobs(self, prompt_list, choice_lists, [])
        else:
            results = self._choice_logprobs(prompt_list, choice_lists, list(heads))
        self.usage.calls += 1
        self.usage.requests += sum(map(len, choices))
        self.usage.errors += sum(
            len(options) for options, result in zip(choices, results, strict=True) if isinstance(result, BackendError)
        )
        return results

    def completion_ids(self, texts: Sequence[str]) -> list[list[int]] | None:
        """Returns the token ids of texts, tokenised as completions of :meth:`logprobs`, without loading the model.

        Returns:
            A list of token ids per text; None if the backend does not know its model's tokenizer.
        """
        return None

    def context_error(self, prompt: Prompt, max_tokens: int) -> ContextLengthError | None:
        """Checks, without running the model, whether a prompt and its completion fit into the model's context.

        Args:
            prompt: the prompt.
            max_tokens: length of the completion in tokens.

        Returns:
            The error that such a request would get; None if it fits, or if the backend does not know the context.
        """
        return None

    async def agenerate(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] = Sampling()
    ) -> list[Result]:
        """Runs :meth:`generate` in a thread."""
        return await asyncio.to_thread(self.generate, prompts, sampling)

    async def alogprobs(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[np.ndarray | BackendError]:
        """Runs :meth:`logprobs` in a thread."""
        return await asyncio.to_thread(self.logprobs, prompts, completions)

    def _generate(self, prompts: list[Prompt], samplings: list[Sampling]) -> list[Result]:
        """Completes non-empty prompts, one set of sampling parameters each; or implement :meth:`_generate_each`."""
        raise NotImplementedError

    def _generate_each(self, prompts: list[Prompt], samplings: list[Sampling]) -> Iterator[tuple[int, Result]]:
        """Yields (index, result) in any order; by default all at the end of one :meth:`_generate`."""
        yield from enumerate(self._generate(prompts, samplings))

    def _logprobs(self, prompts: list[Prompt], completions: list[str]) -> list[np.ndarray | BackendError]:
        return [UnsupportedRequestError(f"backend {self.name!r} reports no log-probs") for _ in prompts]

    def _choice_logprobs(
        self, prompts: list[Prompt], choices: list[list[str]], heads: list[Prompt]
    ) -> list[np.ndarray | BackendError]:
        """Scores every continuation as a request of its own; backends that can share the reading override it."""
        repeated = [prompt for prompt, continuations in zip(prompts, choices, strict=True) for _ in continuations]
        rows = iter(self._logprobs(repeated, [choice for continuations in choices for choice in continuations]))
        results: list[np.ndarray | BackendError] = []
        for continuations in choices:
            scores = [next(rows) for _ in continuations]
            # A prompt gets all its sums or an error: one failed continuation fails the prompt.
            error = next((row for row in scores if isinstance(row, BackendError)), None)
            sums = [float(np.sum(row, dtype=np.float64)) for row in scores if not isinstance(row, BackendError)]
            results.append(np.array(sums, np.float32) if error is None else error)
        return results

    def _run_fitting(
        self,
        encoded: Sequence[list[int] | BackendError],
        run: Callable[[list[int], list[list[int]]], Iterable[ResultT]],
    ) -> list[ResultT | BackendError]:
        """Runs the prompts that fit into the context as one batch; the others keep their error in their place.

        Args:
            encoded: for each prompt its token ids, which are counted in ``usage``, or its error.
            run: gets indices and token ids of the prompts that fit, and returns a result for each of them.
        """
        fit = [index for index, ids in enumerate(encoded) if not isinstance(ids, BackendError)]
        tokens = [ids for ids in encoded if not isinstance(ids, BackendError)]
        self.usage.prompt_tokens += sum(map(len, tokens))
        results = iter(run(fit, tokens) if fit else ())
        return [ids if isinstance(ids, BackendError) else next(results) for ids in encoded]

    def _per_prompt(self, prompts: list[Prompt], sampling: Sampling | Sequence[Sampling]) -> list[Sampling]:
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(samplings) != len(prompts):
            raise ValueError(f"generate got {len(prompts)} prompts but {len(samplings)} sampling parameters")
        if not all(map(len, prompts)):
            raise ValueError("generate needs non-empty prompts")
        if any(parameters.choices for parameters in samplings) and not self.supports_choices:
            raise UnsupportedRequestError(
                f"backend {self.name!r} has no constrained decoding: leave choices empty or use another backend"
            )
        return samplings


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restores the global random generators of Python, NumPy and torch at the end of the block.

    A resumed run takes replies from its journal instead of running the model again. If models drew from the learner's
    generators, the learner would draw other numbers after a resume. torch is touched only if it has been imported.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    torch_state = torch.random.get_rng_state() if torch is not None else None
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if torch is not None:
            torch.random.set_rng_state(torch_state)
