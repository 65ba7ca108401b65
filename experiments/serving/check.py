"""``instructgym serve-check``: shows the capabilities and speed of an LLM server and the settings to use with it.

The probe is in :mod:`instructgym.llm_backends.serving.probe`, the speed measurement in
:mod:`instructgym.llm_backends.serving.speed`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from ...llm_backends.errors import InputError
from ...llm_backends.serving.probe import CAPABILITIES, Findings, ServerProbe
from ...llm_backends.serving.speed import Speed, measure_speed, recommended
from ..runs.folder import write_json
from ..runs.options import check_output

TITLES = {name: title for name, (title, _) in CAPABILITIES.items()}
"""Titles of the capabilities in the table, by name."""

ROLLOUT_NEEDS = (
    "completions",
    "token_ids",
    "tokenize",
    "prompt_ids",
    "given_logprobs",
    "allowed_tokens",
    "end_tokens",
    "adapters",
    "processed_logprobs",
)
"""Capabilities that a server needs to write the rollouts of token-level agents."""


@dataclass
class Settings:
    """Recommended settings for a server."""

    backend: dict[str, Any]
    """Part spec for ``--backend``."""
    judge_mode: Literal["likelihood", "verdict"]
    """Value for ``--mode`` of a judge."""
    rollouts: str
    """Options of ``nlu`` for rollouts on the server; empty if the server lacks something."""
    rollouts_lack: list[str] = field(default_factory=list)
    """Flags that the server must be started with, or capabilities that it lacks."""
    concurrency: int | None = None
    """Smallest number of requests in flight within 10% of the best throughput; None if no level was free of errors."""


def suggest(findings: Findings, speeds: Sequence[Speed], key_variable: str = "OPENAI_API_KEY") -> Settings:
    """Returns the recommended settings.

    Args:
        findings: findings of the probe.
        speeds: measured speeds; may be empty.
        key_variable: environment variable with the key.
    """
    concurrency, missing = recommended(speeds), rollouts_lack(findings)
    return Settings(
        backend=backend_spec(findings, concurrency, key_variable),
        judge_mode="likelihood" if findings.can("given_logprobs") else "verdict",
        rollouts="" if missing else f"--rollouts vllm --servers {findings.base_url}",
        rollouts_lack=missing,
        concurrency=concurrency,
    )


def backend_spec(findings: Findings, concurrency: int | None, key_variable: str) -> dict[str, Any]:
    """Returns the part spec of the most capable backend for a server, without arguments that are at their defaults.

    Args:
        findings: findings of the probe.
        concurrency: number of requests in flight; None: the backend's default.
        key_variable: environment variable with the key.
    """
    is_vllm = findings.can("given_logprobs", "token_ids", "logprobs")
    forms = {"vllm": "structured_vllm", "json_schema": "structured_json_schema"}
    structured = next((form for form, name in forms.items() if findings.can(name)), "none")
    kwargs: dict[str, Any] = {
        "model": findings.model,
        "base_url": findings.base_url,
        "prompt_style": findings.style,
        "logprobs": findings.can("logprobs"),
        "token_ids": findings.can("token_ids"),
        "structured": structured,
        "max_tokens_field": findings.max_tokens_field,
        "key_variable": key_variable,
        "concurrency": concurrency,
    }
    # The defaults of the logprobs, token_ids and structured arguments differ between the two backends.
    defaults = {
        "logprobs": is_vllm,
        "token_ids": is_vllm,
        "structured": "vllm" if is_vllm else "none",
        "max_tokens_field": "max_tokens",
        "key_variable": "OPENAI_API_KEY",
        "concurrency": None,
    }
    kwargs = {name: value for name, value in kwargs.items() if name not in defaults or defaults[name] != value}
    return {"id": "vllm-server" if is_vllm else "openai", "kwargs": kwargs}


def rollouts_lack(findings: Findings) -> list[str]:
    """Returns what a server lacks for rollouts of token-level agents: flags that would help, else the capability."""
    missing = []
    for name in ROLLOUT_NEEDS:
        capability = findings.capabilities[name]
        if capability.answer != "yes":
            # Only vLLM's flags are known, and an unknown answer may have another cause than a flag.
            flags = _flags(name, capability.why) if findings.software == "vllm" and capability.answer == "no" else ""
            state = "missing" if capability.answer == "no" else "not known"
            missing.append(flags or f"{TITLES[name]} ({state})")
    bases = [model.name for model in findings.models if not model.parent]
    if len(bases) != 1:
        missing.append("one base model in its list of models")
    return missing


def _flags(name: str, reason: str) -> str:
    """Returns the vLLM flags that give a missing capability; empty if none is known."""
    if name == "processed_logprobs":
        return "--logprobs-mode processed_logprobs"
    if name != "adapters":
        return ""
    if "not enabled" in reason:
        return "--enable-lora"
    return "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, with --enable-lora"


COLOURS = {"yes": "green", "no": "red", "unknown": "yellow"}
LONGEST_REASON = 110
"""Maximum characters of a server's reply in the table; the JSON file has the whole reply."""


@dataclass
class ServeCheck:
    """Show what an LLM server can do, how fast it is at each concurrency, and which settings to use with it."""

    base_url: str
    """Base URL of a server with OpenAI's API, http://host:port/v1."""
    model: str = ""
    """Name of the model to check on the server; by default its only base model."""
    style: Literal["auto", "chat", "completion"] = "auto"
    """Form of the requests to measure and recommend: chat messages or plain completions. auto: chat if the server
    answers chat requests."""
    concurrency: str = "1,4,16"
    """Numbers of requests in flight at which speed is measured, separated by commas."""
    requests: int = 16
    """Number of prompts at each concurrency. 0: speed is not measured."""
    prompt_tokens: int = 64
    """Approximate number of tokens of each prompt in the speed measurement."""
    max_tokens: int = 32
    """Number of tokens of each completion in the speed measurement."""
    json: str = ""
    """JSON file that all findings are written to. Empty: no file."""
    key_variable: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the API key; a local server may need none."""
    timeout: float = 60.0
    """Time limit of one request, in seconds."""

    @property
    def levels(self) -> list[int]:
        """The numbers of requests in flight, in ascending order.

        Raises:
            InputError: for anything but positive integers, or a number above ``requests``.
        """
        try:
            levels = sorted({int(part) for part in self.concurrency.split(",")})
        except ValueError:
            levels = [0]
        if min(levels) < 1:
            raise InputError(f"--concurrency must be positive integers like 1,4,16, got {self.concurrency!r}")
        if self.requests and max(levels) > self.requests:
            raise InputError(
                f"--requests {self.requests} cannot fill --concurrency {max(levels)}: raise the one or lower the other"
            )
        return levels


def run(options: ServeCheck, console: Console | None = None) -> dict[str, Any]:
    """Probes a server, measures its speed, prints a report and returns it.

    Args:
        options: options of the command.
        console: console to print to; None: a new one.

    Returns:
        ``{"server": ..., "speed": ..., "settings": ...}``, JSON-serialisable.

    Raises:
        InputError: for bad options, or if there is no server or it refuses the key.
    """
    console = console or Console()
    if options.requests < 0 or min(options.prompt_tokens, options.max_tokens) < 1:
        raise InputError("--prompt-tokens and --max-tokens must be at least 1, --requests at least 0")
    levels = options.levels
    if options.json:
        check_output(Path(options.json))
    with console.status("requesting the list of models") as status:
        probe = ServerProbe(
            options.base_url,
            options.model,
            options.style,
            options.key_variable,
            options.timeout,
            lambda name: status.update(f"probing: {TITLES.get(name, name)}"),
        )
        findings = probe.run()
        speeds = _measure(options, probe, levels, status) if options.requests else []
    settings = suggest(findings, speeds, options.key_variable)
    _show(console, findings, speeds, settings)
    report = {
        "server": asdict(findings),
        "speed": [
            asdict(speed)
            | {"tokens_per_second": speed.tokens_per_second, "requests_per_second": speed.requests_per_second}
            for speed in speeds
        ],
        "settings": asdict(settings),
    }
    if options.json:
        write_json(Path(options.json), report)
    return report


def _measure(options: ServeCheck, probe: ServerProbe, levels: Sequence[int], status: Status) -> list[Speed]:
    findings, needed = probe.findings, options.prompt_tokens + options.max_tokens
    if findings.context_length and needed > findings.context_length:
        raise InputError(
            f"--prompt-tokens and --max-tokens make {needed} tokens, more than the {findings.context_length} of "
            f"{findings.model!r}: lower them"
        )
    # vLLM can ignore EOS, so that every completion has the full number of tokens.
    extra = {"ignore_eos": True} if findings.software == "vllm" else {}
    return measure_speed(
        lambda level: probe.openai(findings.style, concurrency=level, extra_body=extra),
        levels,
        options.requests,
        options.prompt_tokens,
        options.max_tokens,
        lambda level: status.update(f"measuring {options.requests} requests, {level} in flight"),
    )


def _show(console: Console, findings: Findings, speeds: Sequence[Speed], settings: Settings) -> None:
    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    line(f"{findings.base_url}, {findings.software or 'unknown software'}, requests in {findings.style} form")
    for model in findings.models[:4]:
        kind = (
            f"adapter of {model.parent}" if model.parent else f"context of {model.context_length or 'unknown'} tokens"
        )
        line(f"  {model.name}: {kind}{' (probed)' if model.name == findings.model else ''}")
    if len(findings.models) > 4:
        line(f"  and {len(findings.models) - 4} more models")
    console.print(_capability_table(findings))
    if speeds:
        console.print(_speed_table(speeds))
    line("recommended settings")
    line(f"backend: {json.dumps(settings.backend)}")
    line(f"judge: --mode {settings.judge_mode}")
    if settings.rollouts:
        line(f"rollouts: {settings.rollouts}")
    else:
        line(f"rollouts: not on this server, which lacks {'; '.join(settings.rollouts_lack)}")
    if settings.concurrency:
        line(f"concurrency: {settings.concurrency}, the smallest within 10% of the best throughput")
    elif speeds:
        line(f"concurrency: every level had errors, the first: {speeds[0].error[:LONGEST_REASON]}")


def _capability_table(findings: Findings) -> Table:
    table = Table()
    for title in ("capability", "", "evidence"):
        table.add_column(title, overflow="fold")
    for name, capability in findings.capabilities.items():
        answer = f"[{COLOURS[capability.answer]}]{capability.answer}[/]"
        table.add_row(TITLES[name], answer, escape(capability.why[:LONGEST_REASON]))
    return table


def _speed_table(speeds: Sequence[Speed]) -> Table:
    table = Table()
    for title in ("in flight", "seconds", "tokens/s", "requests/s", "median latency", "95th percentile", "errors"):
        table.add_column(title, justify="right", overflow="fold")
    for speed in speeds:
        latencies = ["" if value is None else f"{value:.2f} s" for value in (speed.median_latency, speed.p95_latency)]
        tokens = f"{speed.tokens_per_second:.1f}" if speed.completion_tokens else "not reported"
        requests = f"{speed.requests_per_second:.2f}"
        table.add_row(str(speed.concurrency), f"{speed.seconds:.2f}", tokens, requests, *latencies, str(speed.errors))
    return table
