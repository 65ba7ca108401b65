"""Run folders: a command's options, the rows and replies that it writes, its spending and its results.

:class:`RunFolder` is the folder. :class:`RowWriter` and :func:`replayed` let a killed run be repeated from its journal
of model replies; :class:`Tracker` writes metrics. Training with checkpoints is in
:mod:`instructgym.experiments.runs.training`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from stable_baselines3.common.logger import KVWriter, Logger

from ...llm_backends import Backend, Journal, Journaled, resolve
from ...llm_backends.errors import InputError
from ...llm_backends.records import append_lines, read_records, replaced, write_lines
from ...llm_backends.serving.budget import Budget
from .progress import StepProgress

PACKAGES = ("instructgym", "gymnasium", "stable-baselines3", "sb3-contrib", "torch", "transformers", "numpy")

NOT_IDENTITY = frozenset({"minutes", "track", "dry_run", "run_dir", "max_invalid_share", "servers", "adapter_dir"})
"""Options that may differ when a run is resumed."""

ROW_FILES = ("journal.jsonl", "episodes.jsonl", "metrics.jsonl", "rejected.jsonl")


class RunFolder:
    """The folder of one run: ``config.json`` is written first, then rows, and ``results.json`` last.

    Args:
        path: path of the folder.
        config: JSON-able options of the command.
        command: name of the command.
        fixed: names of the options that must be equal when the run is resumed; None: all but those of
            :data:`NOT_IDENTITY`.

    Raises:
        InputError: if the folder holds another run, or rows without a ``config.json``.
    """

    def __init__(
        self, path: str | Path, config: Mapping[str, Any], command: str, fixed: Collection[str] | None = None
    ) -> None:
        self.path, self.command, self._fixed = Path(path), command, fixed
        # The round trip gives the types that a stored configuration has: tuples become lists, paths strings.
        self.config = json.loads(json.dumps(dict(config), default=str))
        self._refuse_other_run()

    def _refuse_other_run(self) -> None:
        """Raises an InputError if the folder holds rows without a configuration, or a run with other options."""
        stored = read_json(self.path / "config.json")
        if stored is None:
            stray = [name for name in ROW_FILES if (self.path / name).exists()]
            if stray:
                raise InputError(f"{self.path} holds a {stray[0]} but no config.json: choose another folder")
            return
        options = stored.get("options")
        if stored.get("command") != self.command or not isinstance(options, dict):
            raise InputError(f"{self.path} holds a run of '{stored.get('command')}': choose another folder")
        for key in sorted(set(self.config) | set(options)):
            value, stored_value = self.config.get(key), options.get(key)
            fixed = key not in NOT_IDENTITY if self._fixed is None else key in self._fixed
            if fixed and _without_budget(value) != _without_budget(stored_value):
                raise InputError(
                    f"{self.path} holds a run with {key}={stored_value!r}, not {value!r}: choose another folder or "
                    "output, or repeat the options of that run to resume it"
                )

    @property
    def results(self) -> dict[str, Any] | None:
        """The results of a finished run; None for an unfinished one."""
        results = read_json(self.path / "results.json")
        return results if results is not None and results.get("status") == "finished" else None

    def finished(self, console: Console) -> dict[str, Any] | None:
        """Returns the results of a finished run and prints that there is nothing to do; None for an unfinished run."""
        if self.results is not None:
            console.print(
                f"{self.path} holds this run, finished: nothing to do (choose another --run-dir to run it again)"
            )
        return self.results

    @contextmanager
    def opened(self) -> Iterator[RunFolder]:
        """Locks the folder for this process and writes ``config.json``.

        Yields:
            This object.

        Raises:
            InputError: if the folder cannot be written or another process has locked it.
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
        """Returns the path of a file in the run folder; creates the file's parent folder."""
        path = self.path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, metrics: Mapping[str, Any], counts: Mapping[str, Any], status: str = "finished") -> dict[str, Any]:
        """Writes ``results.json`` and returns its content.

        Args:
            metrics: JSON-able metrics of the run.
            counts: JSON-able counts of the run.
            status: ``finished``; with any other status the run can be resumed.
        """
        results = {"status": status, "metrics": dict(metrics), "counts": dict(counts)}
        write_json(self.path / "results.json", results)
        return results


class RowWriter:
    """A writer of JSONL rows that does not write a row again when a run is replayed.

    A resumed run produces the same rows once more, with its model calls answered by the journal. The rows of the file
    are kept; a last line that a kill cut off is dropped.

    Args:
        path: path of the JSONL file.
        compare: True: a replayed row must equal the stored one.

    Raises:
        RecordError: if the file holds something other than rows.
    """

    def __init__(self, path: Path, compare: bool = True) -> None:
        self.path, self.compare = path, compare
        self._stored = read_records(path, repair=True)
        self._seen = 0

    def skip(self, rows: int) -> None:
        """Skips the first ``rows`` rows, which a checkpoint covers: the next row written is the one after them.

        Raises:
            InputError: if the file has fewer rows.
        """
        if rows > len(self._stored):
            raise InputError(f"{self.path} has {len(self._stored)} rows, its checkpoint stands behind {rows}")
        self._seen = rows

    def skip_those(self, belongs: Callable[[dict[str, Any]], bool]) -> None:
        """Skips the rows that a checkpoint covers, as many as there are stored rows for which ``belongs`` is true."""
        self._seen = sum(map(belongs, self._stored))

    def write(self, row: Mapping[str, Any]) -> bool:
        """Appends the row unless it is stored already; returns whether it was new.

        Raises:
            InputError: if a replayed row differs from the stored one: the file then belongs to another run.
        """
        self._seen += 1
        if self._seen > len(self._stored):
            append_lines(self.path, [dict(row)])
            return True
        if self.compare and not _almost_equal(json.loads(json.dumps(row)), self._stored[self._seen - 1]):
            raise InputError(
                f"row {self._seen} of {self.path} is not the one that this run gives: a model, a seed file or the "
                "machine has changed since; choose another folder or output"
            )
        return False


def write_once(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows into a new file, atomically; for a resumed run, checks that the file holds the same rows.

    Raises:
        InputError: if it holds other rows.
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
    """Makes a file of rows in chunks; complete chunks that the file holds already are read instead.

    Args:
        path: path of the JSONL file, to which each chunk is appended in one write.
        total: number of rows of the complete file.
        size: number of rows of a chunk.
        make: returns the rows of the chunk that begins at the row number it gets.
        label: label of the progress bar.
        console: console that shows the progress bar.

    Returns:
        All rows.
    """
    rows = read_records(path, repair=True)
    # A kill cut off the end of a chunk: drop its rows, because a chunk is made as a whole.
    if len(rows) < total and len(rows) % size:
        rows = rows[: len(rows) // size * size]
        path.unlink()
        append_lines(path, rows)
    with StepProgress(label, total, console) as progress:
        for start in range(len(rows), total, size):
            chunk = [dict(row) for row in make(start)]
            append_lines(path, chunk)
            rows += chunk
            progress.update(len(rows))
    return rows


def _without_budget(option: Any) -> Any:
    """Returns an option's value; of a part in JSON form without its budget, which may be raised to resume a run."""
    if isinstance(option, str) and option.lstrip().startswith("{"):
        with suppress(ValueError):
            return json.loads(option, object_hook=lambda part: {k: v for k, v in part.items() if k != "budget"})
    return option


def _almost_equal(row: Any, stored: Any) -> bool:
    """Returns whether two JSON values are equal, floats up to an absolute difference of 1e-4."""
    if isinstance(row, dict) and isinstance(stored, dict):
        return row.keys() == stored.keys() and all(_almost_equal(row[key], stored[key]) for key in row)
    if isinstance(row, list) and isinstance(stored, list):
        return len(row) == len(stored) and all(map(_almost_equal, row, stored))
    if {type(row), type(stored)} in ({float}, {int, float}):
        return math.isclose(row, stored, abs_tol=1e-4)
    return bool(row == stored)


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file; None if there is no file.

    Raises:
        InputError: if the file cannot be read or holds something other than a JSON object.
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
    """Writes a JSON file atomically: after a kill, the file is complete or unchanged."""
    with replaced(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


Roles = TypeVar("Roles", bound=Mapping[str, Backend])


@contextmanager
def replayed(
    folder: RunFolder, build: Callable[[Journal], Roles], console: Console, name: Path | None = None
) -> Iterator[tuple[Journal, Roles]]:
    """Locks a run folder, opens its journal, prints how many replies are replayed, and records what the roles spend.

    Args:
        folder: the run folder.
        build: returns the run's backends by role, which store their replies in the journal.
        console: console on which to print that a run is resumed.
        name: path to print for the resumed run; None: the run folder.

    Yields:
        The journal, and what ``build`` returned.

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
        with accounted(roles, folder.path):
            yield journal, roles


def journaled_roles(parts: Mapping[str, Any], journal: Journal | None) -> dict[str, Backend]:
    """Builds the backends of several roles; equal parts are built once, and with a journal each role counts its usage.

    Args:
        parts: for each role its backend, in the JSON forms that ``resolve`` takes.
        journal: journal that stores the replies; None: the backends are returned without a journal.

    Returns:
        The backends by role.
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
    """Records in a run folder what its backends spend, added up over all starts of the run.

    ``budget-ROLE.json`` holds what a budget has spent; roles that share a budget have one file, named after the first.
    ``usage.json`` holds what each role sent to its model, without replies from the journal; it lacks the usage of
    starts that were killed and of calls that were interrupted.

    Args:
        backends: backends by role.
        folder: path of the run folder.
    """
    for name, backend in backends.items():
        # A budget may belong to any of the backends that wrap each other.
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
            # Requests count those that the journal answered.
            usage["requests"] -= usage.pop("cache_hits")
            totals[name] = {key: before.get(key, 0) + value for key, value in usage.items()}
        write_json(folder / "usage.json", totals)


TRACKERS = ("none", "wandb")


class Tracker(KVWriter):
    """A stable-baselines3 log writer that writes one row per update to ``metrics.jsonl``, and to wandb if set.

    Rows that a resumed run replays are not written again. Without an API key wandb runs offline.

    Args:
        folder: the run folder.
        track: ``"none"`` or ``"wandb"``.
        step_name: key under which a row holds its step.

    Raises:
        InputError: if the tracker is unknown, wandb is not installed, or wandb refuses the run.
    """

    def __init__(self, folder: RunFolder, track: str = "none", step_name: str = "timesteps") -> None:
        check_tracker(track)
        self.step_name = step_name
        self._rows = RowWriter(folder.file("metrics.jsonl"), compare=False)
        self._run: Any = _start_wandb(folder) if track == "wandb" else None

    def logger(self) -> Logger:
        """Returns a logger whose only writer is this tracker."""
        return Logger(folder=None, output_formats=[self])

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        row = {self.step_name: int(step)} | {key: _number(value) for key, value in sorted(key_values.items())}
        if self._rows.write(row) and self._run is not None:
            self._run.log(row, step=step)

    def skip(self, rows: int) -> None:
        """Skips the first ``rows`` rows of ``metrics.jsonl``, which a checkpoint covers."""
        self._rows.skip(rows)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends rows with equal keys to wandb as a table."""
        if self._run is not None and rows:
            import wandb

            columns: list[str | int] = list(rows[0])
            self._run.log({name: wandb.Table(columns=columns, data=[list(row.values()) for row in rows])})

    def image(self, name: str, path: Path) -> None:
        """Sends an image file to wandb."""
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Image(str(path))})

    def summary(self, results: Mapping[str, Any]) -> None:
        """Sends the results to wandb as the summary of the run."""
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
    """Raises an InputError if the tracker is unknown."""
    if track not in TRACKERS:
        raise InputError(f"unknown tracker {track!r}: use {' or '.join(TRACKERS)}")


def _start_wandb(folder: RunFolder) -> Any:
    """Starts the wandb run of a folder, offline without an API key, unless the environment sets another mode.

    Raises:
        InputError: if wandb is not installed or refuses the run.
    """
    try:
        import wandb
    except ImportError as error:
        raise InputError("--track wandb needs wandb: pip install wandb") from error
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").exists()
    try:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "instructgym"),
            name=folder.path.name,
            # The id depends on the path alone, so a resumed run continues its wandb run.
            id=hashlib.sha1(str(folder.path.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder.path),
            config=folder.config,
            mode=os.environ.get("WANDB_MODE") or ("online" if has_key else "offline"),  # type: ignore[arg-type]
        )
    except wandb.errors.Error as error:
        raise InputError(f"wandb refused the run: {error}") from error


def _number(value: Any) -> Any:
    """Returns a metric as JSON can hold it: NumPy scalars as Python numbers, NaN and infinity as None."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
