"""Sending of requests to a server: many at a time, within rate limits and a budget, with retries.

:class:`Sender` is what :class:`~instructgym.llm_backends.serving.openai_backend.OpenAIBackend` sends with;
:class:`Job` is one request, :class:`~instructgym.llm_backends.serving.budget.Budget` holds the hard limits.
"""

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
"""Longest wait, in seconds, that a server may ask for; a request is not sent again if the server asks for more."""


class MalformedReplyError(BackendError):
    """Raised if a server's answer is not a valid reply: broken JSON, no choices, a wrong number of log-probs."""


@dataclass(frozen=True)
class Job:
    """A request: how to send it, how to read its reply, and what it may use at most."""

    send: Callable[[Any], Awaitable[Any]]
    """Makes one attempt with the given client and returns the raw reply."""
    parse: Callable[[Any], Any]
    """Returns the result of a raw reply. Raises MalformedReplyError if another attempt may help, else BackendError."""
    reservation: Spending
    """Upper bound of what one attempt uses; reserved in the budget before the attempt is sent."""
    usage_of: Callable[[Any], Spending | None]
    """Returns the usage that a raw reply reports, None if it reports none. Called once per reply."""
    attempts: int = 0
    """Maximum number of attempts; 0: the sender's ``attempts``."""
    timeout: float = 0.0
    """Seconds for one attempt; 0: the sender's ``timeout``."""


@dataclass
class _Connection:
    """The client, event loop and rate limiters of one process."""

    pid: int = field(default_factory=os.getpid)
    loop: Any = None
    """Event loop in a separate thread, because callers may run their own loop, or none."""
    client: Any = None
    slots: Any = None
    limits: tuple[Any, Any] = (None, None)


@dataclass
class Sender:
    """Sends jobs to one server through the ``openai`` client."""

    connect: Callable[[], Any]
    """Returns a new client; called once per process."""
    server: str
    """Name of the server in error messages."""
    redact: Callable[[str], str]
    """Returns a text with the API key masked."""
    concurrency: int
    """Maximum number of requests in flight."""
    requests_per_minute: int
    """Limit of attempts; 0: no limit."""
    tokens_per_minute: int
    """Limit of the tokens that attempts reserve; 0: no limit."""
    timeout: float
    """Seconds for one attempt, from its start to the whole reply."""
    attempts: int
    """Maximum number of attempts per request."""
    backoff: float
    """Longest wait, in seconds, before the second attempt; doubled before each further one."""
    budget: Budget
    """Hard limits on requests, tokens and money."""
    retries: int = 0
    """Number of attempts so far beyond the first of each request."""

    def __post_init__(self) -> None:
        self._random = random.Random()
        self._lock, self._connection = threading.Lock(), _Connection()

    def run(self, jobs: Sequence[Job | BackendError]) -> Iterator[tuple[int, Any]]:
        """Sends all jobs and yields (index, result or BackendError) in the order in which they finish.

        Args:
            jobs: the requests; a BackendError in place of a job is yielded unchanged.

        Raises:
            InputError: for an error that no retry can fix: a wrong key, address or model.
            BudgetExceededError: if the rest of the budget does not suffice for the next request. Results of requests
                in flight are awaited and yielded first.
        """
        connection = self.connected()  # a missing key or package is an error of the call, not of each request
        # The event loop runs in another thread: results reach this one through a thread-safe queue.
        done: queue.SimpleQueue[tuple[int, Any, bool]] = queue.SimpleQueue()
        fatal: list[BaseException] = []

        async def run_job(index: int, job: Job | BackendError) -> None:
            try:
                result = job if isinstance(job, BackendError) else await self._complete(connection, job, fatal)
                done.put((index, result, True))
            except BaseException as error:
                fatal.append(error)
                done.put((index, error, False))

        tasks = [asyncio.run_coroutine_threadsafe(run_job(i, job), connection.loop) for i, job in enumerate(jobs)]
        try:
            for _ in tasks:
                index, result, succeeded = done.get()
                if succeeded:  # results that were paid for are yielded even if another job failed
                    yield index, result
            if fatal:
                raise fatal[0]
        finally:
            # The caller may have stopped iterating: cancel the requests that are still in flight.
            for task in tasks:
                task.cancel()

    def connected(self) -> _Connection:
        """Returns the connection of this process, made on the first call.

        Raises:
            InputError: if the client or the key is missing.
        """
        # After a fork the parent's loop thread does not exist, and its sockets and locks must not be shared.
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
        """Returns the result of a job, or the BackendError of its last attempt."""
        async with connection.slots:
            attempts = job.attempts or self.attempts
            for attempt in range(1, attempts + 1):
                await self._wait_for_turn(connection, job.reservation, fatal)
                used = job.reservation  # no reply: charge the full reservation
                try:
                    result, pause, used = await self._try(connection.client, job)
                finally:
                    self.budget.settle(job.reservation, used)
                if isinstance(result, InputError):
                    raise result
                if pause is None or attempt == attempts or not isinstance(result, BackendError):
                    return result
                self.retries += 1
                # The jitter keeps requests that failed together from being sent again together.
                delay = self.backoff * 2 ** (attempt - 1) * self._random.uniform(0.5, 1.0)
                await asyncio.sleep(max(pause, delay))
        raise AssertionError("unreachable")

    async def _wait_for_turn(
        self, connection: _Connection, reservation: Spending, fatal: Sequence[BaseException]
    ) -> None:
        """Waits until rate limits and budget allow one more attempt; raises the error that ended the whole call."""
        for limiter, amount in zip(connection.limits, (1, reservation.tokens), strict=True):
            if fatal:
                raise fatal[0]
            # AsyncLimiter refuses more than its burst at once: acquire a large amount in parts.
            while limiter is not None and amount > 0:
                part = min(amount, limiter.max_rate)
                await limiter.acquire(part)
                amount -= part
                if fatal:
                    raise fatal[0]
        # The reservations of other requests may be returned when these settle: poll.
        while not self.budget.reserve(reservation):
            if fatal:
                raise fatal[0]
            await asyncio.sleep(0.01)

    async def _try(self, client: Any, job: Job) -> tuple[Any, float | None, Spending]:
        """Makes one attempt.

        Returns:
            The result or error, the shortest wait in seconds before the next attempt (None: no further attempt), and
                what the attempt used.
        """
        import openai

        used = job.reservation
        try:
            reply = await asyncio.wait_for(job.send(client), job.timeout or self.timeout)
            used = job.usage_of(reply) or job.reservation
            return job.parse(reply), None, used
        except openai.APIStatusError as error:
            refusal, pause = self._status_error(error)
            return refusal, pause, Spending(1)
        except MalformedReplyError as error:
            return error, 0.0, used
        except BackendError as error:  # another attempt would get the same reply
            return error, None, used
        except (TimeoutError, openai.APITimeoutError):
            return BackendError(f"{self.server} gave no answer within {self.timeout:g} s"), 0.0, used
        except openai.APIConnectionError as error:
            # httpx's ConnectError: there was no connection, so the server has read no tokens.
            sent = type(error.__cause__).__name__ != "ConnectError"
            why = f"{self.server} cannot be reached: {self._line(error.__cause__ or error)}"
            return BackendError(why), 0.0, used if sent else Spending(1)
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError) as error:
            return MalformedReplyError(f"{self.server} gave a malformed reply: {self._line(error)}"), 0.0, used

    def _status_error(self, error: Any) -> tuple[BackendError | InputError, float | None]:
        """Returns the error for an HTTP error status and the wait before the next attempt (None: no further one)."""
        status, why = error.status_code, f"{self.server} answered {error.status_code}: {self._line(error)}"
        if status in (401, 404):  # every request would fail like this
            return InputError(f"{why} (check base_url, the model's name and the key)"), None
        if status in (408, 409, 429) or status >= 500:
            pause = retry_after(error.response.headers)
            return BackendError(why), pause if pause <= LONGEST_PAUSE else None
        # Status 400 has many causes: only the words of the message show that the prompt is too long.
        if status == 400 and any(hint in why.lower() for hint in ("context length", "maximum context", "too long")):
            return ContextLengthError(why), None
        return BackendError(why), None

    def _line(self, error: object) -> str:
        """Returns an error's text on one line, with the key masked in case the server repeats it."""
        return self.redact(" ".join(str(error).split()))[:300]


def retry_after(headers: Mapping[str, str]) -> float:
    """Returns the seconds in a ``Retry-After`` header, a number or a date; 0 if it is missing or invalid."""
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
    """Returns a limiter of so many per minute with bursts of at most a sixth of them; None if ``per_minute`` is 0."""
    if not per_minute:
        return None
    from aiolimiter import AsyncLimiter

    # Windows of 10 s, longer for less than 6 per minute, as a burst must hold at least 1.
    seconds = max(10.0, 60.0 / per_minute)
    return AsyncLimiter(per_minute * seconds / 60, seconds)
