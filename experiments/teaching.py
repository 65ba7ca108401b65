"""Does made data teach? Fine-tuning one model on each of several data sets of equal size, and measuring it.

The last stages of REFINE-AF (arXiv 2505.06548) and TeaMs-RL (arXiv 2403.08694): supervised fine-tuning, zero-shot
evaluation on held-out tasks, membership inference. Everything lies in one folder, a stage that is finished is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ..llm_backends.errors import InputError
from .evaluate import Evaluate
from .evaluate import run as evaluate
from .finetune import Finetune, usable_rows
from .finetune import run as finetune
from .options import SCALES, check_counts, check_output
from .privacy import Privacy
from .privacy import run as privacy
from .stages import tokenizer_of
from .teaching_report import report
from .tracking import check_tracker

SFT_SEEDS = {"smoke": 1, "report": 3}
LEAST_ROWS = 8
"""Rows of a data set below which nothing is trained."""


@dataclass
class TeachingOptions(ABC):
    """Options of fine-tuning on made data and of what is measured then."""

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
    """Seed tasks kept for evaluation, chosen by a hash of their text: never shown to a model that makes data."""
    tasks: str = ""
    """Evaluation tasks in place of the held-out seeds: Super-NaturalInstructions' JSON files, or JSONL with
    'instruction' and 'instances'."""
    size: int = 0
    """Rows of each data set, those that are withheld for membership inference included. 0: as many as the smallest
    has."""
    withheld: float = 0.25
    """Share of the rows that nobody trains on: the non-members of membership inference."""
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
    track: str = "none"
    """none or wandb."""
    dry_run: bool = False
    """Check the options, load no model."""

    def check(self) -> None:
        """Refuses what can be refused without looking at data.

        Raises:
            InputError: naming the option.
        """
        if not self.run_dir:
            raise InputError("--run-dir is missing: name the folder of the experiment")
        check_output(self.root / "report" / "report.md")
        check_tracker(self.track)
        check_counts(self, "sft_epochs")
        if self.scale not in SCALES:
            raise InputError(f"--scale must be {' or '.join(SCALES)}, got {self.scale!r}")
        if not 0 <= self.withheld < 1:
            raise InputError(f"--withheld is a share below 1, got {self.withheld}")
        for name in ("size", "sft_seeds", "held_out"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")

    @property
    def root(self) -> Path:
        """The folder of the experiment."""
        return Path(self.run_dir)

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
        """By arm: what its data cost, by kind."""


def teach(options: TeachingOptions, console: Console) -> dict[str, Any]:
    """All stages behind the making of the data; returns the report's figures."""
    finetune_arms(options, console)
    evaluate_arms(options, console)
    return write_report(options, console)


def finetune_arms(options: TeachingOptions, console: Console) -> None:
    """Fine-tunes the model on equally many rows of each data set, once per seed.

    Raises:
        InputError: if a data set is missing or too small.
    """
    options.check()
    data = options.data
    missing = {arm: path for arm, path in data.items() if not path.is_file()}
    if missing:
        arm, path = next(iter(missing.items()))
        raise InputError(f"{path} is missing, the data of {arm}: has that stage finished?")
    runs = {arm: _run(options, path, arm, 0) for arm, path in data.items()}
    usable = {arm: usable_rows(run) for arm, run in runs.items()}
    size = options.size or min(usable.values())
    withheld = round(options.withheld * size)
    small = [f"{arm} has {count}" for arm, count in usable.items() if count < max(size, LEAST_ROWS)]
    if small:
        raise InputError(
            f"fine-tuning needs {max(size, LEAST_ROWS)} usable rows of each data set, but {', '.join(small)}: make "
            "more data, or lower --size"
        )
    for seed in range(options.sft_seeds or SFT_SEEDS[options.scale]):
        for arm, path in data.items():
            finetune(replace(_run(options, path, arm, seed), limit=size - withheld, holdout=float(withheld)), console)


def _run(options: TeachingOptions, data: Path, arm: str, seed: int) -> Finetune:
    return Finetune(
        run_dir=str(options.root / "finetune" / f"{arm}-{seed}"),
        data=str(data),
        model=options.model,
        layout=options.sft_layout,
        context_length=_context(options, Finetune),
        epochs=options.sft_epochs,
        learning_rate=options.sft_learning_rate,
        dtype=options.dtype,
        seed=seed,
        track=options.track,
        dry_run=options.dry_run,
    )


def _context(options: TeachingOptions, stage: type[Finetune | Evaluate]) -> int:
    """A stage's own limit, or the model's where that is smaller."""
    return min(stage.context_length, tokenizer_of(options.model).context_length)


def tuned_arms(options: TeachingOptions) -> dict[str, Path]:
    """The fine-tuned models that the folder holds.

    Raises:
        InputError: if there is none.
    """
    found = {path.parent.name: path.parent for path in sorted(options.root.glob("finetune/*/results.json"))}
    if not found:
        raise InputError(f"{options.root / 'finetune'} holds no fine-tuned model: run the stage 'finetune' first")
    return found


def evaluate_arms(options: TeachingOptions, console: Console) -> None:
    """Evaluates the base model and the fine-tuned ones on the held-out tasks, then attacks the latter.

    The attack is membership inference: rows that were trained on against those withheld.

    Raises:
        InputError: if there is no fine-tuned model.
    """
    options.check()
    policies = ",".join(f"{name}={path}" for name, path in tuned_arms(options).items())
    evaluate(
        Evaluate(
            run_dir=str(options.root / "evaluate"),
            policy=policies,
            tasks=options.tasks or options.seeds,
            held_out=0 if options.tasks else options.held_out,
            layout=options.sft_layout,
            context_length=_context(options, Evaluate),
            model=options.model,
            dtype=options.dtype,
            track=options.track,
            dry_run=options.dry_run,
        ),
        console,
    )
    if options.withheld:
        privacy(
            Privacy(
                run_dir=str(options.root / "privacy"),
                policy=policies,
                dtype=options.dtype,
                track=options.track,
                dry_run=options.dry_run,
            ),
            console,
        )


def write_report(options: TeachingOptions, console: Console) -> dict[str, Any]:
    """Gathers the finished stages."""
    options.check()
    return report(options.root, list(options.data), options.costs(), options.title, console)
