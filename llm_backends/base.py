"""The backend contract: batched, order-preserving text generation and scoring by a language model."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sys
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from .errors import RunError
from .parts import Part

Message: TypeAlias = Mapping[str, str]
"""One chat message: ``{"role": "system" | "user" | "assistant", "content": str}``."""

Prompt: TypeAlias = str | Sequence[Message] | Sequence[int]
"""A prompt is a plain string, a list of chat messages, or a list of token ids."""

PromptStyle: TypeAlias = Literal["chat", "completion"]
"""``chat``: the model follows instructions; ``completion``: it needs few-shot text to continue (small base models)."""


class BackendError(RunError):
    """A request that a backend could not serve. Returned in the place of that request's result."""


class ContextLengthError(BackendError):
    """The prompt (plus the completion) does not fit into the model's context."""


class UnsupportedRequestError(BackendError):
    """The backend cannot serve this kind of request, for example log-probs on a server that reports none."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one request; together with the prompt they determine the reply.

    Raises:
        ValueError: on construction, for a value out of range.
    """

    max_tokens: int = 64
    """Largest number of tokens to generate."""
    temperature: float = 1.0
    """Softmax temperature; 0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus: sample from the smallest set of tokens whose probability reaches this. 1 turns it off."""
    top_k: int = 0
    """Sample from the k most likely tokens. 0 turns it off."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion; they are cut from the text, their tokens stay in ``token_ids``."""
    n: int = 1
    """Number of completions per prompt."""
    choices: tuple[str, ...] = ()
    """Structured output: the completion is one of these texts, as a whole. Empty for free text."""
    seed: int = 0
    """Seed of the request (see :func:`request_seed`): results do not depend on what else is in the batch."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "choices", tuple(self.choices))
        for name in ("temperature", "top_p"):  # 1 and 1.0 are one request, also in a journal's key
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
        """The same parameters under another request seed."""
        return replace(self, seed=seed)


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt."""

    text: str
    """Decoded text without special tokens, cut before the stop string."""
    token_ids: list[int]
    """Generated token ids, the end-of-sequence token and the tokens of a stop string included."""
    logprobs: list[float]
    """Log-prob in nats of each token of ``token_ids``, by the model at temperature 1, before truncation by top-p/k."""
    finish_reason: Literal["stop", "length"]
    """``stop``: end-of-sequence token or stop string; ``length``: ``max_tokens`` or the context was reached."""

    @property
    def mean_logprob(self) -> float:
        """Length-normalised log-prob in nats per token; ``-inf`` for an empty completion."""
        return float(np.mean(self.logprobs)) if self.logprobs else float("-inf")


Result: TypeAlias = list[Completion] | BackendError
"""What one prompt gives: its completions, or the error of that prompt alone."""


@dataclass
class Usage:
    """Counters of what went through a backend since it was built."""

    calls: int = 0
    """Batched calls of ``generate`` and ``logprobs``."""
    requests: int = 0
    """Prompts in those calls."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cache_hits: int = 0
    """Requests answered from a journal or cache; the model saw nothing of them."""
    errors: int = 0
    cost: float = 0.0
    """Money spent, in the backend's currency; 0 for local models."""

    def __sub__(self, other: Usage) -> Usage:
        return Usage(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    def as_dict(self) -> dict[str, float]:
        """The counters under their names."""
        return asdict(self)


def request_seed(*parts: Any) -> int:
    """Seed of one request: a 63-bit hash of what identifies it, e.g. ``(run seed, row, step, role, attempt)``."""
    digest = hashlib.sha256(json.dumps(parts, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def last_content(prompt: Prompt) -> str:
    """The text of a string prompt, or of the last message of a chat prompt (for logs and error messages)."""
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1] if len(prompt) else ""
    return str(last["content"]) if isinstance(last, Mapping) else f"{len(prompt)} token ids"


class Backend(Part, ABC):
    """A language model behind two batched, order-preserving calls.

    Subclasses implement :meth:`_generate` (or :meth:`_generate_each`, where results come one by one) and, where the
    model reports log-probs, :meth:`_logprobs`. They get lists of equal length and give one result per prompt; the
    failure of one prompt is a :class:`BackendError` in its place, never an empty string. The async twins run the same
    code in a thread.
    """

    name: str = "backend"
    """Says which model answers; part of the key of every stored reply, so two models never share replies."""
    prompt_style: PromptStyle = "chat"
    """The form of prompt this model needs."""

    @property
    def supports_logprobs(self) -> bool:
        """Whether :meth:`logprobs` can answer at all."""
        return type(self)._logprobs is not Backend._logprobs

    @property
    def supports_choices(self) -> bool:
        """Whether a completion can be held to ``Sampling.choices``."""
        return False

    @cached_property
    def usage(self) -> Usage:
        """Counters since this object was built."""
        return Usage()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] = Sampling()) -> list[Result]:
        """Completes every prompt.

        Args:
            prompts: n prompts.
            sampling: one set of parameters for all, or one per prompt.

        Returns:
            n results in the order of the prompts, each a list of ``sampling.n`` completions or a :class:`BackendError`.

        Raises:
            ValueError: if the numbers of prompts and sampling parameters differ, or a prompt is empty.
            UnsupportedRequestError: if ``choices`` are set and the backend cannot hold a completion to them.
        """
        prompts = list(prompts)
        results: dict[int, Result] = dict(self.generate_each(prompts, sampling))
        return [results[index] for index in range(len(prompts))]

    def generate_each(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] = Sampling()
    ) -> Iterator[tuple[int, Result]]:
        """As :meth:`generate`, but gives (index, result) as soon as a result is known, in any order.

        Who stores replies loses none that way when a long batch is interrupted.
        """
        prompts, samplings = list(prompts), self._per_prompt(list(prompts), sampling)
        return self._counted(prompts, samplings) if prompts else iter(())

    def _counted(self, prompts: list[Prompt], samplings: list[Sampling]) -> Iterator[tuple[int, Result]]:
        self.usage.calls += 1
        for index, result in self._generate_each(prompts, samplings):
            self._count(result)
            yield index, result

    def logprobs(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[np.ndarray | BackendError]:
        """Log-probs of given completions.

        Args:
            prompts: n prompts.
            completions: n texts; each is tokenised by itself and appended to its prompt's tokens.

        Returns:
            n float32 arrays, shape (tokens of the completion,), in nats at temperature 1; or an error in one's place.

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
        """Log-probs of a few possible continuations of each prompt, e.g. of the words for the labels of a task.

        Args:
            prompts: n prompts.
            choices: for each prompt its continuations, tokenised as in :meth:`logprobs`.
            heads: for each prompt a beginning that others share, empty for none. What the result is does not depend on
                it; a model in this process reads a shared beginning once.

        Returns:
            n float32 arrays, shape (choices,), each the sum over a continuation's tokens, in nats; or an error in one's
            place.

        Raises:
            ValueError: if the lengths differ, or a prompt or continuation is empty.
        """
        if len(prompts) != len(choices) or not all(choices) or (heads is not None and len(heads) != len(prompts)):
            raise ValueError("choice_logprobs needs choices for every prompt, and a head for every one or for none")
        if not all(map(len, prompts)) or not all(choice for mine in choices for choice in mine):
            raise ValueError("choice_logprobs needs non-empty prompts and continuations")
        if not prompts:
            return []
        asked, wanted = list(prompts), [list(mine) for mine in choices]
        if heads is None:  # as logprobs does it, with whatever that shares by itself
            results = Backend._choice_logprobs(self, asked, wanted, [])
        else:
            results = self._choice_logprobs(asked, wanted, list(heads))
        self.usage.calls += 1
        self.usage.requests += sum(map(len, choices))
        self.usage.errors += sum(len(m) for m, r in zip(choices, results, strict=True) if isinstance(r, BackendError))
        return results

    def completion_ids(self, texts: Sequence[str]) -> list[list[int]] | None:
        """Token ids of texts as :meth:`logprobs` tokenises completions, found without loading the model.

        Backends that do not know their model's tokenizer answer None.
        """
        return None

    def context_error(self, prompt: Prompt, max_tokens: int) -> ContextLengthError | None:
        """The error that a request of this size would meet, found without running the model; None if it fits.

        Backends that do not know their model's context answer None.
        """
        return None

    async def agenerate(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] = Sampling()
    ) -> list[Result]:
        """Async twin of :meth:`generate`."""
        return await asyncio.to_thread(self.generate, prompts, sampling)

    async def alogprobs(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[np.ndarray | BackendError]:
        """Async twin of :meth:`logprobs`."""
        return await asyncio.to_thread(self.logprobs, prompts, completions)

    def _generate(self, prompts: list[Prompt], samplings: list[Sampling]) -> list[Result]:
        """Completes non-empty prompts, one set of sampling parameters each. This or the next one is implemented."""
        raise NotImplementedError

    def _generate_each(self, prompts: list[Prompt], samplings: list[Sampling]) -> Iterator[tuple[int, Result]]:
        """The same, result by result; at once where a backend answers in batches."""
        yield from enumerate(self._generate(prompts, samplings))

    def _logprobs(self, prompts: list[Prompt], completions: list[str]) -> list[np.ndarray | BackendError]:
        return [UnsupportedRequestError(f"backend {self.name!r} reports no log-probs") for _ in prompts]

    def _choice_logprobs(
        self, prompts: list[Prompt], choices: list[list[str]], heads: list[Prompt]
    ) -> list[np.ndarray | BackendError]:
        """Every continuation as a request of its own; backends that can share the reading do."""
        repeated = [prompt for prompt, mine in zip(prompts, choices, strict=True) for _ in mine]
        rows = iter(self._logprobs(repeated, [choice for mine in choices for choice in mine]))
        results: list[np.ndarray | BackendError] = []
        for mine in choices:
            found = [next(rows) for _ in mine]
            failed = next((row for row in found if isinstance(row, BackendError)), None)
            sums = [float(np.sum(row, dtype=np.float64)) for row in found if not isinstance(row, BackendError)]
            results.append(np.array(sums, np.float32) if failed is None else failed)
        return results

    def _count(self, result: Result) -> None:
        self.usage.requests += 1
        if isinstance(result, BackendError):
            self.usage.errors += 1
        else:
            self.usage.completion_tokens += sum(len(completion.token_ids) for completion in result)

    def _per_prompt(self, prompts: list[Prompt], sampling: Sampling | Sequence[Sampling]) -> list[Sampling]:
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(samplings) != len(prompts):
            raise ValueError(f"generate got {len(prompts)} prompts but {len(samplings)} sampling parameters")
        if not all(map(len, prompts)):
            raise ValueError("generate needs non-empty prompts")
        if any(one.choices for one in samplings) and not self.supports_choices:
            raise UnsupportedRequestError(f"backend {self.name!r} cannot hold a completion to given choices")
        return samplings


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leaves the global generators of Python, NumPy and torch as they were.

    A run that is resumed takes replies from its journal where it asked a model before; were models to draw from the
    generators that the learner draws from, the learner would then go another way. torch is touched only if imported.
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
