"""What the agent sees of prompt and response."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from ...llm_backends.errors import InputError

TOKEN_OBSERVATIONS = ("tokens", "onehot")

ONEHOT_LIMIT = 65_536
"""Inputs of a learner's first layer at most: one-hot observations are for small vocabularies."""


class TokenObservation(ABC):
    """Turns states (int32 arrays of token ids, prompt first) into observations."""

    space: spaces.Space[Any]

    @abstractmethod
    def encode(self, states: Sequence[np.ndarray]) -> list[Any]:
        """One observation per state; no two share memory."""


class TokenIds(TokenObservation):
    """Dict of ``ids`` (int32, shape (length,), right-padded with 0) and ``mask`` (int8, shape (length,))."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self._length = length
        self.space = spaces.Dict(
            {
                "ids": spaces.Box(0, vocabulary - 1, (length,), np.int32),
                "mask": spaces.Box(0, 1, (length,), np.int8),
            }
        )

    def encode(self, states: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        observations: list[dict[str, np.ndarray]] = []
        for state in states:
            ids, mask = np.zeros(self._length, np.int32), np.zeros(self._length, np.int8)
            ids[: len(state)] = state
            mask[: len(state)] = 1
            observations.append({"ids": ids, "mask": mask})
        return observations


class OneHotTokens(TokenObservation):
    """int64, shape (length,): token ids, ``vocabulary`` where there is none; learners one-hot a MultiDiscrete."""

    def __init__(self, vocabulary: int, length: int) -> None:
        if length * (vocabulary + 1) > ONEHOT_LIMIT:
            raise InputError(
                f"observation 'onehot' would have {length} x {vocabulary + 1} inputs, more than {ONEHOT_LIMIT}: lower "
                "context_length, take a smaller vocabulary or observation 'tokens'"
            )
        self._length, self._padding = length, vocabulary
        self.space = spaces.MultiDiscrete([vocabulary + 1] * length)

    def encode(self, states: Sequence[np.ndarray]) -> list[np.ndarray]:
        rows = [np.full(self._length, self._padding, np.int64) for _ in states]
        for row, state in zip(rows, states, strict=True):
            row[: len(state)] = state
        return rows


def make_token_observation(mode: str, vocabulary: int, length: int) -> TokenObservation:
    """The observation of the given mode, one of :data:`TOKEN_OBSERVATIONS`.

    Raises:
        ValueError: for an unknown mode, and for ``onehot`` where it would be too wide.
    """
    if mode == "tokens":
        return TokenIds(vocabulary, length)
    if mode == "onehot":
        return OneHotTokens(vocabulary, length)
    raise InputError(f"unknown observation mode {mode!r}: use {', '.join(TOKEN_OBSERVATIONS)}")
