"""What playing whole responses gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..process.faces import batch
from .observations import TokenObservation
from .scoring import Turn


@dataclass(eq=False)
class Played:
    """The outcome of one play of n copies, the same as that of stepping each through its tokens until it ended."""

    rewards: list[np.ndarray]
    """n arrays, float32, shape (tokens consumed,): what each step would have paid."""
    credit: list[np.ndarray] | None
    """For a *whole* reward, likewise: its split over the tokens. The share of tokens written before is not in it."""
    n_consumed: np.ndarray
    """int64, shape (n,): tokens taken."""
    n_dropped: np.ndarray
    """int64, shape (n,): tokens that came after the end."""
    terminated: np.ndarray
    """bool, shape (n,): whose episode ended in this play."""
    truncated: np.ndarray
    """bool, shape (n,): all False."""
    valid: np.ndarray
    """bool, shape (n,): False where there was no verdict and rewards are imputed."""
    appended: list[np.ndarray]
    """n arrays, int32: tokens that the environment added; none in a single turn."""
    infos: list[dict[str, Any]]
    """The info of each copy's last step; of a copy that took none, the same keys about where it stands."""
    reset_infos: list[dict[str, Any]]
    """In autoreset mode ``SAME_STEP``, the info of the reset of each copy that ended; else empty."""
    turns: Sequence[Turn] = field(repr=False)
    observer: TokenObservation = field(repr=False)

    @cached_property
    def final_obs(self) -> Any:
        """The batched observations after the last tokens, before any autoreset; made when asked for."""
        states = [turn.episode.state(turn.start + turn.count) for turn in self.turns]
        return batch(self.observer.space, self.observer.encode(states))

    def observation(self, i: int, t: int) -> Any:
        """Copy i's observation after t of its tokens, before token t.

        Raises:
            IndexError: unless 0 <= t <= n_consumed[i].
        """
        turn = self.turns[i]
        if not 0 <= t <= turn.count:
            raise IndexError(f"copy {i} consumed {turn.count} tokens, there is no observation after {t}")
        return self.observer.encode([turn.episode.state(turn.start + t)])[0]
