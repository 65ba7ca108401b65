"""``instructgym nlu report``: gathers run folders into the paper's table (tasks by methods) and learning curves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ..runs.folder import NOT_IDENTITY
from ..runs.report import COLOURS, FinishedRun, band, finished_runs, panels, smooth, write_report
from ..runs.statistics import interval
from .run import NLU, TRAINED


def plot_nlu(runs: Mapping[str, Mapping[str, Sequence[FinishedRun]]], figures: Mapping[str, Any], path: Path) -> Path:
    """Plots learning curves and final scores of language-understanding runs, a row of axes per task; returns the path.

    Args:
        runs: by task and arm, one run per seed.
        figures: by task and arm, a row of the table: ``greedy`` (mean and half-width of the main metric), ``metric``
            (its name), ``examples`` (number of evaluated rows).
        path: PNG file to write.
    """
    figure, axes = panels(2, len(runs))
    for (left, right), (task, arms) in zip(axes, runs.items(), strict=True):
        colours = [COLOURS[k % len(COLOURS)] for k in range(len(arms))]
        for colour, (arm, members) in zip(colours, arms.items(), strict=True):
            curves = [np.array(curve).T for run in members if (curve := learning_curve(run))]
            if curves:
                # Average over seeds on the range of labels that every seed covers.
                grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 80)
                rows = [np.interp(grid, x, smooth(y, max(len(y) // 8, 1))) for x, y in curves]
                band(left, grid, np.array(rows), arm, colour)
        left.set(title=f"{task}: right answers in training (smoothed)", xlabel="labels seen", ylabel="share")
        if left.get_legend_handles_labels()[1]:
            left.legend(frameon=False, fontsize=8)
        scores = list(figures[task].values())
        means, halves = 100 * np.array([row["greedy"] for row in scores]).T
        # The half-width of a single seed is NaN: draw no error bar.
        bars = right.barh(range(len(arms)), means, xerr=np.nan_to_num(halves), color=colours)
        right.bar_label(bars, fmt="%.1f", fontsize=8, padding=3)
        right.set_yticks(range(len(arms)), arms, fontsize=8)
        right.invert_yaxis()
        right.set_xlim(right=max(*means, 1.0) * 1.15)
        metric, count = scores[0]["metric"], scores[0]["examples"]
        right.set(title=f"{task}: {metric}, greedy, {count} dev rows", xlabel="percent")
    figure.savefig(path, dpi=130)
    return path


def learning_curve(run: FinishedRun) -> list[tuple[float, float]]:
    """Returns the labels seen and the share of right answers by update; empty without reinforcement learning."""
    rows = read_records(run.folder / "metrics.jsonl")
    return [(row["rollout/labels"], row.get("rollout/terms/correct") or 0.0) for row in rows if "rollout/labels" in row]


def _percent(value: Any) -> str:
    """Returns a share, or a mean of shares and the half-width of its interval (NaN: none), in percent."""
    mean, half = value if isinstance(value, tuple) else (value, np.nan)
    return f"{100 * mean:.1f}" + ("" if np.isnan(half) else f" ± {100 * half:.1f}")


NON_IDENTITY_OPTIONS = NOT_IDENTITY | set("seed data_dir eval_data_dir save_every token_budget".split())
"""Options that do not make two runs different arms."""
TRAINING_OPTIONS = set("labels passes batch_size group_size learning_rate schedule optimizer epochs".split())
TRAINING_OPTIONS |= {"kl_coefficient", "lora_rank", "rollouts"}
"""Options without effect on a method that is not trained."""
ORDER = ("majority", "zero-shot", "few-shot", *TRAINED)
"""Order of the methods in the table."""
COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("metric", "metric", str),
    ("greedy", "greedy", _percent),
    ("T = 1", "sampled", _percent),
    ("format, greedy", "greedy_format", _percent),
    ("format, T = 1", "sampled_format", _percent),
    ("labels", "labels", str),
    ("seeds", "seeds", str),
    ("minutes", "minutes", "{:.1f}".format),
)
"""Columns that describe an arm: title, key in its row, and form."""


@dataclass
class NLUReport:
    """Gather finished runs of 'nlu' into a table and a figure."""

    runs: tuple[str, ...] = ("runs/nlu",)
    """Run folders, or folders of run folders."""
    out: str = "runs/nlu-report"
    """Folder to write report.md and curves.png to."""


def run(options: NLUReport, console: Console | None = None) -> dict[str, Any]:
    """Writes ``report.md`` and ``curves.png`` and returns the figures of the table by task and arm.

    Raises:
        InputError: if there is no finished run.
    """
    console = console or Console()
    # Options that are newer than a run had the effect of their defaults.
    defaults = asdict(NLU())
    runs = [replace(run, options=defaults | run.options) for run in finished_runs([*map(Path, options.runs)], "nlu")]
    if not runs:
        raise InputError(f"no finished run of 'nlu' in {', '.join(options.runs)}")
    tasks = dict.fromkeys(task for run in runs for task in run.metrics["greedy"])
    arms = {task: _group_by_arm([run for run in runs if task in run.metrics["greedy"]]) for task in tasks}
    figures = {task: {arm: _row(members, task) for arm, members in arms[task].items()} for task in tasks}
    rows = [
        [task, arm, *(form(row[key]) if key in row else "" for _, key, form in COLUMNS)]
        for task, rows_by_arm in figures.items()
        for arm, row in rows_by_arm.items()
    ]
    console.print("Main metric in percent; malformed answers are wrong")
    write_report(
        Path(options.out),
        [("", [["task", "method, start", *(title for title, *_ in COLUMNS)], *rows])],
        console,
        plots={"curves.png": lambda path: plot_nlu(arms, figures, path)},
    )
    return figures


def _arm(run: FinishedRun) -> str:
    """Returns the name of a run's arm: the method and, except for ``majority``, how it starts."""
    method, start, shots = (run.options[key] for key in ("method", "start", "shots"))
    if method == "majority":
        return "majority"
    return f"{shots}-shot, {start}" if method == "few-shot" else f"{method}, {start}"


def _identity(run: FinishedRun) -> dict[str, str]:
    """Returns the options, as text, that must be equal in runs that count as seeds of one arm."""
    left_out = NON_IDENTITY_OPTIONS | (set() if run.options["method"] in TRAINED else TRAINING_OPTIONS)
    # The majority answer depends on the training labels, although nothing is trained.
    left_out -= {"labels"} if run.options["method"] == "majority" else set()
    return {key: str(value) for key, value in run.options.items() if key not in left_out}


def _group_by_arm(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Groups runs by arm and names the groups.

    Runs of one arm that differ in nothing but :data:`NON_IDENTITY_OPTIONS` are its seeds. If runs of one arm differ in
    other options, they form several groups, whose names contain these options.

    Raises:
        InputError: for two runs of one group with the same seed.
    """
    arms: dict[str, dict[frozenset[tuple[str, str]], list[FinishedRun]]] = {}
    for run in sorted(runs, key=lambda run: (ORDER.index(run.options["method"]), _arm(run))):
        arms.setdefault(_arm(run), {}).setdefault(frozenset(_identity(run).items()), []).append(run)
    named: dict[str, list[FinishedRun]] = {}
    for arm, groups in arms.items():
        # Name each group by its arm and the options in which the groups of that arm differ.
        shared = frozenset.intersection(*groups)
        for identity, members in groups.items():
            [(seed, count)] = Counter(run.options["seed"] for run in members).most_common(1)
            if count > 1:
                raise InputError(f"{arm}: two runs with seed {seed} are alike: leave one out")
            options = sorted(identity - shared)
            named["".join([arm, *(f", {key.replace('_', ' ')} {value}" for key, value in options)])] = members
    return named


def _row(runs: Sequence[FinishedRun], task: str) -> dict[str, Any]:
    """Returns an arm's row: main metric and format rate, greedy and sampled, labels, and minutes; means over seeds."""
    # The first metric of a task is its main metric.
    main = next(iter(runs[0].metrics["greedy"][task]))
    labels = runs[0].counts["labels"] if runs[0].options["method"] in TRAINED else 0
    row: dict[str, Any] = {"metric": main, "seeds": len(runs), "labels": labels}
    for decoding in ("greedy", "sampled"):
        measured = [run.metrics[decoding][task] for run in runs if decoding in run.metrics]
        if measured:
            row[decoding] = interval([values[main] for values in measured])
            row[f"{decoding}_format"] = float(np.mean([values["format_rate"] for values in measured]))
    row["minutes"] = float(np.mean([run.counts["seconds"] for run in runs])) / 60
    row["examples"] = runs[0].counts["evaluated"]
    return row
