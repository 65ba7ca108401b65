"""The time limit of commands, and the display of their progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sized
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class OutOfTimeError(Exception):
    """Raised when the time limit of a run is reached; finished work is kept."""


class Deadline:
    """A time limit, of one run or shared by several stages; its clock starts on construction or after a replay.

    Args:
        minutes: the limit in minutes; 0: no limit.
        journal: journal of a run that is replayed, before its first request. The clock then starts with the first
            piece of work that adds a reply to the journal.
    """

    def __init__(self, minutes: float = 0.0, journal: Sized | None = None) -> None:
        self.minutes, self.begun = minutes, time.monotonic()
        self._journal, self._stored = journal, len(journal or ())

    def remaining(self) -> float:
        """Returns the remaining minutes, infinity without a limit; to be called before every piece of work."""
        now = time.monotonic()
        if self._journal is not None and len(self._journal) == self._stored:
            self.begun = now  # all replies so far were stored ones
        return self.minutes - (now - self.begun) / 60 if self.minutes else math.inf

    def reached(self) -> bool:
        """Returns whether the limit is reached; to be called before every piece of work."""
        return self.remaining() <= 0

    def check(self) -> None:
        """Checks the limit.

        Raises:
            OutOfTimeError: if it is reached.
        """
        if self.reached():
            raise OutOfTimeError

    @property
    def left(self) -> float:
        """Remaining minutes as an option of a stage: 0 without a limit.

        Raises:
            OutOfTimeError: if the limit is reached.
        """
        remaining = self.remaining()
        if remaining <= 0:
            raise OutOfTimeError
        return remaining if self.minutes else 0.0

    def run(self, run: Callable[[Any, Console], dict[str, Any]], options: Any, console: Console) -> dict[str, Any]:
        """Runs a stage within the remaining time and returns its results.

        Args:
            run: function of the stage.
            options: options of the stage; their ``minutes`` are replaced.
            console: console that shows progress.

        Raises:
            OutOfTimeError: if no time is left, or the stage stopped before its end.
        """
        results = run(replace(options, minutes=self.left), console)
        if results.get("status") == "stopped":
            raise OutOfTimeError
        return results


class StepProgress:
    """A context manager that shows progress: a rich bar on a terminal, otherwise a line per tenth of the steps.

    Args:
        label: text in front of the bar or line.
        total: number of steps.
        console: console to print on.
    """

    def __init__(self, label: str, total: int, console: Console) -> None:
        self.label, self.total, self.console = label, total, console
        self._tenth = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=total, note="")

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, completed: int, note: str = "") -> None:
        """Shows the number of completed steps.

        Args:
            completed: completed steps; more than the total counts as the total.
            note: text behind the bar or line.
        """
        completed = min(completed, self.total)
        self._bar.update(self._task, completed=completed, note=note)
        tenth = 10 * completed // max(self.total, 1)
        if not self.console.is_terminal and tenth > self._tenth:
            self._tenth = tenth
            self.console.print(f"{self.label}: {completed}/{self.total}  {note}".rstrip(), highlight=False)
