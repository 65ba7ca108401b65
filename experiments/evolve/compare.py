"""``instructgym evolve compare``: compares agents and baselines at equal LLM budget, training calls included.

Every arm (an agent or a baseline) gets the same number of LLM calls per random seed. A learner spends part of its
budget on training. The rest, and the whole budget of a baseline, goes into generation, which cycles over the seed
instructions until the budget does not cover another chunk.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...agents.sb3.factory import BASELINES, check_algorithm, make_agent
from ...agents.sb3.policy_io import load_policy
from ...envs.tasks.instruction.seeds import Instruction
from ...llm_backends import Journal
from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ..runs.folder import RowWriter, RunFolder, Tracker, accounted, read_json, write_json
from ..runs.options import input_errors
from ..runs.progress import StepProgress
from ..runs.report import COLOURS, band, panels, smooth
from ..runs.statistics import interval
from .generate import EvolveGenerate
from .generator import GenerationSettings, InstructionGenerator, chunks, dataset_metrics, generation_env
from .train import EnvOptions, EvolveTrain, check_context, identity, load_seeds, make_env, roles_of
from .train import run as train


def plot_comparison(arms: Mapping[str, Mapping[str, Any]], budget: int, path: Path) -> Path:
    """Plots agents and baselines side by side, with 95% t-intervals over seeds, and returns the path.

    Args:
        arms: results by name of the arm: ``curves`` (per seed, a list of (LLM calls spent, instructions accepted)),
            ``training`` (per seed, a list of (environment steps, return), empty for an arm without training),
            ``results`` (per seed, the metrics of the table).
        budget: LLM calls per arm and seed.
        path: PNG file to write.
    """
    figure, axes = panels(2, 2)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(arms)}
    _plot_returns(axes[0, 0], arms, colours)
    _plot_accepted(axes[0, 1], arms, colours, budget)
    _plot_bars(
        axes[1, 0],
        arms,
        colours,
        {"calls_per_accepted": "training included", "calls_per_accepted_generation": "generation only"},
        "LLM queries per accepted instruction (fewer is better)",
    )
    _plot_bars(
        axes[1, 1],
        arms,
        colours,
        {"embedding_distance": "mean cosine distance", "distinct_2": "distinct-2"},
        "Diversity of the accepted instructions",
    )
    seeds = max(len(arm["results"]) for arm in arms.values())
    figure.suptitle(f"{seeds} seeds, {budget} LLM calls per arm and seed; bands and bars: 95% t-interval of the mean")
    figure.savefig(path, dpi=130)
    return path


def _plot_returns(axis: Any, arms: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    for name, arm in arms.items():
        curves = [curve for curve in arm["training"] if curve]
        if not curves:
            continue
        # Average over seeds on the range of steps that every seed covers.
        grid = np.linspace(max(c[0][0] for c in curves), min(c[-1][0] for c in curves), 60)
        # Several episodes may end in one step: the dict keeps one value per step, as np.interp needs rising steps.
        smoothed = [
            dict(zip((s for s, _ in c), smooth([r for _, r in c], max(len(c) // 8, 5)), strict=True)) for c in curves
        ]
        rows = [np.interp(grid, list(curve), list(curve.values())) for curve in smoothed]
        band(axis, grid, np.array(rows), name, colours[name])
    axis.set(title="Return per episode in training", xlabel="environment steps", ylabel="return (smoothed)")
    if axis.get_legend_handles_labels()[1]:
        axis.legend(frameon=False)


def _plot_accepted(axis: Any, arms: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str], budget: int) -> None:
    grid = np.linspace(0, budget, 80)
    for name, arm in arms.items():
        # A learner's curve begins after its training calls: the point (0, 0) is put before it.
        rows = [np.interp(grid, [0, *(c for c, _ in curve)], [0, *(a for _, a in curve)]) for curve in arm["curves"]]
        band(axis, grid, np.array(rows), name, colours[name])
    axis.set(title="Accepted instructions", xlabel="LLM calls spent, training included", ylabel="accepted")
    axis.legend(frameon=False)


def _plot_bars(
    axis: Any, arms: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str], keys: Mapping[str, str], title: str
) -> None:
    positions = np.arange(len(arms), dtype=np.float64)
    width = 0.8 / len(keys)
    for k, (key, label) in enumerate(keys.items()):
        # The bars of one arm are centred on its tick.
        means, errors = zip(*(_mean_error(arm["results"], key) for arm in arms.values()), strict=True)
        bars = axis.bar(
            positions + (k - (len(keys) - 1) / 2) * width,
            means,
            width * 0.92,
            yerr=errors,
            capsize=3,
            color=[colours[name] for name in arms],
            alpha=1.0 if k == 0 else 0.45,
            label=label,
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axis.set_xticks(positions, list(arms))
    axis.set(title=title)
    axis.set_ylim(top=axis.get_ylim()[1] * 1.12)
    axis.text(
        0.99,
        0.99,
        " | ".join(("solid: ", "light: ")[k] + v for k, v in enumerate(keys.values())),
        transform=axis.transAxes,
        ha="right",
        va="top",
        fontsize=8,
    )


def _mean_error(results: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float]:
    """Returns the mean of a metric over seeds and the half-width of its 95% t-interval, 0 for a single seed."""
    values = [row[key] for row in results if row[key] is not None]
    if not values:
        return float("nan"), 0.0
    mean, half = interval(values)
    return mean, 0.0 if np.isnan(half) else half


BUDGET = {"smoke": 700, "report": 2400}
"""LLM calls per arm and seed, by ``--scale``."""
TRAINING_EPISODES = {"smoke": 20, "report": 80}
"""Episodes that a learner trains for, by ``--scale``."""

COLUMNS = {
    "mean_return": "return per episode",
    "accepted": "accepted",
    "calls_per_accepted": "calls / accepted",
    "calls_per_accepted_generation": "calls / accepted, training excluded",
    "embedding_distance": "cosine distance",
    "distinct_2": "distinct-2",
    "mean_words": "words",
}


@dataclass
class EvolveCompare(EnvOptions):
    """Compare agents and baselines at equal LLM budget."""

    algorithms: str = "TRPO,PPO,random,schedule"
    """Arms to compare, separated by commas: learners and baselines that 'evolve train --algorithm' takes."""
    repeats: int = 3
    """Random seeds per arm: --seed, --seed + 1, ..."""
    calls: int = 0
    """LLM calls per arm and random seed, training included: rewrites, judge verdicts and answers. 0: by --scale, 700
    or 2400."""
    episodes: int = 0
    """Length of each learner's training, in full episodes. 0: by --scale, 20 or 80."""
    n_steps: int = 6
    """Steps of each environment per policy update in training."""
    chunk: int = 16
    """Seed instructions evolved together in one batch of generation."""
    answer_tokens: int = 64
    """Maximum length of an answer, in tokens."""
    rouge_threshold: float = 0.7
    """Drop an instruction if its ROUGE-L to a seed or to an accepted instruction is above this."""

    def check(self) -> None:
        super().check()
        if self.repeats < 1:
            raise InputError(f"--repeats must be at least 1, got {self.repeats}")
        arms = self.arms
        if not arms or len(set(arms)) < len(arms):
            raise InputError(f"--algorithms must name distinct arms, separated by commas, got {self.algorithms!r}")
        for arm in arms:
            self.training(arm, self.seed, self.run_dir).check()
        EvolveGenerate(
            run_dir=self.run_dir,
            chunk=self.chunk,
            answer_tokens=self.answer_tokens,
            rouge_threshold=self.rouge_threshold,
        ).check()

    @property
    def arms(self) -> list[str]:
        """Names of the arms, in the spelling that the library uses."""
        return [check_algorithm(name.strip()) for name in self.algorithms.split(",") if name.strip()]

    @property
    def budget(self) -> int:
        """LLM calls per arm and seed."""
        return self.calls or BUDGET[self.scale]

    def training(self, arm: str, seed: int, run_dir: str) -> EvolveTrain:
        """Returns the options with which 'evolve train' trains one arm."""
        shared = {k: v for k, v in vars(self).items() if k in EvolveTrain.__dataclass_fields__}
        episodes = self.episodes or TRAINING_EPISODES[self.scale]
        # Only the comparison is logged to the tracker, as one entry with its figure and table.
        return EvolveTrain(
            **shared | {"algorithm": arm, "seed": seed, "run_dir": run_dir, "episodes": episodes, "track": "none"}
        )


def run(options: EvolveCompare, console: Console | None = None) -> dict[str, Any]:
    """Runs every arm under every seed, except those that are finished, and returns the results.

    Returns:
        ``status``, ``counts`` and ``metrics``: by arm, mean and half-width of the 95% t-interval of each metric.

    Raises:
        InputError: for bad input, before any expensive work.
    """
    console = console or Console()
    options.check()
    instructions = load_seeds(options.seeds)
    folder = RunFolder(options.run_dir, identity(options, instructions), "evolve compare")
    with input_errors():
        roles = roles_of(options, None)
        env = make_env(options, roles, instructions)
    check_context(roles.rewriter, instructions, options.seeds)
    _check_budget(options, env.get_attr("reward")[0].calls_per_sample)
    if options.dry_run:
        console.print(f"would run {', '.join(options.arms)} on {options.repeats} seeds, {options.budget} calls each")
        return {}
    if folder.results is not None:
        console.print(f"{folder.path} holds this comparison, finished: nothing to do")
        return folder.results
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else math.inf
    with folder.opened():
        runs: dict[str, list[dict[str, Any]]] = {}
        for repeat in range(options.repeats):
            # Arms in the inner loop: a run that is stopped early has about as many seeds of each arm.
            for arm in options.arms:
                result = _arm(options, folder, arm, options.seed + repeat, instructions, deadline, console)
                if result is None:
                    console.print("stopped at the time limit: the same command goes on")
                    return folder.finish({}, {}, status="stopped")
                runs.setdefault(arm, []).append(result)
        return _report(options, folder, runs, console)


def _check_budget(options: EvolveCompare, verdicts: int) -> None:
    """Raises an InputError if the budget does not cover an arm's training and one chunk of generation.

    Args:
        options: options of the comparison.
        verdicts: judge calls per edit.
    """
    # An edit costs a rewrite and verdicts, in generation an answer too.
    per_chunk = options.chunk * options.horizon * (2 + verdicts)
    for arm in options.arms:
        training = 0 if arm in BASELINES else options.training(arm, options.seed, "").timesteps * (1 + verdicts)
        if options.budget < training + per_chunk:
            raise InputError(
                f"--calls {options.budget} does not cover the training of {arm} ({training} calls) and one chunk of "
                f"generation ({per_chunk} calls): raise it, or lower --episodes or --chunk"
            )


def _arm(
    options: EvolveCompare,
    folder: RunFolder,
    arm: str,
    seed: int,
    instructions: Sequence[Instruction],
    deadline: float,
    console: Console,
) -> dict[str, Any] | None:
    """Trains one arm under one seed and generates with it; returns the stored result if it is finished.

    Returns:
        The result; None if time ran out.
    """
    arm_folder = folder.path / "arms" / f"{arm}-seed{seed}"
    stored = read_json(arm_folder / "arm.json")
    if stored is not None:
        return stored
    minutes = (deadline - time.monotonic()) / 60
    if minutes <= 0:
        return None
    # For 'evolve train', 0 minutes mean no limit.
    training_options = replace(
        options.training(arm, seed, str(arm_folder)), minutes=minutes if math.isfinite(minutes) else 0.0
    )
    training_calls = 0
    if arm not in BASELINES:
        results = train(training_options, console)
        if results["status"] != "finished":
            return None
        training_calls = results["counts"]["rewrite_calls"] + results["counts"]["judge_calls"]
    result = _generate(options, training_options, arm_folder, instructions, training_calls, deadline, console)
    if result is None:
        return None
    curve = [(row["timesteps"], row["return"]) for row in read_records(arm_folder / "episodes.jsonl")]
    result |= {"training": curve, "seed": seed}
    write_json(arm_folder / "arm.json", result)
    return result


def _generate(
    options: EvolveCompare,
    training_options: EvolveTrain,
    arm_folder: Path,
    instructions: Sequence[Instruction],
    training_calls: int,
    deadline: float,
    console: Console,
) -> dict[str, Any] | None:
    """Loads or makes the arm's agent and generates until the budget does not cover another chunk.

    Returns:
        Metrics and the curve of accepted instructions; None if time ran out.
    """
    roles = roles_of(training_options, Journal(arm_folder / "generate.jsonl"))
    env = generation_env(training_options, roles, instructions, options.chunk)
    if training_options.algorithm in BASELINES:
        agent = make_agent(training_options.algorithm, env, training_options.seed)
    else:
        agent = load_policy(arm_folder / "checkpoints", env, training_options.seed)
    settings = GenerationSettings(training_options.seed, options.chunk, options.rouge_threshold, options.answer_tokens)
    generator = InstructionGenerator(agent, env, roles, settings)
    with accounted(vars(roles), arm_folder / "generate"):
        return _generate_rows(
            options, training_options, arm_folder, generator, len(instructions), training_calls, deadline, console
        )


def _generate_rows(
    options: EvolveCompare,
    training_options: EvolveTrain,
    arm_folder: Path,
    generator: InstructionGenerator,
    seeds: int,
    training_calls: int,
    deadline: float,
    console: Console,
) -> dict[str, Any] | None:
    """Evolves chunk after chunk, writes the accepted rows, and returns the metrics; None if time ran out."""
    # Replayed chunks give the same rows again: the writer appends only those that the file lacks.
    rows = RowWriter(arm_folder / "data.jsonl")
    texts: list[str] = []
    returns: list[float] = []
    calls: Counter[str] = Counter()
    spent = training_calls
    curve: list[tuple[int, int]] = [(spent, 0)]
    with StepProgress(
        f"{training_options.algorithm} seed {training_options.seed} generates", options.budget, console
    ) as progress:
        for epoch, members in _rounds(seeds, options.chunk):
            progress.update(spent, f"{len(texts)} accepted")
            # Reserve the most that a chunk may cost, so that no arm exceeds the budget.
            if spent + generator.max_chunk_calls > options.budget:
                break
            if time.monotonic() >= deadline:
                return None
            result = generator.chunk(members, epoch)
            if not result.calls.total():
                break  # a policy that only chooses the no-op makes no calls and would never spend its budget
            for row in result.accepted:
                rows.write(row)
            texts += [row["instruction"] for row in result.accepted]
            returns += result.returns
            calls.update(result.calls)
            spent = training_calls + calls.total()
            curve.append((spent, len(texts)))
    return dataset_metrics(texts, calls, returns) | {
        "accepted": len(texts),
        "calls": dict(calls) | {"training": training_calls},
        "calls_per_accepted": spent / len(texts) if texts else None,
        "calls_per_accepted_generation": calls.total() / len(texts) if texts else None,
        "curve": curve,
    }


def _rounds(count: int, size: int) -> Iterator[tuple[int, list[int]]]:
    """Yields the number of the round and the indices of a chunk, over all ``count`` seeds, in endless rounds."""
    for epoch in itertools.count():
        for members in chunks(count, size):
            yield epoch, members


def _report(
    options: EvolveCompare, folder: RunFolder, runs: dict[str, list[dict[str, Any]]], console: Console
) -> dict[str, Any]:
    """Draws the figure, writes the table, and returns the results of the comparison."""
    arms = {
        arm: {
            "results": results,
            "curves": [result["curve"] for result in results],
            "training": [result["training"] for result in results],
        }
        for arm, results in runs.items()
    }
    figure = plot_comparison(arms, options.budget, folder.file("figures", "comparison.png"))
    table = Table(title=f"{options.repeats} seeds, {options.budget} LLM calls per arm and seed (mean ± 95% t-interval)")
    table.add_column("arm", overflow="fold")
    markdown = ["| arm | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    metrics: dict[str, Any] = {}
    for title in COLUMNS.values():
        table.add_column(title, justify="right", overflow="fold")
    for arm, results in runs.items():
        cells = []
        metrics[arm] = {}
        for key in COLUMNS:
            values = [result[key] for result in results if result[key] is not None]
            if not values:
                metrics[arm][key] = None
                cells.append("-")
                continue
            mean, half = interval(values)
            metrics[arm][key] = {"mean": mean, "half_width": None if math.isnan(half) else half}
            digits = 1 if mean >= 10 else 2
            cells.append(f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}"))
        table.add_row(arm, *cells)
        markdown.append(f"| {arm} | " + " | ".join(cells) + " |")
    console.print(table)
    folder.file("table.md").write_text("\n".join(markdown) + "\n", "utf-8")
    with Tracker(folder, options.track) as tracker:
        tracker.image("comparison", figure)
        tracker.summary(metrics)
    console.print(f"figure: {figure}")
    return folder.finish(metrics, {"arms": len(runs), "repeats": options.repeats, "calls_per_arm": options.budget})
