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
        handles, labels = right.get_legend_handles_labels()
        # Reversed, so that the legend lists the operations as they are stacked, from top to bottom.
        right.legend(handles[::-1], labels[::-1], frameon=False, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    right.set(title="Operations chosen (last 96 steps)", xlabel="environment steps", ylabel="share")
    figure.savefig(path, dpi=130)
    return path


def _learning_curve(steps: Sequence[int], returns: Sequence[float]) -> tuple[dict[int, float], int]:
    """Returns the mean of the last returns by step, and over how many episodes the mean is taken."""
    window = max(len(returns) // 8, 5)
    # Several episodes may end in one step: the dict keeps one value per step, as np.interp needs rising steps.
    return dict(zip(steps, smooth(returns, window), strict=True)), window


def plot_comparison(arms: Mapping[str, Mapping[str, Any]], budget: int, path: Path) -> Path:
    """Plots agents and baselines side by side, with 95% t-intervals over seeds, and returns the path.

    Args:
        arms: results by name of the arm: ``curves`` (per seed, a list of (LLM calls spent, instructions accepted)),
            ``training`` (per seed, a list of (environment steps, return), empty for an arm without training),
            ``results`` (per seed, the metrics of the table).
        budget: LLM calls per arm and seed.
        path: PNG file to write.
    """
    figure, axes = panels(2, 2)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(arms)}
    _plot_returns(axes[0, 0], arms, colours)
    _plot_accepted(axes[0, 1], arms, colours, budget)
    _plot_bars(
        axes[1, 0],
        arms,
        colours,
        {"calls_per_accepted": "training included", "calls_per_accepted_generation": "generation only"},
        "LLM queries per accepted instruction (fewer is better)",
    )
    _plot_bars(
        axes[1, 1],
        arms,
        colours,
        {"embedding_distance": "mean cosine distance", "distinct_2": "distinct-2"},
        "Diversity of the accepted instructions",
    )
    seeds = max(len(arm["results"]) for arm in arms.values())
    figure.suptitle(f"{seeds} seeds, {budget} LLM calls per arm and seed; bands and bars: 95% t-interval of the mean")
    figure.savefig(path, dpi=130)
    return path


def _plot_returns(axis: Any, arms: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    for name, arm in arms.items():
        curves = [curve for curve in arm["training"] if curve]
        if not curves:
            continue
        # Average over seeds on the range of steps that every seed covers.
        grid = np.linspace(max(c[0][0] for c in curves), min(c[-1][0] for c in curves), 60)
        smoothed = [_learning_curve(*zip(*curve, strict=True))[0] for curve in curves]
        rows = [np.interp(grid, list(curve), list(curve.values())) for curve in smoothed]
        band(axis, grid, np.array(rows), name, colours[name])
    axis.set(title="Return per episode in training", xlabel="environment steps", ylabel="return (smoothed)")
    if axis.get_legend_handles_labels()[1]:
        axis.legend(frameon=False)


def _plot_accepted(axis: Any, arms: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str], budget: int) -> None:
    grid = np.linspace(0, budget, 80)
    for name, arm in arms.items():
        # A learner's curve begins after its training calls: the point (0, 0) is put before it.
        rows = [np.interp(grid, [0, *(c for c, _ in curve)], [0, *(a for _, a in curve)]) for curve in arm["curves"]]
        band(axis, grid, np.array(rows), name, colours[name])
    axis.set(title="Accepted instructions", xlabel="LLM calls spent, training included", ylabel="accepted")
    axis.legend(frameon=False)


def _plot_bars(
    axis: Any, arms: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str], keys: Mapping[str, str], title: str
) -> None:
    positions = np.arange(len(arms), dtype=np.float64)
    width = 0.8 / len(keys)
    for k, (key, label) in enumerate(keys.items()):
        # The bars of one arm are centred on its tick.
        figures = [over_seeds(arm["results"], key) or NO_VALUES for arm in arms.values()]
        bars = axis.bar(
            positions + (k - (len(keys) - 1) / 2) * width,
            [figure["mean"] for figure in figures],
            width * 0.92,
            yerr=[figure["half_width"] or 0.0 for figure in figures],
            capsize=3,
            color=[colours[name] for name in arms],
            alpha=1.0 if k == 0 else 0.45,
            label=label,
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axis.set_xticks(positions, list(arms))
    axis.set(title=title)
    axis.set_ylim(top=axis.get_ylim()[1] * 1.12)
    axis.text(
        0.99,
        0.99,
        " | ".join(("solid: ", "light: ")[k] + v for k, v in enumerate(keys.values())),
        transform=axis.transAxes,
        ha="right",
        va="top",
        fontsize=8,
    )


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
