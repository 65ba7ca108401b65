"""Keeping the global random generators of a run apart from those of its models."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leaves the global generators of Python, NumPy and torch as they were.

    A run that is resumed takes replies from its journal where it asked a model before; were models to draw from the
    generators that the learner draws from, the learner would then go another way. torch is touched only if imported.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    torch_state = torch.random.get_rng_state() if torch is not None else None
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if torch is not None:
            torch.random.set_rng_state(torch_state)
