"""Any server that speaks OpenAI's API: OpenAI itself, vLLM, llama.cpp, and the many others."""

from __future__ import annotations

import asyncio
import json
import math
import os
import queue
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from time import time
from typing import Any
from urllib.parse import urlsplit

from .base import (
    Backend,
    BackendError,
    Completion,
    ContextLengthError,
    Message,
    Prompt,
    PromptStyle,
    Result,
    Sampling,
    UnsupportedRequestError,
)
from .budget import Budget, Spending
from .errors import InputError

NO_KEY = "none"
"""What servers without keys are sent."""


LONGEST_PAUSE = 120.0
"""Seconds: a server that asks to wait longer is given up on."""

OWN_FIELDS = {
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
} | {
    "seed",
    "stop",
    "stream",
    "logprobs",
    "return_token_ids",
}
"""What a request sets itself."""


class MalformedReplyError(BackendError):
    """A server answered something that is no completion: broken JSON, no choices, log-probs of another length."""


@dataclass
class _Sending:
    """What sends requests, in the process that made it."""

    pid: int = field(default_factory=os.getpid)
    loop: Any = None
    """Runs in a thread of its own: callers may have a loop of theirs, or none."""
    client: Any = None
    slots: Any = None
    limits: tuple[Any, Any] = (None, None)


class OpenAIBackend(Backend):
    """A server's model, one request per prompt, many at a time.

    Requests that fail for the moment (connection lost, time out, 408, 409, 429, 5xx, a malformed reply) are sent again
    after the time that the server's ``Retry-After`` asks for, or else after a jittered, exponentially growing one. When
    all attempts have failed, the error stands in the place of that prompt's result.

    The key is read from the environment when the first request is sent; it is never stored, logged or part of an error.

    Args:
        model: name of the model on the server.
        base_url: ``http(s)://host/v1``; by default OpenAI's own, or the environment's ``OPENAI_BASE_URL``.
        prompt_style: ``chat``: chat completions, strings become one user message; ``completion``: plain completions
            of strings and token ids.
        key_variable: environment variable with the key. A server given by ``base_url`` may need none.
        concurrency: requests in flight at most.
        requests_per_minute: limit; 0 for none. Attempts count, so a retry waits for its turn as well.
        tokens_per_minute: limit of estimated prompt tokens plus ``max_tokens``; 0 for none.
        timeout: seconds for one attempt, from its start to the whole reply.
        attempts: of one request at most.
        backoff: seconds before the second attempt, at most; doubled before each further one.
        logprobs: ask for the log-probs of completions.
        token_ids: ask for token ids, which vLLM reports.
        max_tokens_field: ``max_tokens``, or ``max_completion_tokens`` as newer models of OpenAI's want it.
        extra_body: further fields of every request.
        prices: money per million prompt and completion tokens, for ``usage.cost``.
        budget: hard limits, a :class:`Budget` (to be shared) or its arguments. Prompts are reckoned at one token per
            byte before they are sent. At a limit no further request is sent, those in flight are waited for and given
            out, and then :class:`BudgetExceededError` is raised.

    Raises:
        InputError: for arguments out of range, a URL with a password, a missing key, a budget of money without prices.
    """

    def __init__(
        self,
        model: str,
        base_url: str = "",
        prompt_style: PromptStyle = "chat",
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        requests_per_minute: int = 0,
        tokens_per_minute: int = 0,
        timeout: float = 60.0,
        attempts: int = 6,
        backoff: float = 0.5,
        logprobs: bool = False,
        token_ids: bool = False,
        max_tokens_field: str = "max_tokens",
        extra_body: Mapping[str, Any] | None = None,
        prices: tuple[float, float] = (0.0, 0.0),
        budget: Budget | Mapping[str, Any] | None = None,
    ) -> None:
        url = base_url or os.environ.get("OPENAI_BASE_URL", "")
        parts = urlsplit(url)
        if "@" in url or parts.query:
            raise InputError(f"base_url must hold no name, password or query: put the key into ${key_variable}")
        if url and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise InputError(f"base_url must be http(s)://host/v1, got {url!r}")
        if prompt_style not in ("chat", "completion"):
            raise InputError(f"prompt_style must be chat or completion, got {prompt_style!r}")
        for name, value in (("concurrency", concurrency), ("attempts", attempts)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if timeout <= 0 or min(requests_per_minute, tokens_per_minute, backoff) < 0:
            raise InputError("timeout must be above 0; backoff, requests_per_minute, tokens_per_minute at least 0")
        self.model, self.url, self.prompt_style, self.key_variable = model, url, prompt_style, key_variable
        self.concurrency, self.timeout, self.attempts, self.backoff = concurrency, timeout, attempts, backoff
        self.requests_per_minute, self.tokens_per_minute = requests_per_minute, tokens_per_minute
        self.ask_logprobs, self.ask_token_ids, self.prices = logprobs, token_ids, prices
        self.max_tokens_field, self.extra_body = max_tokens_field, dict(extra_body or {})
        taken = sorted(OWN_FIELDS & set(self.extra_body))
        if taken:
            raise InputError(f"extra_body must not set {', '.join(taken)}: these are arguments and sampling parameters")
        if max_tokens_field not in ("max_tokens", "max_completion_tokens"):
            raise InputError(f"max_tokens_field must be max_tokens or max_completion_tokens, got {max_tokens_field!r}")
        self.budget = budget if isinstance(budget, Budget) else Budget(**(budget or {}))
        if self.budget.limit.cost and not any(prices):
            raise InputError("a budget of money needs prices")
        self.retries = 0
        """Attempts beyond the first of each request, since this object was built."""
        self._random = random.Random()
        self._lock, self._sending = threading.Lock(), _Sending()

    @property
    def name(self) -> str:  # type: ignore[override]
        """Server, model and what else decides on a reply."""
        extras = f" {sorted(self.extra_body.items())}" if self.extra_body else ""
        asked = "".join(f" +{what}" for what in ("logprobs", "token_ids") if getattr(self, f"ask_{what}"))
        return f"openai:{self.url or 'default'}:{self.model}:{self.prompt_style}{asked}{extras}"

    # --- sending -----------------------------------------------------------------------------------------------------

    def _connected(self) -> _Sending:
        """The connection of this process: a fork leaves the parent's loop, sockets and locks behind."""
        if self._sending.pid != os.getpid():
            self._lock, self._sending = threading.Lock(), _Sending()
        with self._lock:
            sending = self._sending
            if sending.loop is None:
                sending.client = self._connect()
                sending.slots = asyncio.Semaphore(self.concurrency)
                sending.limits = (_limiter(self.requests_per_minute), _limiter(self.tokens_per_minute))
                sending.loop = asyncio.new_event_loop()
                threading.Thread(target=sending.loop.run_forever, name=self.name, daemon=True).start()
            return sending

    def _connect(self) -> Any:
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise InputError("the openai package is missing: pip install 'instructgym[openai]'") from error
        key = self._key()
        if not key and not self.url:
            raise InputError(f"no key: set ${self.key_variable}, or name a server with base_url")
        return AsyncOpenAI(api_key=key or NO_KEY, base_url=self.url or None, timeout=self.timeout, max_retries=0)

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"${self.key_variable} holds characters that no key has")
        return key

    def _line(self, error: object) -> str:
        """An error's text on one line, without the key, should a server repeat it."""
        text = " ".join(str(error).split())
        return (text.replace(self._key(), "***") if self._key() else text)[:300]

    def _generate_each(self, prompts: list[Prompt], samplings: list[Sampling]) -> Iterator[tuple[int, Result]]:
        sending = self._connected()  # a missing key or package is an error of the call, not of each prompt
        done: queue.SimpleQueue[tuple[int, Result | BaseException]] = queue.SimpleQueue()
        fatal: list[BaseException] = []

        async def one(index: int) -> None:
            try:
                done.put((index, await self._complete(sending, prompts[index], samplings[index], fatal)))
            except BaseException as error:
                fatal.append(error)
                done.put((index, error))

        tasks = [asyncio.run_coroutine_threadsafe(one(index), sending.loop) for index in range(len(prompts))]
        try:
            for _ in tasks:
                index, result = done.get()
                if isinstance(result, list | BackendError):  # what was paid for is given out, whatever else happened
                    yield index, result
            if fatal:
                raise fatal[0]
        finally:
            for task in tasks:
                task.cancel()

    async def _complete(
        self, sending: _Sending, prompt: Prompt, sampling: Sampling, fatal: Sequence[BaseException]
    ) -> Result:
        try:
            request = self._request(prompt, sampling)
        except BackendError as error:
            return error
        read, written = prompt_tokens_at_most(prompt), sampling.max_tokens * request["n"]
        most = Spending(1, read + written, self._cost(read, written))
        async with sending.slots:
            for attempt in range(1, self.attempts + 1):
                await self._wait_for_turn(sending, most, fatal)
                used = most  # of an attempt that ends in the dark the most is booked
                try:
                    result, pause, used = await self._try(sending.client, request, sampling, most)
                finally:
                    self.budget.settle(most, used)
                if pause is None or attempt == self.attempts or not isinstance(result, BackendError):
                    return result
                self.retries += 1
                growing = self.backoff * 2 ** (attempt - 1) * self._random.uniform(0.5, 1.0)
                await asyncio.sleep(max(pause, growing))
        raise AssertionError("unreachable")

    def _cost(self, read: int, written: int) -> float:
        return (read * self.prices[0] + written * self.prices[1]) / 1e6

    async def _wait_for_turn(self, sending: _Sending, most: Spending, fatal: Sequence[BaseException]) -> None:
        """Until limits and budget allow one more attempt; raises what has ended the call meanwhile."""
        for limiter, amount in zip(sending.limits, (1, most.tokens), strict=True):
            if fatal:
                raise fatal[0]
            if limiter is not None:
                await limiter.acquire(min(amount, limiter.max_rate))
        while not self.budget.reserve(most):  # what others have reserved may come back
            if fatal:
                raise fatal[0]
            await asyncio.sleep(0.01)

    async def _try(
        self, client: Any, request: dict[str, Any], sampling: Sampling, most: Spending
    ) -> tuple[Result, float | None, Spending]:
        """One attempt: its result, the seconds to wait before the next one (None: no further one), what it used."""
        import openai

        used = most
        api = client.chat.completions if self.prompt_style == "chat" else client.completions
        try:
            reply = await asyncio.wait_for(api.create(**request), self.timeout)
            used = self._used(reply, most)
            return self._parse(reply, sampling), None, used
        except openai.APIStatusError as error:
            return *self._refused(error), Spending(1)
        except MalformedReplyError as error:
            return error, 0.0, used
        except BackendError as error:  # a reply that would not come out better
            return error, None, used
        except (TimeoutError, openai.APITimeoutError):
            return BackendError(f"{self._server} gave no answer within {self.timeout:g} s"), 0.0, used
        except openai.APIConnectionError as error:
            sent = type(error.__cause__).__name__ != "ConnectError"
            why = f"{self._server} cannot be reached: {self._line(error.__cause__ or error)}"
            return BackendError(why), 0.0, used if sent else Spending(1)
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
            return MalformedReplyError(f"{self._server} gave a malformed reply: {self._line(error)}"), 0.0, used

    def _used(self, reply: Any, most: Spending) -> Spending:
        """What a reply says it used, booked before anything else is asked of it."""
        told = getattr(reply, "usage", None)
        if told is None:
            return most
        read, written = int(told.prompt_tokens or 0), int(told.completion_tokens or 0)
        self.usage.prompt_tokens += read
        self.usage.completion_tokens += written
        self.usage.cost += self._cost(read, written)
        return Spending(1, read + written, self._cost(read, written))

    def _refused(self, error: Any) -> tuple[BackendError, float | None]:
        status, why = error.status_code, f"{self._server} answered {error.status_code}: {self._line(error)}"
        if status in (401, 404):  # no request will do better
            raise InputError(f"{why} (check base_url, the model's name and ${self.key_variable})") from None
        if status in (408, 409, 429) or status >= 500:
            pause = retry_after(error.response.headers)
            return BackendError(why), pause if pause <= LONGEST_PAUSE else None
        if status == 400 and any(hint in why.lower() for hint in ("context length", "maximum context", "too long")):
            return ContextLengthError(why), None
        return BackendError(why), None

    @property
    def _server(self) -> str:
        return self.url or "the OpenAI API"

    def _count(self, result: Result) -> None:
        self.usage.requests += 1
        self.usage.errors += isinstance(result, BackendError)  # tokens are the server's, see _parse

    # --- requests and replies ----------------------------------------------------------------------------------------

    def _request(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            self.max_tokens_field: sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "n": sampling.n if sampling.temperature else 1,  # greedy completions are all the same
            "seed": sampling.seed % 2**31,
        }
        if sampling.stop:
            request["stop"] = list(sampling.stop)
        body = dict(self.extra_body)
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if self.ask_token_ids:
            body["return_token_ids"] = True
        if body:
            request["extra_body"] = body
        try:
            json.dumps(prompt if isinstance(prompt, str) else list(prompt), default=str, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UnsupportedRequestError("the prompt holds half a character, which UTF-8 cannot say") from None
        ids = not isinstance(prompt, str) and not isinstance(prompt[0], Mapping)
        if self.prompt_style == "chat":
            if ids:
                raise UnsupportedRequestError("token ids need prompt_style='completion'")
            messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            request["messages"] = [dict(message) for message in messages]
            if self.ask_logprobs:
                request["logprobs"] = True
        else:
            if not ids and not isinstance(prompt, str):
                raise UnsupportedRequestError("chat messages need prompt_style='chat'")
            request["prompt"] = [int(token) for token in prompt] if ids else prompt  # type: ignore[arg-type]
            if self.ask_logprobs:
                request["logprobs"] = 1  # some servers take 0 for no
        return request

    def _parse(self, reply: Any, sampling: Sampling) -> list[Completion]:
        choices = getattr(reply, "choices", None)
        wanted = sampling.n if sampling.temperature else 1
        if not isinstance(choices, list) or not choices:
            raise MalformedReplyError(f"{self._server} gave no completions")
        if len(choices) != wanted:
            raise UnsupportedRequestError(f"{self._server} gave {len(choices)} completions, not {wanted}: it ignores n")
        completions = [self._completion(choice) for choice in sorted(choices, key=lambda choice: choice.index or 0)]
        return completions * (sampling.n // wanted)

    def _completion(self, choice: Any) -> Completion:
        chat = self.prompt_style == "chat"
        text = choice.message.content if chat else choice.text
        if not isinstance(text, str) or choice.finish_reason not in ("stop", "length"):
            raise BackendError(f"{self._server} gave no whole text: it ended by {choice.finish_reason!r}")
        logprobs: Sequence[float] = ()
        if self.ask_logprobs:
            found = choice.logprobs
            if found is None:
                raise UnsupportedRequestError(f"{self._server} reports no log-probs: build the backend without them")
            logprobs = [token.logprob for token in found.content or ()] if chat else list(found.token_logprobs or ())
            if not all(isinstance(value, float | int) and value <= 1e-6 for value in logprobs) or (
                text and not logprobs
            ):
                raise MalformedReplyError(f"{self._server} gave log-probs that are no numbers below 0, or none")
        ids = list(getattr(choice, "token_ids", None) or ())
        if self.ask_token_ids and not ids:
            raise UnsupportedRequestError(f"{self._server} reports no token ids: build the backend without them")
        if self.ask_token_ids and self.ask_logprobs and len(ids) != len(logprobs):
            raise MalformedReplyError(f"{self._server} gave {len(logprobs)} log-probs of {len(ids)} tokens")
        reason = "length" if choice.finish_reason == "length" else "stop"
        return Completion(text, ids, [float(value) for value in logprobs], reason)  # type: ignore[arg-type]


def prompt_tokens_at_most(prompt: Prompt) -> int:
    """An upper bound of a prompt's tokens without its tokenizer: one per byte, and what a chat template may add."""
    if isinstance(prompt, str):
        return len(prompt.encode("utf-8", "replace")) + 64
    messages: list[Message] = [message for message in prompt if isinstance(message, Mapping)]
    if len(messages) < len(prompt):
        return len(prompt)
    return sum(len(message["content"].encode("utf-8", "replace")) + 16 for message in messages) + 64


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
