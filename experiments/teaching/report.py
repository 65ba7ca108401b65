"""The report of an experiment: scores of the models fine-tuned on each data set, comparisons, and costs of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ..runs.folder import read_json
from ..runs.report import COLOURS, panels, percent, write_report
from ..runs.statistics import compare_paired, macro_interval
from .evaluate import BASE, comparison_rows

ATTACK = "calibrated"
"""The attack that the table shows: the base model's loss minus the model's own."""


@dataclass
class ArmResult:
    """The base model, or a data set with the models fine-tuned on it, one per seed."""

    name: str
    """``base``, or the name of the data set."""
    tasks: dict[str, float]
    """ROUGE-L by task, averaged over seeds."""
    exact_match: float
    """Exact match averaged over tasks and seeds."""
    seeds: list[float]
    """Macro ROUGE-L of each seed."""
    rows: int
    """Number of rows trained on."""
    attacks: list[Mapping[str, Any]]
    """Per seed, the metrics of every attack by its name."""

    @cached_property
    def rouge_l(self) -> tuple[float, float, float]:
        """ROUGE-L averaged over tasks, and the ends of its interval."""
        return macro_interval(self.tasks)

    @property
    def auc(self) -> tuple[float, float, float] | None:
        """AUC of the calibrated attack and the ends of its interval, averaged over seeds; None without attacks."""
        if not self.attacks:
            return None
        area, low, high = (
            float(np.mean([attack[ATTACK][key] for attack in self.attacks])) for key in ("auc", "auc_low", "auc_high")
        )
        return area, low, high


def stage_results(root: Path, name: str) -> dict[str, Any]:
    """Returns the results of a stage of an experiment.

    Raises:
        InputError: if the stage has not finished.
    """
    results = read_json(root / name / "results.json") or {}
    if results.get("status") != "finished":
        stage = name.partition("/")[0]
        raise InputError(f"{root / name} is not finished: run the stage {stage!r} first, with the same options")
    return results


def write_teaching_report(
    root: Path,
    models: Mapping[str, Sequence[str]],
    costs: Mapping[str, Mapping[str, float]],
    title: str,
    console: Console,
) -> dict[str, Any]:
    """Writes ``report/report.md``, ``report/results.json`` and ``report/taught.png``, and returns the figures.

    Args:
        root: folder of the experiment.
        models: names of the models fine-tuned on each data set, one per seed; the first data set is the one that the
            others are compared with.
        costs: LLM calls by kind, for each data set.
        title: heading of the report.
        console: console to print the tables to.

    Raises:
        InputError: if the evaluation or the attacks have not finished, or a model was not evaluated.
    """
    base, first, *others = arms = _gather(root, models)
    # Compare every data set with the base model, and with the first data set.
    pairs = {
        (arm.name, other.name): compare_paired(arm.tasks, other.tasks)
        for other, rest in ((base, [first, *others]), (first, others))
        for arm in rest
    }
    named = {f"{name} against {other}": pair for (name, other), pair in pairs.items()}
    seeds = len(first.seeds)
    notes = [
        f"Zero-shot ROUGE-L (percent) on {len(base.tasks)} held-out tasks, greedy; for fine-tuned models the mean "
        f"over {seeds} seed{'s' * (seeds > 1)}. Intervals: 95%, bootstrap over tasks; not over seeds.",
        "AUC: membership inference by the difference of the loss to the base model's, bootstrap over rows; 0.5 is "
        "guessing. With several seeds, the AUC and both ends of its interval are means over seeds, so this is no "
        "interval of the mean.",
    ]
    results = {
        "arms": {
            arm.name: {name: getattr(arm, name) for name in ("rouge_l", "seeds", "exact_match", "rows", "auc")}
            for arm in arms
        },
        "comparisons": {f"{name} vs {other}": asdict(pair) | pair.shares for (name, other), pair in pairs.items()},
        "costs": {name: dict(cost) for name, cost in costs.items()},
    }
    write_report(
        root / "report",
        [("", rows) for rows in (_score_rows(arms), comparison_rows(named, "task by task"), _cost_rows(costs))],
        console,
        title,
        notes,
        results,
        {"taught.png": lambda path: plot_arms(arms, path)},
    )
    return results


def _gather(root: Path, models: Mapping[str, Sequence[str]]) -> list[ArmResult]:
    """Reads the results of evaluation and attacks; returns the base model, then the data sets in order."""
    metrics = stage_results(root, "evaluate")["metrics"]["arms"]
    # Without withheld rows there is no attack.
    attacked = stage_results(root, "privacy")["metrics"] if (root / "privacy").exists() else {}
    tasks = read_json(root / "evaluate" / "tasks.json") or {}
    arms = []
    for name, seeds in {BASE: [BASE], **models}.items():
        if missing := [seed for seed in seeds if seed not in metrics]:
            raise InputError(f"{root / 'evaluate'} did not evaluate {missing[0]}: repeat that stage in a new folder")
        arms.append(
            ArmResult(
                name,
                {task: float(np.mean([tasks[seed][task] for seed in seeds])) for task in tasks[seeds[0]]},
                float(np.mean([metrics[seed]["exact_match"] for seed in seeds])),
                [metrics[seed]["rouge_l"] for seed in seeds],
                len(read_records(root / "finetune" / seeds[0] / "train.jsonl")),
                [attacked[seed]["attacks"] for seed in seeds if seed in attacked],
            )
        )
    return arms


def _score_rows(arms: Sequence[ArmResult]) -> list[list[str]]:
    return [
        ["trained on", "rows", "ROUGE-L (95%)", "by seed", "exact match", "AUC (95%)"],
        *(
            [
                arm.name if arm.name != BASE else "nothing (base)",
                str(arm.rows or ""),
                percent(*arm.rouge_l),
                ", ".join(f"{100 * seed:.1f}" for seed in arm.seeds) if len(arm.seeds) > 1 else "",
                f"{100 * arm.exact_match:.1f}",
                "{:.2f} ({:.2f} to {:.2f})".format(*arm.auc) if arm.auc else "",
            ]
            for arm in arms
        ),
    ]


def _cost_rows(costs: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    # Data sets may have different kinds of cost: keep the order in which they appear.
    kinds = list(dict.fromkeys(kind for cost in costs.values() for kind in cost))

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}" if value.is_integer() else f"{value:,.2f}"

    return [
        ["LLM calls", *kinds],
        *([name, *(shown(cost.get(kind)) for kind in kinds)] for name, cost in costs.items()),
    ]


def plot_arms(arms: Sequence[ArmResult], path: Path) -> Path:
    """Plots ROUGE-L and membership inference of all arms with 95% intervals, and returns the path; dots are seeds.

    Args:
        arms: the arms, the base model first.
        path: PNG file to write.
    """
    figure, axes = panels(2)
    left, right = axes[0]
    for k, arm in enumerate(arms):
        mean, low, high = (100 * value for value in arm.rouge_l)
        left.bar(k, mean, yerr=[[mean - low], [high - mean]], color=COLOURS[k], alpha=0.75, capsize=4, width=0.6)
        left.scatter([k] * len(arm.seeds), [100 * seed for seed in arm.seeds], s=16, color="#000000", zorder=3)
    left.set_xticks(range(len(arms)), [arm.name for arm in arms])
    left.set(title=f"Zero-shot on {len(arms[0].tasks)} held-out tasks", ylabel="ROUGE-L, percent")
    attacked = [(k, arm.name, arm.auc) for k, arm in enumerate(arms) if arm.auc]
    for place, (k, _, (area, low, high)) in enumerate(attacked):
        right.errorbar(place, area, yerr=[[area - low], [high - area]], fmt="o", color=COLOURS[k], capsize=4)
    right.axhline(0.5, color="#555555", linewidth=1, linestyle="--")
    right.set_xticks(range(len(attacked)), [name for _, name, _ in attacked])
    right.set(title="Membership inference", ylabel="AUC (0.5: guessing)", xlim=(-0.5, max(len(attacked), 1) - 0.5))
    figure.savefig(path, dpi=130)
    return path
