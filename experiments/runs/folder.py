"""Run folders: what a command was told, what it wrote, and whether it has finished."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from stable_baselines3.common.logger import KVWriter, Logger

from ...llm_backends import Backend, Journal, Journaled, resolve
from ...llm_backends.errors import InputError
from ...llm_backends.records import append_lines, read_records, write_lines
from ...llm_backends.serving.budget import Budget
from .progress import StepProgress

PACKAGES = ("instructgym", "gymnasium", "stable-baselines3", "sb3-contrib", "torch", "transformers", "numpy")

NOT_IDENTITY = frozenset({"minutes", "track", "dry_run", "run_dir", "max_invalid_share", "servers", "adapter_dir"})
"""Options that may change between a start and its resumption."""

ROW_FILES = ("journal.jsonl", "episodes.jsonl", "metrics.jsonl", "rejected.jsonl")


class RunFolder:
    """One run: ``config.json`` first, rows while it goes, ``results.json`` last.

    Args:
        path: the folder.
        config: JSON-able options of the command.
        command: its name.

    Raises:
        InputError: if the folder cannot be written, belongs to a run with other options, or is in use.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any], command: str) -> None:
        self.path, self.command = Path(path), command
        self.config = json.loads(json.dumps(dict(config), default=str))
        self._refuse_other_run()

    def _refuse_other_run(self) -> None:
        stored = read_json(self.path / "config.json")
        if stored is None:
            strangers = [name for name in ROW_FILES if (self.path / name).exists()]
            if strangers:
                raise InputError(f"{self.path} holds a {strangers[0]} but no config.json: choose another folder")
            return
        options = stored.get("options")
        if stored.get("command") != self.command or not isinstance(options, dict):
            raise InputError(f"{self.path} holds a run of '{stored.get('command')}': choose another folder")
        for key in sorted(set(self.config) | set(options)):
            mine, theirs = self.config.get(key), options.get(key)
            if key not in NOT_IDENTITY and _without_budget(mine) != _without_budget(theirs):
                raise InputError(
                    f"{self.path} holds a run with {key}={theirs!r}, not {mine!r}: choose another folder or output, or "
                    "repeat the options of that run to resume it"
                )

    @property
    def results(self) -> dict[str, Any] | None:
        """The results of a finished run."""
        results = read_json(self.path / "results.json")
        return results if results is not None and results.get("status") == "finished" else None

    def finished(self, console: Console) -> dict[str, Any] | None:
        """The results of a finished run, after saying that there is nothing to do; None for any other run."""
        if self.results is not None:
            console.print(
                f"{self.path} holds this run, finished: nothing to do (choose another --run-dir to run it again)"
            )
        return self.results

    @contextmanager
    def opened(self) -> Iterator[RunFolder]:
        """Holds the folder for this process and writes ``config.json``.

        Raises:
            InputError: if it cannot be written or another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{self.path} is in use by another process") from None
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot write the run folder {self.path}: {reason}") from error
        try:
            if not (self.path / "config.json").exists():
                write_json(
                    self.path / "config.json",
                    {"command": self.command, "options": self.config, "versions": _versions()},
                )
            yield self
        finally:
            lock.release()

    def file(self, *parts: str) -> Path:
        """Path of a file in the folder; its folder is made."""
        path = self.path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, metrics: Mapping[str, Any], counts: Mapping[str, Any], status: str = "finished") -> dict[str, Any]:
        """Writes ``results.json``; a status other than ``finished`` leaves the run open for resumption."""
        results = {"status": status, "metrics": dict(metrics), "counts": dict(counts)}
        write_json(self.path / "results.json", results)
        return results


class RowWriter:
    """Rows of a run that may be replayed: those that are in the file already are not written again.

    A resumed run goes through the same rows once more, its model calls answered by the journal. The file keeps what it
    has, a torn last line is dropped.

    Args:
        path: a JSONL file.
        compare: hold replayed rows to the stored ones.

    Raises:
        RecordError: if the file holds something other than rows.
    """

    def __init__(self, path: Path, compare: bool = True) -> None:
        self.path, self.compare = path, compare
        self._stored = read_records(path, repair=True)
        self._seen = 0

    def skip(self, rows: int) -> None:
        """Says that a checkpoint stands behind the first ``rows`` rows: the next one written is the one after them.

        Raises:
            InputError: if the file has fewer.
        """
        if rows > len(self._stored):
            raise InputError(f"{self.path} has {len(self._stored)} rows, its checkpoint stands behind {rows}")
        self._seen = rows

    def skip_those(self, belongs: Callable[[dict[str, Any]], bool]) -> None:
        """The same for a checkpoint that says which rows of the file it stands behind."""
        self._seen = sum(map(belongs, self._stored))

    def write(self, row: Mapping[str, Any]) -> bool:
        """Appends the row unless it stands there from before; says whether it was new.

        Raises:
            InputError: if a replayed row differs from the stored one, for then the file belongs to another run.
        """
        self._seen += 1
        if self._seen > len(self._stored):
            append_lines(self.path, [dict(row)])
            return True
        if self.compare and not _alike(json.loads(json.dumps(row)), self._stored[self._seen - 1]):
            raise InputError(
                f"row {self._seen} of {self.path} is not the one that this run gives: a model, a seed file or the "
                "machine has changed since; choose another folder or output"
            )
        return False


def write_once(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows in one move; those of a run that is resumed must be the same.

    Raises:
        InputError: if they are not.
    """
    if path.exists():
        if read_records(path) != list(rows):
            raise InputError(f"the data have changed since {path} was written: choose another --run-dir")
        return
    write_lines(path, rows)


def chunked_rows(
    path: Path,
    total: int,
    size: int,
    make: Callable[[int], Sequence[Mapping[str, Any]]],
    label: str,
    console: Console,
) -> list[dict[str, Any]]:
    """A file of ``total`` rows that are made in chunks; whole chunks that stand there are read, not made again.

    Args:
        path: a JSONL file, to which each chunk is appended at once.
        total: rows in all.
        size: rows of a chunk.
        make: the rows of the chunk that begins at the given row.
        label: for the progress bar.
        console: where to show it.
    """
    rows = read_records(path, repair=True)
    if len(rows) < total and len(rows) % size:  # the end of a chunk was cut off
        rows = rows[: len(rows) // size * size]
        path.unlink()
        append_lines(path, rows)
    with StepProgress(label, total, console) as progress:
        for start in range(len(rows), total, size):
            made = [dict(row) for row in make(start)]
            append_lines(path, made)
            rows += made
            progress.update(len(rows))
    return rows


def _without_budget(option: Any) -> Any:
    """An option's value; a part given as JSON without its budget, which may be raised to go on."""
    if isinstance(option, str) and option.lstrip().startswith("{"):
        try:
            return _stripped(json.loads(option))
        except ValueError:
            pass
    return option


def _stripped(value: Any) -> Any:
    """The value without any ``budget``, however deep."""
    if isinstance(value, dict):
        return {key: _stripped(inner) for key, inner in value.items() if key != "budget"}
    return [_stripped(inner) for inner in value] if isinstance(value, list) else value


def _alike(row: Any, stored: Any) -> bool:
    """Equal, up to floating-point noise."""
    if isinstance(row, dict) and isinstance(stored, dict):
        return row.keys() == stored.keys() and all(_alike(row[key], stored[key]) for key in row)
    if isinstance(row, list) and isinstance(stored, list):
        return len(row) == len(stored) and all(map(_alike, row, stored))
    if isinstance(row, float) or isinstance(stored, float):
        return (
            isinstance(row, int | float) and isinstance(stored, int | float) and math.isclose(row, stored, abs_tol=1e-4)
        )
    return bool(row == stored)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is no file.

    Raises:
        InputError: if the file is broken.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, not an object")
        return value
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}; delete the file, and the run is replayed") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file in one move: it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
    scratch.replace(path)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


Roles = TypeVar("Roles")


@contextmanager
def replayed(
    folder: RunFolder, build: Callable[[Journal], Roles], console: Console, name: Path | None = None
) -> Iterator[tuple[Journal, Roles]]:
    """Holds a run folder, opens its journal, says what is replayed, and accounts for what the roles spend.

    Args:
        folder: of the run.
        build: the run's backends by role, with their replies kept in the journal: a mapping, or an object whose
            attributes they are.
        console: where to say that a run is resumed.
        name: what is resumed; by default the folder.

    Yields:
        The journal and the roles.

    Raises:
        InputError: if the folder cannot be written or is in use.
    """
    with folder.opened():
        journal = Journal(folder.file("journal.jsonl"))
        if len(journal):
            console.print(
                f"resuming {name or folder.path}: {len(journal)} stored replies are replayed, none is paid for again"
            )
        roles = build(journal)
        with accounted(roles if isinstance(roles, Mapping) else vars(roles), folder.path):
            yield journal, roles


def journaled_roles(parts: Mapping[str, Any], journal: Journal | None) -> dict[str, Backend]:
    """Backends by role; equal parts are built once, and each role counts its own usage.

    Args:
        parts: by role, in the forms that ``resolve`` takes as JSON.
        journal: keeps the replies; None for the bare backends.
    """
    live: dict[str, Backend] = {}

    def role(part: Any) -> Backend:
        key = json.dumps(part, sort_keys=True)
        if key not in live:
            live[key] = resolve("backend", part)
        return live[key] if journal is None else Journaled(live[key], journal)

    return {name: role(part) for name, part in parts.items()}


@contextmanager
def accounted(backends: Mapping[str, Backend], folder: Path) -> Iterator[None]:
    """Keeps the spending of a run's backends in its folder, over all its starts.

    ``budget-ROLE.json`` is what a budget has spent, under the first of the roles that share it. ``usage.json`` is what
    each role sent to its model, replies from the journal left out; starts that were killed and calls that broke off are
    missing in it.

    Args:
        backends: by role.
        folder: the run's.
    """
    for name, backend in backends.items():
        inner: Any = backend
        while inner is not None:
            if isinstance(budget := getattr(inner, "budget", None), Budget):
                budget.keep(folder / f"budget-{name}.json")
            inner = getattr(inner, "inner", None)
    stored = read_json(folder / "usage.json") or {}
    try:
        yield
    finally:
        totals = {}
        for name, backend in backends.items():
            usage, before = backend.usage.as_dict(), stored.get(name, {})
            usage["requests"] -= usage.pop("cache_hits")
            totals[name] = {key: before.get(key, 0) + value for key, value in usage.items()}
        write_json(folder / "usage.json", totals)


class TimeLimit:
    """A limit on a run's time that does not count what is replayed from its journal.

    Args:
        minutes: the limit; 0 for none.
        journal: of the run, before the first reply is asked for.
    """

    def __init__(self, minutes: float, journal: Journal) -> None:
        self.minutes, self.journal, self.replies = minutes, journal, len(journal)
        self._asked: float | None = None
        self._paid_since: float | None = None

    def reached(self) -> bool:
        """Whether to stop; asked before every piece of work. Time counts from the first that a model worked on."""
        if self._paid_since is None and len(self.journal) > self.replies:
            self._paid_since = self._asked
        self._asked = time.monotonic()
        return (
            bool(self.minutes) and self._paid_since is not None and self._asked - self._paid_since >= 60 * self.minutes
        )


TRACKERS = ("none", "wandb")


class Tracker(KVWriter):
    """A stable-baselines3 log writer: a row of ``metrics.jsonl`` per update, the same to wandb.

    Rows that a resumed run replays are written to neither a second time. Without a key wandb runs offline.

    Args:
        folder: the run.
        track: ``"none"`` or ``"wandb"``.
        step_name: what a row's step counts.

    Raises:
        InputError: for another tracker, or if wandb is not installed.
    """

    def __init__(self, folder: RunFolder, track: str = "none", step_name: str = "timesteps") -> None:
        check_tracker(track)
        self.step_name = step_name
        self._rows = RowWriter(folder.file("metrics.jsonl"), compare=False)
        self._run: Any = _start_wandb(folder) if track == "wandb" else None

    def logger(self) -> Logger:
        """A logger that writes here only."""
        return Logger(folder=None, output_formats=[self])

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        row = {self.step_name: int(step)} | {key: _number(value) for key, value in sorted(key_values.items())}
        if self._rows.write(row) and self._run is not None:
            self._run.log(row, step=step)

    def skip(self, rows: int) -> None:
        """Says that a checkpoint stands behind the first ``rows`` rows."""
        self._rows.skip(rows)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends rows with the same keys to wandb as a table."""
        if self._run is not None and rows:
            import wandb

            columns: list[str | int] = list(rows[0])
            self._run.log({name: wandb.Table(columns=columns, data=[list(row.values()) for row in rows])})

    def image(self, name: str, path: Path) -> None:
        """Sends a picture to wandb."""
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Image(str(path))})

    def summary(self, results: Mapping[str, Any]) -> None:
        """Sends the results to wandb."""
        if self._run is not None:
            self._run.summary.update(dict(results))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def check_tracker(track: str) -> None:
    """Refuses an unknown tracker."""
    if track not in TRACKERS:
        raise InputError(f"unknown tracker {track!r}: use {' or '.join(TRACKERS)}")


def _start_wandb(folder: RunFolder) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise InputError("--track wandb needs wandb: pip install wandb") from error
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").exists()
    try:
        return _init_wandb(wandb, folder, "online" if has_key else "offline")
    except wandb.errors.Error as error:
        raise InputError(f"wandb refused the run: {error}") from error


def _init_wandb(wandb: Any, folder: RunFolder, mode: str) -> Any:
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", "instructgym"),
        name=folder.path.name,
        id=hashlib.sha1(str(folder.path.resolve()).encode()).hexdigest()[:16],
        resume="allow",
        dir=str(folder.path),
        config=folder.config,
        mode=os.environ.get("WANDB_MODE") or mode,
    )


def _number(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
