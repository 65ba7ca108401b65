"""``instructgym bench backend``: compares the cached server backend with a bare concurrent client."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...llm_backends import BackendError, Sampling
from ...llm_backends.errors import InputError
from ...llm_backends.replies.cache import Cached, ReplyStore
from ...llm_backends.serving.openai_backend import NO_KEY, OpenAIBackend
from ..runs.folder import write_json
from ..runs.options import check_output


@dataclass
class BenchBackend:
    """Requests per second of the cached server backend, half of them duplicates, against a bare client of openai."""

    server: str = "http://127.0.0.1:8000/v1"
    """Base URL of any OpenAI-compatible server."""
    model: str = "model"
    """Name of the model on that server."""
    requests: int = 256
    """Number of requests to the cached backend, half of them duplicates. The bare client sends half as many, all
    different."""
    concurrency: int = 16
    """Maximum number of concurrent requests, on each side."""
    max_tokens: int = 8
    """Maximum number of tokens of each reply."""
    rounds: int = 3
    """Measurements of each side, taken alternately after a warm-up."""
    json: str = ""
    """JSON file for the results. Empty: do not write one."""


def run(options: BenchBackend, console: Console | None = None) -> dict[str, Any]:
    """Measures both sides and returns ``{"ours": ..., "theirs": ..., "ratio": ..., "settings": ...}``.

    Raises:
        InputError: if an option is out of range, or the server cannot be used.
        BackendError: if a request fails.
    """
    console = console or Console()
    for name in ("requests", "concurrency", "max_tokens", "rounds"):
        if getattr(options, name) < 1 + (name == "requests"):
            raise InputError(f"--{name} must be at least {1 + (name == 'requests')}, got {getattr(options, name)}")
    if options.json:
        check_output(Path(options.json))
    unique = options.requests // 2
    our_rates: list[float] = []
    client_rates: list[float] = []
    sent: list[int] = []
    sent_again: list[int] = []
    with tempfile.TemporaryDirectory(prefix="instructgym-bench-") as scratch:
        for number in range(options.rounds + 1):
            # New texts, which are in no prefix cache of the server, of equal length on both sides.
            texts = [[f"{side} {number:03d}-{i:05d}: name a word." for i in range(unique)] for side in "AB"]
            store = ReplyStore(Path(scratch) / f"{number}.db")
            seconds, first, second = _ours(options, store, texts[0])
            client_seconds = asyncio.run(_bare(options, texts[1]))
            sent.append(first)
            sent_again.append(second)
            if number:  # the first round warms up
                our_rates.append(unique / seconds)
                client_rates.append(unique / client_seconds)
    # Ratios within a round: both sides are measured one right after the other.
    ratios = np.array(our_rates) / np.array(client_rates)
    figures = {
        "ours": {"requests_per_second": float(np.median(our_rates)), "sent": max(sent), "sent_again": max(sent_again)},
        "theirs": {"requests_per_second": float(np.median(client_rates)), "sent": unique},
        "ratio": {
            "requests_per_second": float(np.median(ratios)),
            "requests_per_second_min": float(ratios.min()),
            "requests_per_second_max": float(ratios.max()),
        },
        "settings": {key: value for key, value in vars(options).items() if key != "json"},
    }
    _print(options, figures, console)
    if options.json:
        write_json(Path(options.json), figures)
    return figures


def _ours(options: BenchBackend, store: ReplyStore, texts: list[str]) -> tuple[float, int, int]:
    """Returns the seconds for all requests, how many of them were sent, and how many were sent on a repetition."""
    inner = OpenAIBackend(options.model, options.server, concurrency=options.concurrency, attempts=2)
    backend = Cached(inner, store)
    sampling = Sampling(max_tokens=options.max_tokens, temperature=0.0)
    inner.sender.connected()  # connects before the clock starts, as the bare client does
    begun = time.perf_counter()
    for result in backend.generate(texts + texts[::-1], sampling):
        if isinstance(result, BackendError):
            raise result
    seconds = time.perf_counter() - begun
    first = inner.usage.requests
    Cached(inner, store).generate(texts, sampling)
    return seconds, first, inner.usage.requests - first


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


def _print(options: BenchBackend, figures: dict[str, Any], console: Console) -> None:
    """Prints the results as a table."""
    name, ratio = "requests_per_second", figures["ratio"]
    table = Table(title=f"{options.requests} requests, half of them duplicates, {options.concurrency} in flight")
    for title in ("", "cached backend (ours)", "bare client", "ratio (median, min to max)"):
        table.add_column(title, overflow="fold")
    spread = f"{ratio[name]:.2f} ({ratio[f'{name}_min']:.2f} to {ratio[f'{name}_max']:.2f})"
    ours, client = figures["ours"], figures["theirs"]
    table.add_row("different requests per second", f"{ours[name]:.1f}", f"{client[name]:.1f}", spread)
    table.add_row("requests sent", str(ours["sent"]), str(client["sent"]), "")
    table.add_row("requests sent when repeated", str(ours["sent_again"]), "", "")
    console.print(table)
