"""Start and stop of a vLLM server on this machine, with the flags that the library's backends and rollouts need."""

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
from ..local.loading import computes_in_bfloat16

RUNTIME = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
"""Environment variables of the server: no usage reports, and adapters that are loaded at run time."""

CPU_LORA_MODULES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""All layers except the output layer, by vLLM's names for those of Llama and related models."""

CPU_FLAGS = ("--no-enable-chunked-prefill", "--lora-target-modules", *CPU_LORA_MODULES)
"""Flags that keep vLLM's CPU build (0.32.0) from crashing. It crashes on a request with a seed whose prompt it reads in
chunks ("CPU Generator does not use offset"), and, if adapters may change the output layer, on two simultaneous requests
for the log-probs of given texts ("einsum(): subscript b has size")."""


def cpu_dtype(dtype: str) -> str:
    """Returns the dtype for the CPU build: float32 instead of ``auto`` if the CPU does not compute in bfloat16.

    vLLM would choose bfloat16 for ``auto``, whose products take 90 times as long as those in float32 on such a CPU.
    """
    return "float32" if dtype == "auto" and not computes_in_bfloat16("cpu") else dtype


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
    """Returns the command line of a server with adapters, prefix caching and log-probs of the sampled distribution.

    Args:
        model: path or hub id.
        port: port on 127.0.0.1.
        name: name of the model in requests.
        dtype: dtype of the weights; ``auto``: the one in the model's configuration, or float32 if ``cpu`` and the CPU
            does not compute in bfloat16.
        context_length: maximum number of tokens of prompt and completion.
        max_lora_rank: largest rank of an adapter.
        adapters: maximum number of adapters in use at the same time; one per training run.
        sequences: maximum number of completions that are generated at the same time.
        cpu: whether the server is vLLM's CPU build.
        python: path of the interpreter that has vLLM.
        flags: further command-line arguments.
    """
    options = {
        "--model": model,
        "--served-model-name": name,
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": cpu_dtype(dtype) if cpu else dtype,
        "--max-model-len": context_length,
        "--max-num-seqs": sequences,
        "--max-lora-rank": max_lora_rank,
        "--max-loras": adapters,
        "--logprobs-mode": "processed_logprobs",
    }
    if cpu:  # CPU_FLAGS turn chunked prefill off: a whole prompt must fit into one batch
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
    startup_timeout: float = 600.0,
    kv_cache_gb: int = 1,
    **options: object,
) -> Iterator[str]:
    """Runs a server for the duration of a ``with`` block.

    Args:
        model: path or hub id.
        log: file for the server's output, created with its folders if missing.
        python: path of the interpreter that has vLLM, which may be in another environment.
        cpu: whether the server is vLLM's CPU build.
        startup_timeout: seconds to wait until the server answers.
        kv_cache_gb: size of the key-value cache of the CPU build, in GiB.
        **options: further arguments of :func:`server_command`.

    Yields:
        The base URL of the server.

    Raises:
        InputError: if the server exits before it answers, or does not answer in time; with the end of its log.
    """
    # Port 0 makes the operating system choose a free port; it is released for the server to bind.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = server_command(model, port, cpu=cpu, python=python, **options)  # type: ignore[arg-type]
    environment = os.environ | RUNTIME | {"VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gb)}
    log = Path(log)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # In a new session, so that the whole process group can be killed below.
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + startup_timeout
        while not _answers(f"http://127.0.0.1:{port}/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                end = " ".join(log.read_text("utf-8", "replace").splitlines()[-3:])
                raise InputError(f"the vLLM server did not start, see {log}: {end[-300:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        if server.poll() is None:
            # SIGTERM, because the server inherits an ignored SIGINT if this process is a background job.
            server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _answers(url: str) -> bool:
    """Returns whether a GET request to the address is answered with status 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (OSError, urllib.error.URLError):
        return False
