"""The report of an experiment: scores of the models fine-tuned on each data set, comparisons, and costs of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ..runs.folder import read_json, write_json
from ..runs.report import COLOURS, markdown, panels, rich_table
from ..runs.statistics import PairedComparison, compare_paired, macro_interval
from .evaluate import BASE

ATTACK = "calibrated"
"""The attack that the table shows: the base model's loss minus the model's own."""


@dataclass
class ArmResult:
    """The base model, or a data set with the models fine-tuned on it, one per seed."""

    name: str
    """``base``, or the name of the data set."""
    tasks: dict[str, float] = field(default_factory=dict)
    """ROUGE-L by task, averaged over seeds."""
    exact_match: float = 0.0
    """Exact match averaged over tasks and seeds."""
    seeds: list[float] = field(default_factory=list)
    """Macro ROUGE-L of each seed."""
    rows: int = 0
    """Number of rows trained on."""
    attacks: list[Mapping[str, Any]] = field(default_factory=list)
    """Per seed, the metrics of every attack by its name."""

    @property
    def auc(self) -> tuple[float, float, float] | None:
        """AUC of the calibrated attack and the ends of its interval, averaged over seeds; None without attacks."""
        calibrated = [attack[ATTACK] for attack in self.attacks]
        if not calibrated:
            return None
        area, low, high = (
            float(np.mean([metrics[key] for metrics in calibrated])) for key in ("auc", "auc_low", "auc_high")
        )
        return area, low, high


def report(
    root: Path,
    arms: Sequence[str],
    models: Sequence[str],
    costs: Mapping[str, Mapping[str, float]],
    title: str,
    console: Console,
) -> dict[str, Any]:
    """Writes ``report/report.md``, ``report/results.json`` and ``report/taught.png``, and returns the figures.

    Args:
        root: folder of the experiment.
        arms: names of the data sets; the first is the one that the others are compared with.
        models: names of the fine-tuned models: name of the data set, a hyphen and the seed.
        costs: LLM calls by kind, for each data set.
        title: heading of the report.
        console: console to print the tables to.

    Raises:
        InputError: if the evaluation or the attacks have not finished, or a model was not evaluated.
    """
    arm_results = _gather(root, arms, models)
    base = arm_results[0]
    macro = {arm.name: macro_interval(arm.tasks) for arm in arm_results}
    # Compare every data set with the base model, and with the first data set.
    pairs = {(arm.name, BASE): compare_paired(arm.tasks, base.tasks) for arm in arm_results[1:]}
    pairs |= {
        (arm.name, arm_results[1].name): compare_paired(arm.tasks, arm_results[1].tasks) for arm in arm_results[2:]
    }
    out = root / "report"
    out.mkdir(parents=True, exist_ok=True)
    tables = [_score_rows(arm_results, macro, pairs), _pair_rows(pairs)]
    if costs:
        tables.append(_cost_rows(costs))
    lines = [f"# {title}", "", *_notes(arm_results), ""]
    (out / "report.md").write_text("\n".join([*lines, *map(markdown, tables)]), "utf-8")
    plot_arms(arm_results, macro, out / "taught.png")
    results = {
        "arms": {
            arm.name: {
                "rouge_l": macro[arm.name],
                "seeds": arm.seeds,
                "exact_match": arm.exact_match,
                "rows": arm.rows,
                "auc": arm.auc,
            }
            for arm in arm_results
        },
        "comparisons": {f"{first} vs {second}": asdict(pair) | pair.shares for (first, second), pair in pairs.items()},
        "costs": {name: dict(cost) for name, cost in costs.items()},
    }
    write_json(out / "results.json", results)
    for rows in tables:
        console.print(rich_table(rows))
    console.print(f"wrote {out / 'report.md'} and {out / 'taught.png'}")
    return results


def _gather(root: Path, names: Sequence[str], models: Sequence[str]) -> list[ArmResult]:
    """Reads the results of evaluation and attacks; returns the base model, then the data sets in order."""
    evaluated = _finished_results(root / "evaluate")
    # Without withheld rows there is no attack.
    attacked = _finished_results(root / "privacy")["metrics"] if (root / "privacy").exists() else {}
    tasks = read_json(root / "evaluate" / "tasks.json") or {}
    metrics = evaluated["metrics"]["arms"]
    base = ArmResult(BASE, dict(tasks[BASE]), metrics[BASE]["exact_match"], [metrics[BASE]["rouge_l"]])
    arms = [base]
    for name in names:
        # The name of a data set may contain hyphens itself: split at the last one.
        seeds = [model for model in models if model.rpartition("-")[0] == name]
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


def _finished_results(folder: Path) -> dict[str, Any]:
    """Returns the results of a finished stage; raises an InputError if it has not finished."""
    results = read_json(folder / "results.json")
    if results is None or results.get("status") != "finished":
        raise InputError(f"{folder} holds no finished run: run that stage first")
    return results


def _notes(arms: Sequence[ArmResult]) -> list[str]:
    seeds = max(len(arm.seeds) for arm in arms)
    return [
        f"Zero-shot ROUGE-L (percent) on {len(arms[0].tasks)} held-out tasks, greedy; for fine-tuned models the mean "
        f"over {seeds} seed{'s' * (seeds > 1)}. Intervals: 95%, bootstrap over tasks; not over seeds.",
        "AUC: membership inference by the difference of the loss to the base model's, bootstrap over rows; 0.5 is "
        "guessing. With several seeds, the AUC and both ends of its interval are means over seeds, so this is no "
        "interval of the mean.",
    ]


def _score_rows(
    arms: Sequence[ArmResult], macro: Mapping[str, tuple[float, float, float]], pairs: Mapping[Any, PairedComparison]
) -> list[list[str]]:
    rows = [["trained on", "rows", "ROUGE-L (95%)", "by seed", "exact match", "AUC (95%)"]]
    for arm in arms:
        mean, low, high = (100 * value for value in macro[arm.name])
        auc = arm.auc
        rows.append(
            [
                arm.name if arm.name != BASE else "nothing (base)",
                str(arm.rows or ""),
                f"{mean:.1f} ({low:.1f} to {high:.1f})",
                ", ".join(f"{100 * seed:.1f}" for seed in arm.seeds) if len(arm.seeds) > 1 else "",
                f"{100 * arm.exact_match:.1f}",
                "" if auc is None else f"{auc[0]:.2f} ({auc[1]:.2f} to {auc[2]:.2f})",
            ]
        )
    return rows


def _pair_rows(pairs: Mapping[tuple[str, str], PairedComparison]) -> list[list[str]]:
    rows = [["task by task", "won", "tied", "lost", "difference (95%)"]]
    for (first, second), pair in pairs.items():
        shares = [f"{100 * share:.0f}%" for share in pair.shares.values()]
        gap = f"{100 * pair.difference:+.1f} ({100 * pair.low:+.1f} to {100 * pair.high:+.1f})"
        rows.append([f"{first} against {second}", *shares, gap])
    return rows


def _cost_rows(costs: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    # Data sets may have different kinds of cost: keep the order in which they appear.
    kinds = list(dict.fromkeys(kind for cost in costs.values() for kind in cost))
    rows = [["LLM calls", *kinds]]
    for name, cost in costs.items():
        rows.append([name, *(_count(cost[kind]) if kind in cost else "" for kind in kinds)])
    return rows


def _count(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"


def plot_arms(arms: Sequence[ArmResult], macro: Mapping[str, tuple[float, float, float]], path: Path) -> Path:
    """Plots ROUGE-L and membership inference of all arms with 95% intervals, and returns the path; dots are seeds.

    Args:
        arms: the arms, the base model first.
        macro: by arm, mean ROUGE-L over tasks and the ends of its interval.
        path: PNG file to write.
    """
    figure, axes = panels(2)
    left, right = axes[0]
    for k, arm in enumerate(arms):
        mean, low, high = (100 * value for value in macro[arm.name])
        left.bar(k, mean, yerr=[[mean - low], [high - mean]], color=COLOURS[k], alpha=0.75, capsize=4, width=0.6)
        left.scatter([k] * len(arm.seeds), [100 * seed for seed in arm.seeds], s=16, color="#000000", zorder=3)
    left.set_xticks(range(len(arms)), [arm.name for arm in arms])
    left.set(title=f"Zero-shot on {len(arms[0].tasks)} held-out tasks", ylabel="ROUGE-L, percent")
    attacked = [(k, arm) for k, arm in enumerate(arms) if arm.attacks]
    for place, (k, arm) in enumerate(attacked):
        assert arm.auc is not None
        area, low, high = arm.auc
        right.errorbar(place, area, yerr=[[area - low], [high - area]], fmt="o", color=COLOURS[k], capsize=4)
    right.axhline(0.5, color="#555555", linewidth=1, linestyle="--")
    right.set_xticks(range(len(attacked)), [arm.name for _, arm in attacked])
    right.set(title="Membership inference", ylabel="AUC (0.5: guessing)", xlim=(-0.5, max(len(attacked), 1) - 0.5))
    figure.savefig(path, dpi=130)
    return path
