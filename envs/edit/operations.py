"""Rewriting operations from the prompt files: those of TeaMs-RL, in the order of its actions, and those of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...llm_backends.base import Prompt, PromptStyle
from ...llm_backends.prompting import build_prompt, few_shot, fill, load_prompts

NO_OP = "no_op"


@dataclass(frozen=True)
class Operation:
    """One way to rewrite an instruction; ``no_op`` leaves it alone and costs nothing."""

    name: str
    summary: str
    chat: str = ""
    """Request to a chat model; ``{text}`` stands for the fenced instruction."""
    header: str = ""
    """First line of the few-shot form, for small models."""
    demonstrations: tuple[tuple[str, str], ...] = ()
    """Pairs (before, after) of the few-shot form."""

    def prompt(self, text: str, style: PromptStyle) -> Prompt:
        """The request to rewrite ``text``, in the form that the backend asks for."""
        shots = few_shot(self.header, ("Instruction", "New instruction"), self.demonstrations, [text])
        return build_prompt(style, fill(self.chat, {"text": text}), shots)


def _by_name(tables: Sequence[Mapping[str, Any]]) -> dict[str, Operation]:
    return {
        table["name"]: Operation(
            **{k: v for k, v in table.items() if k != "demonstrations"},
            demonstrations=tuple((shot["before"], shot["after"]) for shot in table.get("demonstrations", ())),
        )
        for table in tables
    }


def operation_names() -> tuple[str, ...]:
    """The six operations of the paper, in action order."""
    return tuple(operation.name for operation in load_operations())


def load_operations(
    names: Sequence[str] | None = None, no_op: bool = False, tables: Sequence[Mapping[str, Any]] | None = None
) -> tuple[Operation, ...]:
    """Operations by name.

    Args:
        names: which, and in which order; None for all of them, the no-op aside.
        no_op: append the operation that does nothing.
        tables: where they are described, the ``operation`` tables of a prompt file; None for TeaMs-RL's six.

    Raises:
        ValueError: for an unknown or repeated name, or no names at all.
    """
    known = _by_name(load_prompts(__package__, "operations")["operation"] if tables is None else tables)
    chosen = [name for name in known if name != NO_OP] if names is None else list(names)
    if no_op and NO_OP not in chosen:
        chosen.append(NO_OP)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(f"unknown operation {unknown[0]!r}: use {', '.join(known)}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"operations must be distinct and at least one, got {chosen}")
    return tuple(known[name] for name in chosen)
