"""``instructgym tuna report``: tables and a figure that compare the arms of an experiment with ranked lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ...llm_backends.errors import InputError
from ..runs.folder import read_json
from ..runs.report import COLOURS, FinishedRun, finished_run, panels, percent, write_report
from ..runs.statistics import compare_paired
from ..teaching.evaluate import BASE

EVALUATION, RANKINGS, POLICIES = "evaluate", "rank", "train"
"""Folders of the stages below the folder of an experiment."""


@dataclass
class TunaReport:
    """Gather the stages of 'tuna run' into tables and a figure."""

    run_dir: str = ""
    """Folder of the experiment: the --run-dir of 'tuna run'."""


def run(options: TunaReport, console: Console | None = None) -> dict[str, Any]:
    """Writes ``report/report.md``, ``report/arms.png`` and ``report/results.json``, and returns the latter.

    Raises:
        InputError: if the evaluation is not finished.
    """
    console = console or Console()
    if not options.run_dir:
        raise InputError("--run-dir is missing: name the folder of 'tuna run'")
    root = Path(options.run_dir)
    judged, tasks = finished_run(root / EVALUATION / "judged"), read_json(root / EVALUATION / "rouge" / "tasks.json")
    if judged is None or tasks is None:
        raise InputError(f"{root / EVALUATION} holds no finished evaluation: run 'tuna run' or 'tuna evaluate' first")
    figures, against = judged.metrics, judged.metrics["against"]
    trainings, rankings = (_runs_by_name(root / kind) for kind in (POLICIES, RANKINGS))
    # Paired over tasks: every arm was evaluated on the same ones. The bootstrap takes the seed of the evaluation: its
    # intervals are the same on every call.
    gaps = {
        name: compare_paired(tasks[name], tasks[against], judged.options["seed"]) for name in tasks if name != against
    }
    count = len(tasks[BASE])
    results = {
        "arms": figures["arms"],
        "against": against,
        "win_rates": figures["win_rates"],
        "comparisons": {name: asdict(pair) | pair.shares for name, pair in gaps.items()},
        "training": {name: training.metrics for name, training in trainings.items()},
        "rankings": {name: ranking.metrics | ranking.counts for name, ranking in rankings.items()},
    }
    write_report(
        root / "report",
        [("", _arm_rows(figures, gaps, trainings)), ("", _ranking_rows(rankings))],
        console,
        f"Learning from rankings, {count} held-out tasks",
        _notes(against),
        results,
        {"arms.png": lambda path: plot_arms(figures, count, path)},
    )
    return results


def _runs_by_name(folder: Path) -> dict[str, FinishedRun]:
    """Returns the finished runs in a folder, by the names of their folders."""
    runs = (finished_run(path) for path in sorted(folder.glob("*")))
    return {run.folder.name: run for run in runs if run is not None}


def _notes(against: str) -> list[str]:
    """Returns the paragraphs that explain the columns of the tables."""
    return [
        "ROUGE-L (percent) of greedy answers, the mean over tasks. Win rate: the judge's mean outcome against "
        f"{against}, each pair in both orders. Intervals: 95%, bootstrap over tasks; they do not "
        "cover the variation between training seeds, as there is only one.",
        "Same: instances with the same response from both, a tie. Orders agree: of the others, those where both orders "
        "preferred the same response.",
        "Tau: Kendall's, between the order of candidates by the policy's log-probs per token and the ranking that it "
        "was trained on, on lists that were withheld, before and after training.",
    ]


def _arm_rows(
    figures: Mapping[str, Any], gaps: Mapping[str, Any], trainings: Mapping[str, FinishedRun]
) -> list[list[str]]:
    """Returns the table of the arms: a header, then one row per arm."""
    against = figures["against"]
    rows = [
        ["arm", "ROUGE-L (95%)", f"against {against} (95%)", "win rate (95%)", "same", "orders agree", "tokens", "tau"]
    ]
    for name, arm in figures["arms"].items():
        row = [name, percent(arm["rouge_l"], arm["rouge_l_low"], arm["rouge_l_high"])]
        row.append(percent(gap.difference, gap.low, gap.high, "+.1f") if (gap := gaps.get(name)) else "")
        wins = figures["win_rates"].get(name)
        row += _win_cells(wins) if wins and wins["win_rate"] is not None else [""] * 3
        row += [f"{arm['tokens']:.0f}", _taus(trainings[name].metrics if name in trainings else {})]
        rows.append(row)
    return rows


def _win_cells(wins: Mapping[str, float]) -> list[str]:
    """Returns the cells of an arm's win rate, its same responses and the agreement of the two orders."""
    agreed = "" if wins["agreement"] is None else f"{100 * wins['agreement']:.0f}%"
    rate = percent(wins["win_rate"], wins["win_rate_low"], wins["win_rate_high"], ".0f")
    return [rate, f"{100 * wins['same']:.0f}%", agreed]


def _taus(metrics: Mapping[str, Any]) -> str:
    """Returns the cell of Kendall's tau on withheld lists before and after training; empty if one is missing."""
    before, after = (metrics.get(f"tau, held out {when}") for when in ("before", "after"))
    return "" if before is None or after is None else f"{before:.2f} to {after:.2f}"


def _ranking_rows(rankings: Mapping[str, FinishedRun]) -> list[list[str]]:
    """Returns the table of the rankings: a header, then one row per run of 'tuna rank'."""
    rows = [["ranking", "lists", "candidates", "no ranking", "all tied", "tau with ROUGE-L", "ROUGE-L: best", "mean"]]
    for name, ranking in rankings.items():
        metrics, counts = ranking.metrics, ranking.counts
        keys = ("lists", "candidates", "without a ranking", "all tied")
        shown = ("kendall_tau", "rouge_l_best", "rouge_l_mean")
        cells = ["" if metrics[key] is None else f"{metrics[key]:.2f}" for key in shown]
        rows.append([name, *(str(counts[key]) for key in keys), *cells])
    return rows


def plot_arms(figures: Mapping[str, Any], tasks: int, path: Path) -> Path:
    """Plots ROUGE-L of every arm and its win rate against the reference policy, with 95% intervals over tasks.

    Args:
        figures: metrics of the evaluation, with ``arms``, ``win_rates`` and ``against``.
        tasks: number of held-out tasks.
        path: PNG file to write.

    Returns:
        The path.
    """
    figure, axes = panels(2)
    left, right = axes[0]
    names = list(figures["arms"])
    for k, name in enumerate(names):
        colour, arm = COLOURS[k % len(COLOURS)], figures["arms"][name]
        mean, low, high = (100 * arm[key] for key in ("rouge_l", "rouge_l_low", "rouge_l_high"))
        left.bar(k, mean, yerr=[[mean - low], [high - mean]], color=colour, alpha=0.75, capsize=4, width=0.6)
        wins = figures["win_rates"].get(name)
        if wins and wins["win_rate"] is not None:
            mean, low, high = (100 * wins[key] for key in ("win_rate", "win_rate_low", "win_rate_high"))
            right.errorbar(k, mean, yerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=4)
    # At 50 percent an arm wins as often as it loses.
    right.axhline(50, color="#555555", linewidth=1, linestyle="--")
    for axis in (left, right):
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_xlim(-0.6, len(names) - 0.4)
    left.set(title=f"Zero-shot on {tasks} held-out tasks", ylabel="ROUGE-L, percent")
    right.set(title=f"Judged against {figures['against']}, both orders", ylabel="win rate, percent")
    figure.savefig(path, dpi=130)
    return path
