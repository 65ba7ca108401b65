"""Tables and figures of reports: Markdown, the terminal, curves with intervals; colours follow one order of arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from ...llm_backends.records import read_records
from .statistics import interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's palette, distinguishable by colour-blind readers, with a grey for its yellow."""


def panels(columns: int, rows: int = 1) -> tuple[Any, Any]:
    """A figure and its grid of axes, shape (rows, columns)."""
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
    """Mean over the last ``window`` values at each position (fewer at the start)."""
    total = np.cumsum(np.concatenate([[0.0], np.asarray(values, dtype=np.float64)]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def plot_token_training(run: Path, path: Path) -> Path:
    """Learning curves of one token-level run: reward, KL and entropy over the labels it has seen.

    Args:
        run: its folder, of which ``metrics.jsonl`` is read.
        path: the PNG.
    """
    rows = read_records(run / "metrics.jsonl")
    terms = {"rollout/reward": "reward", "rollout/terms/correct": "correct", "rollout/terms/format": "well-formed"}
    return _plot_updates(rows, [row["rollout/labels"] for row in rows], "labels seen", terms, path)


def plot_instance_training(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Learning curves of training on instances: reward, format rate, KL and entropy over updates.

    Args:
        rows: of ``metrics.jsonl``.
        path: the PNG.
    """
    terms = {"rollout/reward": "reward", "rollout/terms/well_formed": "well-formed"}
    return _plot_updates(rows, list(range(1, len(rows) + 1)), "updates", terms, path)


def _plot_updates(
    rows: Sequence[Mapping[str, Any]], x: Sequence[float], label: str, terms: Mapping[str, str], path: Path
) -> Path:
    """Means of rollouts by their key, next to KL and entropy."""
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
    """Draws the mean of several curves and its 95% interval.

    Args:
        axis: where to draw.
        grid: shape (n,), the horizontal positions.
        rows: shape (curves, n); of a single curve no interval is drawn.
        name: in the legend.
        colour: of line and band.
    """
    mean = rows.mean(axis=0)
    axis.plot(grid, mean, color=colour, linewidth=2, label=name)
    if len(rows) > 1:
        half = np.array([interval(rows[:, i].tolist())[1] for i in range(rows.shape[1])])
        axis.fill_between(grid, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def rich_table(rows: Sequence[Sequence[str]]) -> Table:
    """The rows as a table for the terminal; brackets in a cell are text, not markup."""
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table
