"""``instructgym prompt compare``: all methods on all tasks at equal numbers of task-model calls, and the report."""

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
    """Folder for the run folders of all searches; those that are finished are kept."""
    scale: Literal["smoke", "report"] = "report"
    """smoke: minutes; report: hours."""
    tasks: str = "rotten-tomatoes"
    """Tasks, separated by commas; see 'prompt run'."""
    data_dir: str = ""
    """Folder of GLUE's or SuperGLUE's files."""
    methods: str = "manual,random,maskable-ppo,soft-q,gepa"
    """Methods, separated by commas; also beam, ppo and grpo."""
    seeds: int = 0
    """Seeds of each search, 0, 1, ...; manual draws nothing and runs once. 0: by --scale, 1 or 3."""
    calls: int = 0
    """Task-model calls of each search. 0: by --scale."""
    test: int = 0
    """Test examples; searches that are finished are tested anew where this changes. 0: by --scale."""
    backend: str = "embedded"
    """The frozen model."""
    backend_dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Its arithmetic; see 'prompt run'."""
    rewriter: str = "embedded"
    """Who edits, or reflects."""
    model: str = "embedded"
    """The policy of the methods that write tokens."""
    minutes: float = 0.0
    """Begin no search after so many minutes; the same command goes on from there. 0: no limit."""
    track: str = "none"
    """none or wandb."""
    dry_run: bool = False
    """Check everything, load no model."""

    @property
    def root(self) -> Path:
        """Where everything goes."""
        return Path(self.run_dir)

    def runs(self) -> list[PromptRun]:
        """The searches, seed by seed.

        Raises:
            InputError: for unknown or no methods, no tasks, and a bad scale or number of seeds.
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
            for seed in range(self.seeds or SEEDS[self.scale])
            for task in tasks
            for method in methods
            if method != "manual" or not seed
        ]


def run(options: PromptCompare, console: Console | None = None) -> dict[str, Any]:
    """Runs the searches that are not finished and returns the report's figures, of these searches alone.

    Raises:
        InputError: for bad input, before the first search.
    """
    return in_time(_run)(options, console or Console())


def _run(options: PromptCompare, console: Console) -> dict[str, Any]:
    limit = Deadline(options.minutes)
    runs = options.runs()
    out = options.root / "report"
    check_output(out / "report.md")
    for one in {(one.task, one.method): one for one in runs}.values():
        search(PromptRun(**vars(one) | {"dry_run": True}), Console(quiet=True))
    if options.dry_run:
        console.print(f"would make {len(runs)} searches in {options.run_dir}")
        return {}
    for one in runs:
        limit.check()
        search(one, console)
    return write_prompt_report([Path(one.run_dir) for one in runs], out, console)
