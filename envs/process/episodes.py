"""Which example an episode is about: shuffled epochs without replacement, shared by the copies of a vector env."""

from __future__ import annotations

from typing import Any

import numpy as np


class EpisodeSource:
    """Draws indices of n examples in shuffled epochs: none comes twice before all have come once.

    Args:
        size: number of examples.

    Raises:
        ValueError: if there are none.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError("an episode source needs at least one example")
        self.size = size
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Starts again, in the order that belongs to the seed."""
        self._seed, self._epoch, self._position = int(seed), 0, 0
        self._order = self._shuffled()

    def draw(self) -> int:
        """Index of the next example."""
        if self._position == self.size:
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffled()
        self._position += 1
        return int(self._order[self._position - 1])

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands, JSON-able."""
        return {"seed": self._seed, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""
        self._seed, self._epoch, self._position = state["seed"], state["epoch"], state["position"]
        self._order = self._shuffled()

    def _shuffled(self) -> np.ndarray:
        return np.random.default_rng([self._seed, self._epoch]).permutation(self.size)
