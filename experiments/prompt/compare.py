"""``instructgym prompt compare``: compares methods on tasks at equal numbers of task-model calls."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from ...llm_backends.errors import InputError
from ..runs.options import named
from ..runs.study import StudyOptions, StudyStage, run_study
from .methods import METHODS
from .report import write_prompt_report
from .run import PromptRun, SearchOptions
from .run import run as search

SEEDS = {"smoke": 1, "report": 3}
"""Number of seeds by scale."""


@dataclass
class PromptCompare(SearchOptions, StudyOptions):
    """Run methods side by side and gather them."""

    command: ClassVar[str] = "prompt compare"

    run_dir: str = "runs/prompt"
    """Folder for the run folders of all searches. Finished searches are not run again."""
    tasks: str = "rotten-tomatoes"
    """Tasks, separated by commas: rotten-tomatoes (offline), tasks of GLUE or SuperGLUE, or TOML files that describe
    one."""
    methods: str = "manual,random,maskable-ppo,soft-q,gepa"
    """Search methods, separated by commas: those of the default, or beam, ppo and grpo."""
    seeds: int = 0
    """Number of seeds of each search: 0, 1, ... The method manual is not random and runs once. 0: set by --scale, 1 for
    smoke and 3 for report."""
    minutes: float = 0.0
    """Time limit in minutes. No search starts after it, and the same command resumes the rest. 0: no limit."""

    def check(self) -> None:
        super().check()
        # One dry run per task and method finds invalid options before the first search.
        for stage in {(stage.options.task, stage.options.method): stage for stage in self.stages()}.values():
            search(replace(stage.options, run_dir=str(self.root / stage.name), dry_run=True), Console(quiet=True))

    def stages(self) -> list[StudyStage]:
        """Returns the searches, seed by seed.

        Raises:
            InputError: if a method is unknown, no method or no task is named, or two tasks have the same name.
        """
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
        shared = named(self, *(field.name for field in fields(SearchOptions)))
        return [
            StudyStage(
                f"{Path(task).stem}-{method}-{seed}",
                _whole_search,
                PromptRun(task=task, method=method, seed=seed, **shared),  # type: ignore[arg-type]
            )
            # Seeds are outermost: if time runs out, every method has had about as many seeds.
            for seed in range(self.seeds or SEEDS[self.scale])
            for task in tasks
            for method in methods
            if method != "manual" or not seed
        ]

    def report(self, console: Console) -> dict[str, Any]:
        # The report is of these searches alone: the folder may hold others.
        return write_prompt_report([self.root / stage.name for stage in self.stages()], self.root / "report", console)


def run(options: PromptCompare, console: Console | None = None) -> dict[str, Any]:
    """Runs the searches that are not finished and returns the report of these searches alone.

    Raises:
        InputError: if the input is invalid, before the first search.
    """
    return run_study(options, console or Console())


def _whole_search(options: PromptRun, console: Console) -> dict[str, Any]:
    """Runs a search without a time limit, because an interrupted one would start again from the beginning."""
    return search(replace(options, minutes=0.0), console)
