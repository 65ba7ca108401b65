"""``instructgym tuna report``: tables and a figure that compare the arms of an experiment with ranked lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ...llm_backends.errors import InputError
from ..runs.folder import read_json
from ..runs.report import COLOURS, finished_run, panels, percent, with_ends, write_report
from ..runs.statistics import PairedComparison, compare_paired
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
    runs = {kind: filter(None, map(finished_run, sorted((root / kind).glob("*")))) for kind in (POLICIES, RANKINGS)}
    training = {run.folder.name: run.metrics for run in runs[POLICIES]}
    rankings = {run.folder.name: run.metrics | run.counts for run in runs[RANKINGS]}
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
        "training": training,
        "rankings": rankings,
    }
    write_report(
        root / "report",
        [("", _arm_rows(figures, gaps, training)), ("", _ranking_rows(rankings))],
        console,
        f"Learning from rankings, {count} held-out tasks",
        _notes(against),
        results,
        {"arms.png": lambda path: plot_arms(figures, count, path)},
    )
    return results


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
    figures: Mapping[str, Any], gaps: Mapping[str, PairedComparison], training: Mapping[str, Mapping[str, Any]]
) -> list[list[str]]:
    """Returns the table of the arms: a header, then one row per arm."""
    against = f"against {figures['against']} (95%)"
    rows = [["arm", "ROUGE-L (95%)", against, "win rate (95%)", "same", "orders agree", "tokens", "tau"]]
    for name, arm in figures["arms"].items():
        gap, wins = gaps.get(name), figures["win_rates"].get(name)
        row = [name, percent(*with_ends(arm, "rouge_l"))]
        row.append(percent(gap.difference, gap.low, gap.high, "+.1f") if gap else "")
        if wins and wins["win_rate"] is not None:
            agreed = "" if wins["agreement"] is None else f"{wins['agreement']:.0%}"
            row += [percent(*with_ends(wins, "win_rate"), ".0f"), f"{wins['same']:.0%}", agreed]
        else:
            row += [""] * 3
        before, after = (training.get(name, {}).get(f"tau, held out {when}") for when in ("before", "after"))
        taus = "" if before is None or after is None else f"{before:.2f} to {after:.2f}"
        rows.append([*row, f"{arm['tokens']:.0f}", taus])
    return rows


def _ranking_rows(rankings: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Returns the table of the rankings: a header, then one row per run of 'tuna rank'."""
    rows = [["ranking", "lists", "candidates", "no ranking", "all tied", "tau with ROUGE-L", "ROUGE-L: best", "mean"]]
    for name, ranking in rankings.items():
        counts = [ranking[key] for key in ("lists", "candidates", "without a ranking", "all tied")]
        means = [ranking[key] for key in ("kendall_tau", "rouge_l_best", "rouge_l_mean")]
        rows.append([name, *map(str, counts), *("" if mean is None else f"{mean:.2f}" for mean in means)])
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
        colour, wins = COLOURS[k % len(COLOURS)], figures["win_rates"].get(name)
        style: dict[str, Any] = {"color": colour, "capsize": 4}
        mean, low, high = (100 * end for end in with_ends(figures["arms"][name], "rouge_l"))
        left.bar(k, mean, yerr=[[mean - low], [high - mean]], alpha=0.75, width=0.6, **style)
        if wins and wins["win_rate"] is not None:
            mean, low, high = (100 * end for end in with_ends(wins, "win_rate"))
            right.errorbar(k, mean, yerr=[[mean - low], [high - mean]], fmt="o", **style)
    # At 50 percent an arm wins as often as it loses.
    right.axhline(50, color="#555555", linewidth=1, linestyle="--")
    for axis in (left, right):
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_xlim(-0.6, len(names) - 0.4)
    left.set(title=f"Zero-shot on {tasks} held-out tasks", ylabel="ROUGE-L, percent")
    right.set(title=f"Judged against {figures['against']}, both orders", ylabel="win rate, percent")
    figure.savefig(path, dpi=130)
    return path
