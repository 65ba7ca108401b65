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
from ..runs.options import Count, named
from ..runs.study import Results, StudyStage, run_study
from ..teaching.report import stage_results
from ..teaching.run import EVALUATION, FINETUNING, REPORT, TeachingOptions
from .bootstrap import RefineAFBootstrap
from .bootstrap import run as bootstrap
from .generate import RefineAFGenerate
from .generate import run as generate
from .train import RefineAFTrain
from .train import run as train

SELF_INSTRUCT, REFINE_AF = "self-instruct", "refine-af"
"""The arms: instances by the untrained model, and by the model trained on feedback."""
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {
        "bootstrap": {"target": 12, "batch": 4, "instruction_tokens": 128},
        "train": {"updates": 2, "batch_size": 8},
        "max_tokens": 48,
    },
    "report": {
        "bootstrap": {"target": 300, "batch": 16, "instruction_tokens": 200},
        "train": {"updates": 20, "batch_size": 48},
        "max_tokens": 64,
    },
}
"""By ``--scale``: options of bootstrapping and of the training on feedback, and maximum tokens of an instance."""
SAMPLES = 2
"""Instances sampled per instruction."""
LEARNING_RATE = 5e-4
"""Learning rate of the training on feedback, which makes few updates."""


@dataclass
class RefineAFStageOptions(TeachingOptions):
    """Options of the stages that follow the generation of the data."""

    command: ClassVar[str] = "refine-af run"

    @property
    def data(self) -> dict[str, Path]:
        return {arm: self.root / arm / "data.jsonl" for arm in (SELF_INSTRUCT, REFINE_AF)}

    @property
    def title(self) -> str:
        return f"REFINE-AF against Self-Instruct, {self.model}"

    def costs(self) -> dict[str, dict[str, float]]:
        counts = {
            stage: stage_results(self.root, stage)["counts"]
            for stage in ("bootstrap", "train", SELF_INSTRUCT, REFINE_AF)
        }
        # The journal holds one line per reply; both arms use the instructions.
        with (self.root / "bootstrap" / "journal.jsonl").open("rb") as replies:
            calls = sum(1 for _ in replies)
        return {
            arm: {
                "for instructions": float(calls),
                "training episodes": float(counts["train"]["episodes"] if arm == REFINE_AF else 0),
                "instances drawn": float(counts[arm]["responses"]),
                "rows made": float(counts[arm]["rows"]),
            }
            for arm in self.data
        }


@dataclass
class RefineAFFinetune(RefineAFStageOptions):
    """Fine-tune the model on both data sets of 'refine-af run', at equal size."""

    only = FINETUNING


@dataclass
class RefineAFEvaluate(RefineAFStageOptions):
    """Evaluate and attack the models that 'refine-af finetune' left."""

    only = EVALUATION


@dataclass
class RefineAFReport(RefineAFStageOptions):
    """Gather the stages of 'refine-af run' into tables and a figure."""

    only = REPORT


@dataclass
class RefineAFRun(RefineAFStageOptions):
    """Bootstrap, train by feedback, generate with and without that training, fine-tune, evaluate, attack, report."""

    target: int = 0
    """New instructions to accept. 0: by --scale, 12 or 300."""
    updates: int = 0
    """Updates of the training on feedback. 0: by --scale, 2 or 20."""
    samples: Count = SAMPLES
    """Instances sampled per instruction."""
    reward_preset: str = "no_und"
    """Name of the weights of the quality reward. no_und: the rule of Instruction Mining without its negative weight of
    understandability, which rewards outputs that are hard to understand."""

    def check(self) -> None:
        super().check()
        if self.reward_preset not in PRESETS:
            raise InputError(f"--reward-preset must be one of {', '.join(sorted(PRESETS))}, got {self.reward_preset!r}")
        if self.dry_run:  # otherwise the first stage finds what is wrong with seeds and model
            first, *_ = self.stages()
            options = replace(first.options, run_dir=str(self.root / first.name), dry_run=True)
            bootstrap(options, Console(quiet=True))

    def stages(self) -> list[StudyStage]:
        sizes = SIZES[self.scale]
        # --model names a model, bootstrapping needs the backend that runs it.
        embedded = self.model == "embedded"
        kwargs = ({} if embedded else {"model": self.model}) | {"dtype": self.dtype}
        bootstrapping = RefineAFBootstrap(
            **named(self, "scale", "seeds", "held_out", "seed"),
            **sizes["bootstrap"] | ({"target": self.target} if self.target else {}),
            backend=json.dumps({"id": "embedded" if embedded else "transformers", "kwargs": kwargs}),
            keep_cut=True,
            instances=False,
        )
        # Training and generation share max_tokens: 'refine-af generate' refuses a policy that was trained with another.
        shared: dict[str, Any] = named(self, "dtype", "seed") | {
            "instructions": str(self.root / "bootstrap" / "instructions.jsonl"),
            "max_tokens": sizes["max_tokens"],
        }
        training = RefineAFTrain(
            **shared | named(self, "scale", "model", "reward_preset"),
            **sizes["train"] | ({"updates": self.updates} if self.updates else {}),
            epochs=1,
            learning_rate=LEARNING_RATE,
        )
        untrained = RefineAFGenerate(**shared, samples=self.samples, model=self.model)
        trained = RefineAFGenerate(**shared, samples=self.samples, policy=str(self.root / "train"))
        return [
            StudyStage("bootstrap", bootstrap, bootstrapping),
            StudyStage("train", train, training),
            StudyStage(SELF_INSTRUCT, generate, untrained),
            StudyStage(REFINE_AF, generate, trained),
            *super().stages(),
        ]


def run(options: RefineAFRun, console: Console | None = None) -> Results:
    """Runs the stages that are not finished and returns the figures of the report.

    Raises:
        InputError: for bad input.
    """
    return run_study(options, console or Console())


def finetune(options: RefineAFFinetune, console: Console) -> Results:
    """Fine-tunes the model on both data sets of a run."""
    return run_study(options, console)


def evaluate(options: RefineAFEvaluate, console: Console) -> Results:
    """Evaluates and attacks the models of a run."""
    return run_study(options, console)


def report(options: RefineAFReport, console: Console) -> Results:
    """Gathers the stages of a run into tables and a figure."""
    return run_study(options, console)
