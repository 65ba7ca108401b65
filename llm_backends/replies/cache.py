"""A cache of replies that runs and processes share, in memory and in SQLite.

:class:`ReplyStore` is the storage, :class:`Cached` the backend that uses it. A journal
(:mod:`~instructgym.llm_backends.replies.journal`) belongs to one run instead, and also keeps errors.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any

from ..base import BackendError, Prompt, Sampling, Usage
from ..errors import InputError
from ..parts import resolve
from .journal import BackendWrapper, Send, pack

SCHEMA = """
CREATE TABLE IF NOT EXISTS replies
(key TEXT PRIMARY KEY, reply TEXT NOT NULL, size INTEGER NOT NULL, used REAL NOT NULL) WITHOUT ROWID
"""
CHECK_EVERY = 256
"""Number of replies stored between two checks of the file's size."""


class ReplyStore:
    """A store of replies by request key; safe to use from several threads and processes.

    Args:
        path: the SQLite file, created with its folders if missing.
        max_mb: size of all replies, in MB, above which the least recently used ones are dropped; the file is a little
            larger.
        memory: number of replies that are also held in memory.

    Raises:
        InputError: if the file is not such a cache, or cannot be written.
    """

    def __init__(self, path: str | Path, max_mb: float = 1024.0, memory: int = 10_000) -> None:
        self.path, self.max_bytes, self.memory = Path(path), int(max_mb * 1e6), memory
        self._recent: OrderedDict[str, str] = OrderedDict()
        self._touched: set[str] = set()
        self._lock, self._stored = threading.Lock(), 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connect()
            # With a write-ahead log readers and one writer do not block each other.
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(SCHEMA)
            self._shrink()
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"cannot use {self.path} as a cache of replies: {error}") from error

    def _connect(self) -> None:
        """Opens the database in this process."""
        self._process = os.getpid()
        self._database = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA synchronous=NORMAL")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Yields the database to one thread at a time.

        Raises:
            OSError: if SQLite fails.
        """
        # SQLite connections must not be carried across a fork, and the parent's lock may stay locked.
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
        """Returns the stored reply, None if there is none."""
        with self._open() as database:
            reply = self._recent.get(key)
            if reply is None:
                row = database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
                if row is None:
                    return None
                reply = str(row[0])
            # Times of use are written by _shrink, many at once, so that a lookup does not write to the file.
            self._touched.add(key)
            self._remember(key, reply)
            return reply

    def put(self, key: str, reply: str) -> None:
        """Stores a reply, replacing an earlier one; other processes can read it when this returns."""
        with self._open() as database:
            row = (key, reply, len(reply), time())
            database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", row)
            self._remember(key, reply)
            self._stored += 1
            if self._stored % CHECK_EVERY == 0:
                self._shrink()

    def _remember(self, key: str, reply: str) -> None:
        """Holds a reply in memory as the most recently used one."""
        self._recent[key] = reply
        self._recent.move_to_end(key)
        while len(self._recent) > self.memory:
            self._recent.popitem(last=False)

    def _shrink(self) -> None:
        """Drops the least recently used replies, if there are too many, until a tenth of the size is free."""
        now = time()
        self._database.executemany("UPDATE replies SET used = ? WHERE key = ?", [(now, key) for key in self._touched])
        self._touched.clear()
        total = self._database.execute("SELECT COALESCE(SUM(size), 0) FROM replies").fetchone()[0]
        if total <= self.max_bytes:
            return
        dropped = []
        for key, size in self._database.execute("SELECT key, size FROM replies ORDER BY used"):
            dropped.append((key,))
            self._recent.pop(key, None)
            total -= size
            if total <= 0.9 * self.max_bytes:
                break
        self._database.executemany("DELETE FROM replies WHERE key = ?", dropped)


@dataclass(eq=False)
class Cached(BackendWrapper):
    """A backend that stores replies and answers repeated requests from the store.

    The key is the whole request: model and server, prompt, every sampling parameter. Another seed therefore gives a
    new sample; ``refresh=True`` sends every request again and stores the new replies. Equal requests that are in
    flight at the same time, in one call or in several threads, are sent once. A reply is stored as soon as it arrives;
    errors are not stored.

    Args:
        inner: the backend that answers requests that are not stored.
        store: a :class:`ReplyStore`, which backends can share, or the path of its file.
        refresh: whether to send every request, without looking it up.
    """

    store: ReplyStore
    refresh: bool = False
    _usage: Usage = field(default_factory=Usage, repr=False)
    _in_flight: dict[str, Future[Any]] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.store, ReplyStore):
            self.store = ReplyStore(self.store)

    def _key(self, prompt: Prompt, sampling: Sampling) -> str:
        """Returns the key of a request; greedy requests that differ in the seed only have the same key."""
        # Greedy decoding draws nothing.
        return super()._key(prompt, sampling if sampling.temperature else sampling.with_seed(0))

    def _answers(self, keys: list[str], send: Send, unpack: Callable[[Any], Any]) -> Iterator[tuple[int, Any]]:
        # Equal requests share a key: one result answers all their indices.
        open_requests: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            open_requests.setdefault(key, []).append(index)
        self.usage.cache_hits += len(keys)  # _round subtracts those that are sent
        # A further round is needed if another call gave up a request that this one was waiting for.
        while open_requests:
            claimed: dict[str, Future[Any]] = {}
            try:
                for key, result in self._round(open_requests, claimed, send, unpack):
                    yield from ((index, result) for index in open_requests.pop(key))
            finally:
                # If this call breaks off, None tells calls that wait for its results to send the requests themselves.
                with self._lock:
                    for key, future in claimed.items():
                        self._in_flight.pop(key, None)
                        if not future.done():
                            future.set_result(None)

    def _round(
        self,
        open_requests: dict[str, list[int]],
        claimed: dict[str, Future[Any]],
        send: Send,
        unpack: Callable[[Any], Any],
    ) -> Iterator[tuple[str, Any]]:
        """Yields stored replies, then those of requests that this call sends, then those that other calls have sent.

        Args:
            open_requests: indices of the open requests by key.
            claimed: filled with a future for each request that this call sends.
            send: sends requests by their indices.
            unpack: returns the result of a stored reply.

        Yields:
            Key and result; none for a request that another call sent and gave up.
        """
        # Sort the keys: stored, in flight in another call, or claimed by this one.
        stored: dict[str, str] = {}
        others: dict[str, Future[Any]] = {}
        for key in open_requests:
            with self._lock:  # no other thread may claim the key between lookup and claim
                reply = None if self.refresh else self.store.get(key)
                if reply is not None:
                    stored[key] = reply
                elif key in self._in_flight:
                    others[key] = self._in_flight[key]
                else:
                    claimed[key] = self._in_flight[key] = Future()
        for key, reply in stored.items():
            yield key, unpack(json.loads(reply))
        sent_keys = list(claimed)
        if sent_keys:
            self.usage.cache_hits -= len(sent_keys)
            for number, result in send([open_requests[key][0] for key in sent_keys]):
                key = sent_keys[number]
                if not isinstance(result, BackendError):
                    self.store.put(key, json.dumps(pack(result)))
                claimed[key].set_result(result)
                yield key, result
        # Last, so that this call never holds up its own requests while it waits for other calls.
        for key, future in others.items():
            other_result = future.result()
            if other_result is not None:
                yield key, other_result

    @property
    def usage(self) -> Usage:
        """Calls, cache hits and errors of this object; tokens and cost of the inner backend, which may be shared."""
        inner = self.inner.usage
        self._usage.prompt_tokens, self._usage.completion_tokens = inner.prompt_tokens, inner.completion_tokens
        self._usage.cost = inner.cost
        return self._usage


def cached(inner: Any, path: str, max_mb: float = 1024.0, refresh: bool = False) -> Cached:
    """Builds the part ``{"id": "cached", "kwargs": {"inner": ..., "path": ...}}``.

    Args:
        inner: a backend, in any form that :func:`~instructgym.llm_backends.parts.resolve` takes.
        path: path of the SQLite file.
        max_mb: size of all replies, in MB, above which the least recently used ones are dropped.
        refresh: whether to send every request, without looking it up.
    """
    return Cached(resolve("backend", inner), ReplyStore(path, max_mb), refresh)
