"""Starts a vLLM server on this machine, with what the library's backends and rollouts need, and stops it again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError

RUNTIME = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
"""Environment of the server: no reports of usage, and adapters at run time."""

CPU_LORA_MODULES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""All layers but the output, by the names that vLLM gives to those of Llama and its relatives."""

CPU_FLAGS = ("--no-enable-chunked-prefill", "--lora-target-modules", *CPU_LORA_MODULES)
"""What keeps vLLM's CPU build (0.32.0) alive. It dies of a request with a seed whose prompt it reads in chunks ("CPU
Generator does not use offset"), and, where adapters may change the output layer, of two requests at a time for the
log-probs of given texts ("einsum(): subscript b has size")."""


def server_command(
    model: str,
    port: int,
    name: str = "model",
    dtype: str = "auto",
    context_length: int = 1024,
    max_lora_rank: int = 16,
    adapters: int = 4,
    sequences: int = 64,
    cpu: bool = False,
    python: str = sys.executable,
    flags: Sequence[str] = (),
) -> list[str]:
    """The command line of a server: adapters, prefix caching, log-probs of what was sampled from.

    Args:
        model: path or hub id.
        port: on 127.0.0.1.
        name: of the model in requests.
        dtype: of the weights.
        context_length: tokens of prompt and completion at most.
        max_lora_rank: of adapters.
        adapters: used at the same time at most, one per training run.
        sequences: completions in the making at most.
        cpu: for vLLM's CPU build.
        python: the interpreter that has vLLM.
        flags: further ones.
    """
    options = {
        "--model": model,
        "--served-model-name": name,
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": dtype,
        "--max-model-len": context_length,
        "--max-num-seqs": sequences,
        "--max-lora-rank": max_lora_rank,
        "--max-loras": adapters,
        "--logprobs-mode": "processed_logprobs",
    }
    if cpu:  # without chunks a whole prompt must fit into one batch
        options["--max-num-batched-tokens"] = max(context_length, 2048)
    command = [python, "-m", "vllm.entrypoints.openai.api_server"]
    command += [str(part) for pair in options.items() for part in pair]
    return [*command, "--enable-lora", "--enable-prefix-caching", *(CPU_FLAGS if cpu else ()), *flags]


@contextmanager
def vllm_server(
    model: str,
    log: str | Path,
    python: str = sys.executable,
    cpu: bool = True,
    patience: float = 600.0,
    kv_cache_gb: int = 1,
    **options: object,
) -> Iterator[str]:
    """Runs a server for the duration of a ``with`` block and gives its base URL.

    Args:
        model: path or hub id.
        log: file for what the server prints.
        python: the interpreter that has vLLM, in whatever environment.
        cpu: whether it is the CPU build.
        patience: seconds to wait for the server to answer.
        kv_cache_gb: size of the key-value cache of the CPU build, in GiB.
        **options: of :func:`server_command`.

    Raises:
        InputError: if the server ends before it answers, or does not answer in time; with the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = server_command(model, port, cpu=cpu, python=python, **options)  # type: ignore[arg-type]
    environment = os.environ | RUNTIME | {"VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gb)}
    log = Path(log)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + patience
        while not _answers(f"http://127.0.0.1:{port}/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                end = " ".join(log.read_text("utf-8", "replace").splitlines()[-3:])
                raise InputError(f"the vLLM server did not start, see {log}: {end[-300:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        if server.poll() is None:
            server.terminate()  # an ignored SIGINT, as background jobs have it, would be inherited
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (OSError, urllib.error.URLError):
        return False
