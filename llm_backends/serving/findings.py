"""What was found out about a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..base import PromptStyle


@dataclass(frozen=True)
class Capability:
    """Whether a server can do something."""

    answer: Literal["yes", "no", "unknown"]
    """``unknown``: the request failed for another reason, or could not be made."""
    why: str = ""
    """What the reply showed, on one line."""


@dataclass(frozen=True)
class ServedModel:
    """One entry of a server's list of models."""

    name: str
    context_length: int | None = None
    """Tokens of prompt and completion at most; None where the server does not say."""
    parent: str | None = None
    """The base model, if this is an adapter."""


@dataclass
class Findings:
    """What is known of a server."""

    base_url: str
    model: str
    """The one that was asked."""
    software: str = ""
    """``owned_by`` of the model, for example ``vllm``."""
    style: PromptStyle = "chat"
    """The form of request that everything was asked in that goes in either form."""
    max_tokens_field: str = "max_tokens"
    models: list[ServedModel] = field(default_factory=list)
    capabilities: dict[str, Capability] = field(default_factory=dict)
    """By their names, see ``CAPABILITIES`` in :mod:`.serve_probe`."""

    def can(self, *names: str) -> bool:
        """Whether all of these capabilities were shown."""
        return all(self.capabilities[name].answer == "yes" for name in names)

    @property
    def context_length(self) -> int | None:
        """Of the model that was asked, or of its base."""
        known = {model.name: model for model in self.models}
        asked = known.get(self.model)
        if asked is not None and asked.context_length is None and asked.parent:
            asked = known.get(asked.parent)
        return asked.context_length if asked else None
