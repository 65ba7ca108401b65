"""A cache of replies that runs and processes share, in memory and in SQLite."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import time
from typing import Any

import numpy as np

from ..base import BackendError, Completion, Prompt, Result, Sampling, Usage
from ..errors import InputError
from ..parts import resolve
from .journal import Wrapped, request_key

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
        max_mb: size of the replies (the file is a little larger) at which those not asked for longest are dropped.
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
            self._connect()
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(SCHEMA)
            self._shrink()
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"cannot use {self.path} as a cache of replies: {error}") from error

    def _connect(self) -> None:
        self._process = os.getpid()
        self._database = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA synchronous=NORMAL")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The database, for this thread alone; a fork gets a connection and a lock of its own."""
        if self._process != os.getpid():
            self._lock = threading.Lock()
            self._connect()
        with self._lock:
            try:
                yield self._database
            except sqlite3.Error as error:
                raise OSError(f"the cache of replies {self.path} failed: {error}") from error

    def __len__(self) -> int:
        with self._open() as database:
            return int(database.execute("SELECT COUNT(*) FROM replies").fetchone()[0])

    def get(self, key: str) -> str | None:
        """The stored reply, or None."""
        with self._open() as database:
            reply = self._recent.get(key)
            if reply is None:
                row = database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
                if row is None:
                    return None
                reply = str(row[0])
            self._touched.add(key)
            self._keep(key, reply)
            return reply

    def put(self, key: str, reply: str) -> None:
        """Stores a reply, in place of an earlier one; it is on disk for other processes when this returns."""
        with self._open() as database:
            row = (key, reply, len(reply), time())
            database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", row)
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
class Cached(Wrapped):
    """A backend whose replies are stored, and taken from the store when the same request comes again.

    The key is the whole request: model and server, prompt, every sampling parameter. So another seed gives a fresh
    sample; ``refresh=True`` asks anew for everything and stores the new replies. Equal requests that are under way, in
    one call or in several threads, are sent once. A reply is stored as soon as it has come; errors are not stored.

    Args:
        inner: the backend that answers what is not stored.
        store: a :class:`ReplyStore`, which backends may share, or the path of its file.
        refresh: look nothing up.
    """

    store: ReplyStore
    refresh: bool = False
    _usage: Usage = field(default_factory=Usage, repr=False)
    _under_way: dict[str, Future[Result | None]] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.store, ReplyStore):
            self.store = ReplyStore(self.store)

    def _generate_each(self, prompts: list[Prompt], samplings: list[Sampling]) -> Iterator[tuple[int, Result]]:
        wanted: dict[str, list[int]] = {}
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            wanted.setdefault(self._key(prompt, sampling), []).append(index)
        self.usage.cache_hits += len(prompts)  # less those that are sent
        while wanted:
            claimed: dict[str, Future[Result | None]] = {}
            try:
                for key, result in self._round(wanted, claimed, prompts, samplings):
                    yield from ((index, result) for index in wanted.pop(key))
            finally:  # who waits for what this call did not get asks for it
                with self._lock:
                    for key, future in claimed.items():
                        self._under_way.pop(key, None)
                        if not future.done():
                            future.set_result(None)

    def _key(self, prompt: Prompt, sampling: Sampling) -> str:
        same = sampling if sampling.temperature else sampling.with_seed(0)  # greedy decoding draws nothing
        return request_key("generate", self.name, prompt, asdict(same))

    def _round(
        self,
        wanted: dict[str, list[int]],
        claimed: dict[str, Future[Result | None]],
        prompts: list[Prompt],
        samplings: list[Sampling],
    ) -> Iterator[tuple[str, Result]]:
        """Stored replies, then those of requests that nobody has sent, then those that other calls are waiting for."""
        stored: dict[str, str] = {}
        others: dict[str, Future[Result | None]] = {}
        for key in wanted:
            with self._lock:  # between the look and the claim no other thread may claim the key
                reply = None if self.refresh else self.store.get(key)
                if reply is not None:
                    stored[key] = reply
                elif key in self._under_way:
                    others[key] = self._under_way[key]
                else:
                    claimed[key] = self._under_way[key] = Future()
        for key, reply in stored.items():
            yield key, [Completion(**completion) for completion in json.loads(reply)]
        mine = list(claimed)
        if mine:
            self.usage.cache_hits -= len(mine)
            indices = [wanted[key][0] for key in mine]
            asked = self.inner.generate_each([prompts[i] for i in indices], [samplings[i] for i in indices])
            for number, result in asked:
                key = mine[number]
                if not isinstance(result, BackendError):
                    self.store.put(key, json.dumps([asdict(completion) for completion in result]))
                claimed[key].set_result(result)
                yield key, result
        for key, future in others.items():
            result_of_another = future.result()
            if result_of_another is not None:
                yield key, result_of_another

    @property
    def usage(self) -> Usage:
        """Calls, hits and errors of this object; tokens and money of the inner backend, which may be shared."""
        inner = self.inner.usage
        self._usage.prompt_tokens, self._usage.completion_tokens = inner.prompt_tokens, inner.completion_tokens
        self._usage.cost = inner.cost
        return self._usage

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
