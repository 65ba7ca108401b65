"""How fast a server answers at which number of requests in flight."""

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
"""Each is one token of most tokenizers."""

NEAR_BEST = 0.9
"""A level with this share of the best throughput is as good: fewer requests in flight mean shorter waits."""


@dataclass(frozen=True)
class Speed:
    """What was measured at one number of requests in flight."""

    concurrency: int
    requests: int
    seconds: float
    """From the first request to the last reply."""
    completion_tokens: int
    """As the server counts them; 0 where it does not."""
    errors: int
    median_latency: float | None
    """Seconds, of the requests that were answered; None where none was."""
    p95_latency: float | None
    error: str = ""
    """The first one."""

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens per second of the whole level."""
        return self.completion_tokens / self.seconds

    @property
    def requests_per_second(self) -> float:
        """Answered requests per second of the whole level."""
        return (self.requests - self.errors) / self.seconds


def probe_prompts(count: int, tokens: int, salt: object) -> list[str]:
    """Different prompts of about so many tokens, which share no beginning that a prefix cache could know."""
    chooser = random.Random(str(salt))
    return [" ".join(chooser.choices(WORDS, k=tokens)) for _ in range(count)]


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
        build: gives a fresh backend with that many requests in flight.
        levels: numbers of requests in flight.
        requests: prompts per level.
        prompt_tokens: about how long each is.
        max_tokens: of each completion.
        on_level: called before each level.
    """
    salt, sampling = time.time_ns(), Sampling(max_tokens=max_tokens)  # another run must not find its prompts cached
    _timed(build(1), probe_prompts(1, prompt_tokens, (salt, "warm-up"))[0], sampling)
    speeds = []
    for level in levels:
        on_level(level)
        speeds.append(_level(build(level), level, probe_prompts(requests, prompt_tokens, (salt, level)), sampling))
    return speeds


def recommended(speeds: Sequence[Speed]) -> int | None:
    """The smallest concurrency with nearly the best throughput among the levels without errors; None if there is none.

    Throughput is in tokens, or in requests where the server counts no tokens.
    """
    sound = [speed for speed in speeds if not speed.errors]
    counted = all(speed.completion_tokens for speed in sound)
    rates = {speed.concurrency: speed.tokens_per_second if counted else speed.requests_per_second for speed in sound}
    return min((level for level, rate in rates.items() if rate >= NEAR_BEST * max(rates.values())), default=None)


def _level(backend: OpenAIBackend, level: int, prompts: Sequence[str], sampling: Sampling) -> Speed:
    begun = time.perf_counter()
    with ThreadPoolExecutor(level) as pool:  # a thread per request in flight sees how long each took
        outcomes = list(pool.map(lambda prompt: _timed(backend, prompt, sampling), prompts))
    seconds = time.perf_counter() - begun
    latencies = [taken for taken, error in outcomes if not error]
    errors = [error for _, error in outcomes if error]
    median, p95 = np.percentile(latencies, (50, 95)).tolist() if latencies else (None, None)
    written = backend.usage.completion_tokens
    return Speed(level, len(prompts), seconds, written, len(errors), median, p95, errors[0] if errors else "")


def _timed(backend: OpenAIBackend, prompt: str, sampling: Sampling) -> tuple[float, str]:
    begun = time.perf_counter()
    try:
        [result] = backend.generate([prompt], sampling)
    except InputError as error:  # a refusal that would end a whole run is one error here
        return 0.0, str(error)
    return time.perf_counter() - begun, str(result) if isinstance(result, BackendError) else ""
