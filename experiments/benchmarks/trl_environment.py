"""An environment with TRL's last release that has PPO, apart from this library's own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from ...llm_backends.errors import InputError
from ...llm_backends.local.loading import cache_folder

TRL_VERSION = "1.12.0"

SHARED = ("torch", "transformers", "peft")
"""Packages of which both sides have the same version."""

_PROBE = f"from importlib.metadata import version; print(*map(version, {('trl', *SHARED)!r}))"


def trl_folder() -> Path:
    """Where the prepared environment lies."""
    return cache_folder() / "trl-venv"


def installed(python: str | Path) -> dict[str, str] | None:
    """Versions of TRL and what it shares with this library, as an interpreter has them; None where one is missing."""
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, env=clean_environment(1))
    except OSError:
        return None
    return dict(zip(("trl", *SHARED), done.stdout.split(), strict=True)) if done.returncode == 0 else None


def clean_environment(threads: int) -> dict[str, str]:
    """Environment variables of a measured process: so many threads, no GPU, no network, no path of this process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "PYTHONPATH"))}
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONSAFEPATH": "1",
        "PYTHONWARNINGS": "ignore",
    }


def trl_python(given: str, console: Console) -> str:
    """The interpreter to run TRL with; without a given one an environment is prepared, once.

    Raises:
        InputError: if the given one has no TRL of the right version, or none can be prepared.
    """
    if given:
        found = installed(given)
        if found is None or found["trl"] != TRL_VERSION:
            has = f"trl {found['trl']}" if found else "no environment with trl, torch, transformers and peft"
            raise InputError(f"--trl-python {given}: {has}; the benchmark needs trl=={TRL_VERSION}")
        return given
    folder = trl_folder()
    python, ready = folder / "bin" / "python", folder / ".ready"
    found = installed(python) if ready.exists() else None
    if found is None or found["trl"] != TRL_VERSION:
        console.print(f"preparing an environment with trl {TRL_VERSION} in {folder}, once (minutes)")
        folder.parent.mkdir(parents=True, exist_ok=True)
        wanted = [f"{package}=={version(package).partition('+')[0]}" for package in SHARED]
        _call([sys.executable, "-m", "venv", str(folder)])
        # torch goes first and alone: another package's requirement would otherwise choose its newest build.
        for packages in ([wanted[0]], [f"trl=={TRL_VERSION}", *wanted]):
            _call([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages])
        ready.touch()
    return str(python)


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(1))
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise InputError(
            f"cannot prepare an environment with trl=={TRL_VERSION}: {lines[-1] if lines else 'no output'}; "
            "name an existing one with --trl-python"
        )
