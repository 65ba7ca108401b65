"""Does made data teach? Fine-tuning one model on each of several data sets of equal size, and measuring it.

The last stages of REFINE-AF (arXiv 2505.06548) and TeaMs-RL (arXiv 2403.08694): supervised fine-tuning, zero-shot
evaluation on held-out tasks, membership inference. Everything lies in one folder, a stage that is finished is kept.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Console

from ...envs.tasks.instruction.data import InstructionExample, prompt_text, read_instruction_data
from ...envs.tasks.instruction.evaluation import EvaluationTask, load_evaluation_tasks
from ...llm_backends.errors import InputError
from ...rewards import RougeGate
from ..runs.folder import RunFolder, check_tracker, read_json, write_once
from ..runs.options import SCALES, check_counts, check_output, input_errors
from ..runs.training import Deadline, digest, tokenizer_of
from .evaluate import Evaluate
from .evaluate import run as evaluate
from .finetune import Finetune, usable_rows
from .finetune import run as finetune
from .privacy import Privacy
from .privacy import run as privacy
from .report import report

SFT_SEEDS = {"smoke": 1, "report": 3}
MOST_ROWS = {"smoke": 40, "report": 240}
"""Of each data set, where nothing else is asked for."""
RESPONSE_TOKENS = {"smoke": 32, "report": 96}
"""Of an answer to an evaluation task."""
LEAST_ROWS = 8
"""Rows of a data set below which nothing is trained."""


@dataclass
class TeachingOptions(ABC):
    """Options of fine-tuning on made data and of what is measured then."""

    name: ClassVar[str]
    """Of the whole experiment, as a command."""

    run_dir: str = ""
    """Folder of the experiment, which holds the run folders of all its stages."""
    scale: Literal["smoke", "report"] = "report"
    """smoke: under three minutes on two cores; report: up to two hours."""
    model: str = "embedded"
    """Who is fine-tuned: embedded, or a local path or hub id of a causal language model."""
    seeds: str = ""
    """Seed tasks: Self-Instruct's seed_tasks.jsonl, or JSONL with 'instruction' and 'instances'. By default the
    package's own."""
    held_out: int = 40
    """Seed tasks kept for evaluation, a quarter of all at most, chosen by a hash of their text: never shown to a model
    that makes data, and no row that resembles one is trained on."""
    tasks: str = ""
    """Evaluation tasks in place of the held-out seeds: Super-NaturalInstructions' JSON files, or JSONL with
    'instruction' and 'instances'."""
    seed: int = 0
    """Of the making of the data; fine-tuning has seeds of its own."""
    size: int = 0
    """Rows of each data set, those that are withheld for membership inference included. 0: as many as the smallest
    has, by --scale at most 40 or 240."""
    withheld: float = 0.25
    """Share of the rows that nobody trains on: the non-members of membership inference. 0: no attack."""
    sft_layout: Literal["chat", "plain", "alpaca"] = "chat"
    """How requests are written: in the model's chat template, as a text to continue, or as Stanford Alpaca did."""
    sft_epochs: int = 2
    """Passes over the rows in fine-tuning."""
    sft_learning_rate: float = 5e-4
    """Peak learning rate of fine-tuning (cosine, 10% warm-up)."""
    sft_seeds: int = 0
    """Repetitions of fine-tuning, with seeds 0, 1, ... 0: by --scale, 1 or 3."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic; auto: bfloat16 where the hardware computes in it."""
    minutes: float = 0.0
    """Stop cleanly after so many minutes; the same command goes on from there. 0: no limit."""
    track: str = "none"
    """none or wandb."""
    dry_run: bool = False
    """Check the options, load no model."""

    def __post_init__(self) -> None:
        self.deadline = Deadline(self.minutes)

    def check(self) -> None:
        """Refuses what can be refused without a model, the evaluation tasks and the options of later stages included.

        Raises:
            InputError: naming the option.
        """
        if not self.run_dir or "," in self.run_dir:
            raise InputError(f"--run-dir must name the folder of the experiment, without a comma, got {self.run_dir!r}")
        check_output(self.root / "report" / "report.md")
        check_tracker(self.track)
        if self.scale not in SCALES:
            raise InputError(f"--scale must be {' or '.join(SCALES)}, got {self.scale!r}")
        if not 0 <= self.minutes < math.inf:
            raise InputError(f"--minutes must not be negative, got {self.minutes}")
        if not 0 <= self.withheld <= 0.9:
            raise InputError(f"--withheld is a share of at most 0.9, got {self.withheld}")
        if self.size and self.size < LEAST_ROWS:
            raise InputError(f"--size must be at least {LEAST_ROWS}, got {self.size}")
        if not self.tasks:
            check_counts(self, "held_out")
        check_counts(self, "sft_epochs")
        for name in ("sft_seeds", "seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise InputError(f"--{name.replace('_', '-')} must be in [0, 2**32), got {getattr(self, name)}")
        self._finetune("", Path("data.jsonl"), 0).check()
        prompt_text(InstructionExample("a", "", "b"), self.sft_layout, tokenizer_of(self.model))
        self.evaluation_tasks()

    @property
    def root(self) -> Path:
        """The folder of the experiment."""
        return Path(self.run_dir).resolve()

    @property
    @abstractmethod
    def data(self) -> dict[str, Path]:
        """Files of the data sets by arm, the one to be compared with first."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Heading of the report."""

    @abstractmethod
    def costs(self) -> dict[str, dict[str, float]]:
        """By arm: what its data cost, by kind.

        Raises:
            InputError: if a data set is not finished.
        """

    def evaluation_tasks(self) -> list[EvaluationTask]:
        """What the models are evaluated on.

        Raises:
            InputError: for files that cannot be used.
        """
        with input_errors():
            return load_evaluation_tasks(self.tasks or self.seeds or None, 0 if self.tasks else self.held_out)

    def identity(self) -> dict[str, Any]:
        """What may not change between the stages of one experiment."""
        asked = digest([[task.name, task.instruction] for task in self.evaluation_tasks()])
        return {"model": self.model, "evaluation_tasks": asked}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Holds the folder of the experiment for this process.

        Raises:
            InputError: if it holds another experiment, or is in use.
        """
        with RunFolder(self.root, self.identity(), self.name).opened():
            yield

    def runs(self) -> dict[str, Finetune]:
        """Fine-tuning of every arm under every seed, by the names of the models; sizes are left open."""
        seeds = range(self.sft_seeds or SFT_SEEDS[self.scale])
        return {
            f"{arm}-{seed}": self._finetune(arm, self.root / "data" / f"{arm}.jsonl", seed)
            for seed in seeds
            for arm in self.data
        }

    def _finetune(self, arm: str, data: Path, seed: int) -> Finetune:
        return Finetune(
            run_dir=str(self.root / "finetune" / f"{arm}-{seed}"),
            data=str(data),
            model=self.model,
            layout=self.sft_layout,
            context_length=_context(self, Finetune),
            epochs=self.sft_epochs,
            learning_rate=self.sft_learning_rate,
            dtype=self.dtype,
            seed=seed,
            track=self.track,
        )


def _context(options: TeachingOptions, stage: type[Finetune | Evaluate]) -> int:
    """A stage's own limit, or the model's where that is smaller."""
    return min(stage.context_length, tokenizer_of(options.model).context_length)


def teach(options: TeachingOptions, console: Console) -> dict[str, Any]:
    """All stages behind the making of the data; returns the report's figures.

    Raises:
        OutOfTimeError: if the time does not do for all of them.
    """
    finetune_arms(options, console)
    evaluate_arms(options, console)
    return write_report(options, console)


def finetune_arms(options: TeachingOptions, console: Console) -> None:
    """Fine-tunes the model on equally many rows of each data set, once per seed.

    Rows whose instruction has a ROUGE-L above 0.7 to an evaluation task's are left out.

    Raises:
        InputError: if a data set is missing, not finished or too small.
        OutOfTimeError: between two models, or within one.
    """
    options.check()
    options.costs()  # refuses data that are still being made
    if options.dry_run:
        console.print(f"would fine-tune {', '.join(options.runs())} in {options.root}")
        return
    with options.opened():
        known = [task.instruction for task in options.evaluation_tasks()]
        for arm, path in options.data.items():
            _keep_apart(path, options.root / "data" / f"{arm}.jsonl", known, console)
        runs = options.runs()
        by_data = {run.data: run for run in runs.values()}  # all seeds of an arm read the same
        usable = {data: usable_rows(run) for data, run in by_data.items()}
        size = options.size or min(*usable.values(), MOST_ROWS[options.scale])
        small = [f"{Path(data).stem} has {count}" for data, count in usable.items() if count < max(size, LEAST_ROWS)]
        if small:
            raise InputError(
                f"fine-tuning needs {max(size, LEAST_ROWS)} usable rows of each data set, but {', '.join(small)}: make "
                "more data, or lower --size"
            )
        withheld = max(round(options.withheld * size), 1) if options.withheld else 0
        for run in runs.values():
            options.deadline.run(finetune, replace(run, limit=size - withheld, holdout=float(withheld)), console)


def _keep_apart(data: Path, out: Path, known: list[str], console: Console) -> None:
    """Copies a data set without the rows that resemble an evaluation task."""
    examples = read_instruction_data(data).examples
    gate = RougeGate(0.7, known)
    kept = [example.row() for example in examples if not gate.rejects(gate.nearest(example.instruction)[0])]
    if len(kept) < len(examples):
        console.print(f"{data}: {len(examples) - len(kept)} rows resemble an evaluation task and are left out")
    write_once(out, kept)


def _tuned(options: TeachingOptions) -> str:
    """The fine-tuned models in the form that evaluation and attack take.

    Raises:
        InputError: if one has not finished.
    """
    folders = {name: Path(run.run_dir) for name, run in options.runs().items()}
    for name, folder in folders.items():
        if (read_json(folder / "results.json") or {}).get("status") != "finished":
            raise InputError(f"{name} is not fine-tuned yet: run the stage 'finetune' first, with the same options")
    return ",".join(f"{name}={folder}" for name, folder in folders.items())


def evaluate_arms(options: TeachingOptions, console: Console) -> None:
    """Evaluates the base model and the fine-tuned ones on the held-out tasks, then attacks the latter.

    The attack is membership inference: rows that were trained on against those withheld.

    Raises:
        InputError: if a model is missing.
        OutOfTimeError: before all have answered.
    """
    options.check()
    policies = _tuned(options)
    shared: dict[str, Any] = {"policy": policies, "dtype": options.dtype, "track": options.track}
    shared["dry_run"] = options.dry_run
    evaluation = Evaluate(
        run_dir=str(options.root / "evaluate"),
        tasks=options.tasks or options.seeds,
        held_out=0 if options.tasks else options.held_out,
        layout=options.sft_layout,
        max_tokens=RESPONSE_TOKENS[options.scale],
        context_length=_context(options, Evaluate),
        model=options.model,
        **shared,
    )
    with options.opened():
        options.deadline.run(evaluate, evaluation, console)
        if options.withheld:
            options.deadline.run(privacy, Privacy(run_dir=str(options.root / "privacy"), **shared), console)


def write_report(options: TeachingOptions, console: Console) -> dict[str, Any]:
    """Gathers the finished stages."""
    options.check()
    costs = options.costs()
    if options.dry_run:
        console.print(f"would gather the stages in {options.root} into {options.root / 'report'}")
        return {}
    with options.opened():
        return report(options.root, list(options.data), list(options.runs()), costs, options.title, console)
