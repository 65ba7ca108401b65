"""``instructgym fine-grained report``: tables and learning curves of the arms of an experiment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ..runs.report import (
    COLOURS,
    FinishedRun,
    band,
    differing,
    finished_runs,
    panels,
    percent,
    smooth,
    table_rows,
    write_report,
)
from ..runs.statistics import known_mean
from .evaluate import RESPONSES, wilson_win_rate

PANELS = (
    ("Held-out judge in training (smoothed)", "updates", "mean score"),
    ("Distance from the start", "updates", "KL per response (nats)"),
    ("What is optimised", "KL per response (nats)", "proxy reward, deviations"),
    ("What is wanted", "KL per response (nats)", "held-out judge"),
)
"""Title and axis labels of each panel of the figure."""


def plot_fine_grained(
    curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], figures: Mapping[str, Mapping[str, Any]], path: Path
) -> Path:
    """Plots the held-out judge and the KL over the training of each PPO arm, and proxy and judge over the KL.

    Where the proxy, the learned reward, keeps rising with the KL divergence from the initial policy and the judge does
    not, the reward model is over-optimised (Gao et al. 2023, arXiv 2210.10760).

    Args:
        curves: rows of ``metrics.jsonl`` by arm and seed.
        figures: metrics of the evaluation by arm; arms without a curve are left out.
        path: PNG file to write.

    Returns:
        The path.
    """
    figure, axes = panels(2, 2)
    judge_axis, kl_axis, proxy_axis, over_axis = axes.flat
    for k, (arm, runs) in enumerate(curves.items()):
        colour = COLOURS[k % len(COLOURS)]
        # Seeds may have stopped at different updates: use those that all of them have.
        updates = np.arange(1, min(map(len, runs)) + 1)
        window = max(len(updates) // 8, 1)
        kl, proxy, judge = (
            np.array([smooth([row.get(key, float("nan")) for row in run], window)[: len(updates)] for run in runs])
            for key in ("train/kl", "rollout/terms/proxy", "rollout/terms/judge")
        )
        won = figures.get(arm, {}).get("win_rate")
        band(judge_axis, updates, judge, arm if won is None else f"{arm}: wins {100 * won:.0f}%", colour)
        band(kl_axis, updates, kl, arm, colour)
        for axis, values in ((proxy_axis, proxy), (over_axis, judge)):
            for seed in range(len(runs)):
                axis.plot(kl[seed], values[seed], color=colour, linewidth=1.6, label=arm if not seed else None)
    for axis, (title, xlabel, ylabel) in zip(axes.flat, PANELS, strict=True):
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return path


MODEL, PPO, EVALUATE = COMMANDS = ("fine-grained reward-model", "fine-grained ppo", "fine-grained evaluate")
"""Commands whose runs are in the report."""


@dataclass
class FineGrainedReport:
    """Gather the finished stages of an experiment into tables and figures."""

    runs: str = "runs/fine-grained"
    """Folder with the run folders of all stages, at any depth."""
    out: str = ""
    """Folder for report.md and curves.png. Empty: 'report' in --runs."""


SAME_OPTIONS = ("split", "judge", "against", "temperature", "limit", "data", "data_seed")
"""Options that must be equal in all evaluations of one arm, which then count as its seeds."""

ARM_COLUMNS = (
    ("KL, nats", "kl", ".1f"),
    ("tokens", "tokens", ".1f"),
    ("distinct-2", "distinct_2", ".2f"),
    ("seeds", "seeds", ""),
)
MODEL_COLUMNS = (
    ("pairs", "pairs_from", ""),
    ("loss", "loss", ""),
    ("trained on", "pairs", ""),
    ("held out", "held_out", ""),
    ("pair accuracy", "accuracy", ".3f"),
    ("AUC removed", "removed_auc", ".3f"),
    ("AUC written", "written_auc", ".3f"),
)
"""Title, key and format of the columns of the tables; that of the arms has the win rate and the measures before these.
"""


def run(options: FineGrainedReport, console: Console | None = None) -> dict[str, Any]:
    """Writes ``report.md`` and ``curves.png`` and returns the numbers of the tables.

    Raises:
        InputError: if there is no finished evaluation, or evaluations of one arm have different options.
    """
    root = Path(options.runs)
    evaluations: dict[str, list[FinishedRun]] = defaultdict(list)
    curves: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    models: dict[str, dict[str, Any]] = {}
    for run in finished_runs([root], *COMMANDS):
        arm = run.options.get("arm") or run.folder.name
        if run.command == EVALUATE:
            evaluations[arm].append(run)
        elif run.command == PPO:
            rows = [row for row in read_records(run.folder / "metrics.jsonl") if "train/kl" in row]
            curves[arm] += [rows] if rows else []
        else:
            models[str(run.folder.relative_to(root))] = run.metrics | {
                "pairs_from": Path(run.options["pairs"]).stem,
                **{key: run.options[key] for key in ("level", "loss")},
                **{key: run.counts[key] for key in ("pairs", "held_out")},
            }
    if not evaluations:
        raise InputError(f"no finished run of 'fine-grained evaluate' in {root}")
    figures = {arm: _arm_figures(arm, runs) for arm, runs in evaluations.items()}
    drawn = {arm: curves[arm] for arm in figures if curves.get(arm)}
    plots = {"curves.png": lambda path: plot_fine_grained(drawn, figures, path)} if drawn else {}
    tables = [("", _arm_table(figures))]
    tables += [("", table_rows("reward model", models, MODEL_COLUMNS))] if models else []
    write_report(Path(options.out or root / "report"), tables, console or Console(), plots=plots)
    return {"arms": figures, "reward_models": models}


def _arm_figures(arm: str, runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """Returns means over the seeds of an arm, and the win rate with its interval over prompts.

    The outcome of a prompt is its mean over seeds: more seeds do not make the interval over prompts narrower.

    Raises:
        InputError: if the evaluations have different options.
    """
    for run in runs:
        if different := differing(runs[0].options, run.options, SAME_OPTIONS):
            raise InputError(
                f"the evaluations of {arm} differ in {different}, so they are no seeds of one arm: give them other "
                f"names by --arm, or move {run.folder} away"
            )
    names = sorted({name for run in runs for name in run.metrics})
    figures: dict[str, Any] = {name: known_mean(run.metrics.get(name) for run in runs) for name in names}
    figures["seeds"] = len(runs)
    tables = [
        {row["id"]: row["win"] for row in read_records(run.folder / RESPONSES) if row.get("win") is not None}
        for run in runs
    ]
    # Only prompts that every seed has a verdict on.
    if prompts := sorted(set.intersection(*map(set, tables))):
        pooled = wilson_win_rate([float(np.mean([wins[prompt] for wins in tables])) for prompt in prompts])
        figures |= {name: value for name, value in pooled.items() if name.startswith("win_rate")}
    return figures


def _arm_table(figures: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Returns the table of the arms, in the order of their win rates: a header, then one row per arm."""
    rows = {arm: dict(row) for arm, row in sorted(figures.items(), key=lambda item: item[1].get("win_rate", -1.0))}
    for row in rows.values():
        if "win_rate" in row:
            row["won"] = percent(row["win_rate"], row["win_rate_low"], row["win_rate_high"])
    measures = sorted({name for row in figures.values() for name in row if name.startswith("mean/")})
    means = [(f"mean {name[5:]}", name, ".3f") for name in measures]
    return table_rows("arm", rows, [("win rate, % (95%)", "won", ""), *means, *ARM_COLUMNS])
