"""``instructgym fine-grained report``: the arms of an experiment side by side, with curves and over-optimisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..llm_backends.errors import InputError
from ..llm_backends.records import read_records
from .fine_grained_evaluate import RESPONSES, win_rate
from .options import check_output
from .plots import plot_fine_grained
from .run_folder import read_json

COMMAND = "fine-grained "


@dataclass
class FineGrainedReport:
    """Gather the finished stages of an experiment into tables and figures."""

    runs: str = "runs/fine-grained"
    """Folder that holds the run folders of all stages."""
    out: str = ""
    """Folder for report.md and curves.png; by default 'report' within --runs."""


@dataclass
class _Arm:
    """One arm: the evaluations of its seeds, and the training behind them."""

    evaluations: list[dict[str, Any]] = field(default_factory=list)
    wins: list[dict[str, float]] = field(default_factory=list)
    curves: list[list[dict[str, Any]]] = field(default_factory=list)

    def mean(self, name: str) -> float:
        values = [results["metrics"].get(name) for results in self.evaluations]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else float("nan")

    def win_rate(self) -> dict[str, float] | None:
        """Over prompts, each taken as the mean of its seeds."""
        prompts = set.intersection(*(set(wins) for wins in self.wins)) if self.wins else set()
        return win_rate([float(np.mean([wins[p] for wins in self.wins])) for p in sorted(prompts)]) if prompts else None


def run(options: FineGrainedReport, console: Console | None = None) -> dict[str, Any]:
    """Writes ``report.md`` and ``curves.png`` and returns the tables' figures.

    Raises:
        InputError: if there is no finished evaluation.
    """
    console = console or Console()
    arms, reward_models = _gather(Path(options.runs))
    if not arms:
        raise InputError(f"no finished run of 'fine-grained evaluate' in {options.runs}")
    out = Path(options.out) if options.out else Path(options.runs) / "report"
    check_output(out / "report.md")
    out.mkdir(parents=True, exist_ok=True)
    figures = {name: _figures(arm) for name, arm in arms.items()}
    tables = [_arm_rows(figures), _reward_rows(reward_models)]
    (out / "report.md").write_text("\n".join(_markdown(rows) for rows in tables if len(rows) > 1), "utf-8")
    curves = {name: arm.curves for name, arm in arms.items() if arm.curves}
    if curves:
        plot_fine_grained(curves, figures, out / "curves.png")
    for rows in tables:
        if len(rows) > 1:
            table = Table(*rows[0])
            for row in rows[1:]:
                table.add_row(*row)
            console.print(table)
    console.print(f"wrote {out / 'report.md'}" + (f" and {out / 'curves.png'}" if curves else ""))
    return {"arms": figures, "reward_models": reward_models}


def _gather(root: Path) -> tuple[dict[str, _Arm], dict[str, dict[str, Any]]]:
    arms: dict[str, _Arm] = {}
    reward_models: dict[str, dict[str, Any]] = {}
    for path in sorted(root.rglob("results.json")):
        config, results = read_json(path.parent / "config.json"), read_json(path)
        command = str((config or {}).get("command", ""))
        if config is None or results is None or results.get("status") != "finished" or not command.startswith(COMMAND):
            continue
        options = config["options"]
        if command == COMMAND + "reward-model":
            reward_models[path.parent.name] = results["metrics"] | {
                "pairs_from": Path(options["pairs"]).stem,
                "level": options["level"],
                "loss": options["loss"],
                "pairs": results["counts"]["pairs"],
                "held_out": results["counts"]["held_out"],
            }
        elif command == COMMAND + "evaluate":
            arm = arms.setdefault(options["arm"] or path.parent.name, _Arm())
            arm.evaluations.append(results)
            rows = read_records(path.parent / RESPONSES)
            if wins := {row["id"]: row["win"] for row in rows if row.get("win") is not None}:
                arm.wins.append(wins)
            metrics = Path(options["policy"]) / "metrics.jsonl"
            curve = [row for row in (read_records(metrics) if metrics.exists() else []) if "train/kl" in row]
            if curve:
                arm.curves.append(curve)
    return arms, reward_models


def _figures(arm: _Arm) -> dict[str, Any]:
    names = sorted({name for results in arm.evaluations for name in results["metrics"]})
    pooled = arm.win_rate()
    return {name: arm.mean(name) for name in names} | (pooled or {}) | {"seeds": len(arm.evaluations)}


def _arm_rows(figures: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    measures = sorted({name for row in figures.values() for name in row if name.startswith("mean/")})
    titles = ["arm", "win rate, %", *(f"mean {name[5:]}" for name in measures), "KL, nats", "tokens", "distinct-2"]
    rows = [[*titles, "seeds"]]
    for name, row in sorted(figures.items(), key=lambda item: item[1].get("win_rate", -1.0)):
        won = (
            f"{100 * row['win_rate']:.1f} ± {100 * row['win_rate_half_width']:.1f}"
            if "win_rate" in row
            else "reference"
        )
        rows.append(
            [
                name,
                won,
                *(f"{row.get(measure, float('nan')):.3f}" for measure in measures),
                f"{row['kl']:.1f}" if "kl" in row else "0",
                f"{row['tokens']:.1f}",
                f"{row['distinct_2']:.2f}",
                str(row["seeds"]),
            ]
        )
    return rows


def _reward_rows(models: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    titles = ["reward model", "pairs", "loss", "trained on", "held out", "pair accuracy", "AUC removed", "AUC written"]
    rows = [titles]
    for name, row in models.items():
        measured = [row.get(key) for key in ("accuracy", "removed_auc", "written_auc")]
        rows.append(
            [name, str(row["pairs_from"]), str(row["loss"]), str(row["pairs"]), str(row["held_out"])]
            + ["" if value is None else f"{value:.3f}" for value in measured]
        )
    return rows


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"
