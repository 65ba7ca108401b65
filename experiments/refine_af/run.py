"""``instructgym refine-af run``: all stages of REFINE-AF.

Does fine-tuning help more if the instances come from a model that was trained on automated feedback? A model bootstraps
instructions from seed tasks. Instances of the same instructions are then written twice: by the untrained model, which
gives Self-Instruct's data, and by the model trained on feedback. One model is fine-tuned on equally many rows of each
and evaluated on held-out tasks.

:mod:`~instructgym.experiments.teaching.run` has the stages that follow the generation of the data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from ...llm_backends.errors import InputError
from ...rewards.quality.linear import PRESETS
from ..runs.folder import read_json
from ..runs.options import check_counts
from ..runs.training import in_time
from ..teaching.run import TeachingOptions, evaluate_arms, finetune_arms, teach, write_report
from .bootstrap import RefineAFBootstrap
from .bootstrap import run as bootstrap
from .generate import RefineAFGenerate
from .generate import run as generate
from .train import RefineAFTrain
from .train import run as train

SELF_INSTRUCT, REFINE_AF = "self-instruct", "refine-af"
"""The arms: instances by the untrained model, and by the model trained on feedback."""
TARGET = {"smoke": 12, "report": 300}
"""New instructions to accept, by ``--scale``."""
REQUESTS = {"smoke": (4, 128), "report": (16, 200)}
"""Requests for instructions that are sent together, and maximum tokens of each reply, by ``--scale``."""
UPDATES = {"smoke": (2, 8), "report": (20, 48)}
"""Updates of the training on feedback, and instances per update, by ``--scale``."""
SAMPLES = 2
"""Instances sampled per instruction."""
LEARNING_RATE = 5e-4
"""Learning rate of the training on feedback, which makes few updates."""
INSTANCE_TOKENS = {"smoke": 48, "report": 64}
"""Maximum tokens of an instance, by ``--scale``."""


@dataclass
class RefineAFStageOptions(TeachingOptions):
    """Options of the stages that follow the generation of the data."""

    name: ClassVar[str] = "refine-af run"

    @property
    def data(self) -> dict[str, Path]:
        return {arm: self.root / arm / "data.jsonl" for arm in (SELF_INSTRUCT, REFINE_AF)}

    @property
    def title(self) -> str:
        return f"REFINE-AF against Self-Instruct, {self.model}"

    def costs(self) -> dict[str, dict[str, float]]:
        _counts(self.root / "bootstrap")
        # The journal holds one line per reply; both arms use the instructions.
        with (self.root / "bootstrap" / "journal.jsonl").open("rb") as replies:
            calls = sum(1 for _ in replies)
        trained = _counts(self.root / "train")["episodes"]
        return {
            arm: {
                "for instructions": float(calls),
                "training episodes": float(trained if arm == REFINE_AF else 0),
                "instances drawn": float(_counts(path.parent)["responses"]),
                "rows made": float(_counts(path.parent)["rows"]),
            }
            for arm, path in self.data.items()
        }


def _counts(folder: Path) -> dict[str, Any]:
    """Returns the counts of a finished stage; raises an InputError if it has not finished."""
    results = read_json(folder / "results.json") or {}
    if results.get("status") != "finished":
        raise InputError(f"the stage in {folder} is not finished: repeat 'refine-af run'")
    return results["counts"]


@dataclass
class RefineAFFinetune(RefineAFStageOptions):
    """Fine-tune the model on both data sets of 'refine-af run', at equal size."""


@dataclass
class RefineAFEvaluate(RefineAFStageOptions):
    """Evaluate and attack the models that 'refine-af finetune' left."""


@dataclass
class RefineAFReport(RefineAFStageOptions):
    """Gather the stages of 'refine-af run' into tables and a figure."""


@dataclass
class RefineAFRun(RefineAFStageOptions):
    """Bootstrap, train by feedback, generate with and without that training, fine-tune, evaluate, attack, report."""

    target: int = 0
    """New instructions to accept. 0: by --scale, 12 or 300."""
    updates: int = 0
    """Updates of the training on feedback. 0: by --scale, 2 or 20."""
    samples: int = SAMPLES
    """Instances sampled per instruction."""
    reward_preset: str = "no_und"
    """Name of the weights of the quality reward. no_und: the rule of Instruction Mining without its negative weight of
    understandability, which rewards outputs that are hard to understand."""

    def check(self) -> None:
        super().check()
        check_counts(self, "samples")
        if self.reward_preset not in PRESETS:
            raise InputError(f"--reward-preset must be one of {', '.join(sorted(PRESETS))}, got {self.reward_preset!r}")
        for name in ("target", "updates"):
            if getattr(self, name):
                check_counts(self, name)


def run(options: RefineAFRun, console: Console | None = None) -> dict[str, Any]:
    """Runs the stages that are not finished and returns the figures of the report.

    Raises:
        InputError: for bad input.
    """
    return in_time(_run)(options, console or Console())


def _run(options: RefineAFRun, console: Console) -> dict[str, Any]:
    options.check()
    bootstrapping, training, generations = stages(options)
    training.check()
    if options.dry_run:
        # The later stages need the file of instructions, which does not exist yet.
        bootstrap(replace(bootstrapping, dry_run=True), console)
        console.print(f"then training, two data sets, fine-tuning and evaluation, in {options.root}")
        return {}
    with options.opened():
        options.deadline.run(bootstrap, bootstrapping, console)
        options.deadline.run(train, training, console)
        for generation in generations:
            options.deadline.run(generate, generation, console)
    return teach(options, console)


def stages(options: RefineAFRun) -> tuple[RefineAFBootstrap, RefineAFTrain, list[RefineAFGenerate]]:
    """Returns the options of the stages that generate the data: bootstrapping, training, and generation by arm."""
    root, scale = options.root, options.scale
    instructions = str(root / "bootstrap" / "instructions.jsonl")
    updates, batch = UPDATES[scale]
    requests, tokens = REQUESTS[scale]
    # --model names a model, bootstrapping needs the backend that runs it.
    kind = "embedded" if options.model == "embedded" else "transformers"
    model = {} if options.model == "embedded" else {"model": options.model}
    # Training and generation share max_tokens: 'refine-af generate' refuses a policy that was trained with another.
    shared: dict[str, Any] = {
        "instructions": instructions,
        "dtype": options.dtype,
        "seed": options.seed,
        "track": options.track,
        "max_tokens": INSTANCE_TOKENS[scale],
    }
    writer = {"id": kind, "kwargs": model | {"dtype": options.dtype}}
    return (
        RefineAFBootstrap(
            run_dir=str(root / "bootstrap"),
            scale=scale,
            backend=json.dumps(writer),
            seeds=options.seeds,
            held_out=options.held_out,
            target=options.target or TARGET[scale],
            batch=requests,
            instruction_tokens=tokens,
            keep_cut=True,
            instances=False,
            seed=options.seed,
            track=options.track,
        ),
        RefineAFTrain(
            run_dir=str(root / "train"),
            scale=scale,
            model=options.model,
            updates=options.updates or updates,
            batch_size=batch,
            epochs=1,
            learning_rate=LEARNING_RATE,
            reward_preset=options.reward_preset,
            **shared,
        ),
        [
            RefineAFGenerate(
                run_dir=str(root / SELF_INSTRUCT),
                model=options.model,
                samples=options.samples,
                **shared,
            ),
            RefineAFGenerate(
                run_dir=str(root / REFINE_AF),
                policy=str(root / "train"),
                samples=options.samples,
                **shared,
            ),
        ],
    )


def finetune(options: RefineAFFinetune, console: Console) -> Any:
    """Fine-tunes the model on both data sets of a run."""
    return in_time(finetune_arms)(options, console)


def evaluate(options: RefineAFEvaluate, console: Console) -> Any:
    """Evaluates and attacks the models of a run."""
    return in_time(evaluate_arms)(options, console)


def report(options: RefineAFReport, console: Console) -> dict[str, Any]:
    """Gathers the stages of a run into tables and a figure."""
    return write_report(options, console)
