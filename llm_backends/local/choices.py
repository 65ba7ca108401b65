"""Constrained decoding: the few responses that are allowed, as a trie over token ids."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np


class Choices:
    """The allowed responses (verbalizers) of one prompt.

    A response is complete when it equals one of them and none goes on from there. Where one response begins another
    ("1", "10"), the end-of-sequence token is allowed after the shorter one.

    Args:
        responses: token ids of each, none empty.
        eos: an end-of-sequence token; needed only where a response begins another.

    Raises:
        ValueError: if there are none, one is empty, or ``eos`` is missing where it is needed.
    """

    def __init__(self, responses: Sequence[Sequence[int]], eos: int | None = None) -> None:
        if not responses or not all(map(len, responses)):
            raise ValueError("choices need at least one response, and none may be empty")
        self._trie: dict[int, Any] = {}
        ends: list[dict[int, Any]] = []
        for response in responses:
            node = self._trie
            for token in response:
                node = node.setdefault(int(token), {})
            ends.append(node)
        for node in ends:
            if node:
                if eos is None:
                    raise ValueError("one response begins another: an end-of-sequence token is needed")
                node[eos] = {}
        self._arrays: dict[tuple[int, ...], np.ndarray | None] = {}

    def allowed(self, prefix: Sequence[int]) -> np.ndarray | None:
        """int64, sorted: the tokens allowed after ``prefix``; none where complete, None where it left the trie."""
        key = tuple(prefix)
        if key not in self._arrays:
            node: dict[int, Any] | None = self._trie
            for token in key:
                node = node.get(int(token)) if node is not None else None
            self._arrays[key] = None if node is None else np.array(sorted(node), dtype=np.int64)
        return self._arrays[key]

    def after(self, prefix: Sequence[int]) -> Choices:
        """What may still be written after ``prefix``, as choices of their own.

        Raises:
            ValueError: where nothing may follow.
        """
        if not prefix:
            return self
        node: Any = self._trie
        for token in prefix:
            node = node.get(int(token)) if node else None
        if not node:
            raise ValueError(f"nothing may follow the tokens {list(prefix)}")
        rest = copy.copy(self)
        rest._trie, rest._arrays = node, {}
        return rest

    def complete(self, prefix: Sequence[int]) -> bool:
        """Whether ``prefix`` is a whole response."""
        allowed = self.allowed(prefix)
        return allowed is not None and not len(allowed)
