"""A time limit over several stages: each gets what is left, and an experiment that is cut short says so."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from rich.console import Console

from .token_training import OutOfTimeError


class Deadline:
    """What is left of an experiment's time, which begins when this is made.

    Args:
        minutes: in all; 0 for no limit.
    """

    def __init__(self, minutes: float = 0.0) -> None:
        self.minutes, self.begun = minutes, time.monotonic()

    @property
    def left(self) -> float:
        """Minutes; 0 for no limit.

        Raises:
            OutOfTimeError: if nothing is left.
        """
        left = self.minutes - (time.monotonic() - self.begun) / 60 if self.minutes else 0.0
        if self.minutes and left <= 0:
            raise OutOfTimeError
        return left

    def check(self) -> None:
        """Raises OutOfTimeError if nothing is left."""
        _ = self.left

    def run(self, run: Callable[[Any, Console], dict[str, Any]], options: Any, console: Console) -> dict[str, Any]:
        """Runs a stage in what is left of the time.

        Raises:
            OutOfTimeError: if nothing is left, or the stage has not come to its end.
        """
        results = run(replace(options, minutes=self.left), console)
        if results.get("status") == "stopped":
            raise OutOfTimeError
        return results


def in_time(work: Callable[[Any, Console], Any]) -> Callable[[Any, Console], Any]:
    """The same work, which says so where the time is over, and then returns ``{"status": "stopped"}``."""

    @wraps(work)
    def run(options: Any, console: Console) -> Any:
        try:
            return work(options, console)
        except OutOfTimeError:
            console.print(f"out of time: the same command goes on in {options.root}")
            return {"status": "stopped"}

    return run
