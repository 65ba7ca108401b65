"""Any server that speaks OpenAI's API: OpenAI itself, vLLM, llama.cpp, and the many others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from ..base import (
    Backend,
    BackendError,
    Completion,
    Message,
    Prompt,
    PromptStyle,
    Result,
    Sampling,
    UnsupportedRequestError,
)
from ..errors import InputError
from .budget import Budget, Spending
from .sending import Job, MalformedReplyError, Sender

NO_KEY = "none"
"""What servers without keys are sent."""

JSON_TOKENS = 24
"""Tokens, white space included, that a JSON object takes beside its answer."""

OWN_FIELDS = set(
    "model messages prompt max_tokens max_completion_tokens temperature top_p top_k n seed stop stream logprobs "
    "return_token_ids structured_outputs response_format".split()
)
"""What a request sets itself."""

Structured = Literal["none", "vllm", "json_schema"]
"""How a server is asked for one of a few texts: not at all; by vLLM's ``structured_outputs``; or by OpenAI's
``response_format``, where the reply is a JSON object whose ``answer`` is the text."""


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
        structured: how the server is asked for one of a few texts (``Sampling.choices``): ``none``, ``vllm`` or
            ``json_schema``, which other servers know.
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
        structured: Structured = "none",
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
        self.ask_logprobs, self.ask_token_ids, self.prices = logprobs, token_ids, prices
        self.max_tokens_field, self.structured, self.extra_body = max_tokens_field, structured, dict(extra_body or {})
        taken = sorted(OWN_FIELDS & set(self.extra_body))
        if taken:
            raise InputError(f"extra_body must not set {', '.join(taken)}: these are arguments and sampling parameters")
        if max_tokens_field not in ("max_tokens", "max_completion_tokens"):
            raise InputError(f"max_tokens_field must be max_tokens or max_completion_tokens, got {max_tokens_field!r}")
        if max_tokens_field != "max_tokens" and prompt_style == "completion":
            raise InputError("plain completions know max_tokens only: leave max_tokens_field, or use the chat form")
        if structured not in ("none", "vllm", "json_schema"):
            raise InputError(f"structured must be none, vllm or json_schema, got {structured!r}")
        self.budget = budget if isinstance(budget, Budget) else Budget(**(budget or {}))
        if self.budget.limit.cost and not any(prices):
            raise InputError("a budget of money needs prices")
        self.sender = Sender(
            self._connect,
            url or "the OpenAI API",
            self._redacted,
            concurrency,
            requests_per_minute,
            tokens_per_minute,
            timeout,
            attempts,
            backoff,
            self.budget,
        )

    @property
    def name(self) -> str:  # type: ignore[override]
        """Server, model and what else decides on a reply."""
        extras = f" {sorted(self.extra_body.items())}" if self.extra_body else ""
        asked = "".join(f" +{what}" for what in ("logprobs", "token_ids") if getattr(self, f"ask_{what}"))
        asked += f" +structured={self.structured}" if self.structured != "none" else ""
        return f"openai:{self.url or 'default'}:{self.model}:{self.prompt_style}{asked}{extras}"

    # --- sending -----------------------------------------------------------------------------------------------------

    def _connect(self) -> Any:
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise InputError("the openai package is missing: pip install 'instructgym[openai]'") from error
        key = self._key()
        if not key and not self.url:
            raise InputError(f"no key: set ${self.key_variable}, or name a server with base_url")
        return AsyncOpenAI(api_key=key or NO_KEY, base_url=self.url or None, timeout=self.sender.timeout, max_retries=0)

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"${self.key_variable} holds characters that no key has")
        return key

    def _redacted(self, text: str) -> str:
        return text.replace(self._key(), "***") if self._key() else text

    def _generate_each(self, prompts: list[Prompt], samplings: list[Sampling]) -> Iterator[tuple[int, Result]]:
        yield from self.sender.each([self._job(p, s) for p, s in zip(prompts, samplings, strict=True)])

    def _job(self, prompt: Prompt, sampling: Sampling) -> Job | BackendError:
        try:
            request = self._request(prompt, sampling)
        except BackendError as error:
            return error

        async def send(client: Any) -> Any:
            api = client.chat.completions if self.prompt_style == "chat" else client.completions
            return await api.create(**request)

        read, written = prompt_tokens_at_most(prompt), request[self.max_tokens_field] * request["n"]
        return Job(send, lambda reply: self._parse(reply, sampling), self._spending(read, written), self._used)

    def _spending(self, read: int, written: int) -> Spending:
        return Spending(1, read + written, (read * self.prices[0] + written * self.prices[1]) / 1e6)

    def _used(self, reply: Any) -> Spending | None:
        """What a reply says it used, booked before anything else is asked of it."""
        told = getattr(reply, "usage", None)
        if told is None:
            return None
        read, written = int(told.prompt_tokens or 0), int(told.completion_tokens or 0)
        used = self._spending(read, written)
        self.usage.prompt_tokens += read
        self.usage.completion_tokens += written
        self.usage.cost += used.cost
        return used

    @property
    def retries(self) -> int:
        """Attempts beyond the first of each request, since this object was built."""
        return self.sender.retries

    @property
    def supports_choices(self) -> bool:
        return self.structured != "none"

    @property
    def _server(self) -> str:
        return self.sender.server

    def _count(self, result: Result) -> None:
        self.usage.requests += 1
        self.usage.errors += isinstance(result, BackendError)  # tokens are the server's, see _used

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
        if sampling.choices and self.structured == "json_schema":  # limits are those of the answer, not of the JSON
            request[self.max_tokens_field] += JSON_TOKENS + max(len(text.encode()) for text in sampling.choices)
        elif sampling.stop:
            request["stop"] = list(sampling.stop)
        body = dict(self.extra_body)
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if self.ask_token_ids:
            body["return_token_ids"] = True
        if sampling.choices and self.structured == "vllm":
            body["structured_outputs"] = {"choice": list(sampling.choices)}
        elif sampling.choices:
            body["response_format"] = _answer_format(sampling.choices)  # plain completions of some servers know it too
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
        if sampling.choices:
            completions = [self._choice(completion, sampling.choices) for completion in completions]
        return completions * (sampling.n // wanted)

    def _choice(self, completion: Completion, choices: Sequence[str]) -> Completion:
        """The completion, which has to be one of the choices; the JSON's tokens and log-probs are left out."""
        cut, text = completion.finish_reason == "length", completion.text
        if self.structured == "json_schema" and not cut:
            text = str(json.loads(text)["answer"])
            completion = Completion(text, [], [], "stop")
        if text not in choices:
            kind = BackendError if cut else MalformedReplyError  # what was cut would be cut again
            raise kind(f"{self._server} gave {text[:80]!r}, which is no choice{' (cut at max_tokens)' * cut}")
        return completion

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


def _answer_format(choices: Sequence[str]) -> dict[str, Any]:
    """OpenAI's ``response_format`` for an object whose ``answer`` is one of the choices."""
    answer = {"type": "string", "enum": list(choices)}
    schema = {"type": "object", "properties": {"answer": answer}, "required": ["answer"], "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def prompt_tokens_at_most(prompt: Prompt) -> int:
    """An upper bound of a prompt's tokens without its tokenizer: one per byte, and what a chat template may add."""
    if isinstance(prompt, str):
        return len(prompt.encode("utf-8", "replace")) + 64
    messages: list[Message] = [message for message in prompt if isinstance(message, Mapping)]
    if len(messages) < len(prompt):
        return len(prompt)
    return sum(len(message["content"].encode("utf-8", "replace")) + 16 for message in messages) + 64
