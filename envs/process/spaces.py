"""Spaces that Gymnasium lacks."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
from gymnasium.spaces import Space

_ALPHABET = string.ascii_letters + string.digits + " .,?!'-\n"


class Unicode(Space[str]):
    """Any string. Gymnasium's ``Text`` refuses the empty string, blanks and letters outside its character set.

    Args:
        sample_length: longest string that ``sample`` returns.
        seed: of ``sample``.
    """

    def __init__(self, sample_length: int = 32, seed: int | np.random.Generator | None = None) -> None:
        if sample_length < 1:
            raise ValueError(f"sample_length must be at least 1, got {sample_length}")
        self.sample_length = sample_length
        super().__init__(dtype=str, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """A random string over letters, digits and some punctuation; takes no mask."""
        length = int(self.np_random.integers(self.sample_length + 1))
        return "".join(self.np_random.choice(list(_ALPHABET), size=length))

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)

    def __repr__(self) -> str:
        return "Unicode()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unicode)

    def __hash__(self) -> int:
        return hash(Unicode)
