"""``instructgym evolve compare``: compares agents and baselines at equal LLM budget, training calls included.

Every arm (an agent or a baseline) gets the same number of LLM calls per random seed. A learner spends part of its
budget on training. The rest, and the whole budget of a baseline, goes into generation, which cycles over the seed
instructions until the budget does not cover another chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ...agents.sb3.factory import BASELINES, check_algorithm, make_agent
from ...agents.sb3.policy_io import load_policy
from ...envs.tasks.instruction.seeds import Instruction
from ...llm_backends import Journal
from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ..runs.folder import RowWriter, accounted, read_json, write_json
from ..runs.options import Count
from ..runs.progress import StepProgress
from ..runs.report import markdown, rich_table
from ..runs.training import Run, run_stage
from .generator import GenerationOptions, InstructionGenerator, generation_env
from .plots import Runs, over_seeds, plot_comparison
from .train import EnvOptions, EvolveTrain, check_context, identity, load_seeds, make_env, roles_of
from .train import run as train

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
class EvolveCompare(EnvOptions, GenerationOptions):
    """Compare agents and baselines at equal LLM budget."""

    algorithms: str = "TRPO,PPO,random,schedule"
    """Arms to compare, separated by commas: learners and baselines that 'evolve train --algorithm' takes."""
    repeats: Count = 3
    """Random seeds per arm: --seed, --seed + 1, ..."""
    calls: int = 0
    """LLM calls per arm and random seed, training included: rewrites, judge verdicts and answers. 0: by --scale, 700
    or 2400."""
    episodes: int = 0
    """Length of each learner's training, in full episodes. 0: by --scale, 20 or 80."""
    answer_tokens: Count = 64
    """Maximum length of an answer, in tokens; an answer that is cut off there loses its unfinished sentence."""

    def check(self) -> None:
        super().check()
        arms = self.arms
        if not arms or len(set(arms)) < len(arms):
            raise InputError(f"--algorithms must name distinct arms, separated by commas, got {self.algorithms!r}")
        for arm in arms:
            self.training(arm, self.seed, self.run_dir).check()

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
    options.check()
    instructions = load_seeds(options.seeds)
    roles = roles_of(options, None)
    env = make_env(options, roles, instructions)
    check_context(roles["rewriter"], instructions, options.seeds)
    _check_budget(options, env.get_attr("reward")[0].calls_per_sample)

    def work(opened: Run) -> dict[str, Any]:
        results: dict[str, list[dict[str, Any]]] = {}
        # Arms in the inner loop: a run that is stopped early has about as many seeds of each arm.
        for repeat, arm in itertools.product(range(options.repeats), options.arms):
            results.setdefault(arm, []).append(_arm(options, opened, arm, options.seed + repeat, instructions))
        return _report(options, opened, results)

    return run_stage(
        options,
        "evolve compare",
        console or Console(),
        work,
        distributed=False,
        plan=f"run {', '.join(options.arms)} on {options.repeats} seeds, {options.budget} calls each",
        **identity(options, instructions),
    )


def _check_budget(options: EvolveCompare, verdicts: int) -> None:
    """Raises an InputError if the budget does not cover an arm's training and one chunk of generation.

    Args:
        options: options of the comparison.
        verdicts: judge calls per edit.
    """
    per_chunk = options.chunk_calls(options.horizon, verdicts)
    for arm in options.arms:
        # In training an edit costs a rewrite and verdicts.
        training = 0 if arm in BASELINES else options.training(arm, options.seed, "").timesteps * (1 + verdicts)
        if options.budget < training + per_chunk:
            raise InputError(
                f"--calls {options.budget} does not cover the training of {arm} ({training} calls) and one chunk of "
                f"generation ({per_chunk} calls): raise it, or lower --episodes or --chunk"
            )


def _arm(
    options: EvolveCompare, opened: Run, arm: str, seed: int, instructions: Sequence[Instruction]
) -> dict[str, Any]:
    """Trains one arm under one seed, generates with it, and returns the result, or the stored one if it is finished.

    Raises:
        OutOfTimeError: if the time limit is reached.
    """
    folder = opened.folder.path / "arms" / f"{arm}-seed{seed}"
    stored = read_json(folder / "arm.json")
    if stored is not None:
        return stored
    opened.check_time()
    trained, spent = options.training(arm, seed, str(folder)), 0
    if arm not in BASELINES:
        counts = opened.limit.run(train, trained, opened.console)["counts"]
        spent = counts["rewrite_calls"] + counts["judge_calls"]
    roles = roles_of(trained, Journal(folder / "generate.jsonl"))
    env = generation_env(trained, roles, instructions, options.chunk)
    agent = make_agent(arm, env, seed) if arm in BASELINES else load_policy(folder / "checkpoints", env, seed)
    generator = InstructionGenerator(agent, env, roles["responder"], options, seed)
    totals, calls, curve = generator.totals, {"training": spent}, [(spent, 0)]
    # Replayed chunks give the same rows again: the writer appends only those that the file lacks.
    data = RowWriter(folder / "data.jsonl")
    with (
        accounted(roles, folder / "generate"),
        StepProgress(f"{arm} seed {seed} generates", options.budget, opened.console) as progress,
    ):
        progress.update(spent, "0 accepted")
        for rows in generator.run(opened.check_time, options.budget - spent):
            for row in rows:
                if "rejected_by" not in row:
                    data.write(row)
            calls = dict(totals.calls) | {"training": spent}
            curve.append((sum(calls.values()), len(totals.texts)))
            progress.update(curve[-1][0], f"{len(totals.texts)} accepted")
    metrics = totals.metrics()
    result = metrics | {
        "accepted": len(totals.texts),
        "calls": calls,
        "calls_per_accepted": curve[-1][0] / len(totals.texts) if totals.texts else None,
        "calls_per_accepted_generation": metrics["calls_per_accepted"],
        "curve": curve,
        "training": [(row["timesteps"], row["return"]) for row in read_records(folder / "episodes.jsonl")],
        "seed": seed,
    }
    write_json(folder / "arm.json", result)
    return result


def _report(options: EvolveCompare, opened: Run, results: Runs) -> dict[str, Any]:
    """Draws the figure, writes the table, and returns the results of the comparison."""
    figure = plot_comparison(results, options.budget, opened.folder.file("figures", "comparison.png"))
    metrics = {arm: {key: over_seeds(of_arm, key) for key in COLUMNS} for arm, of_arm in results.items()}
    rows = [["arm", *COLUMNS.values()], *([arm, *map(_cell, values.values())] for arm, values in metrics.items())]
    table = rich_table(rows)
    table.title = f"{options.repeats} seeds, {options.budget} LLM calls per arm and seed (mean ± 95% t-interval)"
    for column in table.columns[1:]:
        column.justify = "right"
    opened.console.print(table)
    opened.folder.file("table.md").write_text(markdown(rows), "utf-8")
    opened.tracker.image("comparison", figure)
    opened.tracker.summary(metrics)
    opened.console.print(f"figure: {figure}")
    return opened.folder.finish(
        metrics, {"arms": len(results), "repeats": options.repeats, "calls_per_arm": options.budget}
    )


def _cell(figure: Mapping[str, Any] | None) -> str:
    """Returns the text of a metric in the table: mean and half-width, if it has them."""
    if figure is None:
        return "-"
    mean, half = figure["mean"], figure["half_width"]
    digits = 1 if mean >= 10 else 2
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")
