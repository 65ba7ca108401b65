"""Does fine-tuning on synthetic data help? Fine-tunes one model on each of several data sets of equal size.

The last stages of REFINE-AF (arXiv 2505.06548) and TeaMs-RL (arXiv 2403.08694): supervised fine-tuning, zero-shot
evaluation on held-out tasks, membership inference. :mod:`~instructgym.experiments.evolve.run` and
:mod:`~instructgym.experiments.refine_af.run` are studies that generate the data first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Le
from rich.console import Console

from ...envs.tasks.instruction.data import InstructionExample, prompt_text, read_instruction_data
from ...envs.tasks.instruction.evaluation import EvaluationTask, load_evaluation_tasks
from ...llm_backends.errors import InputError
from ...rewards import RougeGate
from ..runs.folder import write_once
from ..runs.options import Count, DType, Positive, Seed, input_errors
from ..runs.study import Results, StudyOptions, StudyStage
from ..runs.training import digest, tokenizer_of
from .evaluate import Evaluate
from .evaluate import run as evaluate
from .finetune import Finetune, usable_rows
from .finetune import run as finetune
from .privacy import Privacy
from .privacy import run as privacy
from .report import stage_results, write_teaching_report

SIZES = {
    "smoke": {"sft_seeds": 1, "rows": 40, "max_tokens": 32},
    "report": {"sft_seeds": 3, "rows": 240, "max_tokens": 96},
}
"""By ``--scale``: fine-tuning runs per data set, maximum rows of each data set without ``--size``, and maximum tokens
of a response to an evaluation task."""
LEAST_ROWS = 8
"""Minimum rows of a data set; with fewer, nothing is trained."""
FINETUNING, EVALUATION, REPORT = ("data", "finetune"), ("evaluate", "privacy"), ("report",)
"""Stages of the commands that run a part of the study."""


@dataclass
class TeachingOptions(StudyOptions):
    """Options of fine-tuning on generated data and of the evaluation that follows."""

    seeds: str = ""
    """File of seed tasks: Self-Instruct's seed_tasks.jsonl, or JSONL with 'instruction' and 'instances'. By default the
    package's own."""
    held_out: int = 40
    """Seed tasks held out for evaluation, at most a quarter of all, chosen by a hash of their text. They are never
    shown to a model that generates data, and rows that resemble one of them are not trained on."""
    tasks: str = ""
    """Evaluation tasks, in place of the held-out seed tasks: Super-NaturalInstructions' JSON files, or JSONL with
    'instruction' and 'instances'."""
    seed: Seed = 0
    """Seed of the generation of the data; the seeds of fine-tuning are set by --sft-seeds."""
    size: int = 0
    """Rows of each data set, including those withheld for membership inference. 0: as many as the smallest data set
    has, but at most 40 or 240, by --scale."""
    withheld: Annotated[float, Le(0.9)] = 0.25
    """Share of the rows withheld from training, as the non-members of membership inference. 0: no membership
    inference."""
    sft_layout: Literal["chat", "plain", "alpaca"] = "chat"
    """How requests are written in fine-tuning and evaluation. chat: in the model's chat template; plain: as a text to
    continue; alpaca: as in Stanford Alpaca."""
    sft_epochs: Count = 2
    """Passes over the rows in fine-tuning."""
    sft_learning_rate: Positive = 5e-4
    """Peak learning rate of fine-tuning (cosine schedule, 10% warm-up)."""
    sft_seeds: Seed = 0
    """Number of fine-tuning runs per data set, with seeds 0, 1, and so on. 0: by --scale, 1 or 3."""
    dtype: DType = "auto"
    """Number format of the computation. auto: bfloat16 if the hardware supports it."""

    def check(self) -> None:
        # A comma separates the run folders that the option --policy of later stages takes.
        if "," in self.run_dir:
            raise InputError(f"--run-dir must name a folder without a comma, got {self.run_dir!r}")
        super().check()
        if 0 < self.size < LEAST_ROWS:
            raise InputError(f"--size must be at least {LEAST_ROWS}, got {self.size}")
        if not self.tasks and not self.held_out:
            raise InputError("--held-out must be at least 1 without --tasks")
        # Raises an error if the layout needs a chat template that the model's tokenizer lacks.
        prompt_text(InstructionExample("a", "", "b"), self.sft_layout, tokenizer_of(self.model))
        _ = self.evaluation_tasks
        if self.only == EVALUATION:
            for name in self.models:
                stage_results(self.root, f"finetune/{name}")
        elif self.only:
            self.costs()  # raises an error if the data are not finished

    @property
    @abstractmethod
    def data(self) -> dict[str, Path]:
        """Files of the data sets by arm; the first is the one that the others are compared with."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Heading of the report."""

    @abstractmethod
    def costs(self) -> dict[str, dict[str, float]]:
        """Returns the cost of each arm's data, by kind of cost.

        Raises:
            InputError: if a data set is not finished.
        """

    @property
    def num_held_out(self) -> int:
        """Number of seed tasks to hold out: with evaluation tasks of their own, none has to be."""
        return 0 if self.tasks else self.held_out

    @cached_property
    def evaluation_tasks(self) -> list[EvaluationTask]:
        """The tasks that the models are evaluated on, read once.

        Raises:
            InputError: for files that cannot be used.
        """
        with input_errors():
            return load_evaluation_tasks(self.tasks or self.seeds or None, self.num_held_out)

    @property
    def models(self) -> dict[str, tuple[str, int]]:
        """Arm and seed of each model to fine-tune, by its name: all arms under one seed before the next."""
        seeds = range(self.sft_seeds or SIZES[self.scale]["sft_seeds"])
        return {f"{arm}-{seed}": (arm, seed) for seed in seeds for arm in self.data}

    def identity(self) -> Mapping[str, Any]:
        tasks = digest([[task.name, task.instruction] for task in self.evaluation_tasks])
        return {"model": self.model, "evaluation_tasks": tasks}

    def stages(self) -> list[StudyStage]:
        shared: dict[str, Any] = {"model": self.model, "layout": self.sft_layout, "dtype": self.dtype}
        context = tokenizer_of(self.model).context_length
        finetuning = Finetune(
            **shared,
            context_length=min(Finetune.context_length, context),
            epochs=self.sft_epochs,
            learning_rate=self.sft_learning_rate,
        )

        def model(name: str, arm: str, seed: int) -> StudyStage:
            """Returns the stage that fine-tunes a model on the rows of an arm."""

            def options(results: Mapping[str, Results]) -> Finetune:
                data = str(self.root / "data" / f"{arm}.jsonl")
                return replace(finetuning, data=data, seed=seed, **results["data"])

            return StudyStage(f"finetune/{name}", finetune, options, ("data",))

        policy = ",".join(f"{name}={self.root / 'finetune' / name}" for name in self.models)
        evaluation = Evaluate(
            **shared,
            policy=policy,
            tasks=self.tasks or self.seeds,
            held_out=self.num_held_out,
            max_tokens=SIZES[self.scale]["max_tokens"],
            context_length=min(Evaluate.context_length, context),
        )
        # The rows trained on are the members, the withheld rows the non-members.
        attack = StudyStage("privacy", privacy, Privacy(policy=policy, dtype=self.dtype))
        return [
            StudyStage("data", self.equal_rows, finetuning),
            *(model(name, arm, seed) for name, (arm, seed) in self.models.items()),
            StudyStage("evaluate", evaluate, evaluation),
            *([attack] if self.withheld else []),
        ]

    def equal_rows(self, options: Finetune, console: Console) -> Results:
        """Copies the data sets without the rows whose instruction has a ROUGE-L above 0.7 to an evaluation task's.

        Args:
            options: options of the fine-tuning; their run folder gets the copies.
            console: console on which to print how many rows are left out.

        Returns:
            Options of the fine-tuning, by which all models are trained on equally many rows: ``limit``, the rows to
            train on, and ``holdout``, those to withhold.

        Raises:
            InputError: if a data set cannot be used or is too small.
        """
        gate = RougeGate(0.7, [task.instruction for task in self.evaluation_tasks])
        usable = {}
        for arm, path in self.data.items():
            examples = read_instruction_data(path).examples
            rows = [example.row() for example in examples if not gate.rejects(gate.nearest(example.instruction)[0])]
            if len(rows) < len(examples):
                console.print(f"{path}: {len(examples) - len(rows)} rows resemble an evaluation task and are left out")
            copy = Path(options.run_dir) / f"{arm}.jsonl"
            write_once(copy, rows)
            usable[arm] = usable_rows(replace(options, data=str(copy)))
        size = self.size or min(*usable.values(), SIZES[self.scale]["rows"])
        least = max(size, LEAST_ROWS)
        if small := [f"{arm} has {count}" for arm, count in usable.items() if count < least]:
            raise InputError(
                f"fine-tuning needs {least} usable rows of each data set, but {', '.join(small)}: make more data, or "
                "lower --size"
            )
        # Membership inference needs at least one non-member.
        withheld = max(round(self.withheld * size), 1) if self.withheld else 0
        return {"limit": size - withheld, "holdout": float(withheld)}

    def report(self, console: Console) -> Results:
        arms = {arm: [name for name, (of, _) in self.models.items() if of == arm] for arm in self.data}
        return write_teaching_report(self.root, arms, self.costs(), self.title, console)
