"""Figures of the evolve commands: the learning curve of a training, and a comparison of agents and baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runs.report import COLOURS, band, panels, smooth
from ..runs.statistics import interval

OPERATION_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#999999")

BARS = {
    "LLM queries per accepted instruction (fewer is better)": {
        "calls_per_accepted": "training included",
        "calls_per_accepted_generation": "generation only",
    },
    "Diversity of the accepted instructions": {
        "embedding_distance": "mean cosine distance",
        "distinct_2": "distinct-2",
    },
}
"""Panels of bars by title: two metrics and their names."""

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""Results of each seed, by name of the arm."""


def plot_training(episodes: Sequence[Mapping[str, Any]], updates: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Plots the learning curve of one run and the shares of the operations over its updates, and returns the path.

    Args:
        episodes: rows of ``episodes.jsonl``.
        updates: rows of ``metrics.jsonl``.
        path: PNG file to write.
    """
    figure, axes = panels(2)
    left, right = axes[0]
    if episodes:
        steps = [row["timesteps"] for row in episodes]
        returns = [row["return"] for row in episodes]
        left.scatter(steps, returns, s=14, alpha=0.35, color=COLOURS[0], linewidths=0, label="episode")
        curve, window = _learning_curve(steps, returns)
        left.plot(list(curve), list(curve.values()), color=COLOURS[0], linewidth=2, label=f"mean of the last {window}")
        left.legend(frameon=False)
    left.set(title="Return per episode", xlabel="environment steps", ylabel="return")
    names = sorted({key for row in updates for key in row if key.startswith("operations/")})
    if names:
        steps = [row["timesteps"] for row in updates]
        shares = np.array([[row.get(name) or 0.0 for row in updates] for name in names])
        right.stackplot(
            steps, shares, labels=[n.removeprefix("operations/") for n in names], colors=OPERATION_COLOURS, alpha=0.85
        )
        right.set_ylim(0, 1)
        # Reversed, so that the legend lists the operations as they are stacked, from top to bottom.
        right.legend(reverse=True, frameon=False, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    right.set(title="Operations chosen (last 96 steps)", xlabel="environment steps", ylabel="share")
    figure.savefig(path, dpi=130)
    return path


def _learning_curve(steps: Sequence[int], returns: Sequence[float]) -> tuple[dict[int, float], int]:
    """Returns the mean of the last returns by step, and over how many episodes the mean is taken."""
    window = max(len(returns) // 8, 5)
    # Several episodes may end in one step: the dict keeps one value per step, as np.interp needs rising steps.
    return dict(zip(steps, smooth(returns, window), strict=True)), window


def plot_comparison(runs: Runs, budget: int, path: Path) -> Path:
    """Plots agents and baselines side by side, with 95% t-intervals over seeds, and returns the path.

    Args:
        runs: results of each seed by name of the arm: ``curve``, a list of (LLM calls spent, instructions accepted),
            ``training``, a list of (environment steps, return), empty for an arm without training, and the metrics of
            the table.
        budget: LLM calls per arm and seed.
        path: PNG file to write.
    """
    figure, axes = panels(2, 2)
    training, accepted = axes[0]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(runs))]
    steps = np.linspace(0, budget, 80)
    for (name, results), colour in zip(runs.items(), colours, strict=True):
        smoothed = [_learning_curve(*zip(*run["training"], strict=True))[0] for run in results if run["training"]]
        if smoothed:
            # Average over seeds on the range of steps that every seed covers.
            grid = np.linspace(max(min(curve) for curve in smoothed), min(max(curve) for curve in smoothed), 60)
            rows = [np.interp(grid, list(curve), list(curve.values())) for curve in smoothed]
            band(training, grid, np.array(rows), name, colour)
        # A learner's curve begins after its training calls: the point (0, 0) is put before it.
        rows = [np.interp(steps, *np.array([(0, 0), *run["curve"]]).T) for run in results]
        band(accepted, steps, np.array(rows), name, colour)
    training.set(title="Return per episode in training", xlabel="environment steps", ylabel="return (smoothed)")
    accepted.set(title="Accepted instructions", xlabel="LLM calls spent, training included", ylabel="accepted")
    for axis in (training, accepted):
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False)
    for axis, (title, keys) in zip(axes[1], BARS.items(), strict=True):
        axis.set(title=title)
        _plot_bars(axis, runs, colours, keys)
    seeds = max(map(len, runs.values()))
    figure.suptitle(f"{seeds} seeds, {budget} LLM calls per arm and seed; bands and bars: 95% t-interval of the mean")
    figure.savefig(path, dpi=130)
    return path


def _plot_bars(axis: Any, runs: Runs, colours: Sequence[str], keys: Mapping[str, str]) -> None:
    """Draws two metrics, solid and light, as neighbouring bars for each arm."""
    for offset, alpha, key in zip((-0.2, 0.2), (1.0, 0.45), keys, strict=True):
        # The bars of one arm are centred on its tick and take most of 0.8 of the way to the next.
        figures = [over_seeds(results, key) or NO_VALUES for results in runs.values()]
        bars = axis.bar(
            np.arange(len(runs)) + offset,
            [figure["mean"] for figure in figures],
            0.368,
            yerr=[figure["half_width"] or 0.0 for figure in figures],
            capsize=3,
            color=colours,
            alpha=alpha,
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axis.set_xticks(range(len(runs)), list(runs))
    axis.set_ylim(top=axis.get_ylim()[1] * 1.12)
    legend = "solid: {} | light: {}".format(*keys.values())
    axis.text(0.99, 0.99, legend, transform=axis.transAxes, ha="right", va="top", fontsize=8)


NO_VALUES: dict[str, float | None] = {"mean": math.nan, "half_width": None}


def over_seeds(results: Sequence[Mapping[str, Any]], key: str) -> dict[str, float | None] | None:
    """Returns ``mean`` and ``half_width`` of the 95% t-interval of a metric over the seeds of an arm.

    Args:
        results: metrics per seed.
        key: name of the metric; None in a seed that has no value.

    Returns:
        The figures, without a half-width (None) for a single value; None without any value.
    """
    values = [row[key] for row in results if row[key] is not None]
    if not values:
        return None
    mean, half = interval(values)
    return {"mean": mean, "half_width": None if math.isnan(half) else half}
