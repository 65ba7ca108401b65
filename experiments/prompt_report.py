"""``instructgym prompt report``: test scores of all methods against the task-model calls that they made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..llm_backends.errors import InputError
from .metrics import interval
from .options import check_output
from .plots import COLOURS, panels
from .prompt_methods import METHODS
from .run_folder import read_json, write_json
from .tables import markdown, rich_table

COMMAND = "prompt run"
SAME = ("task", "data_seed", "calls", "validation", "test", "train", "minibatch", "backend", "calibrate", "data_dir")
"""Options in which the runs of one task may not differ."""
KINDS = ("raw", "calibrated")


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


def _gather(root: Path) -> dict[str, dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]]:
    """Options and results of the finished runs, by task and method."""
    found: dict[str, dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]] = {}
    for path in sorted(root.rglob("results.json")):
        config, results = read_json(path.parent / "config.json"), read_json(path)
        if config is None or config.get("command") != COMMAND or results is None:
            continue
        if results.get("status") != "finished":
            continue
        options = config["options"]
        arms = found.setdefault(options["task"], {})
        for other, _ in next(iter(arms.values()), [])[:1]:
            differing = [name for name in SAME if options[name] != other[name]]
            if differing:
                raise InputError(
                    f"the runs of {options['task']} in {root} differ in {', '.join(differing)}: gather them apart"
                )
        arms.setdefault(options["method"], []).append((options, results))
    return {task: {name: arms[name] for name in METHODS if name in arms} for task, arms in sorted(found.items())}


def _figures(runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    """Of one method on one task: means and 95% t-intervals over seeds, and the curve."""
    figures: dict[str, Any] = {"seeds": sorted(options["seed"] for options, _ in runs)}
    for kind in KINDS:
        values = [results["metrics"][f"test_{kind}"] for _, results in runs]
        mean, half = interval(values)
        figures[kind] = {"mean": mean, "half": None if np.isnan(half) else half, "values": values}
    curves = [{row["calls"]: row for row in results["metrics"]["curve"]} for _, results in runs]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    figures["curve"] = [
        {"calls": calls} | {kind: float(np.mean([curve[calls][kind] for curve in curves])) for kind in KINDS}
        for calls in shared
    ]
    figures["calls"] = float(np.mean([results["counts"]["calls"] for _, results in runs]))
    figures["prompts"] = float(np.mean([results["counts"]["prompts"] for _, results in runs]))
    best = max(runs, key=lambda pair: pair[1]["metrics"]["validation"])
    figures["example"] = best[1]["metrics"]["prompt"]
    return figures


def _notes() -> list[str]:
    return [
        "Test accuracy (percent) of the prompt that was best on the validation examples: mean and 95% t-interval over "
        "seeds. Seeds change the search, not the examples. A call is one label of one example, validation included; "
        "`manual` stops when all instructions are validated.",
        "Calibrated: less the label bias on content-free inputs. What is left of a gain there is not a matter of bias.",
    ]


def _rows(arms: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    rows = [["method", "raw", "calibrated", "calls", "prompts validated", "seeds", "best prompt"]]
    for name, figures in arms.items():
        cells = [_share(figures[kind]) for kind in KINDS]
        prompt = figures["example"].replace("\n", " / ").replace("|", "\\|")
        counts = [f"{figures['calls']:,.0f}", f"{figures['prompts']:.0f}", str(len(figures["seeds"]))]
        rows.append([name, *cells, *counts, prompt if len(prompt) < 160 else prompt[:157] + "..."])
    return rows


def _share(figures: Mapping[str, Any]) -> str:
    half = "" if figures["half"] is None else f" ± {100 * figures['half']:.1f}"
    return f"{100 * figures['mean']:.1f}{half}"


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
