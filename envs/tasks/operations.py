"""The rewriting operations of TeaMs-RL, in the order in which its environment decodes actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

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

    def prompt(self, text: str, style: str) -> object:
        """The request to rewrite ``text``, in the form that the backend asks for."""
        shots = few_shot(self.header, ("Instruction", "New instruction"), self.demonstrations, [text])
        return build_prompt(style, fill(self.chat, {"text": text}), shots)  # type: ignore[arg-type]


@cache
def _all_operations() -> dict[str, Operation]:
    tables = load_prompts("envs.tasks", "operations")["operation"]
    return {
        table["name"]: Operation(
            **{k: v for k, v in table.items() if k != "demonstrations"},
            demonstrations=tuple((shot["before"], shot["after"]) for shot in table.get("demonstrations", ())),
        )
        for table in tables
    }


def operation_names() -> tuple[str, ...]:
    """The six operations of the paper, in action order."""
    return tuple(name for name in _all_operations() if name != NO_OP)


def load_operations(names: Sequence[str] | None = None, no_op: bool = False) -> tuple[Operation, ...]:
    """Operations by name.

    Args:
        names: which, and in which order; None for the paper's six.
        no_op: append the operation that does nothing.

    Raises:
        ValueError: for an unknown or repeated name, or no names at all.
    """
    chosen = list(operation_names() if names is None else names)
    if no_op and NO_OP not in chosen:
        chosen.append(NO_OP)
    known = _all_operations()
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(f"unknown operation {unknown[0]!r}: use {', '.join(known)}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"operations must be distinct and at least one, got {chosen}")
    return tuple(known[name] for name in chosen)
