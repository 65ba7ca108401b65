"""Studies: stages that run one after the other in one folder, resumable as a whole, and a report at the end.

A study is a class of options that declares its stages; :func:`run_study` runs them. Each stage is a command of its own,
with a run folder below that of the study.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from ...llm_backends.errors import InputError
from .folder import RunFolder, check_tracker
from .options import Scale, check_fields, check_output
from .training import Deadline, OutOfTimeError

Results = dict[str, Any]


@dataclass(frozen=True)
class StudyStage:
    """A command that a study runs."""

    name: str
    """Name of the stage: its run folder, relative to that of the study."""
    run: Callable[[Any, Console], Results]
    """Function of the command."""
    options: Any
    """Options of the command, or a function that returns them, given the results of the earlier stages by name. The
    study sets ``run_dir``, ``track`` and ``minutes``."""
    needs: tuple[str, ...] = ()
    """Names of the earlier stages that this one reads."""


@dataclass
class StudyOptions(ABC):
    """Options of a study: those that all studies share."""

    command: ClassVar[str]
    """The command, as a user types it."""
    only: ClassVar[tuple[str, ...]] = ()
    """Stages that a command of a part of the study runs, by the first folder of their names, with ``report`` for the
    report; empty: all stages and the report."""

    run_dir: str = ""
    """Folder for the run folders of all stages. Finished stages are not run again."""
    scale: Scale = "report"
    """Size of the study. smoke: minutes on two cores; report: up to two hours."""
    model: str = "embedded"
    """Model to train: embedded, or a local path or hub id of a causal language model."""
    minutes: float = 0.0
    """Number of minutes after which the study stops cleanly; the same command resumes it. 0: no limit."""
    track: str = "none"
    """wandb: log to Weights & Biases too (offline without an API key). none: write files only."""
    dry_run: bool = False
    """Check all options, print what would be done, and stop before a model is loaded."""

    @property
    def root(self) -> Path:
        """Folder of the study, absolute: the stages' options contain it, and a resumed run must have the same."""
        return Path(self.run_dir).resolve()

    def check(self) -> None:
        """Checks everything that needs no model.

        Raises:
            InputError: if an option is wrong; the message names it.
        """
        if not self.run_dir:
            raise InputError("--run-dir is missing: name the folder of the study")
        check_output(self.root / "report" / "report.md")
        check_tracker(self.track)
        check_fields(self)

    def identity(self) -> Mapping[str, Any]:
        """Returns the options, and digests of data, that may not change when the study is resumed.

        Stages check their own options.
        """
        return {}

    @abstractmethod
    def stages(self) -> Sequence[StudyStage]:
        """Returns the stages in an order in which they can run."""

    def prepare(self) -> None:  # noqa: B027
        """Writes the files that stages read and no stage writes."""

    @abstractmethod
    def report(self, console: Console) -> Results:
        """Gathers the finished stages into a report and returns its figures."""


def run_study(study: StudyOptions, console: Console) -> Results:
    """Runs the stages of a study that are not finished, and its report.

    Args:
        study: the options.
        console: console that shows progress.

    Returns:
        The figures of the report, or the results of the stages by name if there is none to write;
        ``{"status": "stopped"}`` if the time limit was reached first; empty for a dry run.

    Raises:
        InputError: for bad input, before the first stage.
    """
    limit = Deadline(study.minutes)
    study.check()
    stages = [stage for stage in study.stages() if not study.only or stage.name.partition("/")[0] in study.only]
    reports = not study.only or "report" in study.only
    if study.dry_run:
        names = ", ".join([stage.name for stage in stages] + ["report"] * reports)
        console.print(f"would run {names} in {study.root}", highlight=False)
        return {}
    results: dict[str, Results] = {}
    identity = study.identity()
    with RunFolder(study.root, asdict(study) | dict(identity), study.command, fixed=set(identity)).opened():
        study.prepare()
        try:
            for stage in stages:
                console.rule(stage.name, style="dim")
                options = stage.options(results) if callable(stage.options) else stage.options
                options = replace(options, run_dir=str(study.root / stage.name), track=study.track)
                results[stage.name] = limit.run(stage.run, options, console)
            return study.report(console) if reports else results
        except OutOfTimeError:
            console.print(f"out of time: the same command goes on in {study.root}")
            return {"status": "stopped"}


def needed(stages: Sequence[StudyStage], targets: Sequence[str]) -> list[StudyStage]:
    """Returns the stages that the targets need, directly or through others, and the targets, in the given order."""
    by_name = {stage.name: stage for stage in stages}
    names, queue = set(targets), list(targets)
    while queue:
        new = [name for name in by_name[queue.pop()].needs if name not in names]
        names.update(new)
        queue += new
    return [stage for stage in stages if stage.name in names]
