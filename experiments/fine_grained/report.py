"""``instructgym fine-grained report``: tables and learning curves of the arms of an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ..runs.report import COLOURS, band, differing, finished_runs, panels, percent, smooth, write_report
from .evaluate import RESPONSES, mean_of, wilson_win_rate


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
    (judge_axis, kl_axis), (proxy_axis, over_axis) = axes
    for k, (arm, runs) in enumerate(curves.items()):
        colour = COLOURS[k % len(COLOURS)]
        # Seeds may have stopped at different updates: use those that all of them have.
        updates = np.arange(1, min(len(run) for run in runs) + 1)
        window = max(len(updates) // 8, 1)

        def column(key: str) -> np.ndarray:
            return np.array(
                [smooth([row.get(key, float("nan")) for row in run], window)[: len(updates)] for run in runs]  # noqa: B023
            )

        kl, proxy, judge = column("train/kl"), column("rollout/terms/proxy"), column("rollout/terms/judge")
        won = figures.get(arm, {}).get("win_rate")
        band(judge_axis, updates, judge, arm if won is None else f"{arm}: wins {100 * won:.0f}%", colour)
        band(kl_axis, updates, kl, arm, colour)
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


@dataclass
class _ArmRuns:
    """One arm: the evaluations of its seeds and the curves of their training."""

    evaluations: list[dict[str, Any]] = field(default_factory=list)  # metrics
    wins: list[dict[str, float]] = field(default_factory=list)
    curves: list[list[dict[str, Any]]] = field(default_factory=list)
    evaluation_options: dict[str, Any] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Returns means over seeds, and the win rate with its interval over prompts.

        The outcome of a prompt is its mean over seeds: more seeds do not make the interval over prompts narrower.
        """
        names = sorted({name for metrics in self.evaluations for name in metrics})
        figures: dict[str, Any] = {name: mean_of(self.evaluations, name) for name in names}
        figures["seeds"] = len(self.evaluations)
        # Only prompts that every seed has a verdict on.
        prompts = set.intersection(*(set(wins) for wins in self.wins)) if self.wins else set()
        if prompts:
            pooled = wilson_win_rate(
                [float(np.mean([wins[prompt] for wins in self.wins])) for prompt in sorted(prompts)]
            )
            figures |= {name: value for name, value in pooled.items() if name.startswith("win_rate")}
        return figures


def run(options: FineGrainedReport, console: Console | None = None) -> dict[str, Any]:
    """Writes ``report.md`` and ``curves.png`` and returns the numbers of the tables.

    Raises:
        InputError: if there is no finished evaluation.
    """
    console = console or Console()
    arms, reward_models = _gather(Path(options.runs))
    if not any(arm.evaluations for arm in arms.values()):
        raise InputError(f"no finished run of 'fine-grained evaluate' in {options.runs}")
    figures = {name: arm.figures() for name, arm in arms.items() if arm.evaluations}
    tables = [("", rows) for rows in (_arm_rows(figures), _reward_rows(reward_models)) if len(rows) > 1]
    curves = {name: arms[name].curves for name in figures if arms[name].curves}
    plots = {"curves.png": lambda path: plot_fine_grained(curves, figures, path)} if curves else {}
    write_report(Path(options.out or Path(options.runs) / "report"), tables, console, plots=plots)
    return {"arms": figures, "reward_models": reward_models}


def _gather(root: Path) -> tuple[dict[str, _ArmRuns], dict[str, dict[str, Any]]]:
    """Returns the arms and the reward models among the finished runs below a folder, by name.

    Raises:
        InputError: if evaluations of one arm have different options.
    """
    arms: dict[str, _ArmRuns] = {}
    reward_models: dict[str, dict[str, Any]] = {}
    for run in finished_runs([root], *COMMANDS):
        options, name = run.options, run.options.get("arm") or run.folder.name
        if run.command == MODEL:
            reward_models[str(run.folder.relative_to(root))] = run.metrics | {
                "pairs_from": Path(options["pairs"]).stem,
                **{key: options[key] for key in ("level", "loss")},
                **{key: run.counts[key] for key in ("pairs", "held_out")},
            }
        elif run.command == PPO:
            rows = [row for row in read_records(run.folder / "metrics.jsonl") if "train/kl" in row]
            if rows:
                arms.setdefault(name, _ArmRuns()).curves.append(rows)
        else:
            arm = arms.setdefault(name, _ArmRuns())
            arm.evaluation_options = arm.evaluation_options or options
            if names := differing(arm.evaluation_options, options, SAME_OPTIONS):
                raise InputError(
                    f"the evaluations of {name} differ in {names}, so they are no seeds of one arm: give them "
                    f"other names by --arm, or move {run.folder} out of {root}"
                )
            arm.evaluations.append(run.metrics)
            rows = read_records(run.folder / RESPONSES)
            if wins := {row["id"]: row["win"] for row in rows if row.get("win") is not None}:
                arm.wins.append(wins)
    return arms, reward_models


def _arm_rows(figures: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Returns the table of the arms, in the order of their win rates: a header, then one row per arm."""
    measures = sorted({name for row in figures.values() for name in row if name.startswith("mean/")})
    titles = [
        "arm",
        "win rate, % (95%)",
        *(f"mean {name[5:]}" for name in measures),
        "KL, nats",
        "tokens",
        "distinct-2",
    ]
    rows = [[*titles, "seeds"]]
    for name, row in sorted(figures.items(), key=lambda item: item[1].get("win_rate", -1.0)):
        won = percent(*(row[f"win_rate{end}"] for end in ("", "_low", "_high"))) if "win_rate" in row else ""
        rows.append(
            [
                name,
                won,
                *(_number(row.get(measure), 3) for measure in measures),
                _number(row.get("kl"), 1),
                _number(row["tokens"], 1),
                _number(row["distinct_2"], 2),
                str(row["seeds"]),
            ]
        )
    return rows


def _reward_rows(models: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Returns the table of the reward models: a header, then one row per model."""
    titles = ["reward model", "pairs", "loss", "trained on", "held out", "pair accuracy", "AUC removed", "AUC written"]
    rows = [titles]
    for name, row in models.items():
        measured = [row.get(key) for key in ("accuracy", "removed_auc", "written_auc")]
        rows.append(
            [name, str(row["pairs_from"]), str(row["loss"]), str(row["pairs"]), str(row["held_out"])]
            + [_number(value, 3) for value in measured]
        )
    return rows


def _number(value: float | None, digits: int) -> str:
    """Returns a number with so many decimals; empty for None."""
    return "" if value is None else f"{value:.{digits}f}"
