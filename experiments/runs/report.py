"""Reports: the finished runs that they gather, their tables (Markdown and terminal), files and figures.

Arms of an experiment take their colours from :data:`COLOURS`, in the order of the arms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...llm_backends.records import read_records
from .folder import read_json, write_json
from .options import check_output
from .statistics import interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""The palette of Okabe and Ito, which colour-blind readers can distinguish, with a grey instead of its yellow."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as its folder holds it."""

    folder: Path
    command: str
    options: dict[str, Any]
    metrics: dict[str, Any]
    counts: dict[str, Any]


def finished_run(folder: Path) -> FinishedRun | None:
    """Returns the run in a folder; None if the folder holds no finished run."""
    config, results = read_json(folder / "config.json"), read_json(folder / "results.json")
    if config is None or results is None or results.get("status") != "finished":
        return None
    return FinishedRun(folder, config["command"], config["options"], results["metrics"], results["counts"])


def finished_runs(roots: Sequence[Path], *commands: str) -> list[FinishedRun]:
    """Returns the finished runs of the given commands in folders and their subfolders, each once, sorted by path."""
    folders = dict.fromkeys(path.parent for root in roots for path in sorted(root.rglob("results.json")))
    runs = [run for folder in folders if (run := finished_run(folder)) is not None]
    return [run for run in runs if run.command in commands]


def differing(first: Mapping[str, Any], second: Mapping[str, Any], names: Iterable[str]) -> str:
    """Returns those of the named options in which two runs differ, separated by commas; empty if there are none."""
    return ", ".join(name for name in names if first.get(name) != second.get(name))


def write_report(
    out: Path,
    tables: Sequence[tuple[str, Sequence[Sequence[str]]]],
    console: Console,
    title: str = "",
    notes: Sequence[str] = (),
    results: Mapping[str, Any] | None = None,
    plots: Mapping[str, Callable[[Path], object]] = {},
) -> None:
    """Writes ``report.md``, ``results.json`` and figures into a folder, and prints the tables.

    Args:
        out: folder of the report.
        tables: heading (may be empty) and rows of each table, the first row being the header.
        console: console to print the tables on.
        title: heading of the report; without one there are no notes.
        notes: paragraphs that explain the tables.
        results: content of ``results.json``; None: the file is not written.
        plots: functions that draw a figure into the file they get, by name of the file.

    Raises:
        InputError: if the report cannot be written.
    """
    check_output(out / "report.md")
    out.mkdir(parents=True, exist_ok=True)
    lines = [f"# {title}", "", *notes, ""] if title else []
    for heading, rows in tables:
        lines += [f"## {heading}", ""] * bool(heading) + [markdown(rows)]
        console.print(rich_table(rows))
    (out / "report.md").write_text("\n".join(lines), "utf-8")
    for name, plot in plots.items():
        plot(out / name)
    if results is not None:
        write_json(out / "results.json", results)
    console.print(f"wrote {' and '.join(str(out / name) for name in ('report.md', *plots))}")


def table_rows(
    title: str, rows: Mapping[str, Mapping[str, Any]], columns: Sequence[tuple[str, str, str]]
) -> list[list[str]]:
    """Returns the cells of a table of named rows: a header, then the name and the values of each row.

    Args:
        title: title of the column of names.
        rows: values by key, by name of the row; the cell of a value that is missing or None is empty.
        columns: title, key and format of each further column, such as ``("tokens", "tokens", ".1f")``.
    """
    header = [title, *(column for column, _, _ in columns)]
    return [header] + [
        [name, *("" if (value := row.get(key)) is None else f"{value:{form}}" for _, key, form in columns)]
        for name, row in rows.items()
    ]


def with_ends(figures: Mapping[str, float], name: str) -> tuple[float, float, float]:
    """Returns a figure and the ends of its interval, which are called ``NAME_low`` and ``NAME_high``."""
    return figures[name], figures[f"{name}_low"], figures[f"{name}_high"]


def percent(value: float, low: float, high: float, form: str = ".1f") -> str:
    """Returns a share and its interval in percent, such as ``41.5 (38.0 to 45.1)``."""
    return f"{100 * value:{form}} ({100 * low:{form}} to {100 * high:{form}})"


def panels(columns: int, rows: int = 1) -> tuple[Any, Any]:
    """Returns a figure and its grid of axes, shape (rows, columns)."""
    # Imported here, because commands that draw nothing must start without matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Returns the mean over the last ``window`` values at each position; at the start, over those that there are.

    Returns:
        float64, shape (values,).
    """
    # Differences of cumulative sums: total[k] is the sum of the first k values.
    total = np.cumsum(np.concatenate([[0.0], np.asarray(values, dtype=np.float64)]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def plot_token_training(run: Path, path: Path) -> Path:
    """Draws the learning curves of a token-level run: reward, KL and entropy over the number of labels seen.

    Args:
        run: run folder whose ``metrics.jsonl`` is read.
        path: path of the PNG to write.

    Returns:
        The path of the PNG.
    """
    rows = read_records(run / "metrics.jsonl")
    terms = {"rollout/reward": "reward", "rollout/terms/correct": "correct", "rollout/terms/format": "well-formed"}
    return _plot_updates(rows, [row["rollout/labels"] for row in rows], "labels seen", terms, path)


def plot_instance_training(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draws the learning curves of training on instances: reward, format rate, KL and entropy over updates.

    Args:
        rows: rows of ``metrics.jsonl``, one per update.
        path: path of the PNG to write.

    Returns:
        The path of the PNG.
    """
    terms = {"rollout/reward": "reward", "rollout/terms/well_formed": "well-formed"}
    return _plot_updates(rows, list(range(1, len(rows) + 1)), "updates", terms, path)


def _plot_updates(
    rows: Sequence[Mapping[str, Any]], x: Sequence[float], label: str, terms: Mapping[str, str], path: Path
) -> Path:
    """Draws means of rollouts in one panel, KL and entropy in another.

    Args:
        rows: rows of ``metrics.jsonl``.
        x: horizontal position of each row.
        label: label of the horizontal axis.
        terms: metric key to name in the legend, for the first panel; a metric that some row lacks is not drawn.
        path: path of the PNG to write.

    Returns:
        The path of the PNG.
    """
    figure, axes = panels(2)
    left, right = axes[0]
    for k, (key, name) in enumerate(terms.items()):
        values = [row[key] for row in rows if row.get(key) is not None]
        if len(values) == len(x):
            left.plot(x, smooth(values, max(len(values) // 10, 1)), color=COLOURS[k], linewidth=2, label=name)
    left.set(title="Rollouts (smoothed)", xlabel=label, ylabel="mean per episode")
    for k, (key, name) in enumerate((("train/kl", "KL per episode (nats)"), ("train/entropy", "entropy (nats)"))):
        right.plot(x, [row.get(key) for row in rows], color=COLOURS[k], linewidth=2, label=name)
    right.set(title="Policy", xlabel=label)
    for axis in (left, right):
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    return path


def band(axis: Any, grid: np.ndarray, rows: np.ndarray, name: str, colour: str) -> None:
    """Draws the mean of several curves and its 95% interval by Student's t.

    Args:
        axis: axes to draw on.
        grid: horizontal positions, shape (n,).
        rows: values of the curves, shape (curves, n); a single curve gets no interval.
        name: name in the legend.
        colour: colour of the line and the band.
    """
    mean = rows.mean(axis=0)
    axis.plot(grid, mean, color=colour, linewidth=2, label=name)
    if len(rows) > 1:
        half = np.array([interval(rows[:, i].tolist())[1] for i in range(rows.shape[1])])
        axis.fill_between(grid, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of cells as a Markdown table; the first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def rich_table(rows: Sequence[Sequence[str]]) -> Table:
    """Returns rows of cells as a table for the terminal; the first row is the header."""
    table = Table()
    for title in rows[0]:
        table.add_column(title, overflow="fold")
    for row in rows[1:]:
        # As Text, so that brackets in a cell are not read as markup.
        table.add_row(*map(Text, row))
    return table
