"""``instructgym prompt report``: tables and a figure of test accuracy over task-model calls, by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ..runs.folder import NOT_IDENTITY
from ..runs.report import COLOURS, FinishedRun, differing, finished_runs, panels, write_report
from ..runs.statistics import interval
from .methods import CURVE_EXAMPLES, KINDS, LEARNING, METHODS, TESTED
from .run import PROMPTS

TASK_OPTIONS = (
    "task data_seed calls validation train minibatch backend backend_dtype rewriter calibrate data_dir".split()
)
"""Options that must be equal in all runs of one task."""
COUNTS = ("calls", "rewriter_requests", "prompts")
"""Counts of a search that the tables show, as means over seeds."""
FREE_OPTIONS = NOT_IDENTITY | {"seed", "test", "scale"}
"""Options that may differ between the runs of one method."""
BEST = "best learned"
NOTES = (
    "Test accuracy, in percent, of the prompt that was best on the validation examples: mean over seeds, with a 95% "
    "interval for the draw of the test examples and of the search (seeds change the search, not the examples). Over "
    "manual: the difference to `manual` on the same test examples.",
    "A call is one label of one example, validation included; `manual` stops when all instructions are validated. "
    "Requests are those to the rewriter; `ppo`, `grpo` and `soft-q` write with a policy of their own instead, and "
    "train it.",
    "Calibrated: without the label bias on content-free inputs. A gain that remains there is not due to that bias.",
    f"{BEST.capitalize()}: the one prompt of all searches by {', '.join(LEARNING)} that did best on the validation "
    "examples; its calls are those of all these searches, its interval is for the draw of the test examples.",
    f"The curves are of the first {CURVE_EXAMPLES} test examples, tables and bars of all.",
)
"""Paragraphs that explain the columns of the tables."""


class SearchRun(FinishedRun):
    """A finished run of 'prompt run'."""

    @cached_property
    def test_rows(self) -> list[dict[str, Any]]:
        """Rows of ``test.jsonl``, one per test example.

        Raises:
            InputError: if rows are missing.
        """
        rows = read_records(self.folder / TESTED)
        if len(rows) != self.counts["test"]:
            raise InputError(f"{self.folder} has no whole {TESTED}: delete the folder and repeat the search")
        return rows

    @cached_property
    def validated(self) -> tuple[float, float]:
        """Validation accuracy of the best prompt and its mean gap, which decides between equal accuracies."""
        best = [row for row in read_records(self.folder / PROMPTS) if row["best"]][-1]
        return best["accuracy"], best["gap"]


@dataclass
class PromptReport:
    """Gather runs of 'prompt run' into tables and a figure."""

    runs: str = "runs/prompt"
    """Folder with the run folders, at any depth."""
    out: str = ""
    """Folder for report.md, methods.png and results.json. Empty: 'report' in --runs."""


def run(options: PromptReport, console: Console | None = None) -> dict[str, Any]:
    """Writes ``report.md``, ``methods.png`` and ``results.json`` and returns the latter.

    Raises:
        InputError: if there are no finished runs, or runs of one task cannot be compared.
    """
    root = Path(options.runs)
    return write_prompt_report([root], Path(options.out) if options.out else root / "report", console or Console())


def write_prompt_report(folders: Sequence[Path], out: Path, console: Console) -> dict[str, Any]:
    """Writes the report of the finished runs of 'prompt run' in the given folders; ignores other runs.

    Args:
        folders: run folders, or folders that hold run folders at any depth.
        out: folder for the files of the report.
        console: where the tables are printed.

    Returns:
        The content of ``results.json``, by task and method.

    Raises:
        InputError: if there are no finished runs, or runs of one task cannot be compared.
    """
    runs = _gather(folders)
    if not runs:
        raise InputError(f"no finished run of 'prompt run' for {out}: name a folder with run folders")
    figures: dict[str, dict[str, Any]] = {}
    for task, arms in runs.items():
        # One search by a learning method, that with the best prompt by validation, stands for all of them.
        learned = [run for name in LEARNING for run in arms.get(name, ())]
        compared = arms | ({BEST: [max(learned, key=lambda run: run.validated)]} if learned else {})
        figures[task] = {name: _figures(method_runs, arms.get("manual", ())) for name, method_runs in compared.items()}
    write_report(
        out,
        [(task, _rows(arms)) for task, arms in figures.items()],
        console,
        "Prompts for a frozen model",
        NOTES,
        figures,
        {"methods.png": lambda path: plot_methods(figures, path)},
    )
    return figures


def _gather(folders: Sequence[Path]) -> dict[str, dict[str, list[SearchRun]]]:
    """Returns the finished runs by task and method; raises an InputError if two of them cannot be compared."""
    by_task: dict[str, dict[str, list[SearchRun]]] = {}
    for finished in finished_runs(folders, "prompt run"):
        run = SearchRun(**vars(finished))
        arms = by_task.setdefault(run.options["task"], {})
        method_runs = arms.setdefault(run.options["method"], [])
        # Comparing with the first run is enough: all earlier ones agree with it.
        compared = [(other, TASK_OPTIONS) for other in next(iter(arms.values()))[:1]]
        compared += [(other, sorted({*run.options, *other.options} - FREE_OPTIONS)) for other in method_runs[:1]]
        for other, names in compared:
            if options := differing(run.options, other.options, names):
                raise InputError(f"{run.folder} and {other.folder} differ in {options}: gather them apart")
        for other in method_runs:
            if run.options["seed"] == other.options["seed"]:
                raise InputError(f"{run.folder} and {other.folder} are one search: gather them apart")
        method_runs.append(run)
    return {task: {name: arms[name] for name in METHODS if name in arms} for task, arms in sorted(by_task.items())}


def _figures(runs: Sequence[SearchRun], manual: Sequence[SearchRun]) -> dict[str, Any]:
    """Returns the results of a method on a task, with differences to the manual prompts if there are any."""
    figures: dict[str, Any] = {"seeds": sorted(run.options["seed"] for run in runs)}
    base = _right(manual, runs[0]) if manual else {}
    for kind, right in _right(runs, runs[0]).items():
        figures[kind] = _interval(right) | {"values": right.mean(axis=1).tolist()}
        if base:
            # Paired: differences on the same test examples.
            figures[kind]["over_manual"] = _interval(right - base[kind].mean(axis=0))
    curves = [{row["calls"]: row for row in run.metrics["curve"]} for run in runs]
    # Means over seeds at the numbers of calls that all curves have.
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    figures["curve"] = [
        {"calls": calls} | {kind: float(np.mean([curve[calls][kind] for curve in curves])) for kind in KINDS}
        for calls in shared
    ]
    for name in COUNTS:
        figures[name] = float(np.mean([run.counts[name] for run in runs]))
    figures["validation"] = float(np.mean([run.validated[0] for run in runs]))
    figures["methods"] = [run.options["method"] for run in runs]
    figures["example"] = max(runs, key=lambda run: run.validated).metrics["prompt"]
    return figures


def _right(runs: Sequence[SearchRun], first: SearchRun) -> dict[str, np.ndarray]:
    """Returns which test examples each run gets right, by kind: 1 or 0, float64, shape (runs, examples)."""
    ids = [row["id"] for row in first.test_rows]
    for run in runs:
        if [row["id"] for row in run.test_rows] != ids:
            raise InputError(f"{run.folder} and {first.folder} were tested on different examples: gather them apart")
    return {
        kind: np.array([[row[kind] == row["label"] for row in run.test_rows] for run in runs], dtype=np.float64)
        for kind in KINDS
    }


def _interval(values: np.ndarray) -> dict[str, Any]:
    """Returns the ``mean`` of values of shape (seeds, examples) and the ``half`` width of its 95% interval.

    Both the test examples and the search are random: the t-intervals over examples and over seeds are added as
    independent errors. With a single seed, only the interval over examples is used.
    """
    mean, half = interval(values.mean(axis=0))
    if len(values) > 1:
        half = float(np.hypot(half, interval(values.mean(axis=1))[1]))
    return {"mean": mean, "half": half}


def _rows(arms: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Returns the table of a task: a header, then one row per method."""
    kinds = [title for kind in KINDS for title in (kind, "over manual")]
    rows = [["method", "validation", *kinds, "calls", "requests", "validated", "seeds", "best prompt"]]
    for name, figures in arms.items():
        row = [name, f"{100 * figures['validation']:.1f}"]
        for kind in KINDS:
            over = None if name == "manual" else figures[kind].get("over_manual")
            row += [_share(figures[kind]), _share(over, "+") if over else ""]
        row += ["" if name == BEST else f"{figures[count]:,.0f}" for count in COUNTS]
        prompt = figures["example"].replace("\n", " / ").replace("|", "\\|")
        rows.append([*row, str(len(figures["seeds"])), prompt if len(prompt) < 160 else prompt[:157] + "..."])
    return rows


def _share(figures: Mapping[str, float], sign: str = "") -> str:
    """Returns a mean and the half-width of its interval in percent."""
    return f"{100 * figures['mean']:{sign}.1f} ± {100 * figures['half']:.1f}"


def plot_methods(figures: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> Path:
    """Plots test accuracy over task-model calls, raw and calibrated, with a row of panels per task.

    Args:
        figures: results of the report by task and method.
        path: PNG file to write.

    Returns:
        The path.
    """
    figure, axes = panels(2, len(figures))
    for row, (task, arms) in zip(axes, figures.items(), strict=True):
        methods = [(name, results) for name, results in arms.items() if name != BEST]
        for axis, kind in zip(row, KINDS, strict=True):
            for place, (name, results) in enumerate(methods):
                colour, curve = COLOURS[list(METHODS).index(name)], results["curve"]
                axis.plot([c["calls"] for c in curve], [100 * c[kind] for c in curve], "o-", color=colour, label=name)
                end = curve[-1]["calls"] * (1 + 0.02 * (place + 1))  # squares of the methods next to each other
                mean, half = (100 * results[kind][part] for part in ("mean", "half"))
                axis.errorbar(end, mean, yerr=half, color=colour, capsize=4, marker="s", markersize=5)
            axis.set(title=f"{task}, {kind}", xlabel="task-model calls", ylabel="test accuracy, percent")
    handles = {line.get_label(): line for axis in axes[:, 0] for line in axis.get_lines() if line.get_label()[0] != "_"}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.suptitle(
        "squares: all test examples, 95% intervals over examples and seeds; curves: the first of them", fontsize=9
    )
    figure.savefig(path, dpi=130)
    return path
