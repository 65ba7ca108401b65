"""A cache of replies that runs and processes share, in memory and in SQLite."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import time
from typing import Any

import numpy as np

from .base import Backend, BackendError, Completion, ContextLengthError, Prompt, Result, Sampling
from .errors import InputError
from .journal import request_key
from .parts import resolve

SCHEMA = """
CREATE TABLE IF NOT EXISTS replies
(key TEXT PRIMARY KEY, reply TEXT NOT NULL, size INTEGER NOT NULL, used REAL NOT NULL) WITHOUT ROWID
"""
CHECK_EVERY = 256
"""Stored replies between two looks at the file's size."""


class ReplyStore:
    """Replies by request key; safe to use from several threads and processes.

    Args:
        path: the SQLite file, made with its folders.
        max_mb: size at which the replies that were not asked for longest are dropped.
        memory: replies that are kept in memory as well.

    Raises:
        InputError: if the file is no such cache, or cannot be written.
    """

    def __init__(self, path: str | Path, max_mb: float = 1024.0, memory: int = 10_000) -> None:
        self.path, self.max_bytes, self.memory = Path(path), int(max_mb * 1e6), memory
        self._recent: OrderedDict[str, str] = OrderedDict()
        self._touched: set[str] = set()
        self._lock, self._stored = threading.Lock(), 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"cannot use {self.path} as a cache of replies: {error}") from error

    def __len__(self) -> int:
        with self._lock:
            return int(self._database.execute("SELECT COUNT(*) FROM replies").fetchone()[0])

    def get(self, key: str) -> str | None:
        """The stored reply, or None."""
        with self._lock:
            reply = self._recent.get(key)
            if reply is None:
                row = self._database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
                if row is None:
                    return None
                reply = str(row[0])
            self._touched.add(key)
            self._keep(key, reply)
            return reply

    def put(self, key: str, reply: str) -> None:
        """Stores a reply, in place of an earlier one; it is on disk for other processes when this returns."""
        with self._lock:
            row = (key, reply, len(reply), time())
            self._database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", row)
            self._keep(key, reply)
            self._stored += 1
            if self._stored % CHECK_EVERY == 0:
                self._shrink()

    def _keep(self, key: str, reply: str) -> None:
        self._recent[key] = reply
        self._recent.move_to_end(key)
        while len(self._recent) > self.memory:
            self._recent.popitem(last=False)

    def _shrink(self) -> None:
        """Drops what was not asked for longest until a tenth of the size is free."""
        now = time()
        self._database.executemany("UPDATE replies SET used = ? WHERE key = ?", [(now, key) for key in self._touched])
        self._touched.clear()
        total = self._database.execute("SELECT COALESCE(SUM(size), 0) FROM replies").fetchone()[0]
        if total <= self.max_bytes:
            return
        leaving = []
        for key, size in self._database.execute("SELECT key, size FROM replies ORDER BY used"):
            leaving.append((key,))
            self._recent.pop(key, None)
            total -= size
            if total <= 0.9 * self.max_bytes:
                break
        self._database.executemany("DELETE FROM replies WHERE key = ?", leaving)


@dataclass(eq=False)
class Cached(Backend):
    """A backend whose replies are stored, and taken from the store when the same request comes again.

    The key is the whole request: model and server, prompt, every sampling parameter. So another seed gives a fresh
    sample; ``refresh=True`` asks anew for everything and stores the new replies. Equal requests that are under way, in
    one call or in several threads, are sent once. A reply is stored as soon as it has come; errors are not stored.

    Args:
        inner: the backend that answers what is not stored.
        store: a :class:`ReplyStore`, which backends may share, or the path of its file.
        refresh: look nothing up.
    """

    inner: Backend
    store: ReplyStore
    refresh: bool = False
    _under_way: dict[str, Future[Result]] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.store, ReplyStore):
            self.store = ReplyStore(self.store)

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
        """As the inner backend."""
        return self.inner.supports_logprobs

    def context_error(self, prompt: Prompt, max_tokens: int) -> ContextLengthError | None:
        return self.inner.context_error(prompt, max_tokens)

    def _generate_each(self, prompts: list[Prompt], samplings: list[Sampling]) -> Iterator[tuple[int, Result]]:
        keys = [request_key("generate", self.name, p, asdict(s)) for p, s in zip(prompts, samplings, strict=True)]
        wanted: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            wanted.setdefault(key, []).append(index)
        mine: dict[str, Future[Result]] = {}
        others: dict[str, Future[Result]] = {}
        stored: dict[str, str] = {}
        for key in wanted:
            with self._lock:  # between the look and the claim no other thread may claim the key
                reply = None if self.refresh else self.store.get(key)
                if reply is not None:
                    stored[key] = reply
                elif key in self._under_way:
                    others[key] = self._under_way[key]
                else:
                    mine[key] = self._under_way[key] = Future()
        self.usage.cache_hits += len(keys) - len(mine)
        for key, reply in stored.items():
            completions = [Completion(**completion) for completion in json.loads(reply)]
            yield from ((index, completions) for index in wanted[key])
        for key, result in self._ask(mine, [wanted[key][0] for key in mine], prompts, samplings):
            yield from ((index, result) for index in wanted[key])
        for key, future in others.items():
            result = future.result()
            yield from ((index, result) for index in wanted[key])

    def _ask(
        self, mine: dict[str, Future[Result]], indices: list[int], prompts: list[Prompt], samplings: list[Sampling]
    ) -> Iterator[tuple[str, Result]]:
        keys = list(mine)
        before = replace(self.inner.usage)
        try:
            if not keys:
                return
            asked = self.inner.generate_each([prompts[i] for i in indices], [samplings[i] for i in indices])
            for number, result in asked:
                if not isinstance(result, BackendError):
                    self.store.put(keys[number], json.dumps([asdict(completion) for completion in result]))
                mine[keys[number]].set_result(result)
                yield keys[number], result
        finally:
            spent = self.inner.usage - before
            self.usage.prompt_tokens += spent.prompt_tokens
            self.usage.cost += spent.cost
            with self._lock:
                for key, future in mine.items():
                    self._under_way.pop(key, None)
                    if not future.done():
                        future.set_result(BackendError("the call that sent this request was interrupted: ask again"))

    def _logprobs(self, prompts: list[Prompt], completions: list[str]) -> list[np.ndarray | BackendError]:
        keys = [request_key("logprobs", self.name, p, c) for p, c in zip(prompts, completions, strict=True)]
        found = {key: None if self.refresh else self.store.get(key) for key in dict.fromkeys(keys)}
        missing = {key: index for index, key in reversed(list(enumerate(keys))) if found[key] is None}
        self.usage.cache_hits += len(keys) - len(missing)
        errors: dict[str, BackendError] = {}
        if missing:
            rows = self.inner.logprobs(
                [prompts[i] for i in missing.values()], [completions[i] for i in missing.values()]
            )
            for key, row in zip(missing, rows, strict=True):
                if isinstance(row, BackendError):
                    errors[key] = row
                else:
                    found[key] = json.dumps([float(value) for value in row])
                    self.store.put(key, str(found[key]))
        return [errors[k] if k in errors else np.array(json.loads(str(found[k])), dtype=np.float32) for k in keys]


def cached(inner: Any, path: str, max_mb: float = 1024.0, refresh: bool = False) -> Cached:
    """The part ``{"id": "cached", "kwargs": {"inner": ..., "path": ...}}``.

    Args:
        inner: a backend, in any form that :func:`resolve` takes.
        path: of the SQLite file.
        max_mb: size at which the replies that were not asked for longest are dropped.
        refresh: look nothing up.
    """
    return Cached(resolve("backend", inner), ReplyStore(path, max_mb), refresh)
