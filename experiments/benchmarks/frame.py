"""What every benchmark does: check options, measure sides in turn, compare their rates, print a table, write a file."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console

from ..runs.folder import write_json
from ..runs.options import check_fields, check_output
from ..runs.report import rich_table

RATIO = "ratio (median, min to max)"
"""Title of the column of :func:`spread_text`."""

Measurement = TypeVar("Measurement")


@dataclass
class BenchOptions:
    """Options of every benchmark."""

    json: str = ""
    """JSON file for the results. Empty: do not write one."""

    def check(self) -> None:
        """Checks that the options are in range and the JSON file can be written.

        Raises:
            InputError: if an option is wrong; the message names it.
        """
        check_fields(self)
        if self.json:
            check_output(Path(self.json))

    def settings(self) -> dict[str, Any]:
        """Returns the options as the ``settings`` of the results."""
        return {key: value for key, value in vars(self).items() if key != "json"}


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields a folder that is deleted at the end of the context."""
    with tempfile.TemporaryDirectory(prefix="instructgym-bench-") as folder:
        yield Path(folder)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Sets the number of threads of torch for as long as the context."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alternate(
    sides: Mapping[str, Callable[[int], Measurement]], rounds: int, warm_up: int = 1
) -> dict[str, list[Measurement]]:
    """Measures all sides one right after the other, round after round.

    Args:
        sides: functions that take the number of the round and return a measurement, by side.
        rounds: measured rounds.
        warm_up: rounds before these.

    Returns:
        The measurements of each side in the measured rounds.
    """
    measurements: dict[str, list[Measurement]] = {side: [] for side in sides}
    for number in range(warm_up + rounds):
        for side, measure in sides.items():
            measurements[side].append(measure(number))
    return {side: values[warm_up:] for side, values in measurements.items()}


def timed(
    function: Callable[[], Measurement], clock: Callable[[], float] = time.perf_counter
) -> tuple[Measurement, float]:
    """Returns the result of a function and the seconds that its call took by a clock."""
    begun = clock()
    result = function()
    return result, clock() - begun


def compare(name: str, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Returns ``{"ours": ..., "theirs": ..., "ratio": ...}`` of a rate: medians over rounds, and their ratio."""
    return {
        "ours": {name: float(np.median(ours))},
        "theirs": {name: float(np.median(theirs))},
        "ratio": spread(name, ours, theirs),
    }


def spread(name: str, above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Returns median, minimum and maximum of the ratios within a round, in which all sides meet the same machine."""
    ratios = np.array(above) / np.array(below)
    return {name: float(np.median(ratios)), f"{name}_min": float(ratios.min()), f"{name}_max": float(ratios.max())}


def spread_text(name: str, ratio: Mapping[str, float]) -> str:
    """Returns the result of :func:`spread` as a cell of a table."""
    return f"{ratio[name]:.2f} ({ratio[f'{name}_min']:.2f} to {ratio[f'{name}_max']:.2f})"


def ratio_row(title: str, name: str, figures: Mapping[str, Any], form: str) -> tuple[str, str, str, str]:
    """Returns a row of a table: a title, the measure of both sides in a format, and the spread of their ratio."""
    ours, theirs = (f"{figures[side][name]:{form}}" for side in ("ours", "theirs"))
    return title, ours, theirs, spread_text(name, figures["ratio"])


def publish(
    options: BenchOptions,
    figures: dict[str, Any],
    title: str,
    rows: Sequence[Sequence[str]],
    console: Console,
    remark: str = "",
) -> dict[str, Any]:
    """Prints the results of a benchmark, writes them if the options name a file, and returns them.

    Args:
        options: options of the benchmark.
        figures: results; a ``note`` among their ``settings`` is printed below the table. Without ``settings``, they get
            the options as settings.
        title: title of the table.
        rows: rows of the table; the first has the titles of the columns.
        console: where to print.
        remark: line after the table; empty: none.
    """
    figures.setdefault("settings", options.settings())
    table = rich_table(rows)
    table.title, table.caption = title, figures["settings"].get("note")
    console.print(table)
    if remark:
        console.print(remark)
    if options.json:
        write_json(Path(options.json), figures)
    return figures
