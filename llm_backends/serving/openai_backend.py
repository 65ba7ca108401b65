"""Backend for any server with OpenAI's API: OpenAI itself, vLLM, llama.cpp and many others.

Requests are sent by :class:`~instructgym.llm_backends.serving.sending.Sender`; what only vLLM can do is in
:class:`~instructgym.llm_backends.serving.vllm_server.VLLMServerBackend`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args
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
from ..errors import InputError, check_at_least, check_known
from .budget import Budget, Spending
from .sending import Job, MalformedReplyError, Sender

NO_KEY = "none"
"""The key sent to servers that need none."""

JSON_TOKENS = 24
"""Number of tokens, including white space, that a JSON object takes in addition to its answer."""

RESERVED_FIELDS = set(
    "model messages prompt max_tokens max_completion_tokens temperature top_p top_k n seed stop stream logprobs "
    "return_token_ids structured_outputs response_format".split()
)
"""Fields that the backend sets in a request, so ``extra_body`` must not."""

Structured = Literal["none", "vllm", "json_schema"]
"""How a server is asked for one of a few texts: ``none``: not at all; ``vllm``: by vLLM's ``structured_outputs``;
``json_schema``: by OpenAI's ``response_format``, where the reply is a JSON object whose ``answer`` is the text."""


class OpenAIBackend(Backend):
    """A backend that sends one request per prompt to a server, many at a time.

    Requests that fail temporarily (connection lost, timeout, 408, 409, 429, 5xx, a malformed reply) are sent again
    after a jittered, exponentially growing wait, or after the server's ``Retry-After`` if that is longer. If all
    attempts fail, the error is returned in place of that prompt's result.

    The key is read from the environment when the first request is sent; it is never stored, logged or part of an error.

    Args:
        model: name of the model on the server.
        base_url: ``http(s)://host/v1``; empty: the environment's ``OPENAI_BASE_URL``, or OpenAI's own address.
        prompt_style: ``chat``: chat completions, where a string becomes one user message; ``completion``: plain
            completions of strings and token ids.
        key_variable: environment variable with the key; a server given by ``base_url`` may need none.
        concurrency: maximum number of requests in flight.
        requests_per_minute: limit of attempts, retries included; 0: no limit.
        tokens_per_minute: limit of estimated prompt tokens plus ``max_tokens``; 0: no limit.
        timeout: seconds for one attempt, from its start to the whole reply.
        attempts: maximum number of attempts per request.
        backoff: longest wait, in seconds, before the second attempt; doubled before each further one.
        logprobs: whether to request the log-probs of completions.
        token_ids: whether to request token ids, which vLLM reports.
        max_tokens_field: ``max_tokens``, or ``max_completion_tokens`` for newer models of OpenAI.
        structured: how the server is asked for one of a few texts (``Sampling.choices``): ``none``, ``vllm``, or
            ``json_schema`` for other servers.
        extra_body: further fields of every request.
        prices: money per million prompt tokens and per million completion tokens, for ``usage.cost``.
        budget: hard limits, as a :class:`Budget` (which backends can share) or its arguments. Before a prompt is sent,
            it is estimated at one token per byte. At a limit no further request is sent; results of those in flight
            are awaited and yielded, and then ``BudgetExceededError`` is raised.

    Raises:
        InputError: for arguments out of range, a URL with a password or query, or a budget of money without prices;
            when the first request is sent, for a missing key.
    """

    counts_result_tokens = False  # _usage_of adds the tokens, as the server counts them

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
        check_known("prompt_style", prompt_style, get_args(PromptStyle))
        check_at_least(1, concurrency=concurrency, attempts=attempts)
        check_at_least(0, backoff=backoff, requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute)
        if timeout <= 0:
            raise InputError(f"timeout must be above 0, got {timeout}")
        self.model, self.url, self.prompt_style, self.key_variable = model, url, prompt_style, key_variable
        self.ask_logprobs, self.ask_token_ids, self.prices = logprobs, token_ids, prices
        self.max_tokens_field, self.structured, self.extra_body = max_tokens_field, structured, dict(extra_body or {})
        conflicts = sorted(RESERVED_FIELDS & set(self.extra_body))
        if conflicts:
            raise InputError(
                f"extra_body must not set {', '.join(conflicts)}: these are arguments and sampling parameters"
            )
        check_known("max_tokens_field", max_tokens_field, ("max_tokens", "max_completion_tokens"))
        if max_tokens_field != "max_tokens" and prompt_style == "completion":
            raise InputError("plain completions know max_tokens only: leave max_tokens_field, or use the chat form")
        check_known("value of structured", structured, get_args(Structured))
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
        """Server, model and everything else that a reply depends on."""
        extras = f" {sorted(self.extra_body.items())}" if self.extra_body else ""
        features = "".join(f" +{feature}" for feature in ("logprobs", "token_ids") if getattr(self, f"ask_{feature}"))
        features += f" +structured={self.structured}" if self.structured != "none" else ""
        return f"openai:{self.url or 'default'}:{self.model}:{self.prompt_style}{features}{extras}"

    # --- sending -----------------------------------------------------------------------------------------------------

    def _connect(self) -> Any:
        """Returns a new client of the ``openai`` package."""
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise InputError("the openai package is missing: pip install 'instructgym[openai]'") from error
        key = self._key()
        if not key and not self.url:
            raise InputError(f"no key: set ${self.key_variable}, or name a server with base_url")
        # The sender retries, so that attempts are counted against budget and rate limits: the client must not.
        return AsyncOpenAI(api_key=key or NO_KEY, base_url=self.url or None, timeout=self.sender.timeout, max_retries=0)

    def _key(self) -> str:
        """Returns the key from the environment, empty if it is not set."""
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"${self.key_variable} holds characters that no key has")
        return key

    def _redacted(self, text: str) -> str:
        return text.replace(self._key(), "***") if self._key() else text

    def _generate_each(self, prompts: list[Prompt], samplings: list[Sampling]) -> Iterator[tuple[int, Result]]:
        yield from self.sender.run([self._job(p, s) for p, s in zip(prompts, samplings, strict=True)])

    def _job(self, prompt: Prompt, sampling: Sampling) -> Job | BackendError:
        """Returns the job for a prompt, or the error if no request can be made of it."""
        try:
            request = self._request(prompt, sampling)
        except BackendError as error:
            return error

        async def send(client: Any) -> Any:
            api = client.chat.completions if self.prompt_style == "chat" else client.completions
            return await api.create(**request)

        prompt_tokens, completion_tokens = max_prompt_tokens(prompt), request[self.max_tokens_field] * request["n"]
        return Job(
            send,
            lambda reply: self._parse(reply, sampling),
            self._spending(prompt_tokens, completion_tokens),
            self._usage_of,
        )

    def _spending(self, prompt_tokens: int, completion_tokens: int) -> Spending:
        """Returns what a request with so many prompt and completion tokens uses."""
        cost = (prompt_tokens * self.prices[0] + completion_tokens * self.prices[1]) / 1e6
        return Spending(1, prompt_tokens + completion_tokens, cost)

    def _usage_of(self, reply: Any) -> Spending | None:
        """Returns the usage that a reply reports, None if it reports none; adds it to the backend's counters."""
        reported = getattr(reply, "usage", None)
        if reported is None:
            return None
        prompt_tokens, completion_tokens = int(reported.prompt_tokens or 0), int(reported.completion_tokens or 0)
        used = self._spending(prompt_tokens, completion_tokens)
        self.usage.prompt_tokens += prompt_tokens
        self.usage.completion_tokens += completion_tokens
        self.usage.cost += used.cost
        return used

    @property
    def retries(self) -> int:
        """Number of attempts beyond the first of each request, since this object was built."""
        return self.sender.retries

    @property
    def supports_choices(self) -> bool:
        return self.structured != "none"

    @property
    def _server(self) -> str:
        return self.sender.server

    # --- requests and replies ----------------------------------------------------------------------------------------

    def _request(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        """Returns the fields of a request; raises UnsupportedRequestError if the prompt does not fit the API."""
        request: dict[str, Any] = {
            "model": self.model,
            self.max_tokens_field: sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "n": sampling.n if sampling.temperature else 1,  # greedy completions are all the same
            "seed": sampling.seed % 2**31,
        }
        # The caller's max_tokens and stop strings are meant for the answer, not for the JSON around it.
        if sampling.choices and self.structured == "json_schema":
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
            # Not only for chat: some servers take it in plain completions as well.
            body["response_format"] = _answer_format(sampling.choices)
        if body:
            request["extra_body"] = body
        # A lone surrogate cannot be encoded; the sender would take that error for a malformed reply and retry.
        try:
            json.dumps(prompt if isinstance(prompt, str) else list(prompt), default=str, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UnsupportedRequestError("the prompt holds a lone surrogate, which UTF-8 cannot encode") from None
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
                request["logprobs"] = 1  # some servers read 0 as off
        return request

    def _parse(self, reply: Any, sampling: Sampling) -> list[Completion]:
        """Returns the completions in a raw reply."""
        choices = getattr(reply, "choices", None)
        count = sampling.n if sampling.temperature else 1
        if not isinstance(choices, list) or not choices:
            raise MalformedReplyError(f"{self._server} gave no completions")
        if len(choices) != count:
            raise UnsupportedRequestError(f"{self._server} gave {len(choices)} completions, not {count}: it ignores n")
        completions = [self._completion(choice) for choice in sorted(choices, key=lambda choice: choice.index or 0)]
        if sampling.choices:
            completions = [self._choice(completion, sampling.choices) for completion in completions]
        return completions * (sampling.n // count)

    def _choice(self, completion: Completion, choices: Sequence[str]) -> Completion:
        """Returns the completion, checked to be one of the choices; the JSON's tokens and log-probs are left out."""
        cut, text = completion.finish_reason == "length", completion.text
        if self.structured == "json_schema" and not cut:
            text = str(json.loads(text)["answer"])
            completion = Completion(text, [], [], "stop")
        if text not in choices:
            # Another attempt would be cut at max_tokens as well, so only other replies are worth one.
            kind = BackendError if cut else MalformedReplyError
            raise kind(f"{self._server} gave {text[:80]!r}, which is no choice{' (cut at max_tokens)' * cut}")
        return completion

    def _completion(self, choice: Any) -> Completion:
        """Returns one choice of a reply as a completion; raises a BackendError if something requested is missing."""
        chat = self.prompt_style == "chat"
        text = choice.message.content if chat else choice.text
        if not isinstance(text, str) or choice.finish_reason not in ("stop", "length"):
            raise BackendError(f"{self._server} gave no whole text: it ended by {choice.finish_reason!r}")
        logprobs: Sequence[float] = ()
        if self.ask_logprobs:
            reported = choice.logprobs
            if reported is None:
                raise UnsupportedRequestError(f"{self._server} reports no log-probs: build the backend without them")
            logprobs = (
                [token.logprob for token in reported.content or ()] if chat else list(reported.token_logprobs or ())
            )
            # Rounding may leave a log-prob slightly above 0.
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
    """Returns OpenAI's ``response_format`` for a JSON object whose ``answer`` is one of the choices."""
    answer = {"type": "string", "enum": list(choices)}
    schema = {"type": "object", "properties": {"answer": answer}, "required": ["answer"], "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def max_prompt_tokens(prompt: Prompt) -> int:
    """Returns an upper bound of a prompt's tokens without a tokenizer: one per byte plus what a chat template adds."""
    if isinstance(prompt, str):
        return len(prompt.encode("utf-8", "replace")) + 64
    messages: list[Message] = [message for message in prompt if isinstance(message, Mapping)]
    if len(messages) < len(prompt):
        return len(prompt)
    return sum(len(message["content"].encode("utf-8", "replace")) + 16 for message in messages) + 64
