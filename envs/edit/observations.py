"""What the agent sees of a text that is being edited."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from ...llm_backends import Embedder, resolve
from ..process.spaces import Unicode

OBSERVATIONS = ("last_edit", "embedding", "text")


@dataclass(frozen=True)
class EditState:
    """The state of one copy: what an observation may be made of."""

    text: str
    last_operation: int | None
    """Index of the last executed operation; None before the first."""
    step: int
    mask: np.ndarray | None = None
    """The possible actions, where the text does not tell them."""


class EditObservation(ABC):
    """Turns states into observations, a batch at a time."""

    space: spaces.Space[Any]

    @abstractmethod
    def encode(self, states: Sequence[EditState]) -> list[Any]:
        """One observation per state; no two share memory."""


class LastEdit(EditObservation):
    """float32 one-hot of the last executed operation, shape (operations,); zeros at the start (TeaMs-RL's)."""

    def __init__(self, operations: int) -> None:
        self.space = spaces.Box(0.0, 1.0, (operations,), np.float32)
        self._operations = operations

    def encode(self, states: Sequence[EditState]) -> list[np.ndarray]:
        rows = [np.zeros(self._operations, np.float32) for _ in states]
        for row, state in zip(rows, states, strict=True):
            if state.last_operation is not None:
                row[state.last_operation] = 1.0
        return rows


class LastEditEmbedding(EditObservation):
    """Dict of ``last_edit`` as above, ``progress`` (step / horizon, shape (1,)) and the text's ``embedding`` ((d,)).

    With ``actions``, the entries of a mask, also ``action_mask``: float32, shape (actions,), 1 where possible.
    """

    def __init__(self, operations: int, horizon: int, embedder: Embedder, actions: int = 0) -> None:
        self._last_edit, self._horizon, self._embedder = LastEdit(operations), horizon, embedder
        parts: dict[str, spaces.Space[Any]] = {
            "last_edit": self._last_edit.space,
            "progress": spaces.Box(0.0, 1.0, (1,), np.float32),
            "embedding": spaces.Box(-1.0, 1.0, (embedder.dimension,), np.float32),
        }
        if actions:
            parts["action_mask"] = spaces.Box(0.0, 1.0, (actions,), np.float32)
        self.space = spaces.Dict(parts)

    def encode(self, states: Sequence[EditState]) -> list[dict[str, np.ndarray]]:
        vectors = np.clip(self._embedder.embed([state.text for state in states]), -1.0, 1.0)
        return [
            {
                "last_edit": last,
                "progress": np.array([min(state.step / self._horizon, 1.0)], np.float32),
                "embedding": vector.copy(),
            }
            | ({} if state.mask is None else {"action_mask": state.mask.astype(np.float32)})
            for state, last, vector in zip(states, self._last_edit.encode(states), vectors, strict=True)
        ]


class TextObservation(EditObservation):
    """The text itself, a str."""

    def __init__(self) -> None:
        self.space = Unicode()

    def encode(self, states: Sequence[EditState]) -> list[str]:
        return [state.text for state in states]


def make_observation(mode: str, operations: int, horizon: int, embedder: Any, actions: int = 0) -> EditObservation:
    """The observation of the given mode, one of :data:`OBSERVATIONS`.

    Args:
        mode: which.
        operations: entries of the last edit's one-hot.
        horizon: edits per episode.
        embedder: of ``embedding``.
        actions: entries of the mask that ``embedding`` shows; 0 for none.

    Raises:
        ValueError: for an unknown mode.
    """
    if mode == "last_edit":
        return LastEdit(operations)
    if mode == "embedding":
        return LastEditEmbedding(operations, horizon, resolve("embedder", embedder), actions)
    if mode == "text":
        return TextObservation()
    raise ValueError(f"unknown observation mode {mode!r}: use {', '.join(OBSERVATIONS)}")
