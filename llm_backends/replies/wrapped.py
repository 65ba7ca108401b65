"""Backends that stand before another one and answer in its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..base import Backend, ContextLengthError, Prompt


@dataclass(eq=False)
class Wrapped(Backend):
    """What a backend that keeps another one's replies has in common with it: everything but how it answers.

    Args:
        inner: the backend that answers what is not kept.
    """

    inner: Backend

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the inner backend."""
        return self.inner.name

    @property
    def prompt_style(self) -> str:  # type: ignore[override]
        """Prompt style of the inner backend."""
        return self.inner.prompt_style

    @property
    def supports_logprobs(self) -> bool:
        """As the inner backend."""
        return self.inner.supports_logprobs

    @property
    def supports_choices(self) -> bool:
        """As the inner backend."""
        return self.inner.supports_choices

    def context_error(self, prompt: Prompt, max_tokens: int) -> ContextLengthError | None:
        return self.inner.context_error(prompt, max_tokens)

    def completion_ids(self, texts: Sequence[str]) -> list[list[int]] | None:
        return self.inner.completion_ids(texts)
