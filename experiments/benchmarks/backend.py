"""``instructgym bench backend``: cache and limits against a bare concurrent client, on the same server."""

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
    """Name of its model."""
    requests: int = 256
    """Requests of ours; half of them are duplicates, and the bare client sends the other half."""
    concurrency: int = 16
    """Requests in flight, of both."""
    max_tokens: int = 8
    """Tokens of each reply at most."""
    rounds: int = 3
    """Measurements of each side, taken in turn after one to warm up."""
    json: str = ""
    """File for the figures, as JSON."""


def run(options: BenchBackend, console: Console | None = None) -> dict[str, Any]:
    """Measures and returns ``{"ours": ..., "theirs": ..., "ratio": ..., "settings": ...}``.

    Raises:
        InputError: for options out of range, or a server that cannot be used.
        BackendError: if a request fails.
    """
    console = console or Console()
    for name in ("requests", "concurrency", "max_tokens", "rounds"):
        if getattr(options, name) < 1 + (name == "requests"):
            raise InputError(f"--{name} must be at least {1 + (name == 'requests')}, got {getattr(options, name)}")
    if options.json:
        check_output(Path(options.json))
    unique = options.requests // 2
    mine: list[float] = []
    plain: list[float] = []
    sent: list[int] = []
    again: list[int] = []
    with tempfile.TemporaryDirectory(prefix="instructgym-bench-") as scratch:
        for number in range(options.rounds + 1):
            # Texts that no prefix cache of the server has seen, of one length on both sides.
            texts = [[f"{side} {number:03d}-{i:05d}: name a word." for i in range(unique)] for side in "AB"]
            store = ReplyStore(Path(scratch) / f"{number}.db")
            seconds, first, second = _ours(options, store, texts[0])
            their_seconds = asyncio.run(_bare(options, texts[1]))
            sent.append(first)
            again.append(second)
            if number:  # the first round warms up
                mine.append(unique / seconds)
                plain.append(unique / their_seconds)
    ratios = np.array(mine) / np.array(plain)
    figures = {
        "ours": {"requests_per_second": float(np.median(mine)), "sent": max(sent), "sent_again": max(again)},
        "theirs": {"requests_per_second": float(np.median(plain)), "sent": unique},
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
    """Seconds for all requests, how many of them were sent, and how many when all are asked once more."""
    inner = OpenAIBackend(options.model, options.server, concurrency=options.concurrency, attempts=2)
    backend = Cached(inner, store)
    sampling = Sampling(max_tokens=options.max_tokens, temperature=0.0)
    inner.sender.connected()  # as the bare client is, before its time begins
    begun = time.perf_counter()
    for result in backend.generate(texts + texts[::-1], sampling):
        if isinstance(result, BackendError):
            raise result
    seconds = time.perf_counter() - begun
    first = inner.usage.requests
    Cached(inner, store).generate(texts, sampling)
    return seconds, first, inner.usage.requests - first


async def _bare(options: BenchBackend, texts: list[str]) -> float:
    """The same number of different requests by the client alone."""
    from openai import AsyncOpenAI

    key = os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY
    slots = asyncio.Semaphore(options.concurrency)
    async with AsyncOpenAI(base_url=options.server, api_key=key, max_retries=0) as client:

        async def one(text: str) -> None:
            async with slots:
                await client.chat.completions.create(
                    model=options.model,
                    messages=[{"role": "user", "content": text}],
                    max_tokens=options.max_tokens,
                    temperature=0.0,
                )

        begun = time.perf_counter()
        await asyncio.gather(*(one(text) for text in texts))
        return time.perf_counter() - begun


def _print(options: BenchBackend, figures: dict[str, Any], console: Console) -> None:
    name, ratio = "requests_per_second", figures["ratio"]
    table = Table(title=f"{options.requests} requests, half of them duplicates, {options.concurrency} in flight")
    for title in ("", "cached backend (ours)", "bare client", "ratio (median, min to max)"):
        table.add_column(title)
    spread = f"{ratio[name]:.2f} ({ratio[f'{name}_min']:.2f} to {ratio[f'{name}_max']:.2f})"
    ours, theirs = figures["ours"], figures["theirs"]
    table.add_row("different requests per second", f"{ours[name]:.1f}", f"{theirs[name]:.1f}", spread)
    table.add_row("requests sent", str(ours["sent"]), str(theirs["sent"]), "")
    table.add_row("sent when asked again", str(ours["sent_again"]), "", "")
    console.print(table)
