"""The report of prompt searches: what its intervals count, and which prompt stands for what was learned."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats

from instructgym.experiments.prompt.report import PromptReport
from instructgym.experiments.prompt.report import run as report
from instructgym.experiments.runs.folder import write_json
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.records import write_lines

QUIET = Console(quiet=True)


def finished(folder, method, seed, right, accuracy, gap=0.0, prompt="Well?", **others):
    """The folder of a search whose prompt gets these test examples right."""
    rows = [{"id": str(i), "label": 1, "raw": int(one), "calibrated": 1} for i, one in enumerate(right)]
    options = {"task": "t", "method": method, "seed": seed} | others
    metrics = {"curve": [{"calls": 9, "raw": 0.5, "calibrated": 1.0}], "prompt": prompt}
    folder = folder / "-".join(map(str, (method, seed, *others)))
    write_json(folder / "config.json", {"command": "prompt run", "options": options})
    write_lines(folder / "test.jsonl", rows)
    write_lines(folder / "prompts.jsonl", [{"best": True, "accuracy": accuracy, "gap": gap}])
    counts = {"test": len(rows), "calls": 9, "prompts": 1, "rewriter_requests": 0}
    write_json(folder / "results.json", {"status": "finished", "metrics": metrics, "counts": counts})
    return folder


def test_intervals_count_examples_and_seeds_and_the_best_is_chosen_by_validation(tmp_path):
    for seed in range(2):
        finished(tmp_path, "manual", seed, [1, 0, 0, 0], 0.5)
        finished(tmp_path, "gepa", seed, [1, 1, seed, 0], 0.6, gap=0.1)
        finished(tmp_path, "soft-q", seed, [0, 0, 0, 1], 0.6, gap=0.2 * seed)
    figures = report(PromptReport(str(tmp_path)), QUIET)["t"]
    over = figures["gepa"]["raw"]["over_manual"]
    examples, seeds = stats.sem([0, 1, 0.5, 0]) * stats.t.ppf(0.975, 3), stats.sem([0.25, 0.5]) * stats.t.ppf(0.975, 1)
    assert over["mean"] == pytest.approx(0.375) and over["half"] == pytest.approx(np.hypot(examples, seeds))
    assert figures["manual"]["raw"]["half"] == pytest.approx(stats.sem([1, 0, 0, 0]) * stats.t.ppf(0.975, 3))
    best = figures["best learned"]
    assert best["methods"] == ["soft-q"] and best["seeds"] == [1] and best["raw"]["values"] == [0.25]
    assert "| best learned |" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("method", "seed", "others", "said"),
    [
        ("gepa", 1, {"horizon": 3}, "differ in horizon"),
        ("gepa", 0, {"track": "wandb"}, "are one search"),
        ("soft-q", 0, {"backend_dtype": "bfloat16"}, "differ in backend_dtype"),
    ],
)
def test_runs_that_cannot_be_averaged_are_refused(method, seed, others, said, tmp_path):
    finished(tmp_path, "gepa", 0, [1, 0], 0.5)
    finished(tmp_path, method, seed, [1, 0], 0.5, **others)
    with pytest.raises(InputError, match=said):
        report(PromptReport(str(tmp_path)), QUIET)


def test_colours_and_brackets(tmp_path, monkeypatch):
    """A method has one colour in all panels, and what looks like markup in a prompt is text."""
    for task, methods in (("t", ("manual", "random", "gepa")), ("u", ("manual", "gepa"))):
        for method in methods:
            finished(tmp_path / task, method, 0, [1, 0], 0.5, task=task, prompt="[/INST] Say [b]it[/b].")
    seen = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (seen.append(self), saved(self, *args, **kw))[1])
    console = Console(record=True, width=300, file=io.StringIO())
    report(PromptReport(str(tmp_path)), console)
    assert "[/INST] Say [b]it[/b]." in console.export_text()
    panels = [{line.get_label(): line.get_color() for line in axis.get_lines()} for axis in seen[0].axes]
    shown = seen[0].legends[0]
    legend = {text.get_text(): one.get_color() for text, one in zip(shown.texts, shown.legend_handles, strict=True)}
    assert list(legend) == ["manual", "random", "gepa"] and len(set(legend.values())) == 3
    assert all(panel[name] == legend[name] for panel in panels for name in legend if name in panel)


def test_runs_are_paired_by_example_or_refused(tmp_path):
    finished(tmp_path, "manual", 0, [1, 0], 0.5)
    other = finished(tmp_path, "gepa", 0, [1, 0], 0.5)
    path = other / "test.jsonl"
    path.write_text(path.read_text().replace('"0"', '"9"'))
    with pytest.raises(InputError, match="tested on different examples"):
        report(PromptReport(str(tmp_path)), QUIET)
    path.unlink()
    with pytest.raises(InputError, match=r"no whole test\.jsonl"):
        report(PromptReport(str(tmp_path)), QUIET)
