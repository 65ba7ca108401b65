"""What a token episode is about: a prompt, and what a reward needs to know about its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PromptExample:
    """One example: the prompt that an episode continues."""

    id: str
    """Stable over runs; episodes of one id form a group."""
    prompt: str
    """The text that the response continues, without a trailing blank."""
    reference: str | None = None
    """The right answer, as the response should say it, without surrounding blanks."""
    choices: tuple[str, ...] = ()
    """The allowed answers (verbalizers), without surrounding blanks; none where the answer is free."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able; handed to rewards and metrics."""
