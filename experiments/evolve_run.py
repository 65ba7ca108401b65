"""``instructgym evolve run``: TeaMs-RL to its end. Does an agent's data teach more than that of random evolution?

Both data sets cost the same number of LLM calls, the agent's training included; then one model is fine-tuned once on
equally many rows of each, evaluated on held-out tasks and attacked by membership inference. Random evolution is
Evol-Instruct with this library's operations, rules and filters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..agents.factory import BASELINES, check_algorithm
from ..envs.tasks.instruction_pool import held_out, load_tasks
from ..llm_backends.errors import InputError
from .evolve_compare import EvolveCompare
from .evolve_compare import run as compare
from .options import input_errors, parse_part, parse_reward
from .run_folder import read_json
from .teaching import TeachingOptions, teach

RANDOM = "random"
CALLS = {"smoke": 500, "report": 1600}
EPISODES = {"smoke": 8, "report": 48}
COPIES, STEPS = 16, 3
"""Of the agent's rollouts: many copies, whose requests share a batch."""


@dataclass
class EvolveTeaching(TeachingOptions):
    """Options of the stages behind the making of the data."""

    algorithm: str = "TRPO"
    """The agent, as of 'evolve train'."""

    def check(self) -> None:
        super().check()
        self.algorithm = check_algorithm(self.algorithm)
        if self.algorithm in BASELINES:
            raise InputError(f"--algorithm must be a learner, {self.algorithm} is a baseline")

    @property
    def data(self) -> dict[str, Path]:
        folder = self.root / "compare" / "arms"
        return {arm: folder / f"{arm}-seed0" / "data.jsonl" for arm in (RANDOM, self.algorithm)}

    @property
    def title(self) -> str:
        return f"TeaMs-RL: {self.algorithm} against random evolution, {self.model}"

    def costs(self) -> dict[str, dict[str, float]]:
        return {arm: _cost(read_json(path.parent / "arm.json") or {}) for arm, path in self.data.items()}


def _cost(made: Mapping[str, Any]) -> dict[str, float]:
    calls = {kind: float(made.get("calls", {}).get(kind, 0)) for kind in ("training", "rewrite", "judge", "answer")}
    rows, total = made.get("accepted", 0), sum(calls.values())
    return calls | {"all": total, "rows made": rows} | ({"calls per row": total / rows} if rows else {})


@dataclass
class EvolveFinetune(EvolveTeaching):
    """Fine-tune the model on both data sets of 'evolve run', at equal size."""


@dataclass
class EvolveEvaluate(EvolveTeaching):
    """Evaluate and attack the models that 'evolve finetune' left."""


@dataclass
class EvolveReport(EvolveTeaching):
    """Gather the stages of 'evolve run' into tables and a figure."""


@dataclass
class EvolveRun(EvolveTeaching):
    """Make data with an agent and at random for equally many LLM calls, fine-tune on both, evaluate, attack, report."""

    backend: str = '{"id": "embedded", "kwargs": {"dtype": "auto"}}'
    """Who rewrites, judges and answers, as of 'evolve train'."""
    reward: str = "judge + diversity"
    """What the agent is paid, as of 'evolve train'."""
    calls: int = 0
    """LLM calls per data set, training included. 0: by --scale, 500 or 1600."""
    episodes: int = 0
    """Training of the agent, in episodes. 0: by --scale, 8 or 48."""

    def check(self) -> None:
        super().check()
        parse_reward(self.reward)
        parse_part(self.backend)


def run(options: EvolveRun, console: Console | None = None) -> dict[str, Any]:
    """Runs the stages that are not finished and returns the report's figures.

    Raises:
        InputError: for bad input.
    """
    console = console or Console()
    options.check()
    comparison = make_data(options)
    if options.dry_run:
        console.print(f"would make data with {options.algorithm} and at random, and compare them in {options.root}")
        return {}
    compare(comparison, console)
    return teach(options, console)


def make_data(options: EvolveRun) -> EvolveCompare:
    """The options of the comparison that makes both data sets; its seeds, those not held out, are written to a file."""
    tasks = load_tasks(options.seeds or None)
    with input_errors():
        shown, _ = held_out(tasks, 0 if options.tasks else min(options.held_out, len(tasks) // 4))
    seeds = options.root / "seeds.jsonl"
    if not options.dry_run and not seeds.exists():
        seeds.parent.mkdir(parents=True, exist_ok=True)
        seeds.write_text("".join(json.dumps(task.row(), ensure_ascii=False) + "\n" for task in shown), "utf-8")
    return EvolveCompare(
        run_dir=str(options.root / "compare"),
        scale=options.scale,
        backend=options.backend,
        seeds=str(seeds),
        algorithms=f"{options.algorithm},{RANDOM}",
        repeats=1,
        num_envs=COPIES,
        n_steps=STEPS,
        calls=options.calls or CALLS[options.scale],
        episodes=options.episodes or EPISODES[options.scale],
        reward=options.reward,
        track=options.track,
    )
