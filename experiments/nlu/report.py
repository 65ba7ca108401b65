"""``instructgym nlu report``: gathers run folders into the paper's table (tasks by methods) and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

Curve = list[tuple[float, float, float]]
"""For each update: labels seen, share of right answers, share of well-formed answers."""


def plot_nlu(curves: Mapping[str, Mapping[str, Sequence[Curve]]], figures: Mapping[str, Any], path: Path) -> Path:
    """Plots learning curves and final scores of language-understanding runs, a row of axes per task; returns the path.

    Args:
        curves: by task and arm, one curve per seed.
        figures: by task and arm, a row of the table: ``greedy`` (mean and half-width of the main metric), ``metric``
            (its name), ``examples`` (number of evaluated rows).
        path: PNG file to write.
    """
    tasks = list(figures)
    figure, axes = panels(2, len(tasks))
    for (left, right), task in zip(axes, tasks, strict=True):
        arms = list(figures[task])
        for k, arm in enumerate(arms):
            colour, runs = COLOURS[k % len(COLOURS)], curves[task][arm]
            if runs:
                # Average over seeds on the range of labels that every seed covers.
                grid = np.linspace(max(r[0][0] for r in runs), min(r[-1][0] for r in runs), 80)
                columns = [np.array(run).T for run in runs]
                rows = [np.interp(grid, c[0], smooth(c[1], max(len(c[1]) // 8, 1))) for c in columns]
                band(left, grid, np.array(rows), arm, colour)
        left.set(title=f"{task}: right answers in training (smoothed)", xlabel="labels seen", ylabel="share")
        if left.get_legend_handles_labels()[1]:
            left.legend(frameon=False, fontsize=8)
        means = [100 * figures[task][arm]["greedy"][0] for arm in arms]
        # The half-width of a single seed is NaN: draw no error bar.
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


NON_IDENTITY_OPTIONS = NOT_IDENTITY | set("seed data_dir eval_data_dir save_every token_budget".split())
"""Options that do not make two runs different arms."""
TRAINING_OPTIONS = set("labels passes batch_size group_size learning_rate schedule optimizer epochs".split())
TRAINING_OPTIONS |= {"kl_coefficient", "lora_rank", "rollouts"}
"""Options without effect on a method that is not trained."""
ORDER = ("majority", "zero-shot", "few-shot", *TRAINED)
"""Order of the methods in the table."""
TITLES = ("metric", "greedy", "T = 1", "format, greedy", "format, T = 1", "labels", "seeds", "minutes")
"""Titles of the columns that describe an arm."""


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
    curves = {
        task: {arm: [curve for run in members if (curve := _curve(run))] for arm, members in arms[task].items()}
        for task in tasks
    }
    rows = [[task, arm, *_cells(row)] for task, by_arm in figures.items() for arm, row in by_arm.items()]
    console.print("Main metric in percent; malformed answers are wrong")
    write_report(
        Path(options.out),
        [("", [["task", "method, start", *TITLES], *rows])],
        console,
        plots={"curves.png": lambda path: plot_nlu(curves, figures, path)},
    )
    return figures


def _curve(run: FinishedRun) -> Curve:
    """Returns the learning curve of a run; empty for one that was not trained by reinforcement learning."""
    return [
        (row["rollout/labels"], row.get("rollout/terms/correct") or 0.0, row.get("rollout/terms/format") or 0.0)
        for row in read_records(run.folder / "metrics.jsonl")
        if "rollout/labels" in row
    ]


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
    groups: dict[str, dict[tuple[tuple[str, str], ...], list[FinishedRun]]] = {}
    for run in runs:
        groups.setdefault(_arm(run), {}).setdefault(tuple(sorted(_identity(run).items())), []).append(run)
    # Name each group by its arm and the options in which the groups of that arm differ.
    named: dict[str, list[FinishedRun]] = {}
    for arm in sorted(groups, key=lambda arm: (_rank(arm), arm)):
        options = [dict(key) for key in groups[arm]]
        keys = sorted(set().union(*options))
        differing = [key for key in keys if len({option.get(key) for option in options}) > 1]
        for option, members in zip(options, groups[arm].values(), strict=True):
            seeds = [run.options["seed"] for run in members]
            if len(set(seeds)) < len(seeds):
                raise InputError(f"{arm}: two runs with seed {max(seeds, key=seeds.count)} are alike: leave one out")
            named["".join([arm, *(f", {key.replace('_', ' ')} {option.get(key)}" for key in differing)])] = members
    return named


def _rank(arm: str) -> int:
    """Returns the place of an arm in the table, that of its method in :data:`ORDER`."""
    name = arm.partition(",")[0]
    # The arm of few-shot begins with the number of examples, as in "4-shot".
    return ORDER.index("few-shot" if name.endswith("-shot") and name[0].isdigit() else name)


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


def _cells(row: Mapping[str, Any]) -> list[str]:
    """Returns the cells of an arm's row as text, in the order of :data:`TITLES`."""

    def figure(pair: Any) -> str:
        mean, half = pair
        return f"{100 * mean:.1f}" + ("" if np.isnan(half) else f" ± {100 * half:.1f}")

    return [
        row["metric"],
        figure(row["greedy"]),
        figure(row["sampled"]) if "sampled" in row else "",
        f"{100 * row['greedy_format']:.1f}",
        f"{100 * row['sampled_format']:.1f}" if "sampled" in row else "",
        str(row["labels"]),
        str(row["seeds"]),
        f"{row['minutes']:.1f}",
    ]
