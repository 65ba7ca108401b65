"""``instructgym bench rollouts``: compares rollouts on a vLLM server with rollouts in this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...agents.policy.language_model import LanguageModelPolicy
from ...agents.policy.optimization import Processes
from ...agents.rollouts.engine import VLLMEngine
from ...llm_backends import BackendError, Sampling, request_seed
from ...llm_backends.errors import InputError
from ...llm_backends.local.loading import resolved_dtype
from ...llm_backends.serving.vllm_launch import vllm_server
from ...llm_backends.serving.vllm_server import TokenSampling, VLLMServerBackend
from ...llm_backends.training.adapters import LoraSettings
from ..runs.options import Count, DType
from .frame import BenchOptions, alternate, compare, publish, scratch_folder, spread_text, timed
from .tiny import make_prompts, model_folder

SIDES = {"theirs": "in process", "ours": "vLLM, adapter", "base_model": "vLLM, base model"}
"""Titles of the sides in the order in which they are measured, by their key in the results."""


@dataclass
class BenchRollouts(BenchOptions):
    """Response tokens per second of rollouts on a vLLM server, adapter pushed, against sampling in this process."""

    server: str = ""
    """Base URL of a running vLLM server with the same model. Empty: start one."""
    python: str = ".venv-server/bin/python"
    """Python interpreter with vLLM, to start a server if --server is empty."""
    model: str = "embedded"
    """Model that samples: embedded, tiny (a GPT-2 of four layers with random weights), or the path of a model."""
    batch: Count = 16
    """Number of episodes that are sampled at once."""
    prompt_tokens: Count = 32
    """Number of tokens of every prompt."""
    response_tokens: Count = 48
    """Number of tokens of every response. No end-of-sequence token shortens it."""
    lora_rank: Count = 8
    """Rank of the LoRA adapter of the policy."""
    dtype: DType = "auto"
    """Floating-point type of this process, and of a server that is started. auto: bfloat16 if the hardware supports it,
    else float32."""
    rounds: Count = 3
    """Measurements of each side, taken alternately after a warm-up."""


def run(options: BenchRollouts, console: Console) -> dict[str, Any]:
    """Measures all sides and returns ``{"ours", "theirs", "base_model", "ratio", "settings"}``.

    ``ours`` is vLLM with the adapter, including the time to push it; ``theirs`` is sampling in this process;
    ``base_model`` is vLLM without an adapter.

    Raises:
        InputError: if an option is out of range, or a server cannot be used or started.
    """
    options.check()
    if not options.server and not Path(options.python).exists():
        raise InputError(f"no interpreter {options.python}: make venv-server, or name a server with --server")
    with scratch_folder() as scratch:
        folder, url = model_folder(options.model, scratch), options.server
        rank, dtype = max(8, options.lora_rank), resolved_dtype(options.dtype, "cpu")
        log = scratch / "server.log"
        server = nullcontext(url) if url else vllm_server(folder, log, options.python, dtype=dtype, max_lora_rank=rank)
        with server as url:
            lora = LoraSettings(rank=options.lora_rank)
            policy = LanguageModelPolicy(folder, lora, value="none", dtype=options.dtype)
            with closing(VLLMEngine([url])) as engine:
                rates, push = measure(options, folder, policy, engine)
    name = "tokens_per_second"
    figures = compare(name, rates["ours"], rates["theirs"])
    figures["ours"]["push_seconds"] = push
    figures["base_model"] = {name: float(np.median(rates["base_model"]))}
    medians = [f"{figures[side][name]:.1f}" for side in SIDES]
    rows = [
        ("", *SIDES.values(), "adapter / in process"),
        ("response tokens per second", *medians, spread_text(name, figures["ratio"])),
        ("seconds to push the adapter", "", f"{push:.2f}", "", ""),
    ]
    tokens = f"{options.batch} x ({options.prompt_tokens} + {options.response_tokens}) tokens"
    return publish(options, figures, f"rollouts of {options.model}: {tokens}, rank {options.lora_rank}", rows, console)


def measure(
    options: BenchRollouts, folder: str, policy: LanguageModelPolicy, engine: VLLMEngine
) -> tuple[dict[str, list[float]], float]:
    """Measures all sides alternately.

    Args:
        options: options of the benchmark.
        folder: folder of the model.
        policy: policy whose adapter is pushed.
        engine: engine with one server.

    Returns:
        Response tokens per second by side and round, and the median seconds to push the adapter.
    """
    processes = Processes()
    engine.push_weights(policy, processes)
    # An adapter has its base model as the parent; the server must have exactly one base model.
    [base] = [model["id"] for model in engine.servers[0].models() if not model.get("parent")]
    plain = VLLMServerBackend(base, engine.servers[0].url, "completion", concurrency=256, timeout=600)
    texts = make_prompts(folder, options.batch * (options.rounds + 1), options.prompt_tokens)
    prompts = [policy.lm.encode(text) for text in texts]
    sampling = Sampling(max_tokens=options.response_tokens)
    pushes: list[float] = []

    # In training every rollout follows an update, so the adapter is pushed each time.
    def pushed(batch: list[list[int]], samplings: list[Sampling]) -> list[Any]:
        pushes.append(timed(lambda: engine.push_weights(policy, processes))[1])
        return engine.generate(batch, samplings, None, frozenset())

    writers: dict[str, Callable[[list[list[int]], list[Sampling]], list[Any]]] = {
        "theirs": lambda batch, samplings: policy.generate(batch, samplings, None, frozenset()),
        "ours": pushed,
        "base_model": lambda batch, samplings: plain.generate(
            batch, [TokenSampling(**vars(s), eos=()) for s in samplings]
        ),
    }

    def rate(side: str, number: int) -> float:
        batch = prompts[number * options.batch : (number + 1) * options.batch]
        samplings = [sampling.with_seed(request_seed(number, i)) for i in range(options.batch)]
        written, seconds = timed(lambda: writers[side](batch, samplings))
        for result in written:
            if isinstance(result, BackendError):
                raise result
        counts = [len(completions[0].token_ids) for completions in written]
        if set(counts) != {options.response_tokens}:
            wrong = f"responses of {sorted(set(counts))} tokens, not {options.response_tokens}"
            raise RuntimeError(f"{SIDES[side]}: {wrong}")
        return sum(counts) / seconds

    rates = alternate({side: partial(rate, side) for side in SIDES}, options.rounds)
    return rates, float(np.median(pushes[1:]))
