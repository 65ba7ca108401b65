"""``instructgym prompt report``: test scores of all methods against the task-model calls that they made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..llm_backends.errors import InputError
from ..llm_backends.records import read_records
from .metrics import interval
from .options import check_output
from .plots import COLOURS, panels
from .prompt import TESTED
from .prompt_methods import METHODS
from .run_folder import read_json, write_json
from .tables import markdown, rich_table

COMMAND = "prompt run"
SAME = ("task", "data_seed", "calls", "validation", "test", "train", "minibatch", "backend", "calibrate", "data_dir")
"""Options in which the runs of one task may not differ."""
KINDS = ("raw", "calibrated")


@dataclass(frozen=True)
class Run:
    """A finished run of 'prompt run'."""

    options: dict[str, Any]
    results: dict[str, Any]
    folder: Path

    @property
    def metrics(self) -> dict[str, Any]:
        """Of its results."""
        metrics: dict[str, Any] = self.results["metrics"]
        return metrics

    def correct(self, kind: str) -> np.ndarray:
        """bool, shape (test examples,): what the best prompt gets right, raw or calibrated."""
        return np.array([row[kind] == row["label"] for row in read_records(self.folder / TESTED)])


@dataclass
class PromptReport:
    """Gather runs of 'prompt run' into tables and a figure."""

    runs: str = "runs/prompt"
    """Folder under which the run folders lie."""
    out: str = ""
    """Folder for report.md and methods.png. By default report in --runs."""


def run(options: PromptReport, console: Console | None = None) -> dict[str, Any]:
    """Writes ``report.md``, ``methods.png`` and ``results.json`` and returns the latter.

    Raises:
        InputError: without finished runs, and for runs of one task that cannot be compared.
    """
    console = console or Console()
    runs = _gather(Path(options.runs))
    if not runs:
        raise InputError(f"no finished run of 'prompt run' in {options.runs}")
    out = Path(options.out) if options.out else Path(options.runs) / "report"
    check_output(out / "report.md")
    figures = {task: {method: _figures(found) for method, found in arms.items()} for task, arms in runs.items()}
    for task, arms in runs.items():
        if "manual" in arms:
            for method, found in arms.items():
                figures[task][method]["over_manual"] = _difference(found, arms["manual"])
    out.mkdir(parents=True, exist_ok=True)
    lines = ["# Prompts for a frozen model", "", *_notes(), ""]
    tables = {task: _rows(arms) for task, arms in figures.items()}
    for task, rows in tables.items():
        lines += [f"## {task}", "", markdown(rows)]
    (out / "report.md").write_text("\n".join(lines), "utf-8")
    plot_methods(figures, out / "methods.png")
    write_json(out / "results.json", figures)
    for rows in tables.values():
        console.print(rich_table(rows))
    console.print(f"wrote {out / 'report.md'} and {out / 'methods.png'}")
    return figures


def _gather(root: Path) -> dict[str, dict[str, list[Run]]]:
    """The finished runs, by task and method."""
    found: dict[str, dict[str, list[Run]]] = {}
    for path in sorted(root.rglob("results.json")):
        config, results = read_json(path.parent / "config.json"), read_json(path)
        if config is None or config.get("command") != COMMAND or results is None:
            continue
        if results.get("status") != "finished":
            continue
        options = config["options"]
        arms = found.setdefault(options["task"], {})
        for other in next(iter(arms.values()), [])[:1]:
            differing = [name for name in SAME if options[name] != other.options[name]]
            if differing:
                raise InputError(
                    f"the runs of {options['task']} in {root} differ in {', '.join(differing)}: gather them apart"
                )
        arms.setdefault(options["method"], []).append(Run(options, results, path.parent))
    return {task: {name: arms[name] for name in METHODS if name in arms} for task, arms in sorted(found.items())}


def _figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Of one method on one task: means and 95% t-intervals over seeds, and the curve."""
    figures: dict[str, Any] = {"seeds": sorted(run.options["seed"] for run in runs)}
    for kind in KINDS:
        values = [run.metrics[f"test_{kind}"] for run in runs]
        mean, half = interval(values)
        figures[kind] = {"mean": mean, "half": None if np.isnan(half) else half, "values": values}
    curves = [{row["calls"]: row for row in run.metrics["curve"]} for run in runs]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    figures["curve"] = [
        {"calls": calls} | {kind: float(np.mean([curve[calls][kind] for curve in curves])) for kind in KINDS}
        for calls in shared
    ]
    figures["calls"] = float(np.mean([run.results["counts"]["calls"] for run in runs]))
    figures["prompts"] = float(np.mean([run.results["counts"]["prompts"] for run in runs]))
    figures["example"] = max(runs, key=lambda run: run.metrics["validation"]).metrics["prompt"]
    return figures


def _difference(runs: Sequence[Run], manual: Sequence[Run]) -> dict[str, dict[str, float]]:
    """How much more of the test examples a method gets right: means and 95% t-intervals over the examples.

    Pairs are of one example; what a method gets right of it is averaged over its seeds.
    """
    figures = {}
    for kind in KINDS:
        mine, theirs = (np.mean([run.correct(kind) for run in side], axis=0) for side in (runs, manual))
        mean, half = interval(mine - theirs)
        figures[kind] = {"mean": mean, "half": half}
    return figures


def _notes() -> list[str]:
    return [
        "Test accuracy (percent) of the prompt that was best on the validation examples: mean and 95% t-interval over "
        "seeds. Seeds change the search, not the examples. A call is one label of one example, validation included; "
        "`manual` stops when all instructions are validated.",
        "Over manual: the difference to `manual` on the same test examples, right answers averaged over seeds, with a "
        "95% t-interval over the examples.",
        "Calibrated: less the label bias on content-free inputs. What is left of a gain there is not a matter of bias.",
    ]


def _rows(arms: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    kinds = [title for kind in KINDS for title in (kind, "over manual")]
    rows = [["method", *kinds, "calls", "prompts validated", "seeds", "best prompt"]]
    for name, figures in arms.items():
        over = {} if name == "manual" else figures.get("over_manual", {})
        cells = [cell for kind in KINDS for cell in (_share(figures[kind]), _share(over[kind], "+") if over else "")]
        prompt = figures["example"].replace("\n", " / ").replace("|", "\\|")
        counts = [f"{figures['calls']:,.0f}", f"{figures['prompts']:.0f}", str(len(figures["seeds"]))]
        rows.append([name, *cells, *counts, prompt if len(prompt) < 160 else prompt[:157] + "..."])
    return rows


def _share(figures: Mapping[str, Any], sign: str = "") -> str:
    half = "" if figures["half"] is None else f" ± {100 * figures['half']:.1f}"
    return f"{100 * figures['mean']:{sign}.1f}{half}"


def plot_methods(figures: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> Path:
    """Test accuracy against task-model calls, a row of panels per task: raw and calibrated.

    Args:
        figures: by task and method.
        path: the PNG.
    """
    figure, axes = panels(2, len(figures))
    for row, (task, arms) in zip(axes, figures.items(), strict=True):
        for axis, kind in zip(row, KINDS, strict=True):
            for colour, (name, mine) in zip(COLOURS * 2, arms.items(), strict=False):
                curve = mine["curve"]
                axis.plot([c["calls"] for c in curve], [100 * c[kind] for c in curve], "o-", color=colour, label=name)
                if mine[kind]["half"] is not None and curve:
                    axis.errorbar(
                        curve[-1]["calls"],
                        100 * mine[kind]["mean"],
                        yerr=100 * mine[kind]["half"],
                        color=colour,
                        capsize=4,
                    )
            axis.set(title=f"{task}, {kind}", xlabel="task-model calls", ylabel="test accuracy, percent")
        row[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    return path
