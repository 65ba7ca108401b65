"""Past episodes, to be learned from again by agents that can: path consistency holds whoever wrote an episode."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Episode(NamedTuple):
    """An episode that is over."""

    prompt: Sequence[int]
    """Token ids."""
    response: Sequence[int]
    """Token ids, not empty."""
    value: float
    """The return, as the env paid it."""
    group: str
    """Episodes of one group are about the same prompt."""


class ReplayBuffer:
    """The last episodes, from which some are drawn, all with the same probability.

    Args:
        capacity: how many are kept; the oldest go first.
    """

    def __init__(self, capacity: int) -> None:
        self._episodes: deque[Episode] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._episodes)

    def add(self, episodes: Iterable[Episode]) -> None:
        """Keeps episodes, the agent's own or those of others."""
        self._episodes.extend(episodes)

    def draw(self, count: int, generator: np.random.Generator) -> list[Episode]:
        """That many different episodes, all of them if there are fewer."""
        chosen = generator.choice(len(self), size=min(count, len(self)), replace=False)
        return [self._episodes[i] for i in chosen]

    def state(self) -> list[list[Any]]:
        """The episodes, JSON-able."""
        return [list(episode) for episode in self._episodes]

    def load_state(self, state: Iterable[Sequence[Any]]) -> None:
        """Continues from :meth:`state`."""
        self._episodes.clear()
        self.add(Episode(*row) for row in state)
