"""Several rewards as one: a weighted sum, with every term logged under its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..llm_backends import Tokenizer, resolve
from .base import Reward, Sample, Score, Timing


class WeightedSum(Reward):
    """Sum of weighted rewards. A term of weight 0 is a metric: logged, not paid, and free to be invalid.

    The sum is invalid where any term of other weight is. Its timing is that of its paid terms where they agree, and
    ``whole`` where they do not: a term without a split of its own then earns its value at the last token.

    Args:
        terms: by name, a reward (as :func:`~instructgym.llm_backends.resolve` takes it).
        weights: by the same names; 1 where none is given.
        backend: the judge LLM for terms that need one and name none.
        embedder: likewise for sentence embeddings.

    Raises:
        ValueError: if there are no terms, or a weight has no term.
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
        timings: set[Timing] = {self.terms[name].timing for name in terms if self.weights[name]}
        self.timing = "whole" if len(timings) > 1 else next(iter(timings), "terminal")  # type: ignore[misc]

    def reset(self) -> None:
        for term in self.terms.values():
            term.reset()

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        for term in self.terms.values():
            term.check_tokenizer(tokenizer)

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        columns = {name: term.reward(samples) for name, term in self.terms.items()}
        return [
            self._sum(sample, {name: column[i] for name, column in columns.items()}) for i, sample in enumerate(samples)
        ]

    def _sum(self, sample: Sample, scores: Mapping[str, Score]) -> Score:
        paid = {name: score for name, score in scores.items() if self.weights[name]}
        terms: dict[str, float] = {}
        for name, score in scores.items():
            if score.valid:
                terms[name] = score.value
                terms |= {f"{name}/{part}": value for part, value in score.terms.items() if part != name}
        valid = all(score.valid for score in paid.values())
        return Score(
            value=sum(self.weights[name] * score.value for name, score in paid.items()),
            per_token=self._split(sample, paid) if valid else None,
            terms=terms,
            feedback="; ".join(f"{name}: {score.feedback}" for name, score in scores.items() if score.feedback),
            valid=valid,
            calls=sum(score.calls for score in scores.values()),
        )

    def _split(self, sample: Sample, paid: Mapping[str, Score]) -> np.ndarray | None:
        """The weighted splits added up; None where no term has one, or one that should have has none."""
        splits = [self.weights[name] * score.per_token for name, score in paid.items() if score.per_token is not None]
        missing = [name for name, score in paid.items() if score.per_token is None]
        if not splits or any(self.terms[name].timing != "terminal" for name in missing):
            return None
        total = np.sum(splits, axis=0)
        if len(total):
            total[-1] += sum(self.weights[name] * paid[name].value for name in missing)
        return total
