"""A task scorer that stops when it has been asked often enough: prompt optimisers are compared at equal calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...llm_backends import BackendError
from ...llm_backends.errors import InputError
from .scorer import TaskScorer
from .task_prompt import TaskPrompt


class CallLimitError(Exception):
    """The next request would need more task-model calls than are left."""


class LimitedScorer(TaskScorer):
    """As :class:`~.task_score.TaskScorer`, up to a number of task-model calls.

    A call is one label of one example after one prompt; what the cache answers counts as well, so that the number says
    what a method asked for, not in which order. Requests that fail do not count.

    Args:
        limit: calls at most.
        *args, **kwargs: as of :class:`~.task_score.TaskScorer`.

    Raises:
        InputError: for a limit below 1.
        CallLimitError: when scoring, before anything is asked that would go beyond the limit.
    """

    def __init__(self, limit: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if limit < 1:
            raise InputError(f"a limit of task-model calls must be at least 1, got {limit}")
        self.limit, self.calls = limit, 0

    @property
    def left(self) -> int:
        """Calls until the limit."""
        return self.limit - self.calls

    def _ask_pairs(self, pairs: Sequence[tuple[TaskPrompt, str]]) -> list[np.ndarray]:
        needed = sum(len(prompt.verbalizers) for prompt, _ in pairs)
        if needed > self.left:
            raise CallLimitError(f"{needed} task-model calls are needed, {self.left} of {self.limit} are left")
        self.calls += needed
        try:
            return super()._ask_pairs(pairs)
        except (BackendError, InputError):
            self.calls -= needed  # what was answered is counted when it is asked for again
            raise
