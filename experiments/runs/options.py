"""What options of experiments have in common: the fields of a run, parts in their command-line form, and checks."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...llm_backends import Backend, UnsupportedRequestError, resolve
from ...llm_backends.errors import InputError
from .folder import check_tracker

SCALES = ("smoke", "report")


@dataclass
class RunOptions:
    """Options of every experiment."""

    run_dir: str = ""
    """Folder of the run. A folder with an unfinished run of the same options is resumed."""
    seed: int = 0
    """Seed of the run; with it and the same options a run gives the same rows."""
    backend: str = "embedded"
    """Who rewrites (and judges and answers, if no one else is named): embedded, transformers, scripted,
    'module:factory', or JSON {"id": ..., "kwargs": {...}}."""
    model: str = ""
    """Model path or hub id for the backend; by default the backend's own."""
    minutes: float = 0.0
    """Stop cleanly after so many minutes; the same command goes on from there. 0: no limit."""
    scale: str = "smoke"
    """Size of the run where a count is left at 0: smoke (minutes) or report (up to two hours)."""
    track: str = "none"
    """wandb: log to Weights & Biases too (offline without a key). none: files only."""
    dry_run: bool = False
    """Check everything, say what would be done, and stop before a model is loaded."""

    def check(self) -> None:
        """Refuses what can be refused without looking at files.

        Raises:
            InputError: naming the option.
        """
        check_run(self)
        if self.scale not in SCALES:
            raise InputError(f"--scale must be {' or '.join(SCALES)}, got {self.scale!r}")


def check_run(options: Any) -> None:
    """Refuses a missing or unusable run folder, an unknown tracker, and numbers that are negative or not finite.

    Args:
        options: a dataclass with ``run_dir``, ``track`` and ``seed`` among its fields.

    Raises:
        InputError: naming the option.
    """
    if not options.run_dir:
        raise InputError("--run-dir is missing: name the folder of the run")
    check_output(Path(options.run_dir) / "config.json")
    check_tracker(options.track)
    for field in fields(options):
        value = getattr(options, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value < math.inf:
            raise InputError(f"--{field.name.replace('_', '-')} must not be negative, got {value}")
    if options.seed >= 2**32:
        raise InputError(f"--seed must be below 2**32, got {options.seed}")


def check_counts(options: Any, *names: str) -> None:
    """Refuses counts below 1.

    Raises:
        InputError: naming the option.
    """
    for name in names:
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")


def parse_reward(text: str) -> Any:
    """A reward from its command-line form: one id, or a sum like ``judge + 0.5*diversity``.

    Raises:
        InputError: if it cannot be read.
    """
    if text.lstrip().startswith("{"):
        return parse_part(text)
    terms: dict[str, str] = {}
    weights: dict[str, float] = {}
    for piece in text.split("+"):
        match = re.fullmatch(r"\s*(?:(\d+(?:\.\d+)?)\s*\*)?\s*([\w.:-]+)\s*", piece)
        if match is None or match[2] in terms:
            raise InputError(f"--reward must be like 'judge + 0.5*diversity' with distinct terms, got {text!r}")
        terms[match[2]], weights[match[2]] = match[2], float(match[1] or 1)
    if len(terms) == 1 and set(weights.values()) == {1.0}:
        return text.strip()
    return {"id": "weighted-sum", "kwargs": {"terms": terms, "weights": weights}}


def parse_part(text: str, model: str = "") -> Any:
    """A part from its command-line form: an id, ``module:factory`` or a JSON object; with a model, for that model."""
    if text.lstrip().startswith("{"):
        try:
            part = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"broken JSON in {text!r}: {error.msg}") from error
        if not isinstance(part.get("id"), str) or not isinstance(part.get("kwargs", {}), dict):
            raise InputError(f'a part as JSON needs {{"id": "...", "kwargs": {{...}}}}, got {text!r}')
    else:
        part = {"id": text}
    if model:
        if part["id"] == "embedded":  # the embedded backend is one model: another one needs the general backend
            part = part | {"id": "transformers"}
        part = part | {"kwargs": dict(part.get("kwargs") or {}) | {"model": model}}
    return part


def build_judge(kind: str, text: str, option: str, backend: Backend, **defaults: Any) -> Any:
    """A ranker or reward from its command-line form, on a backend whose replies a run keeps.

    Args:
        kind: ``ranker`` or ``reward``.
        text: an id, ``module:factory`` or JSON.
        option: that names it, for errors.
        backend: handed on to a factory that takes one.
        **defaults: likewise.

    Raises:
        InputError: if there is none of that id, its arguments are wrong, the backend cannot serve it, or it names a
            backend of its own, past the run's journal and accounts.
    """
    part = parse_part(text)
    if "backend" in (part.get("kwargs") or {}):
        raise InputError(
            f"{option} names a backend of its own: name it by the command's option, so that replies are kept"
        )
    with input_errors():
        try:
            return resolve(kind, part, backend=backend, **defaults)
        except (TypeError, UnsupportedRequestError) as error:
            raise InputError(f"{option} {text}: {error}") from error


@contextmanager
def input_errors() -> Iterator[None]:
    """Turns a ValueError about an option into an InputError: for code that only looks at what the user passed."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def check_output(path: Path) -> None:
    """Refuses a file that cannot be written; makes nothing.

    Raises:
        InputError: naming the file or the folder that is in the way.
    """
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if path.is_dir() or (place != path and not place.is_dir()):
        raise InputError(f"cannot write {path}: {place} is {'a' if place.is_dir() else 'not a'} folder")
    if not os.access(place, os.W_OK):
        raise InputError(f"cannot write {path}: no permission on {place}")
