"""Figures of runs. Colours follow one order of arms, every band says what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...llm_backends.records import read_records
from .metrics import interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's palette, distinguishable by colour-blind readers, with a grey for its yellow."""

OPERATION_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#999999")


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


def plot_training(episodes: Sequence[Mapping[str, Any]], updates: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Learning curve of one run, and the mix of operations over its updates.

    Args:
        episodes: rows of ``episodes.jsonl``.
        updates: rows of ``metrics.jsonl``.
        path: the PNG.
    """
    figure, axes = panels(2)
    left, right = axes[0]
    if episodes:
        steps = [row["timesteps"] for row in episodes]
        returns = [row["return"] for row in episodes]
        left.scatter(steps, returns, s=14, alpha=0.35, color=COLOURS[0], linewidths=0, label="episode")
        window = max(len(returns) // 8, 5)
        curve = dict(zip(steps, smooth(returns, window), strict=True))  # several episodes may end in one step
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
        right.legend(handles[::-1], labels[::-1], frameon=False, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    right.set(title="Operations chosen (last 96 steps)", xlabel="environment steps", ylabel="share")
    figure.savefig(path, dpi=130)
    return path


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


def plot_nlu(curves: Mapping[str, Any], figures: Mapping[str, Any], path: Path) -> Path:
    """Learning curves of language-understanding runs, a row of axes per task; dotted lines are evaluations.

    Args:
        curves: by task and arm, one list of (labels seen, share right, share well-formed) per seed.
        figures: by task and arm, what is known of its evaluation (``greedy``: mean and half-width).
        path: the PNG.
    """
    tasks = list(figures)
    figure, axes = panels(2, len(tasks))
    for (left, right), task in zip(axes, tasks, strict=True):
        arms = list(figures[task])
        for k, arm in enumerate(arms):
            colour, runs = COLOURS[k % len(COLOURS)], curves.get(task, {}).get(arm, [])
            if runs:
                grid = np.linspace(max(r[0][0] for r in runs), min(r[-1][0] for r in runs), 80)
                columns = [np.array(run).T for run in runs]
                rows = [np.interp(grid, c[0], smooth(c[1], max(len(c[1]) // 8, 1))) for c in columns]
                _band(left, grid, np.array(rows), arm, colour)
        left.set(title=f"{task}: right answers in training (smoothed)", xlabel="labels seen", ylabel="share")
        if left.get_legend_handles_labels()[1]:
            left.legend(frameon=False, fontsize=8)
        means = [100 * figures[task][arm]["greedy"][0] for arm in arms]
        errors = [0 if np.isnan(h := figures[task][arm]["greedy"][1]) else 100 * h for arm in arms]
        bars = right.barh(
            range(len(arms)), means, xerr=errors, color=[COLOURS[k % len(COLOURS)] for k in range(len(arms))]
        )
        right.bar_label(bars, fmt="%.1f", fontsize=8, padding=3)
        right.set_yticks(range(len(arms)), arms, fontsize=8)
        right.invert_yaxis()
        right.set_xlim(right=max(*means, 1.0) * 1.15)
        metric, count = figures[task][arms[0]]["metric"], figures[task][arms[0]]["examples"]
        right.set(title=f"{task}: {metric}, greedy, {count} dev rows", xlabel="percent")
    figure.savefig(path, dpi=130)
    return path


def plot_fine_grained(
    curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], figures: Mapping[str, Mapping[str, Any]], path: Path
) -> Path:
    """Arms of PPO on learned rewards: the held-out judge and the KL over training, then proxy and judge over the KL.

    Where the proxy keeps rising with the KL and the judge does not, the reward model is over-optimised (Gao et al.
    2023, arXiv 2210.10760).

    Args:
        curves: by arm, for each seed the rows of ``metrics.jsonl``.
        figures: by arm, what its evaluation gave; that of arms without a curve is left out.
        path: the PNG.
    """
    figure, axes = panels(2, 2)
    (judge_axis, kl_axis), (proxy_axis, over_axis) = axes
    for k, (arm, runs) in enumerate(curves.items()):
        colour = COLOURS[k % len(COLOURS)]
        updates = np.arange(1, min(len(run) for run in runs) + 1)
        window = max(len(updates) // 8, 1)

        def column(key: str) -> np.ndarray:
            return np.array(
                [smooth([row.get(key, float("nan")) for row in run], window)[: len(updates)] for run in runs]  # noqa: B023
            )

        kl, proxy, judge = column("train/kl"), column("rollout/terms/proxy"), column("rollout/terms/judge")
        won = figures.get(arm, {}).get("win_rate")
        _band(judge_axis, updates, judge, arm if won is None else f"{arm}: wins {100 * won:.0f}%", colour)
        _band(kl_axis, updates, kl, arm, colour)
        for seed in range(len(runs)):
            proxy_axis.plot(kl[seed], proxy[seed], color=colour, linewidth=1.6, label=arm if not seed else None)
            over_axis.plot(kl[seed], judge[seed], color=colour, linewidth=1.6, label=arm if not seed else None)
    judge_axis.set(title="Held-out judge in training (smoothed)", xlabel="updates", ylabel="mean score")
    kl_axis.set(title="Distance from the start", xlabel="updates", ylabel="KL per response (nats)")
    proxy_axis.set(title="What is optimised", xlabel="KL per response (nats)", ylabel="proxy reward, deviations")
    over_axis.set(title="What is wanted", xlabel="KL per response (nats)", ylabel="held-out judge")
    for axis in axes.flat:
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return path


def plot_comparison(arms: Mapping[str, Mapping[str, Any]], budget: int, path: Path) -> Path:
    """Agents and baselines side by side, with 95% t-intervals over seeds.

    Args:
        arms: by name: ``curves`` (per seed, lists of (calls spent, accepted)), ``training`` (per seed, lists of
            (steps, return) or empty), ``results`` (per seed, the metrics of the table).
        budget: LLM calls per arm and seed.
        path: the PNG.
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


def plot_calibration(
    shares: Mapping[str, tuple[float, float, float]], probabilities: Sequence[tuple[float, bool]], path: Path
) -> Path:
    """How good a judge is: its shares as bars and, where it gives probabilities, how reliable they are.

    Args:
        shares: by name a share and the ends of its 95% interval.
        probabilities: of pairs, the judge's probability and whether the pair's label is what it is the probability of.
        path: the PNG.
    """
    figure, axes = panels(2 if probabilities else 1)
    left = axes[0, 0]
    values, low, high = (np.array(column) for column in zip(*shares.values(), strict=True))
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(shares))]
    errors = np.maximum([values - low, high - values], 0)  # rounding may take an end past its share
    left.barh(range(len(shares)), values, xerr=errors, color=colours, capsize=3)
    left.set_yticks(range(len(shares)), list(shares), fontsize=8)
    left.invert_yaxis()
    left.set(title="Shares of pairs (bars: 95% Wilson intervals)", xlabel="share", xlim=(0, 1))
    if probabilities:
        right = axes[0, 1]
        chance, positive = (np.array(column, dtype=np.float64) for column in zip(*probabilities, strict=True))
        bins = np.minimum((chance * 10).astype(int), 9)
        right.plot([0, 1], [0, 1], color="#999999", linewidth=1, label="calibrated")
        kept = [number for number in range(10) if (bins == number).any()]
        means = [(chance[bins == number].mean(), positive[bins == number].mean()) for number in kept]
        sizes = [20 + 200 * (bins == number).mean() for number in kept]
        right.scatter(*zip(*means, strict=True), s=sizes, color=COLOURS[0], label="tenths; size: share of pairs")
        right.set(
            title="Reliability", xlabel="probability by the judge", ylabel="share so labelled", ylim=(-0.05, 1.05)
        )
        right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return path


def _plot_returns(axis: Any, arms: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    for name, arm in arms.items():
        curves = [curve for curve in arm["training"] if curve]
        if not curves:
            continue
        grid = np.linspace(max(c[0][0] for c in curves), min(c[-1][0] for c in curves), 60)
        smoothed = [
            dict(zip((s for s, _ in c), smooth([r for _, r in c], max(len(c) // 8, 5)), strict=True)) for c in curves
        ]
        rows = [np.interp(grid, list(curve), list(curve.values())) for curve in smoothed]
        _band(axis, grid, np.array(rows), name, colours[name])
    axis.set(title="Return per episode in training", xlabel="environment steps", ylabel="return (smoothed)")
    if axis.get_legend_handles_labels()[1]:
        axis.legend(frameon=False)


def _plot_accepted(axis: Any, arms: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str], budget: int) -> None:
    grid = np.linspace(0, budget, 80)
    for name, arm in arms.items():
        rows = [np.interp(grid, [0, *(c for c, _ in curve)], [0, *(a for _, a in curve)]) for curve in arm["curves"]]
        _band(axis, grid, np.array(rows), name, colours[name])
    axis.set(title="Accepted instructions", xlabel="LLM calls spent, training included", ylabel="accepted")
    axis.legend(frameon=False)


def _plot_bars(
    axis: Any, arms: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str], keys: Mapping[str, str], title: str
) -> None:
    positions = np.arange(len(arms), dtype=np.float64)
    width = 0.8 / len(keys)
    for k, (key, label) in enumerate(keys.items()):
        means, errors = zip(*(_mean_error(arm["results"], key) for arm in arms.values()), strict=True)
        bars = axis.bar(
            positions + (k - (len(keys) - 1) / 2) * width,
            means,
            width * 0.92,
            yerr=errors,
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


def _mean_error(results: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float]:
    values = [row[key] for row in results if row[key] is not None]
    if not values:
        return float("nan"), 0.0
    mean, half = interval(values)
    return mean, 0.0 if np.isnan(half) else half


def _band(axis: Any, grid: np.ndarray, rows: np.ndarray, name: str, colour: str) -> None:
    mean = rows.mean(axis=0)
    axis.plot(grid, mean, color=colour, linewidth=2, label=name)
    if len(rows) > 1:
        half = np.array([interval(rows[:, i].tolist())[1] for i in range(rows.shape[1])])
        axis.fill_between(grid, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
