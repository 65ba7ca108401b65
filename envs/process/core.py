"""What the edit and the token process have in common: options, transitions, and what to pay without a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

ON_INVALID = ("retry", "raise")
RESET_OPTIONS = frozenset({"index", "prefix", "reset_mask"})


class InvalidRewardError(RuntimeError):
    """The rewriter or the judge gave no usable answer, and the env was told to raise."""


@dataclass(frozen=True)
class Transition:
    """What one copy's step gave."""

    reward: float
    terminated: bool
    info: dict[str, Any]


@dataclass
class RunningMean:
    """The mean of the valid rewards so far: what is paid where there is no verdict."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Takes one more reward in."""
        self.total, self.count = self.total + value, self.count + 1

    @property
    def value(self) -> float:
        """The mean; 0 before any reward."""
        return self.total / self.count if self.count else 0.0


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses unknown reset options with a ValueError."""
    unknown = set(options) - RESET_OPTIONS
    if unknown:
        raise ValueError(f"unknown reset option {sorted(unknown)[0]!r}: use {', '.join(sorted(RESET_OPTIONS))}")


def check_on_invalid(on_invalid: str) -> None:
    """Refuses anything but :data:`ON_INVALID` with a ValueError."""
    if on_invalid not in ON_INVALID:
        raise ValueError(f"on_invalid must be one of {', '.join(ON_INVALID)}, got {on_invalid!r}")


def copy_option(options: Mapping[str, Any], key: str, copy: int, copies: int) -> Any:
    """A reset option's value for one copy: its entry where a list, tuple or array holds one per copy.

    Raises:
        ValueError: if there are more or fewer entries than copies.
    """
    value = options.get(key)
    if isinstance(value, list | tuple | np.ndarray):
        if len(value) != copies:
            raise ValueError(f"options[{key!r}] needs one entry per copy ({copies}), got {len(value)}")
        return value[copy]
    return value


def check_index(index: Any, size: int) -> None:
    """Refuses ``options["index"]`` outside the examples with a ValueError; None is no choice."""
    if index is not None and not 0 <= int(index) < size:
        raise ValueError(f"options['index'] must be in [0, {size}), got {index}")
