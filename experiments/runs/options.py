"""Options that experiments share, the command-line form of pluggable parts, and checks of options."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Gt, Lt

from ...llm_backends import Backend, UnsupportedRequestError, resolve
from ...llm_backends.errors import InputError, requirement
from .folder import check_tracker

Scale = Literal["smoke", "report"]
DType = Literal["auto", "float32", "bfloat16"]
Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
Seed = Annotated[int, Lt(2**32)]  # NumPy's global generator takes 32 bits


@dataclass(frozen=True)
class Required:
    """Marks an option that may not be empty, as ``Annotated[str, Required("the run folder of a policy")]``."""

    what: str
    """What the option is to name."""


def check_fields(options: Any) -> None:
    """Checks the fields of a dataclass against their types, which are the ranges of options.

    A ``Literal`` has to be one of its values; the command line ensures it, Python does not. A number has to be finite,
    not negative, and within the bounds of an ``Annotated`` type (those of annotated-types). An option with
    :class:`Required` must have a value.

    Raises:
        InputError: if a value is out of range; the message names the option.
    """
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        value, hint, option = getattr(options, field.name), hints[field.name], f"--{field.name.replace('_', '-')}"
        for metadata in getattr(hint, "__metadata__", ()):
            if isinstance(metadata, Required) and not value:
                raise InputError(f"{option} is missing: name {metadata.what}")
        wanted = f"be {missed}" if (missed := requirement(hint, value)) else ""
        if not wanted and isinstance(value, int | float) and not 0 <= value < math.inf:
            wanted = "not be negative" if value < 0 else "be finite"
        if wanted:
            raise InputError(f"{option} must {wanted}, got {value!r}")


@dataclass
class RunOptions:
    """Options of every command that has a run folder."""

    run_dir: str = ""
    """Folder of the run; required. An unfinished run with the same options in this folder is resumed."""
    seed: Seed = 0
    """Seed of everything that a run draws; runs with equal seeds and options write equal rows and metrics."""
    minutes: float = 0.0
    """Number of minutes after which the run stops cleanly; the same command resumes it. 0: no limit."""
    track: str = "none"
    """wandb: log to Weights & Biases too (offline without an API key). none: write files only."""
    dry_run: bool = False
    """Check all options, print what would be done, and stop before a model is loaded."""

    def check(self) -> None:
        """Checks the options as far as possible without reading input files.

        Raises:
            InputError: if an option is wrong; the message names it.
        """
        if not self.run_dir:
            raise InputError("--run-dir is missing: name the folder of the run")
        check_output(Path(self.run_dir) / "config.json")
        check_tracker(self.track)
        check_fields(self)


@dataclass
class BackendOptions(RunOptions):
    """Options of the commands in which one backend does most of the work."""

    backend: str = "embedded"
    """LLM backend that writes the texts (and judges and answers, unless another backend is set for that): embedded (a
    packaged model of 135 million parameters), transformers (see --model), scripted (a rule, for trying things out),
    'module:factory', or JSON {"id": ..., "kwargs": {...}}, which openai, vllm and vllm-server need."""
    model: str = ""
    """Path or hub id of the backend's model; if empty, the backend's default model."""
    scale: Scale = "smoke"
    """Size of the run, smoke (minutes) or report (up to two hours), for options whose help says "0: by --scale"."""


def named(options: Any, *names: str) -> dict[str, Any]:
    """Returns the named options with their values, to pass them on to a stage that has options of the same names."""
    return {name: getattr(options, name) for name in names}


def parse_reward(text: str) -> Any:
    """Parses the command-line form of a reward into a part that ``resolve`` takes.

    Args:
        text: an id, a JSON object, or a sum like ``judge + 0.5*diversity``.

    Raises:
        InputError: if the text cannot be parsed.
    """
    if text.lstrip().startswith("{"):
        return parse_part(text)
    terms: dict[str, str] = {}
    weights: dict[str, float] = {}
    for piece in text.split("+"):
        # A term: an optional weight and "*", then an id.
        match = re.fullmatch(r"\s*(?:(\d+(?:\.\d+)?)\s*\*)?\s*([\w.:-]+)\s*", piece)
        if match is None or match[2] in terms:
            raise InputError(f"--reward must be like 'judge + 0.5*diversity' with distinct terms, got {text!r}")
        terms[match[2]], weights[match[2]] = match[2], float(match[1] or 1)
    # A single term with weight 1 is that reward itself, not a sum.
    if len(terms) == 1 and set(weights.values()) == {1.0}:
        return text.strip()
    return {"id": "weighted-sum", "kwargs": {"terms": terms, "weights": weights}}


def parse_part(text: str, model: str = "") -> Any:
    """Parses the command-line form of a part into one that ``resolve`` takes.

    Args:
        text: an id, ``module:factory`` or a JSON object.
        model: model that the part is to use, replacing that of the JSON object; empty: no change.

    Raises:
        InputError: if the JSON is broken or lacks an id.
    """
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
        # The embedded backend has one fixed model: another model needs the general backend.
        if part["id"] == "embedded":
            part = part | {"id": "transformers"}
        part = part | {"kwargs": dict(part.get("kwargs") or {}) | {"model": model}}
    return part


def build_judge(kind: str, text: str, option: str, backend: Backend, **defaults: Any) -> Any:
    """Builds a ranker or reward from its command-line form, on a backend whose replies a run stores.

    Args:
        kind: ``ranker`` or ``reward``.
        text: an id, ``module:factory`` or a JSON object.
        option: option that holds the text, for error messages.
        backend: passed to a factory that has a parameter ``backend``.
        **defaults: further arguments, passed to a factory that has parameters of these names.

    Raises:
        InputError: if the id is unknown, its arguments are wrong, the backend lacks a feature that it needs, or the
            JSON sets a backend, whose replies and spending the run would not record.
    """
    part = parse_part(text)
    if "backend" in (part.get("kwargs") or {}):
        raise InputError(
            f"{option} names a backend of its own: name it by the command's option, so that replies are kept"
        )
    with input_errors():
        try:
            return resolve(kind, part, backend=backend, **defaults)
        # A TypeError: arguments that the factory does not take.
        except (TypeError, UnsupportedRequestError) as error:
            raise InputError(f"{option} {text}: {error}") from error


@contextmanager
def input_errors() -> Iterator[None]:
    """Turns a ValueError into an InputError; for code that only checks what the user passed."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def check_output(path: Path) -> None:
    """Checks that a file can be written, without creating anything.

    Raises:
        InputError: if it cannot; the message names the file or folder that prevents it.
    """
    # The file itself if it exists, otherwise the nearest folder above it that does.
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if path.is_dir() or (nearest != path and not nearest.is_dir()):
        raise InputError(f"cannot write {path}: {nearest} is {'a' if nearest.is_dir() else 'not a'} folder")
    if not os.access(nearest, os.W_OK):
        raise InputError(f"cannot write {path}: no permission on {nearest}")
