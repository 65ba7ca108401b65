"""Sends requests to a server: many at a time, within limits and a budget, again where an attempt failed."""

from __future__ import annotations

import asyncio
import math
import os
import queue
import random
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

from ..base import BackendError, ContextLengthError
from ..errors import InputError
from .budget import Budget, Spending

LONGEST_PAUSE = 120.0
"""Seconds: a server that asks to wait longer is given up on."""


class MalformedReplyError(BackendError):
    """A server answered something that is no reply: broken JSON, no choices, log-probs of another length."""


@dataclass(frozen=True)
class Job:
    """One request."""

    send: Callable[[Any], Awaitable[Any]]
    """Makes the attempt, given the client."""
    parse: Callable[[Any], Any]
    """A reply's result. Raises MalformedReplyError where another attempt may help, else BackendError."""
    most: Spending
    """What the request may use at most: reserved before it is sent."""
    used: Callable[[Any], Spending | None]
    """What a reply says it used; None where it says nothing. Called once per reply."""
    attempts: int = 0
    """At most; 0 for the sender's number."""
    timeout: float = 0.0
    """Seconds for one attempt; 0 for the sender's."""


@dataclass
class _Connection:
    """What sends requests, in the process that made it."""

    pid: int = field(default_factory=os.getpid)
    loop: Any = None
    """Runs in a thread of its own: callers may have a loop of theirs, or none."""
    client: Any = None
    slots: Any = None
    limits: tuple[Any, Any] = (None, None)


@dataclass
class Sender:
    """Sends jobs to one server by the ``openai`` client."""

    connect: Callable[[], Any]
    """Makes the client; called once per process."""
    server: str
    """The server's name in errors."""
    redact: Callable[[str], str]
    """Takes the key out of a text."""
    concurrency: int
    """Requests in flight at most."""
    requests_per_minute: int
    tokens_per_minute: int
    timeout: float
    """Seconds for one attempt, from its start to the whole reply."""
    attempts: int
    backoff: float
    """Seconds before the second attempt, at most; doubled before each further one."""
    budget: Budget
    retries: int = 0
    """Attempts beyond the first of each request, so far."""

    def __post_init__(self) -> None:
        self._random = random.Random()
        self._lock, self._connection = threading.Lock(), _Connection()

    def each(self, jobs: Sequence[Job | BackendError]) -> Iterator[tuple[int, Any]]:
        """Sends all jobs and gives (index, result or BackendError) as they come; errors in a job's place come back.

        Raises:
            InputError: for what no request can mend: a wrong key, address or model.
            BudgetExceededError: when what is left of the budget does not suffice. Requests in flight are waited for and
                given out first.
        """
        connection = self.connected()  # a missing key or package is an error of the call, not of each request
        done: queue.SimpleQueue[tuple[int, Any, bool]] = queue.SimpleQueue()
        fatal: list[BaseException] = []

        async def one(index: int, job: Job | BackendError) -> None:
            try:
                result = job if isinstance(job, BackendError) else await self._complete(connection, job, fatal)
                done.put((index, result, True))
            except BaseException as error:
                fatal.append(error)
                done.put((index, error, False))

        tasks = [asyncio.run_coroutine_threadsafe(one(i, job), connection.loop) for i, job in enumerate(jobs)]
        try:
            for _ in tasks:
                index, result, known = done.get()
                if known:  # what was paid for is given out, whatever else happened
                    yield index, result
            if fatal:
                raise fatal[0]
        finally:
            for task in tasks:
                task.cancel()

    def connected(self) -> _Connection:
        """The connection of this process: a fork leaves the parent's loop, sockets and locks behind.

        Raises:
            InputError: if the client or the key is missing.
        """
        if self._connection.pid != os.getpid():
            self._lock, self._connection = threading.Lock(), _Connection()
        with self._lock:
            connection = self._connection
            if connection.loop is None:
                connection.client = self.connect()
                connection.slots = asyncio.Semaphore(self.concurrency)
                connection.limits = (_limiter(self.requests_per_minute), _limiter(self.tokens_per_minute))
                connection.loop = asyncio.new_event_loop()
                threading.Thread(target=connection.loop.run_forever, name=self.server, daemon=True).start()
            return connection

    async def _complete(self, connection: _Connection, job: Job, fatal: Sequence[BaseException]) -> Any:
        async with connection.slots:
            attempts = job.attempts or self.attempts
            for attempt in range(1, attempts + 1):
                await self._wait_for_turn(connection, job.most, fatal)
                used = job.most  # of an attempt that ends in the dark the most is booked
                try:
                    result, pause, used = await self._try(connection.client, job)
                finally:
                    self.budget.settle(job.most, used)
                if isinstance(result, InputError):
                    raise result
                if pause is None or attempt == attempts or not isinstance(result, BackendError):
                    return result
                self.retries += 1
                growing = self.backoff * 2 ** (attempt - 1) * self._random.uniform(0.5, 1.0)
                await asyncio.sleep(max(pause, growing))
        raise AssertionError("unreachable")

    async def _wait_for_turn(self, connection: _Connection, most: Spending, fatal: Sequence[BaseException]) -> None:
        """Until limits and budget allow one more attempt; raises what has ended the call meanwhile."""
        for limiter, amount in zip(connection.limits, (1, most.tokens), strict=True):
            if fatal:
                raise fatal[0]
            while limiter is not None and amount > 0:  # in parts: more than a burst cannot be had at once
                part = min(amount, limiter.max_rate)
                await limiter.acquire(part)
                amount -= part
                if fatal:
                    raise fatal[0]
        while not self.budget.reserve(most):  # what others have reserved may come back
            if fatal:
                raise fatal[0]
            await asyncio.sleep(0.01)

    async def _try(self, client: Any, job: Job) -> tuple[Any, float | None, Spending]:
        """One attempt: its result, the seconds to wait before the next one (None: no further one), what it used."""
        import openai

        used = job.most
        try:
            reply = await asyncio.wait_for(job.send(client), job.timeout or self.timeout)
            used = job.used(reply) or job.most
            return job.parse(reply), None, used
        except openai.APIStatusError as error:
            refusal, pause = self._refused(error)
            return refusal, pause, Spending(1)
        except MalformedReplyError as error:
            return error, 0.0, used
        except BackendError as error:  # a reply that would not come out better
            return error, None, used
        except (TimeoutError, openai.APITimeoutError):
            return BackendError(f"{self.server} gave no answer within {self.timeout:g} s"), 0.0, used
        except openai.APIConnectionError as error:
            sent = type(error.__cause__).__name__ != "ConnectError"
            why = f"{self.server} cannot be reached: {self._line(error.__cause__ or error)}"
            return BackendError(why), 0.0, used if sent else Spending(1)
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError) as error:
            return MalformedReplyError(f"{self.server} gave a malformed reply: {self._line(error)}"), 0.0, used

    def _refused(self, error: Any) -> tuple[BackendError | InputError, float | None]:
        status, why = error.status_code, f"{self.server} answered {error.status_code}: {self._line(error)}"
        if status in (401, 404):  # no request will do better
            return InputError(f"{why} (check base_url, the model's name and the key)"), None
        if status in (408, 409, 429) or status >= 500:
            pause = retry_after(error.response.headers)
            return BackendError(why), pause if pause <= LONGEST_PAUSE else None
        if status == 400 and any(hint in why.lower() for hint in ("context length", "maximum context", "too long")):
            return ContextLengthError(why), None
        return BackendError(why), None

    def _line(self, error: object) -> str:
        """An error's text on one line, without the key, should a server repeat it."""
        return self.redact(" ".join(str(error).split()))[:300]


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait, by ``Retry-After`` in seconds or as a date; 0 where it says nothing."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time()
        except (TypeError, ValueError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _limiter(per_minute: int) -> Any:
    """Lets through so many a minute, at most a sixth of them at once; None for no limit."""
    if not per_minute:
        return None
    from aiolimiter import AsyncLimiter

    seconds = max(10.0, 60.0 / per_minute)
    return AsyncLimiter(per_minute * seconds / 60, seconds)
