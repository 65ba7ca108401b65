"""The weighted sum of several rewards, with every term logged under its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..llm_backends import Tokenizer, resolve
from .base import Reward, Sample, Score, Timing, scores_of


class WeightedSum(Reward):
    """Adds up weighted rewards. A term of weight 0 is a metric: logged, left out of the sum, and free to be invalid.

    The sum is invalid if any term of nonzero weight is. Its timing is that of the terms of nonzero weight if these
    agree, else ``whole``: a terminal term without a split then earns its value at the last token.

    Args:
        terms: reward by name, as :func:`~instructgym.llm_backends.resolve` takes it.
        weights: weight by name of the term; 1 for a term that is missing here.
        backend: judge LLM of the terms that need one and name none.
        embedder: sentence embedder of the terms that need one and name none.

    Raises:
        ValueError: if ``terms`` is no mapping or is empty, or if a weight has no term.
    """

    name = "sum"

    def __init__(
        self,
        terms: Mapping[str, Any],
        weights: Mapping[str, float] | None = None,
        backend: Any = "embedded",
        embedder: Any = "minilm",
    ) -> None:
        if not isinstance(terms, Mapping):
            raise ValueError(f"terms must map names to rewards, got {terms!r}")
        unknown = set(weights or {}) - set(terms)
        if not terms or unknown:
            raise ValueError(f"weights without a term: {sorted(unknown)}" if unknown else "a sum needs terms")
        self.terms: dict[str, Reward] = {
            name: resolve("reward", term, backend=backend, embedder=embedder) for name, term in terms.items()
        }
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in terms}
        self.calls_per_sample = sum(term.calls_per_sample for term in self.terms.values())
        # Terms of different timings are all known only when the response is complete.
        timings: set[Timing] = {self.terms[name].timing for name in terms if self.weights[name]}
        self.timing = "whole" if len(timings) > 1 else next(iter(timings), "terminal")  # type: ignore[misc]

    def reset(self) -> None:
        for term in self.terms.values():
            term.reset()

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        for term in self.terms.values():
            term.check_tokenizer(tokenizer)

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        columns = {name: scores_of(term, samples) for name, term in self.terms.items()}
        return [
            self._sum(sample, {name: column[i] for name, column in columns.items()}) for i, sample in enumerate(samples)
        ]

    def _sum(self, sample: Sample, scores: Mapping[str, Score]) -> Score:
        weighted = {name: score for name, score in scores.items() if self.weights[name]}
        terms: dict[str, float] = {}
        for name, score in scores.items():
            if score.valid:
                terms[name] = score.value
                # A reward logs its value under its own name too: that part would repeat the term.
                terms |= {f"{name}/{part}": value for part, value in score.terms.items() if part != name}
        valid = all(score.valid for score in weighted.values())
        return Score(
            value=sum(self.weights[name] * score.value for name, score in weighted.items()),
            per_token=self._split(sample, weighted) if valid else None,
            terms=terms,
            feedback="; ".join(f"{name}: {score.feedback}" for name, score in scores.items() if score.feedback),
            valid=valid,
            calls=sum(score.calls for score in scores.values()),
        )

    def _split(self, sample: Sample, weighted: Mapping[str, Score]) -> np.ndarray | None:
        """Returns the sum of the weighted splits; None if no term has one, or one that must have it lacks it."""
        splits = [
            self.weights[name] * score.per_token for name, score in weighted.items() if score.per_token is not None
        ]
        missing = [name for name, score in weighted.items() if score.per_token is None]
        if not splits or any(self.terms[name].timing != "terminal" for name in missing):
            return None
        total = np.sum(splits, axis=0)
        # Terminal terms are known when the text is complete, so the last token earns their value.
        if len(total):
            total[-1] += sum(self.weights[name] * weighted[name].value for name in missing)
        return total
