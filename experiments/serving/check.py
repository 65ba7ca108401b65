"""``instructgym serve-check``: shows the capabilities and speed of an LLM server and the settings to use with it.

The probe is in :mod:`instructgym.llm_backends.serving.probe`, the speed measurement in
:mod:`instructgym.llm_backends.serving.speed`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
from ..runs.options import Count, Positive, check_fields, check_output, named

TITLES = {name: title for name, (title, _) in CAPABILITIES.items()}
"""Titles of the capabilities in the table, by name."""

ROLLOUT_NEEDS = (
    "completions token_ids tokenize prompt_ids given_logprobs allowed_tokens end_tokens adapters processed_logprobs"
).split()
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
    is_vllm = findings.can("given_logprobs", "token_ids", "logprobs")
    structured = next((form for form in ("vllm", "json_schema") if findings.can(f"structured_{form}")), "none")
    # Arguments of the most capable backend for the server, with their defaults, some of which differ between backends.
    arguments: dict[str, tuple[Any, Any]] = {
        "logprobs": (findings.can("logprobs"), is_vllm),
        "token_ids": (findings.can("token_ids"), is_vllm),
        "structured": (structured, "vllm" if is_vllm else "none"),
        "max_tokens_field": (findings.max_tokens_field, "max_tokens"),
        "key_variable": (key_variable, "OPENAI_API_KEY"),
        "concurrency": (concurrency, None),
    }
    kwargs = {"model": findings.model, "base_url": findings.base_url, "prompt_style": findings.style}
    kwargs |= {name: value for name, (value, default) in arguments.items() if value != default}
    return Settings(
        backend={"id": "vllm-server" if is_vllm else "openai", "kwargs": kwargs},
        judge_mode="likelihood" if findings.can("given_logprobs") else "verdict",
        rollouts="" if missing else f"--rollouts vllm --servers {findings.base_url}",
        rollouts_lack=missing,
        concurrency=concurrency,
    )


FLAGS = {
    "processed_logprobs": "--logprobs-mode processed_logprobs",
    "adapters": "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, with --enable-lora",
}
"""Flags of vLLM that give a missing capability."""


def rollouts_lack(findings: Findings) -> list[str]:
    """Returns what a server lacks for rollouts of token-level agents: flags that would help, else the capability."""
    missing = []
    for name in ROLLOUT_NEEDS:
        capability = findings.capabilities[name]
        if capability.answer == "no" and findings.software == "vllm" and name in FLAGS:
            # LoRA that is not enabled needs one flag only.
            lora_off = name == "adapters" and "not enabled" in capability.why
            missing.append("--enable-lora" if lora_off else FLAGS[name])
        elif capability.answer != "yes":
            missing.append(f"{TITLES[name]} ({'missing' if capability.answer == 'no' else 'not known'})")
    if sum(not model.parent for model in findings.models) != 1:
        missing.append("one base model in its list of models")
    return missing


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
    prompt_tokens: Count = 64
    """Approximate number of tokens of each prompt in the speed measurement."""
    max_tokens: Count = 32
    """Number of tokens of each completion in the speed measurement."""
    json: str = ""
    """JSON file that all findings are written to. Empty: no file."""
    key_variable: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the API key; a local server may need none."""
    timeout: Positive = 60.0
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
    check_fields(options)
    levels = options.levels
    if options.json:
        check_output(Path(options.json))
    with console.status("requesting the list of models") as status:
        probe = ServerProbe(
            **named(options, "base_url", "model", "style", "key_variable", "timeout"),
            on_request=lambda name: status.update(f"probing: {TITLES.get(name, name)}"),
        )
        findings = probe.run()
        speeds = _measure(options, probe, levels, status) if options.requests else []
    settings = suggest(findings, speeds, options.key_variable)
    _show(console, findings, speeds, settings)
    report = {
        "server": asdict(findings),
        "speed": [asdict(speed) | named(speed, "tokens_per_second", "requests_per_second") for speed in speeds],
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
        **named(options, "requests", "prompt_tokens", "max_tokens"),
        on_level=lambda level: status.update(f"measuring {options.requests} requests, {level} in flight"),
    )


def _show(console: Console, findings: Findings, speeds: Sequence[Speed], settings: Settings) -> None:
    """Prints the findings, the speeds and the settings."""

    def show(*lines: str) -> None:
        for line in lines:
            console.print(line, highlight=False, markup=False)

    show(f"{findings.base_url}, {findings.software or 'unknown software'}, requests in {findings.style} form")
    for model in findings.models[:4]:
        kind = (
            f"adapter of {model.parent}" if model.parent else f"context of {model.context_length or 'unknown'} tokens"
        )
        show(f"  {model.name}: {kind}{' (probed)' if model.name == findings.model else ''}")
    if len(findings.models) > 4:
        show(f"  and {len(findings.models) - 4} more models")
    capabilities = [
        (TITLES[name], f"[{COLOURS[capability.answer]}]{capability.answer}[/]", escape(capability.why[:LONGEST_REASON]))
        for name, capability in findings.capabilities.items()
    ]
    console.print(_table(("capability", "", "evidence"), capabilities, "left"))
    if speeds:
        console.print(_table(SPEEDS, map(_speed_cells, speeds), "right"))
    lacks = f"not on this server, which lacks {'; '.join(settings.rollouts_lack)}"
    show(
        "recommended settings",
        f"backend: {json.dumps(settings.backend)}",
        f"judge: --mode {settings.judge_mode}",
        f"rollouts: {settings.rollouts or lacks}",
    )
    if settings.concurrency:
        show(f"concurrency: {settings.concurrency}, the smallest within 10% of the best throughput")
    elif speeds:
        show(f"concurrency: every level had errors, the first: {speeds[0].error[:LONGEST_REASON]}")


SPEEDS = ("in flight", "seconds", "tokens/s", "requests/s", "median latency", "95th percentile", "errors")
"""Titles of the table of speeds."""


def _speed_cells(speed: Speed) -> list[str]:
    """Returns the cells of a level, in the order of :data:`SPEEDS`."""
    latencies = ["" if value is None else f"{value:.2f} s" for value in (speed.median_latency, speed.p95_latency)]
    tokens = f"{speed.tokens_per_second:.1f}" if speed.completion_tokens else "not reported"
    requests = f"{speed.requests_per_second:.2f}"
    return [str(speed.concurrency), f"{speed.seconds:.2f}", tokens, requests, *latencies, str(speed.errors)]


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], justify: Literal["left", "right"]) -> Table:
    """Returns a table for the terminal; cells may hold markup."""
    table = Table()
    for title in titles:
        table.add_column(title, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
