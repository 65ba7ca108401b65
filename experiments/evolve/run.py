"""``instructgym evolve run``: all stages of TeaMs-RL.

Does fine-tuning on an agent's data help more than fine-tuning on data of random evolution? Both data sets
cost the same number of LLM calls, the agent's training included. One model is then fine-tuned on equally many rows of
each, evaluated on held-out tasks and attacked by membership inference. Random evolution is Evol-Instruct with this
library's operations, rules and filters.

:mod:`~instructgym.experiments.teaching.run` has the stages that follow the generation of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from ...agents.sb3.factory import BASELINES, check_algorithm
from ...envs.tasks.instruction.pool import evaluation_split, load_tasks
from ...llm_backends.errors import InputError
from ..runs.folder import read_json, write_once
from ..runs.options import input_errors, parse_part, parse_reward
from ..runs.training import in_time
from ..teaching.run import TeachingOptions, evaluate_arms, finetune_arms, teach, write_report
from .compare import EvolveCompare
from .compare import run as compare
from .queries import EVOL_INSTRUCT_CALLS

RANDOM = "random"
"""The arm that evolves at random."""
CALLS = {"smoke": 190, "report": 1600}
"""LLM calls per data set, by ``--scale``."""
EPISODES = {"smoke": 4, "report": 48}
"""Episodes that the agent trains for, by ``--scale``."""
NUM_ENVS = {"smoke": 6, "report": 16}
"""Environments stepped together in training, and seeds evolved together in generation: their requests share a batch."""
ANSWER_TOKENS = {"smoke": 32, "report": 64}
"""Maximum tokens of an answer, by ``--scale``."""


@dataclass
class EvolveStageOptions(TeachingOptions):
    """Options of the stages that follow the generation of the data."""

    name: ClassVar[str] = "evolve run"

    algorithm: str = "TRPO"
    """Algorithm of the agent: any learner that 'evolve train --algorithm' takes."""

    def check(self) -> None:
        super().check()
        self.algorithm = check_algorithm(self.algorithm)
        if self.algorithm in BASELINES:
            raise InputError(f"--algorithm must be a learner, {self.algorithm} is a baseline")

    @property
    def data(self) -> dict[str, Path]:
        # The first data set is the one that the report compares the others with.
        folder = self.root / "compare" / "arms"
        return {arm: folder / f"{arm}-seed{self.seed}" / "data.jsonl" for arm in (RANDOM, self.algorithm)}

    @property
    def title(self) -> str:
        return f"TeaMs-RL: {self.algorithm} against random evolution, {self.model}"

    def costs(self) -> dict[str, dict[str, float]]:
        return {arm: _cost(arm, path.parent) for arm, path in self.data.items()}

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"algorithm": self.algorithm}


def _cost(arm: str, folder: Path) -> dict[str, float]:
    """Returns the LLM calls of one data set by kind, their sum, and its ratio to Evol-Instruct's 3 calls per edit."""
    result = read_json(folder / "arm.json")
    if result is None:
        raise InputError(f"the data of {arm} in {folder} are not finished: repeat 'evolve run'")
    calls = {kind: float(result["calls"].get(kind, 0)) for kind in ("training", "rewrite", "judge", "answer")}
    rows, total = float(result["accepted"]), sum(calls.values())
    # Every edit costs one rewrite, so the rewrites count the edits.
    figures = calls | {"all": total, "of Evol-Instruct's": total / (EVOL_INSTRUCT_CALLS * calls["rewrite"])}
    return figures | {"rows made": rows} | ({"calls per row": total / rows} if rows else {})


@dataclass
class EvolveFinetune(EvolveStageOptions):
    """Fine-tune the model on both data sets of 'evolve run', at equal size."""


@dataclass
class EvolveEvaluate(EvolveStageOptions):
    """Evaluate and attack the models that 'evolve finetune' left."""


@dataclass
class EvolveReport(EvolveStageOptions):
    """Gather the stages of 'evolve run' into tables and a figure."""


@dataclass
class EvolveRun(EvolveStageOptions):
    """Make data with an agent and at random for equally many LLM calls, fine-tune on both, evaluate, attack, report."""

    backend: str = '{"id": "embedded", "kwargs": {"dtype": "auto"}}'
    """Model that rewrites, judges and answers, written as for 'evolve train'."""
    reward: str = "judge + diversity"
    """Reward of the agent, written as for 'evolve train'."""
    calls: int = 0
    """LLM calls per data set, training included. 0: by --scale, 190 or 1600."""
    episodes: int = 0
    """Length of the agent's training, in episodes. 0: by --scale, 4 or 48."""

    def check(self) -> None:
        super().check()
        parse_reward(self.reward)
        parse_part(self.backend)


def run(options: EvolveRun, console: Console | None = None) -> dict[str, Any]:
    """Runs the stages that are not finished and returns the figures of the report.

    Raises:
        InputError: for bad input.
    """
    return in_time(_run)(options, console or Console())


def _run(options: EvolveRun, console: Console) -> dict[str, Any]:
    options.check()
    if options.dry_run:
        console.print(f"would make data with {options.algorithm} and at random, and compare them in {options.root}")
        return {}
    with options.opened():
        # One comparison with two arms makes both data sets.
        options.deadline.run(compare, make_data(options), console)
    return teach(options, console)


def make_data(options: EvolveRun) -> EvolveCompare:
    """Returns the options of the comparison that makes both data sets, after writing its seeds to a file.

    The seeds are the tasks that are not held out for evaluation.
    """
    tasks = load_tasks(options.seeds or None)
    with input_errors():
        # With evaluation tasks of their own, no seed has to be held out.
        shown, _ = evaluation_split(tasks, 0 if options.tasks else options.held_out)
    seeds = options.root / "seeds.jsonl"
    write_once(seeds, [task.row() for task in shown])
    return EvolveCompare(
        run_dir=str(options.root / "compare"),
        scale=options.scale,
        backend=options.backend,
        seeds=str(seeds),
        algorithms=f"{options.algorithm},{RANDOM}",
        repeats=1,
        seed=options.seed,
        num_envs=NUM_ENVS[options.scale],
        n_steps=3,
        chunk=NUM_ENVS[options.scale],
        answer_tokens=ANSWER_TOKENS[options.scale],
        calls=options.calls or CALLS[options.scale],
        episodes=options.episodes or EPISODES[options.scale],
        reward=options.reward,
        track=options.track,
    )


def finetune(options: EvolveFinetune, console: Console) -> Any:
    """Fine-tunes the model on both data sets of a run."""
    return in_time(finetune_arms)(options, console)


def evaluate(options: EvolveEvaluate, console: Console) -> Any:
    """Evaluates and attacks the models of a run."""
    return in_time(evaluate_arms)(options, console)


def report(options: EvolveReport, console: Console) -> dict[str, Any]:
    """Gathers the stages of a run into tables and a figure."""
    return write_report(options, console)
