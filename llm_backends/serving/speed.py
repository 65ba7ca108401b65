"""Measurement of a server's throughput and latency at several numbers of requests in flight."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..base import BackendError, Sampling
from ..errors import InputError
from .openai_backend import OpenAIBackend

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend power "
    "hour game line end member law car city name team minute idea body back parent face level office door health person"
).split()
"""Words that are one token each in most tokenizers."""

NEAR_BEST = 0.9
"""Share of the best throughput at which a lower level is preferred: fewer requests in flight mean shorter waits."""


@dataclass(frozen=True)
class Speed:
    """The measurements at one level, that is, at one number of requests in flight."""

    concurrency: int
    """Maximum number of requests in flight."""
    requests: int
    """Number of requests sent."""
    seconds: float
    """Time from the first request to the last reply."""
    completion_tokens: int
    """Completion tokens as the server counts them; 0 if it does not."""
    errors: int
    """Number of requests that failed."""
    median_latency: float | None
    """Median time per answered request, in seconds; None if none was answered."""
    p95_latency: float | None
    """95th percentile of the time per answered request, in seconds; None if none was answered."""
    error: str = ""
    """Text of the first error; empty if there was none."""

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens per second over the whole level."""
        return self.completion_tokens / self.seconds

    @property
    def requests_per_second(self) -> float:
        """Answered requests per second over the whole level."""
        return (self.requests - self.errors) / self.seconds


def probe_prompts(count: int, tokens: int, salt: object) -> list[str]:
    """Returns random prompts that share no prefix, so that a prefix cache does not help.

    Args:
        count: number of prompts.
        tokens: approximate length of each, in tokens.
        salt: seed of the random words; another salt gives other prompts.
    """
    rng = random.Random(str(salt))
    return [" ".join(rng.choices(WORDS, k=tokens)) for _ in range(count)]


def measure_speed(
    build: Callable[[int], OpenAIBackend],
    levels: Sequence[int],
    requests: int,
    prompt_tokens: int,
    max_tokens: int,
    on_level: Callable[[int], None] = lambda level: None,
) -> list[Speed]:
    """Measures each level, after one request to warm up.

    Args:
        build: returns a new backend that sends at most the given number of requests at a time.
        levels: numbers of requests in flight.
        requests: number of prompts per level.
        prompt_tokens: approximate length of each prompt, in tokens.
        max_tokens: maximum length of each completion, in tokens.
        on_level: called with each level before it is measured.

    Returns:
        The measurements of each level, in the order of ``levels``.
    """
    # Salted with the time, so that another run does not find its prompts in the server's prefix cache.
    salt, sampling = time.time_ns(), Sampling(max_tokens=max_tokens)
    _timed(build(1), probe_prompts(1, prompt_tokens, (salt, "warm-up"))[0], sampling)
    speeds = []
    for level in levels:
        on_level(level)
        speeds.append(_level(build(level), level, probe_prompts(requests, prompt_tokens, (salt, level)), sampling))
    return speeds


def recommended(speeds: Sequence[Speed]) -> int | None:
    """Returns the smallest concurrency with nearly the best throughput among the levels without errors, or None.

    Throughput is in tokens per second, or in requests per second if the server counts no tokens.

    Args:
        speeds: measurements of the levels; None is returned if all of them have errors.
    """
    sound = [speed for speed in speeds if not speed.errors]
    counted = all(speed.completion_tokens for speed in sound)
    rates = {speed.concurrency: speed.tokens_per_second if counted else speed.requests_per_second for speed in sound}
    return min((level for level, rate in rates.items() if rate >= NEAR_BEST * max(rates.values())), default=None)


def _level(backend: OpenAIBackend, level: int, prompts: Sequence[str], sampling: Sampling) -> Speed:
    """Sends all prompts, ``level`` at a time, and returns the measurements."""
    begun = time.perf_counter()
    # One thread per request in flight: one batched call would not show how long each request took.
    with ThreadPoolExecutor(level) as pool:
        outcomes = list(pool.map(lambda prompt: _timed(backend, prompt, sampling), prompts))
    seconds = time.perf_counter() - begun
    latencies = [latency for latency, error in outcomes if not error]
    errors = [error for _, error in outcomes if error]
    median, p95 = np.percentile(latencies, (50, 95)).tolist() if latencies else (None, None)
    written = backend.usage.completion_tokens
    return Speed(level, len(prompts), seconds, written, len(errors), median, p95, errors[0] if errors else "")


def _timed(backend: OpenAIBackend, prompt: str, sampling: Sampling) -> tuple[float, str]:
    """Sends one prompt and returns the seconds that it took and the error's text, empty if there is none."""
    begun = time.perf_counter()
    try:
        [result] = backend.generate([prompt], sampling)
    except InputError as error:  # ends a run elsewhere, but is one failed request of this measurement
        return 0.0, str(error)
    return time.perf_counter() - begun, str(result) if isinstance(result, BackendError) else ""
