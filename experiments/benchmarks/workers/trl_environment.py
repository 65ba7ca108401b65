"""A Python environment for the last release of TRL that has PPO, separate from the environment of this library."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from ....llm_backends.errors import InputError
from ....llm_backends.local.loading import cache_folder

TRL_VERSION = "1.12.0"

SHARED = ("torch", "transformers", "peft")
"""Packages that have the same version on both sides."""

_PROBE = f"from importlib.metadata import version; print(*map(version, {('trl', *SHARED)!r}))"


def trl_folder() -> Path:
    """Returns the folder of the prepared environment."""
    return cache_folder() / "trl-venv"


def installed(python: str | Path) -> dict[str, str] | None:
    """Returns the versions of TRL and :data:`SHARED` in an environment; None if a package or Python is missing."""
    try:
        output = output_of([str(python), "-c", _PROBE], "")
    except (OSError, InputError):
        return None
    return dict(zip(("trl", *SHARED), output.split(), strict=True))


def output_of(command: list[str], failure: str, given: str = "", threads: int = 1) -> str:
    """Runs a command in an environment for measured processes and returns what it prints.

    The environment has no GPU, no model hub and no warnings.

    Args:
        command: the command.
        failure: what has failed if the command fails, for the message.
        given: standard input of the command.
        threads: number of threads of the command.

    Raises:
        InputError: if the command fails; the message ends with the last line that it wrote.
    """
    # PYTHONPATH is meant for this interpreter, whose workers may find this library there; another has its own packages.
    left_out = ("ACCELERATE_",) if command[0] == sys.executable else ("ACCELERATE_", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(left_out)} | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONSAFEPATH": "1",
        "PYTHONWARNINGS": "ignore",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise InputError(f"{failure}: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout


def trl_python(interpreter: str, console: Console) -> str:
    """Returns the Python interpreter for TRL, from an environment that is prepared once unless one is given.

    Args:
        interpreter: interpreter of an environment with TRL; empty for the prepared environment.
        console: where the preparation is announced.

    Raises:
        InputError: if the given environment lacks TRL of the required version, or none can be prepared.
    """
    if interpreter:
        versions = installed(interpreter)
        if versions is None or versions["trl"] != TRL_VERSION:
            has = f"trl {versions['trl']}" if versions else "no environment with trl, torch, transformers and peft"
            raise InputError(f"--trl-python {interpreter}: {has}; the benchmark needs trl=={TRL_VERSION}")
        return interpreter
    folder = trl_folder()
    python, ready = folder / "bin" / "python", folder / ".ready"
    versions = installed(python) if ready.exists() else None
    if versions is None or versions["trl"] != TRL_VERSION:
        console.print(f"preparing an environment with trl {TRL_VERSION} in {folder}, once (minutes)")
        folder.parent.mkdir(parents=True, exist_ok=True)
        requirements = [f"{package}=={version(package).partition('+')[0]}" for package in SHARED]
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # torch goes first and alone: another package's requirement would otherwise choose its newest build.
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [*install, requirements[0]],
            [*install, f"trl=={TRL_VERSION}", *requirements],
        ):
            output_of(command, f"cannot prepare trl=={TRL_VERSION} (name an existing one with --trl-python)")
        ready.touch()  # an interrupted installation has no such file and is repeated
    return str(python)
