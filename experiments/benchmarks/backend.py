"""``instructgym bench backend``: compares the cached server backend with a bare concurrent client."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge
from rich.console import Console

from ...llm_backends import BackendError, Sampling
from ...llm_backends.replies.cache import Cached, ReplyStore
from ...llm_backends.serving.openai_backend import NO_KEY, OpenAIBackend
from ..runs.options import Count
from .frame import RATIO, BenchOptions, alternate, compare, publish, ratio_row, scratch_folder, timed


@dataclass
class BenchBackend(BenchOptions):
    """Requests per second of the cached server backend, half of them duplicates, against a bare client of openai."""

    server: str = "http://127.0.0.1:8000/v1"
    """Base URL of any OpenAI-compatible server."""
    model: str = "model"
    """Name of the model on that server."""
    requests: Annotated[int, Ge(2)] = 256
    """Number of requests to the cached backend, half of them duplicates. The bare client sends half as many, all
    different."""
    concurrency: Count = 16
    """Maximum number of concurrent requests, on each side."""
    max_tokens: Count = 8
    """Maximum number of tokens of each reply."""
    rounds: Count = 3
    """Measurements of each side, taken alternately after a warm-up."""


def run(options: BenchBackend, console: Console) -> dict[str, Any]:
    """Measures both sides and returns ``{"ours": ..., "theirs": ..., "ratio": ..., "settings": ...}``.

    Raises:
        InputError: if an option is out of range, or the server cannot be used.
        BackendError: if a request fails.
    """
    options.check()
    unique, name = options.requests // 2, "requests_per_second"
    sampling = Sampling(max_tokens=options.max_tokens, temperature=0.0)
    sent: list[int] = []
    sent_again: list[int] = []

    # New texts, which are in no prefix cache of the server, of equal length on both sides.
    def texts(side: str, number: int) -> list[str]:
        return [f"{side} {number:03d}-{i:05d}: name a word." for i in range(unique)]

    with scratch_folder() as scratch:

        def ours(number: int) -> float:
            once, store = texts("A", number), ReplyStore(scratch / f"{number}.db")
            inner = OpenAIBackend(options.model, options.server, concurrency=options.concurrency, attempts=2)
            cached = Cached(inner, store)
            inner.sender.connected()  # connects before the clock starts, as the bare client does
            results, seconds = timed(lambda: cached.generate(once + once[::-1], sampling))
            for result in results:
                if isinstance(result, BackendError):
                    raise result
            sent.append(inner.usage.requests)
            Cached(inner, store).generate(once, sampling)
            sent_again.append(inner.usage.requests - sent[-1])
            return unique / seconds

        def theirs(number: int) -> float:
            return unique / asyncio.run(_bare(options, texts("B", number)))

        figures = compare(name, **alternate({"ours": ours, "theirs": theirs}, options.rounds))
    figures["ours"] |= {"sent": max(sent), "sent_again": max(sent_again)}
    figures["theirs"] |= {"sent": unique}
    rows = [
        ("", "cached backend (ours)", "bare client", RATIO),
        ratio_row("different requests per second", name, figures, ".1f"),
        ("requests sent", str(max(sent)), str(unique), ""),
        ("requests sent when repeated", str(max(sent_again)), "", ""),
    ]
    title = f"{options.requests} requests, half of them duplicates, {options.concurrency} in flight"
    return publish(options, figures, title, rows, console)


async def _bare(options: BenchBackend, texts: list[str]) -> float:
    """Sends as many different requests with the bare client and returns the seconds for all of them."""
    from openai import AsyncOpenAI

    key = os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY
    slots = asyncio.Semaphore(options.concurrency)
    async with AsyncOpenAI(base_url=options.server, api_key=key, max_retries=0) as client:

        async def send(text: str) -> None:
            async with slots:
                await client.chat.completions.create(
                    model=options.model,
                    messages=[{"role": "user", "content": text}],
                    max_tokens=options.max_tokens,
                    temperature=0.0,
                )

        begun = time.perf_counter()
        await asyncio.gather(*(send(text) for text in texts))
        return time.perf_counter() - begun
