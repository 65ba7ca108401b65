"""How ``instructgym evaluate`` shows its results: tables and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..runs.plots import COLOURS, panels
from ..runs.rouge_evaluation import Comparison


def tables(
    metrics: Mapping[str, Mapping[str, float]], pairs: Mapping[str, Comparison], counts: Mapping[str, Any]
) -> list[Table]:
    """The results for the terminal.

    Args:
        metrics: by arm: ``rouge_l`` with its interval, ``exact_match``, ``tokens`` and ``finished``.
        pairs: by name the comparisons.
        counts: of tasks and instances.
    """
    arms = Table(title=f"{counts['tasks']} tasks, {counts['instances']} instances (macro averages, percent)")
    for column in ("arm", "ROUGE-L", "95% interval", "exact match", "finished", "tokens"):
        arms.add_column(column, justify="left" if column == "arm" else "right")
    for name, row in metrics.items():
        arms.add_row(
            name,
            f"{100 * row['rouge_l']:.1f}",
            f"{100 * row['rouge_l_low']:.1f} to {100 * row['rouge_l_high']:.1f}",
            f"{100 * row['exact_match']:.1f}",
            f"{100 * row['finished']:.0f}",
            f"{row['tokens']:.0f}",
        )
    if not pairs:
        return [arms]
    compared = Table(title="task by task, ROUGE-L (shares of tasks and points)")
    for column in ("comparison", "won", "tied", "lost", "difference", "95% interval"):
        compared.add_column(column, justify="left" if column == "comparison" else "right")
    for name, pair in pairs.items():
        shares = (f"{100 * share:.0f}%" for share in pair.shares.values())
        ends = f"{100 * pair.low:+.1f} to {100 * pair.high:+.1f}"
        compared.add_row(name, *shares, f"{100 * pair.difference:+.1f}", ends)
    return [arms, compared]


def plot_rouge(metrics: Mapping[str, Mapping[str, float]], pairs: Mapping[str, Comparison], path: Path) -> Path:
    """Macro ROUGE-L of the arms, and its differences with the shares of tasks won, as bars with 95% intervals.

    Args:
        metrics: as of :func:`tables`.
        pairs: likewise.
        path: the PNG.
    """
    figure, axes = panels(2 if pairs else 1)
    rows = list(metrics.values())
    means, low, high = (np.array([row[key] for row in rows]) for key in ("rouge_l", "rouge_l_low", "rouge_l_high"))
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(rows))]
    errors = np.maximum([means - low, high - means], 0)
    axes[0, 0].bar(range(len(rows)), means, yerr=errors, color=colours, capsize=4)
    axes[0, 0].set_xticks(range(len(rows)), list(metrics))
    axes[0, 0].set(title="ROUGE-L, mean over tasks", ylabel="F-measure")
    if pairs:
        right, found = axes[0, 1], list(pairs.values())
        gaps, low, high = (np.array([getattr(p, key) for p in found]) for key in ("difference", "low", "high"))
        right.barh(
            range(len(found)),
            gaps,
            xerr=np.maximum([gaps - low, high - gaps], 0),
            color=COLOURS[6],
            alpha=0.6,
            capsize=4,
        )
        labels = [
            f"{name}\nwon {100 * p.shares['won']:.0f}%, tied {100 * p.shares['tied']:.0f}%" for name, p in pairs.items()
        ]
        right.set_yticks(range(len(found)), labels, fontsize=8)
        right.axvline(0, color="#555555", linewidth=1)
        right.invert_yaxis()
        right.set(title="Difference in ROUGE-L", xlabel="F-measure, mean over tasks")
    figure.suptitle("bars: 95% bootstrap interval over tasks", fontsize=9)
    figure.savefig(path, dpi=130)
    return path
