"""Diversity reward: the distance of a text from all texts before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ...llm_backends import resolve
from ...llm_backends.errors import check_at_least, check_known
from ..base import Reward, Sample, Score, retried_values
from .rouge import RougePool, rouge_l


class DiversityReward(Reward):
    """1 - the largest similarity to the pool of earlier texts and to the text before the edit.

    All samples of a call are scored against the pool at the start of the call and are then added to it in order. This
    term is an extension: TeaMs-RL's published reward does not have it.

    Args:
        form: similarity, ``"cosine"`` of sentence embeddings or ``"rouge"`` for ROUGE-L.
        embedder: sentence embedder of the cosine form.
        capacity: maximum number of texts in the pool; the oldest is removed first.

    Raises:
        ValueError: for an unknown form or a capacity below 1.
    """

    name = "diversity"

    def __init__(
        self, form: Literal["cosine", "rouge"] = "cosine", embedder: Any = "minilm", capacity: int = 10_000
    ) -> None:
        check_known("diversity form", form, ("cosine", "rouge"))
        check_at_least(1, capacity=capacity)
        self.form, self.capacity = form, capacity
        self.embedder = resolve("embedder", embedder) if form == "cosine" else None
        self.reset()

    def reset(self) -> None:
        self.pool: list[str] = []
        self._vectors: np.ndarray | None = None
        self._rouge = RougePool()
        self._latest: dict[tuple[str, str | None], float] = {}

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        edits = [(sample.response, sample.previous) for sample in samples]
        values = retried_values(edits, samples, self._latest)
        fresh = [sample for edit, sample in zip(edits, samples, strict=True) if edit not in values]
        nearest: list[float] = []
        if fresh:
            nearest = self._nearest_cosine(fresh) if self.embedder is not None else self._nearest_rouge(fresh)
        for sample, similarity in zip(fresh, nearest, strict=True):
            self._insert(sample.response)
            values[sample.response, sample.previous] = float(np.clip(1.0 - similarity, 0.0, 1.0))
        self._latest = values
        return [Score(values[edit], terms={self.name: values[edit]}) for edit in edits]

    def _nearest_cosine(self, samples: Sequence[Sample]) -> list[float]:
        """Returns the largest cosine of each response to the pool and to the text before the edit."""
        assert self.embedder is not None
        texts = [s.response for s in samples]
        previous_texts = [s.previous for s in samples if s.previous is not None]
        # One call embeds both the new texts and the texts before the edits.
        vectors = self.embedder.embed([*texts, *previous_texts])
        new, previous = vectors[: len(texts)], iter(vectors[len(texts) :])
        to_pool = (new @ self._pool_vectors().T).max(axis=1) if self.pool else np.zeros(len(texts))
        return [
            max(float(to_pool[i]), float(new[i] @ next(previous)) if sample.previous is not None else 0.0)
            for i, sample in enumerate(samples)
        ]

    def _nearest_rouge(self, samples: Sequence[Sample]) -> list[float]:
        """Returns the largest ROUGE-L of each response to the pool and to the text before the edit."""
        return [
            self._rouge.nearest(s.response, floor=0.0 if s.previous is None else rouge_l(s.response, s.previous))
            for s in samples
        ]

    def _pool_vectors(self) -> np.ndarray:
        """Returns the embeddings of the pool, float32, shape (texts, d)."""
        assert self.embedder is not None
        # Embed only the texts that entered the pool since the last call.
        known = 0 if self._vectors is None else len(self._vectors)
        if known < len(self.pool):
            fresh = self.embedder.embed(self.pool[known:])
            self._vectors = fresh if self._vectors is None else np.concatenate([self._vectors, fresh])
        return self._vectors  # type: ignore[return-value]

    def _insert(self, text: str) -> None:
        """Adds a text to the pool and removes the oldest one if the pool is full."""
        self.pool.append(text)
        if self.form == "rouge":
            self._rouge.add(text)
        if len(self.pool) > self.capacity:
            self.pool.pop(0)
            if self._vectors is not None and len(self._vectors):
                self._vectors = self._vectors[1:]
            if self.form == "rouge":
                self._rouge.discard_oldest()
