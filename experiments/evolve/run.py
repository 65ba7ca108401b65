"""``instructgym evolve run``: all stages of TeaMs-RL.

Does fine-tuning on an agent's data help more than fine-tuning on data of random evolution? Both data sets
cost the same number of LLM calls, the agent's training included. One model is then fine-tuned on equally many rows of
each, evaluated on held-out tasks and attacked by membership inference. Random evolution is Evol-Instruct with this
library's operations, rules and filters.

:mod:`~instructgym.experiments.teaching.run` has the stages that follow the generation of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from ...agents.sb3.factory import BASELINES, check_algorithm
from ...envs.tasks.instruction.pool import evaluation_split, load_tasks
from ...llm_backends.errors import InputError
from ..runs.folder import read_json, write_once
from ..runs.options import input_errors, named, parse_part, parse_reward
from ..runs.study import Results, StudyStage, run_study
from ..teaching.run import EVALUATION, FINETUNING, REPORT, TeachingOptions
from .compare import EvolveCompare
from .compare import run as compare
from .queries import EVOL_INSTRUCT_CALLS

RANDOM = "random"
"""The arm that evolves at random."""
SIZES = {
    "smoke": {"calls": 190, "episodes": 4, "copies": 6, "answer_tokens": 32},
    "report": {"calls": 1600, "episodes": 48, "copies": 16, "answer_tokens": 64},
}
"""By ``--scale``: LLM calls per data set, episodes that the agent trains for, environments stepped together in training
and seeds evolved together in generation (their requests share a batch), and maximum tokens of an answer."""


@dataclass
class EvolveStageOptions(TeachingOptions):
    """Options of the stages that follow the generation of the data."""

    command: ClassVar[str] = "evolve run"

    algorithm: str = "TRPO"
    """Algorithm of the agent: any learner that 'evolve train --algorithm' takes."""

    def check(self) -> None:
        self.algorithm = check_algorithm(self.algorithm)
        if self.algorithm in BASELINES:
            raise InputError(f"--algorithm must be a learner, {self.algorithm} is a baseline")
        super().check()

    @property
    def data(self) -> dict[str, Path]:
        # The first data set is the one that the report compares the others with.
        folder = self.root / "compare" / "arms"
        return {arm: folder / f"{arm}-seed{self.seed}" / "data.jsonl" for arm in (RANDOM, self.algorithm)}

    @property
    def title(self) -> str:
        return f"TeaMs-RL: {self.algorithm} against random evolution, {self.model}"

    def costs(self) -> dict[str, dict[str, float]]:
        costs = {}
        for arm, path in self.data.items():
            result = read_json(path.with_name("arm.json"))
            if result is None:
                raise InputError(f"the data of {arm} in {path.parent} are not finished: repeat 'evolve run'")
            calls = {kind: float(result["calls"].get(kind, 0)) for kind in ("training", "rewrite", "judge", "answer")}
            rows, total = float(result["accepted"]), sum(calls.values())
            # Every edit costs one rewrite, so the rewrites count the edits.
            figures = {"all": total, "of Evol-Instruct's": total / (EVOL_INSTRUCT_CALLS * calls["rewrite"])}
            costs[arm] = calls | figures | {"rows made": rows} | ({"calls per row": total / rows} if rows else {})
        return costs

    def identity(self) -> Mapping[str, Any]:
        return {**super().identity(), "algorithm": self.algorithm}


@dataclass
class EvolveFinetune(EvolveStageOptions):
    """Fine-tune the model on both data sets of 'evolve run', at equal size."""

    only = FINETUNING


@dataclass
class EvolveEvaluate(EvolveStageOptions):
    """Evaluate and attack the models that 'evolve finetune' left."""

    only = EVALUATION


@dataclass
class EvolveReport(EvolveStageOptions):
    """Gather the stages of 'evolve run' into tables and a figure."""

    only = REPORT


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

    def prepare(self) -> None:
        # The seeds of the data are the tasks that are not held out for evaluation.
        with input_errors():
            shown, _ = evaluation_split(load_tasks(self.seeds or None), self.num_held_out)
        write_once(self.root / "seeds.jsonl", [task.row() for task in shown])

    def stages(self) -> list[StudyStage]:
        sizes = SIZES[self.scale]
        # One comparison with two arms makes both data sets.
        data = EvolveCompare(
            **named(self, "scale", "backend", "seed", "reward"),
            seeds=str(self.root / "seeds.jsonl"),
            algorithms=f"{self.algorithm},{RANDOM}",
            repeats=1,
            num_envs=sizes["copies"],
            n_steps=3,
            chunk=sizes["copies"],
            answer_tokens=sizes["answer_tokens"],
            calls=self.calls or sizes["calls"],
            episodes=self.episodes or sizes["episodes"],
        )
        return [StudyStage("compare", compare, data), *super().stages()]


def run(options: EvolveRun, console: Console | None = None) -> Results:
    """Runs the stages that are not finished and returns the figures of the report.

    Raises:
        InputError: for bad input.
    """
    return run_study(options, console or Console())


def finetune(options: EvolveFinetune, console: Console) -> Results:
    """Fine-tunes the model on both data sets of a run."""
    return run_study(options, console)


def evaluate(options: EvolveEvaluate, console: Console) -> Results:
    """Evaluates and attacks the models of a run."""
    return run_study(options, console)


def report(options: EvolveReport, console: Console) -> Results:
    """Gathers the stages of a run into tables and a figure."""
    return run_study(options, console)
