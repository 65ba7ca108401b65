"""Does fine-tuning on synthetic data help? Fine-tunes one model on each of several data sets of equal size.

The last stages of REFINE-AF (arXiv 2505.06548) and TeaMs-RL (arXiv 2403.08694): supervised fine-tuning, zero-shot
evaluation on held-out tasks, membership inference. All stages write to one folder; finished stages are not repeated.
:mod:`~instructgym.experiments.evolve.run` and :mod:`~instructgym.experiments.refine_af.run` generate the data first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Le
from rich.console import Console

from ...envs.tasks.instruction.data import InstructionExample, prompt_text, read_instruction_data
from ...envs.tasks.instruction.evaluation import EvaluationTask, load_evaluation_tasks
from ...llm_backends.errors import InputError
from ...rewards import RougeGate
from ..runs.folder import RunFolder, check_tracker, read_json, write_once
from ..runs.options import Count, DType, Scale, Seed, check_counts, check_fields, check_output, input_errors
from ..runs.training import Deadline, digest, tokenizer_of
from .evaluate import Evaluate
from .evaluate import run as evaluate
from .finetune import Finetune, usable_rows
from .finetune import run as finetune
from .privacy import Privacy
from .privacy import run as privacy
from .report import report

SFT_SEEDS = {"smoke": 1, "report": 3}
"""Fine-tuning runs per data set, by ``--scale``."""
MOST_ROWS = {"smoke": 40, "report": 240}
"""Maximum rows of each data set without ``--size``, by ``--scale``."""
RESPONSE_TOKENS = {"smoke": 32, "report": 96}
"""Maximum tokens of a response to an evaluation task, by ``--scale``."""
LEAST_ROWS = 8
"""Minimum rows of a data set; with fewer, nothing is trained."""


@dataclass
class TeachingOptions(ABC):
    """Options of fine-tuning on generated data and of the evaluation that follows."""

    name: ClassVar[str]
    """Command of the whole experiment."""

    run_dir: str = ""
    """Folder of the experiment, which holds the run folders of all its stages."""
    scale: Scale = "report"
    """Size of the experiment. smoke: under three minutes on two cores; report: up to two hours."""
    model: str = "embedded"
    """Model to fine-tune: embedded, or a local path or hub id of a causal language model."""
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
    sft_learning_rate: float = 5e-4
    """Peak learning rate of fine-tuning (cosine schedule, 10% warm-up)."""
    sft_seeds: Seed = 0
    """Number of fine-tuning runs per data set, with seeds 0, 1, and so on. 0: by --scale, 1 or 3."""
    dtype: DType = "auto"
    """Number format of the computation. auto: bfloat16 if the hardware supports it."""
    minutes: float = 0.0
    """Stop cleanly after so many minutes; the same command goes on from there. 0: no limit."""
    track: str = "none"
    """wandb: log to Weights & Biases too. none: files only."""
    dry_run: bool = False
    """Check the options and stop before a model is loaded."""

    def __post_init__(self) -> None:
        self.deadline = Deadline(self.minutes)

    def check(self) -> None:
        """Checks everything that needs no model, including the evaluation tasks and the options of later stages.

        Raises:
            InputError: for an option that cannot be used, naming it.
        """
        # A comma separates the run folders that the option --policy of later stages takes.
        if not self.run_dir or "," in self.run_dir:
            raise InputError(f"--run-dir must name the folder of the experiment, without a comma, got {self.run_dir!r}")
        check_output(self.root / "report" / "report.md")
        check_tracker(self.track)
        check_fields(self)
        if self.size and self.size < LEAST_ROWS:
            raise InputError(f"--size must be at least {LEAST_ROWS}, got {self.size}")
        if not self.tasks:
            check_counts(self, "held_out")
        self._finetune("", Path("data.jsonl"), 0).check()
        # Raises an error if the layout needs a chat template that the model's tokenizer lacks.
        prompt_text(InstructionExample("a", "", "b"), self.sft_layout, tokenizer_of(self.model))
        self.evaluation_tasks()

    @property
    def root(self) -> Path:
        """Folder of the experiment."""
        return Path(self.run_dir).resolve()

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

    def evaluation_tasks(self) -> list[EvaluationTask]:
        """Loads the tasks that the models are evaluated on.

        Raises:
            InputError: for files that cannot be used.
        """
        with input_errors():
            return load_evaluation_tasks(self.tasks or self.seeds or None, 0 if self.tasks else self.held_out)

    def identity(self) -> dict[str, Any]:
        """Returns the options that must not change between the stages of one experiment."""
        tasks = digest([[task.name, task.instruction] for task in self.evaluation_tasks()])
        return {"model": self.model, "evaluation_tasks": tasks}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Holds the folder of the experiment for this process.

        Raises:
            InputError: if it holds another experiment, or is in use.
        """
        with RunFolder(self.root, self.identity(), self.name).opened():
            yield

    def runs(self) -> dict[str, Finetune]:
        """Returns the options of every fine-tuning run by the name of its model; the number of rows is not set yet."""
        # Seeds in the outer loop: all arms are fine-tuned under one seed before the next.
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
    """Returns the context length of a stage: its default, or that of the model if it is smaller."""
    return min(stage.context_length, tokenizer_of(options.model).context_length)


def teach(options: TeachingOptions, console: Console) -> dict[str, Any]:
    """Runs all stages that follow the generation of the data and returns the figures of the report.

    Raises:
        OutOfTimeError: if the time budget is spent before all stages have finished.
    """
    finetune_arms(options, console)
    evaluate_arms(options, console)
    return write_report(options, console)


def finetune_arms(options: TeachingOptions, console: Console) -> None:
    """Fine-tunes the model on equally many rows of each data set, once per seed.

    Rows whose instruction has a ROUGE-L above 0.7 to an evaluation task's are left out.

    Raises:
        InputError: if a data set is missing, not finished or too small.
        OutOfTimeError: if the time budget is spent, between two models or while one is trained.
    """
    options.check()
    options.costs()  # raises an error if the data are not finished
    if options.dry_run:
        console.print(f"would fine-tune {', '.join(options.runs())} in {options.root}")
        return
    with options.opened():
        known = [task.instruction for task in options.evaluation_tasks()]
        for arm, path in options.data.items():
            _drop_leaked_rows(path, options.root / "data" / f"{arm}.jsonl", known, console)
        runs = options.runs()
        by_data = {run.data: run for run in runs.values()}  # all seeds of an arm read the same file
        usable = {data: usable_rows(run) for data, run in by_data.items()}
        size = options.size or min(*usable.values(), MOST_ROWS[options.scale])
        small = [f"{Path(data).stem} has {count}" for data, count in usable.items() if count < max(size, LEAST_ROWS)]
        if small:
            raise InputError(
                f"fine-tuning needs {max(size, LEAST_ROWS)} usable rows of each data set, but {', '.join(small)}: make "
                "more data, or lower --size"
            )
        # Membership inference needs at least one non-member.
        withheld = max(round(options.withheld * size), 1) if options.withheld else 0
        for run in runs.values():
            options.deadline.run(finetune, replace(run, limit=size - withheld, holdout=float(withheld)), console)


def _drop_leaked_rows(data: Path, out: Path, known: list[str], console: Console) -> None:
    """Copies a data set without the rows that resemble an evaluation task; ``known`` are the tasks' instructions."""
    examples = read_instruction_data(data).examples
    gate = RougeGate(0.7, known)
    rows = [example.row() for example in examples if not gate.rejects(gate.nearest(example.instruction)[0])]
    if len(rows) < len(examples):
        console.print(f"{data}: {len(examples) - len(rows)} rows resemble an evaluation task and are left out")
    write_once(out, rows)


def _policy_option(options: TeachingOptions) -> str:
    """Returns the fine-tuned models in the form of the option ``--policy`` of evaluation and attack.

    Raises:
        InputError: if a fine-tuning has not finished.
    """
    folders = {name: Path(run.run_dir) for name, run in options.runs().items()}
    for name, folder in folders.items():
        if (read_json(folder / "results.json") or {}).get("status") != "finished":
            raise InputError(f"{name} is not fine-tuned yet: run the stage 'finetune' first, with the same options")
    return ",".join(f"{name}={folder}" for name, folder in folders.items())


def evaluate_arms(options: TeachingOptions, console: Console) -> None:
    """Evaluates the base model and the fine-tuned models on the held-out tasks, then attacks the fine-tuned ones.

    The attack is membership inference, with the rows trained on as members and the withheld rows as non-members.

    Raises:
        InputError: if a model is missing.
        OutOfTimeError: if the time budget is spent before all models are evaluated and attacked.
    """
    options.check()
    policies = _policy_option(options)
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
    """Gathers the finished stages into a report and returns its figures."""
    options.check()
    costs = options.costs()
    if options.dry_run:
        console.print(f"would gather the stages in {options.root} into {options.root / 'report'}")
        return {}
    with options.opened():
        return report(options.root, list(options.data), list(options.runs()), costs, options.title, console)
