"""``instructgym prompt compare``: compares methods on tasks at equal numbers of task-model calls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ...llm_backends.errors import InputError
from ..runs.options import SCALES, check_output
from ..runs.training import Deadline, in_time
from .methods import METHODS
from .report import write_prompt_report
from .run import PromptRun
from .run import run as search

SEEDS = {"smoke": 1, "report": 3}


@dataclass
class PromptCompare:
    """Run methods side by side and gather them."""

    run_dir: str = "runs/prompt"
    """Folder for the run folders of all searches. Finished searches are not run again."""
    scale: Literal["smoke", "report"] = "report"
    """Size of each search. smoke: minutes; report: hours."""
    tasks: str = "rotten-tomatoes"
    """Tasks, separated by commas: rotten-tomatoes (offline), tasks of GLUE or SuperGLUE, or TOML files that describe
    one."""
    data_dir: str = ""
    """Folder with the files of GLUE or SuperGLUE. Empty: the datasets library downloads them."""
    methods: str = "manual,random,maskable-ppo,soft-q,gepa"
    """Search methods, separated by commas: those of the default, or beam, ppo and grpo."""
    seeds: int = 0
    """Number of seeds of each search: 0, 1, ... The method manual is not random and runs once. 0: set by --scale, 1 for
    smoke and 3 for report."""
    calls: int = 0
    """Maximum number of task-model calls of each search, one per example and label. 0: set by --scale."""
    test: int = 0
    """Number of test examples. If it changes, finished searches are tested again, but not repeated. 0: set by
    --scale."""
    backend: str = "embedded"
    """Frozen task model, a backend with log-probs: embedded, transformers, vllm-server, or JSON {"id": ..., "kwargs":
    {...}}."""
    backend_dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Floating-point type of a frozen task model in this process. In bfloat16 the score of a prompt depends slightly on
    the other texts in its batch, and likelihoods may tie. auto: bfloat16 if the hardware supports it, else float32."""
    rewriter: str = "embedded"
    """Language model that edits prompts, or reflects on failures for gepa: embedded, transformers, openai, vllm, or
    JSON {"id": ..., "kwargs": {...}}."""
    model: str = "embedded"
    """Model of the policy that ppo, grpo and soft-q train: embedded, or a local path or hub id."""
    minutes: float = 0.0
    """Time limit in minutes. No search starts after it, and the same command resumes the rest. 0: no limit."""
    track: str = "none"
    """Where metrics are logged besides files: wandb (Weights & Biases) or none."""
    dry_run: bool = False
    """Check the options and print what would be done, without loading a model."""

    @property
    def root(self) -> Path:
        """Folder of all runs and the report."""
        return Path(self.run_dir)

    def runs(self) -> list[PromptRun]:
        """Returns the options of all searches, seed by seed.

        Raises:
            InputError: if a method is unknown, no method or no task is named, two tasks have the same name, or scale,
                seeds or minutes are out of range.
        """
        if self.scale not in SCALES:
            raise InputError(f"--scale must be {' or '.join(SCALES)}, got {self.scale!r}")
        for name in ("seeds", "minutes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name} must not be negative, got {getattr(self, name)}")
        methods, tasks = (
            list(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
            for value in (self.methods, self.tasks)
        )
        if unknown := [name for name in methods if name not in METHODS]:
            raise InputError(f"--methods has an unknown {unknown[0]!r}: use {', '.join(METHODS)}")
        if not methods or not tasks:
            raise InputError("--methods and --tasks must name at least one each")
        if len({Path(task).stem for task in tasks}) < len(tasks):
            raise InputError(
                f"--tasks names files of one name, whose run folders would be the same: {', '.join(tasks)}"
            )
        return [
            PromptRun(
                run_dir=str(self.root / f"{Path(task).stem}-{method}-{seed}"),
                task=task,
                data_dir=self.data_dir,
                method=method,  # type: ignore[arg-type]
                calls=self.calls,
                test=self.test,
                backend=self.backend,
                backend_dtype=self.backend_dtype,
                rewriter=self.rewriter,
                model=self.model,
                scale=self.scale,
                seed=seed,
                track=self.track,
            )
            # Seeds are outermost: if time runs out, every method has had about as many seeds.
            for seed in range(self.seeds or SEEDS[self.scale])
            for task in tasks
            for method in methods
            if method != "manual" or not seed
        ]


def run(options: PromptCompare, console: Console | None = None) -> dict[str, Any]:
    """Runs the searches that are not finished and returns the report of these searches alone.

    Raises:
        InputError: if the input is invalid, before the first search.
    """
    return in_time(_run)(options, console or Console())


def _run(options: PromptCompare, console: Console) -> dict[str, Any]:
    limit = Deadline(options.minutes)
    runs = options.runs()
    out = options.root / "report"
    check_output(out / "report.md")
    # One dry run per task and method finds invalid options before the first search.
    for planned in {(planned.task, planned.method): planned for planned in runs}.values():
        search(PromptRun(**vars(planned) | {"dry_run": True}), Console(quiet=True))
    if options.dry_run:
        console.print(f"would make {len(runs)} searches in {options.run_dir}")
        return {}
    for planned in runs:
        limit.check()
        search(planned, console)
    return write_prompt_report([Path(planned.run_dir) for planned in runs], out, console)
