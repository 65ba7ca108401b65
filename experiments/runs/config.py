"""Files of options: ``--config FILE`` fills the options of any command from YAML or from the config.json of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...llm_backends.errors import InputError

FILE_OPTION, TRUST_OPTION = "--config", "--trust-run-folder"
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
"""The form ``module:factory`` of a part that is code outside of this package."""


def config_words(path: str, command: str, options: type, typed: Sequence[str], trusted: bool) -> list[str]:
    """Returns the options in a file as words of a command line, to be put before those that the user typed.

    Args:
        path: file with a mapping of option names to values, or the ``config.json`` of a run folder, whose values that
            are no options (digests of data) are passed over. A mapping as a value is a part: ``{id: ...}``.
        command: name of the command that is called.
        options: dataclass of its options.
        typed: words that the user typed: what they contain may be named by the file too.
        trusted: whether the file may name code as ``module:factory``.

    Raises:
        InputError: if the file cannot be read, belongs to another command, has an unknown option, or names code.
    """
    values, of_run = _read(path)
    source = f"{FILE_OPTION} {path}"
    if of_run is not None and of_run not in (command, command.partition(" ")[0]):
        raise InputError(f"{source} has the options of '{of_run}', not of '{command}'")
    types = {field.name: str(field.type) for field in fields(options)}
    words: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        option = f"--{name.replace('_', '-')}"
        if name not in types:
            if of_run is not None:
                continue
            raise InputError(f"{source}: '{command}' has no option {key!r}; its options: {', '.join(types)}")
        for code in _factories(value):
            if not trusted and not any(code in word for word in typed):
                raise InputError(
                    f"{source} names code to run, {option} {code}: if you trust the file, add {TRUST_OPTION} or type "
                    "the option"
                )
        if types[name] == "bool":
            if not isinstance(value, bool):
                raise InputError(f"{source}: {option} must be true or false, got {value!r}")
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, Mapping):
            words += [option, json.dumps(value)]
        elif isinstance(value, list):
            if "tuple" not in types[name]:
                raise InputError(f"{source}: {option} takes one value, got a list: separate names by commas")
            words += [option, *map(str, value)]
        else:
            words += [option, str(value)]
    return words


def _read(path: str) -> tuple[Mapping[str, Any], str | None]:
    """Returns the options in a file and, if it is the ``config.json`` of a run, the run's command."""
    import yaml

    try:
        # JSON is YAML, but for a few characters.
        text = Path(path).read_text("utf-8")
        value = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {FILE_OPTION} {path}: {' '.join(str(error).split())}") from error
    if not isinstance(value, Mapping):
        raise InputError(f"{FILE_OPTION} {path} must hold a mapping of option names to values")
    if isinstance(value.get("options"), Mapping) and "command" in value:
        return value["options"], str(value["command"])
    return value, None


def _factories(value: Any) -> Iterator[str]:
    """Yields the parts ``module:factory`` that a value names at any depth, within JSON in a text too."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _factories(inner)
    elif isinstance(value, str):
        if value.lstrip().startswith("{"):
            try:
                yield from _factories(json.loads(value))
            except ValueError:
                return
        # Rewards are written as a sum of terms: each of them may be a factory.
        for word in re.split(r"[\s+*,=]+", value):
            if FACTORY.fullmatch(word):
                yield word
