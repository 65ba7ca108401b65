"""The request journal: every reply of a model on disk, so that a killed run pays for none of them twice.

:class:`Journal` is the file, :class:`Journaled` the backend that uses it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, TypeAlias

import numpy as np

from ..base import (
    Backend,
    BackendError,
    Completion,
    ContextLengthError,
    Prompt,
    Result,
    Sampling,
    UnsupportedRequestError,
    preserved_rng,
)
from ..records import RecordError, append_lines, read_records

Send: TypeAlias = Callable[[list[int]], Iterable[tuple[int, Any]]]
"""Sends the requests with the given indices and yields (position in that list, result)."""


@dataclass(eq=False)
class BackendWrapper(Backend):
    """A backend that answers for another one from stored replies, with the same name, prompt style and features.

    Subclasses implement :meth:`_answers`.

    Args:
        inner: the backend that answers requests without a stored reply.
    """

    inner: Backend

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the inner backend."""
        return self.inner.name

    @property
    def prompt_style(self) -> str:  # type: ignore[override]
        """Prompt style of the inner backend."""
        return self.inner.prompt_style

    @property
    def supports_logprobs(self) -> bool:
        """Whether the inner backend reports log-probs."""
        return self.inner.supports_logprobs

    @property
    def supports_choices(self) -> bool:
        """Whether the inner backend can constrain a completion to ``Sampling.choices``."""
        return self.inner.supports_choices

    def context_error(self, prompt: Prompt, max_tokens: int) -> ContextLengthError | None:
        return self.inner.context_error(prompt, max_tokens)

    def completion_ids(self, texts: Sequence[str]) -> list[list[int]] | None:
        return self.inner.completion_ids(texts)

    def _key(self, prompt: Prompt, sampling: Sampling) -> str:
        """Returns the key of a request for completions."""
        return request_key("generate", self.name, prompt, asdict(sampling))

    def _generate_each(self, prompts: list[Prompt], samplings: list[Sampling]) -> Iterator[tuple[int, Result]]:
        return self._answers(
            [self._key(prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)],
            lambda missing: self.inner.generate_each([prompts[i] for i in missing], [samplings[i] for i in missing]),
            unpack=lambda reply: [Completion(**completion) for completion in reply],
        )

    def _logprobs(self, prompts: list[Prompt], completions: list[str]) -> list[np.ndarray | BackendError]:
        keys = [request_key("logprobs", self.name, p, c) for p, c in zip(prompts, completions, strict=True)]
        rows = dict(
            self._answers(
                keys,
                lambda missing: enumerate(
                    self.inner.logprobs([prompts[i] for i in missing], [completions[i] for i in missing])
                ),
                unpack=lambda reply: np.asarray(reply, dtype=np.float32),
            )
        )
        return [rows[index] for index in range(len(keys))]

    def _answers(self, keys: list[str], send: Send, unpack: Callable[[Any], Any]) -> Iterator[tuple[int, Any]]:
        """Answers requests from the store, sends the rest (equal requests once), and stores their replies.

        Args:
            keys: n request keys.
            send: sends requests by their indices.
            unpack: reverses :func:`pack`.

        Yields:
            Index and result of all n requests in any order, errors included.
        """
        raise NotImplementedError


def pack(result: Iterable[Any]) -> list[Any]:
    """Returns completions, or the log-probs of a text, as JSON-able values."""
    return [asdict(value) if isinstance(value, Completion) else float(value) for value in result]


STORE_EVERY = 0.2
"""Shortest time, in seconds, between two writes while the replies of a long call arrive."""


class Journal:
    """A store of replies by request key, in memory and in an append-only JSONL file.

    Replies are written and flushed before the caller gets them, many in one write. A last line cut off by a kill is
    dropped when the file is opened again.

    Args:
        path: the file; created with its folders when the first reply is stored.

    Raises:
        RecordError: if a line is not an entry of a journal.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        rows = read_records(self.path, repair=True)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get("key"), str) or "reply" not in row:
                raise RecordError(f"{self.path} line {number} is no entry of a request journal: remove the line")
        # Errors at the very end stopped the run, and their cause may be fixed now: send these requests again.
        while rows and _is_error(rows[-1]["reply"]):
            rows.pop()
        self._replies: dict[str, Any] = {row["key"]: row["reply"] for row in rows}

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> Any | None:
        """Returns the stored reply, None if there is none."""
        return self._replies.get(key)

    def put(self, replies: dict[str, Any]) -> None:
        """Stores JSON-able replies by key."""
        with self._lock:
            append_lines(self.path, [{"key": key, "reply": reply} for key, reply in replies.items()])
            self._replies.update(replies)


@dataclass(eq=False)
class Journaled(BackendWrapper):
    """A backend that stores replies in a journal and answers repeated requests from it.

    The key is the whole request: model, prompt and every sampling parameter, including the seed. Errors are stored like
    replies, because a run that continued after an error must take the same course when it is resumed; only requests
    whose errors are at the very end of a journal, which stopped the run, are sent again.

    The state of the global random generators is restored after the model has been called, so that a resumed run, which
    takes replies from the journal, draws the same numbers as the first one.

    Args:
        inner: the backend that answers requests that are not in the journal.
        journal: the journal, which several backends can share.
    """

    journal: Journal
    counts_result_tokens = False  # _answers adds the inner backend's tokens

    def _answers(self, keys: list[str], send: Send, unpack: Callable[[Any], Any]) -> Iterator[tuple[int, Any]]:
        missing: dict[str, int] = {}
        for index, key in enumerate(keys):
            if self.journal.get(key) is None:
                missing.setdefault(key, index)
        self.usage.cache_hits += len(keys) - len(missing)
        if missing:
            before = replace(self.inner.usage)
            pending: dict[str, Any] = {}
            sent, errors, stored = list(missing), {}, monotonic()
            try:
                with preserved_rng():
                    for number, result in send(list(missing.values())):
                        if isinstance(result, BackendError):
                            errors[sent[number]] = _pack_error(result)
                        else:
                            pending[sent[number]] = pack(result)
                        if pending and monotonic() - stored > STORE_EVERY:
                            self.journal.put(pending)
                            pending, stored = {}, monotonic()
                # Errors are stored only if the call completes: after one that breaks off they are sent again.
                pending |= errors
            finally:
                if pending:
                    self.journal.put(pending)
                # The inner backend may be shared: add only what this call used.
                spent = self.inner.usage - before
                self.usage.prompt_tokens += spent.prompt_tokens
                self.usage.completion_tokens += spent.completion_tokens
                self.usage.cost += spent.cost
        for index, key in enumerate(keys):
            reply = self.journal.get(key)
            yield index, _unpack_error(reply) if _is_error(reply) else unpack(reply)


_ERRORS = {error.__name__: error for error in (BackendError, ContextLengthError, UnsupportedRequestError)}


def _is_error(reply: Any) -> bool:
    """Returns whether a stored reply is an error."""
    return isinstance(reply, dict) and "error" in reply


def _pack_error(error: BackendError) -> dict[str, str]:
    return {"error": type(error).__name__, "message": str(error)}


def _unpack_error(reply: Any) -> BackendError:
    return _ERRORS.get(reply["error"], BackendError)(reply["message"])


def request_key(*parts: Any) -> str:
    """Returns a stable key of a request: the first 128 bits of the SHA-256 of its JSON, in hex.

    Args:
        *parts: everything that the reply depends on, JSON-able; arrays and mappings are converted.
    """

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else dict(value)

    # Prompts may hold lone surrogates, which strict UTF-8 refuses.
    text = json.dumps(parts, default=plain, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
