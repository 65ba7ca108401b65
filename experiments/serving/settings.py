"""What to set for a server, from what it can do: part specs and options that can be pasted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...llm_backends.serving.probe import Findings
from ...llm_backends.serving.speed import Speed, recommended

TITLES = {
    "chat": "chat",
    "completions": "plain completions",
    "logprobs": "log-probs of completions",
    "token_ids": "token ids out",
    "tokenize": "tokenizer",
    "prompt_ids": "token ids in",
    "given_logprobs": "log-probs of given texts",
    "allowed_tokens": "only allowed tokens",
    "processed_logprobs": "processed log-probs",
    "end_tokens": "own end tokens",
    "adapters": "LoRA adapters at run time",
    "structured_vllm": "structured output, vLLM",
    "structured_json_schema": "structured output, json_schema",
    "n": "n",
    "seed": "seed",
    "stop": "stop",
}
"""Capabilities in words."""

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
"""The capabilities without which agents cannot have their episodes written on a server."""


@dataclass
class Settings:
    """What to set."""

    backend: dict[str, Any]
    """A part spec for ``--backend``."""
    judge_mode: Literal["likelihood", "verdict"]
    rollouts: str
    """Options of 'nlu'; empty where the server lacks something."""
    rollouts_lack: list[str] = field(default_factory=list)
    """What the server must be started with, or what it cannot do."""
    concurrency: int | None = None
    """The smallest one within 10% of the best throughput; None where nothing was measured without errors."""


def suggest(found: Findings, speeds: Sequence[Speed], key_variable: str = "OPENAI_API_KEY") -> Settings:
    """Derives the settings from the findings."""
    concurrency = recommended(speeds)
    lack = rollouts_lack(found)
    return Settings(
        backend=backend_spec(found, concurrency, key_variable),
        judge_mode="likelihood" if found.can("given_logprobs") else "verdict",
        rollouts="" if lack else f"--rollouts vllm --servers {found.base_url}",
        rollouts_lack=lack,
        concurrency=concurrency,
    )


def backend_spec(found: Findings, concurrency: int | None, key_variable: str) -> dict[str, Any]:
    """The part spec of the backend that makes the most of a server; arguments at their defaults are left out."""
    part_id = "vllm-server" if found.can("given_logprobs", "token_ids", "logprobs") else "openai"
    forms = {"vllm": "structured_vllm", "json_schema": "structured_json_schema"}
    structured = next((form for form, name in forms.items() if found.can(name)), "none")
    kwargs: dict[str, Any] = {
        "model": found.model,
        "base_url": found.base_url,
        "prompt_style": found.style,
        "logprobs": found.can("logprobs"),
        "token_ids": found.can("token_ids"),
        "structured": structured,
        "max_tokens_field": found.max_tokens_field,
        "key_variable": key_variable,
        "concurrency": concurrency,
    }
    on = part_id == "vllm-server"
    defaults = {"logprobs": on, "token_ids": on, "structured": "vllm" if on else "none", "concurrency": None}
    defaults |= {"max_tokens_field": "max_tokens", "key_variable": "OPENAI_API_KEY"}
    return {"id": part_id, "kwargs": {k: v for k, v in kwargs.items() if k not in defaults or defaults[k] != v}}


def rollouts_lack(found: Findings) -> list[str]:
    """What is missing for the rollouts of token-level agents: flags where they would help, else the capability."""
    lack = []
    for name in ROLLOUT_NEEDS:
        capability = found.capabilities[name]
        if capability.answer != "yes":
            flags = _flags(name, capability.why) if found.software == "vllm" and capability.answer == "no" else ""
            state = "missing" if capability.answer == "no" else "not known"
            lack.append(flags or f"{TITLES[name]} ({state})")
    bases = [model.name for model in found.models if not model.parent]
    if len(bases) != 1:
        lack.append("one base model in its list of models")
    return lack


def _flags(name: str, why: str) -> str:
    if name == "processed_logprobs":
        return "--logprobs-mode processed_logprobs"
    if name != "adapters":
        return ""
    if "not enabled" in why:
        return "--enable-lora"
    return "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, with --enable-lora"
