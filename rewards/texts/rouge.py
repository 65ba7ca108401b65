"""ROUGE-L between a text and a growing pool: exact search for the nearest text, and a gate against near-duplicates.

ROUGE-L (Lin 2004) is the F-measure of the longest common subsequence (LCS) of two token sequences. The gate is that of
Self-Instruct (Wang et al., arXiv 2212.10560): a text is added if no text of the pool is more similar than 0.7.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

TOLERANCE = 1e-9
"""Similarities that differ by less are equal: the F-measure of 7 common tokens among 7 and 13 is 0.7 + 1e-16."""


@cache
def _rouge_tokenizer(stem: bool = False) -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=stem)


def rouge_l(text: str, other: str) -> float:
    """Returns the ROUGE-L F-measure of two texts (rouge-score, no stemming), in [0, 1]."""
    first, second = (_rouge_tokenizer().tokenize(part) for part in (text, other))
    return _f_measure(lcs_length(_positions(first), len(first), second), len(first), len(second))


def pairwise_rouge_l(texts: Sequence[str], stem: bool = False) -> np.ndarray:
    """Returns the ROUGE-L F-measures between all texts, equal to those of rouge-score.

    Args:
        texts: n texts.
        stem: True: compare stems of words (Porter); False: compare words.

    Returns:
        float64, shape (n, n), symmetric, 1 on the diagonal. Texts that differ at most in white space also get 1, even
        if rouge-score finds no token in them: its tokens consist of the letters a to z and digits.
    """
    tokens = [_rouge_tokenizer(stem).tokenize(text) for text in texts]
    table = np.eye(len(texts))
    for i, first in enumerate(tokens):
        masks = _positions(first)  # they serve the comparisons with all texts before this one
        for j in range(i):
            same = texts[i].split() == texts[j].split()
            common = 0 if same else lcs_length(masks, len(first), tokens[j])
            table[i, j] = table[j, i] = 1.0 if same else _f_measure(common, len(first), len(tokens[j]))
    return table


class RougePool:
    """A pool of texts with exact search for the nearest text by ROUGE-L; most pairs are never compared.

    The LCS of texts with m and n tokens is at most the overlap of the two bags of tokens, so 2 x overlap / (m + n)
    bounds the F-measure. An inverted index gives the overlap with every text of the pool at once. Texts are then
    compared in descending order of their bounds, with the bit-parallel LCS of Hyyrö (2004), until no bound reaches the
    best similarity so far.

    Args:
        texts: the initial texts.
    """

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self._vocabulary: dict[str, int] = {}
        self._forget()
        for text in texts:
            self.add(text)

    def _forget(self) -> None:
        """Empties the index; the ids of known tokens stay."""
        self._tokens: list[list[int]] = []
        self._sizes = array("q")
        # Indices of texts by (token, occurrence). The k-th occurrence of a token is a feature, so that the number of
        # shared features is the overlap of the bags.
        self._postings: dict[tuple[int, int], array[int]] = {}
        self._discarded = 0

    def __len__(self) -> int:
        return len(self._tokens) - self._discarded

    def add(self, text: str) -> None:
        """Adds a text to the pool."""
        self._add([self._vocabulary.setdefault(t, len(self._vocabulary)) for t in _rouge_tokenizer().tokenize(text)])

    def _add(self, tokens: list[int]) -> None:
        for feature in _features(tokens):
            self._postings.setdefault(feature, array("q")).append(len(self._tokens))
        self._tokens.append(tokens)
        self._sizes.append(len(tokens))

    def discard_oldest(self) -> None:
        """Removes the text that was added first."""
        if not len(self):
            raise IndexError("the pool is empty")
        self._discarded += 1
        # Rebuild only when most entries are discarded: the cost per discarded text is at most that of adding one.
        if self._discarded > 64 and 2 * self._discarded > len(self._tokens):
            remaining = self._tokens[self._discarded :]
            self._forget()
            for tokens in remaining:
                self._add(tokens)

    def nearest(self, text: str, floor: float = 0.0) -> float:
        """Returns the largest ROUGE-L F-measure between the text and any text of the pool.

        Args:
            text: the text.
            floor: lower bound of the result; texts that are not more similar than this are ignored.
        """
        return self.most_similar(text, floor)[0]

    def most_similar(self, text: str, floor: float = 0.0) -> tuple[float, int]:
        """Returns the largest similarity to the pool and the index of the text that has it.

        Args:
            text: the text.
            floor: lower bound of the similarity; texts that are not more similar than this are ignored.

        Returns:
            ROUGE-L F-measure and index in the pool, counted from the oldest text; among equals the lowest index.
            ``(floor, -1)`` if no text is more similar than ``floor``.
        """
        # Tokens that the pool has never seen match nothing; all of them get the id -1.
        tokens = [self._vocabulary.get(token, -1) for token in _rouge_tokenizer().tokenize(text)]
        masks = _positions(tokens)
        best, index = floor, -1
        for bound, other in self._bounds(tokens, floor):
            # Bounds fall from here on. The tolerance keeps ties, for which the lowest index wins.
            if bound < best - TOLERANCE:
                break
            similarity = _f_measure(
                lcs_length(masks, len(tokens), self._tokens[other]), len(tokens), len(self._tokens[other])
            )
            if similarity > best or (similarity == best and other < index):
                best, index = similarity, other
        return best, index - self._discarded if index >= 0 else -1

    def _bounds(self, tokens: Sequence[int], floor: float) -> Iterator[tuple[float, int]]:
        """Returns (upper bound of the similarity, index) of the texts with a bound above ``floor``, highest first."""
        shared = [self._postings[feature] for feature in _features(tokens) if feature in self._postings]
        if not shared:
            return iter(())
        overlap = np.bincount(np.concatenate([np.frombuffer(row, np.int64) for row in shared]))
        bound = 2 * overlap / (len(tokens) + np.frombuffer(self._sizes, np.int64)[: len(overlap)])
        # Discarded texts stay in the index until it is rebuilt.
        bound[: self._discarded] = 0.0
        candidates = np.flatnonzero(bound > max(floor - TOLERANCE, 0.0))
        ranked = candidates[np.argsort(-bound[candidates], kind="stable")]
        return zip(bound[ranked].tolist(), ranked.tolist(), strict=True)


class RougeGate:
    """A gate that adds a text to a pool unless a text of the pool is too similar.

    Args:
        threshold: largest allowed ROUGE-L F-measure to any text of the pool, in (0, 1]. A text of exactly this
            similarity is added; floating-point errors up to :data:`TOLERANCE` are ignored.
        texts: the initial texts of the pool.

    Raises:
        ValueError: for a threshold outside (0, 1].
    """

    def __init__(self, threshold: float = 0.7, texts: Sequence[str] = ()) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"a ROUGE-L threshold must be in (0, 1], got {threshold}")
        self.threshold = threshold
        self.pool = RougePool(texts)

    def __len__(self) -> int:
        return len(self.pool)

    def nearest(self, text: str) -> tuple[float, int]:
        """Returns similarity and index of the nearest text of the pool; ``(0.0, -1)`` if none shares a token."""
        return self.pool.most_similar(text)

    def rejects(self, similarity: float) -> bool:
        """Returns whether a text with this similarity to its nearest neighbour is rejected."""
        return similarity > self.threshold + TOLERANCE

    def add_if_new(self, text: str) -> bool:
        """Adds the text unless it is too similar to one in the pool; returns whether it was added."""
        if self.rejects(self.pool.nearest(text, self.threshold)):
            return False
        self.add(text)
        return True

    def add(self, text: str) -> None:
        """Adds a text without checking its similarity."""
        self.pool.add(text)


def _features(tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields each token with the number of its occurrences so far, from 1."""
    seen: dict[int, int] = {}
    for token in tokens:
        seen[token] = seen.get(token, 0) + 1
        yield token, seen[token]


def _positions(tokens: Sequence[Any]) -> dict[Any, int]:
    """Returns the positions of each token, as the bits of one integer."""
    masks: dict[Any, int] = {}
    for position, token in enumerate(tokens):
        masks[token] = masks.get(token, 0) | 1 << position
    return masks


def lcs_length(masks: Mapping[Any, int], size: int, tokens: Sequence[Any]) -> int:
    """Returns the length of the LCS of two sequences, bit-parallel (Hyyrö 2004): a table column is one integer.

    Args:
        masks: maps each token of the first sequence to the bits of its positions.
        size: length of the first sequence.
        tokens: the second sequence.
    """
    full = (1 << size) - 1
    column = full  # a zero bit is a row at which the LCS grows
    for token in tokens:
        if mask := masks.get(token):
            matched = column & mask
            column = ((column + matched) | (column - matched)) & full
    return size - column.bit_count()


def _f_measure(common: int, size: int, other: int) -> float:
    """Returns the F-measure with the operations of rouge-score, so that both agree to the last bit.

    Args:
        common: length of the LCS.
        size: length of one sequence.
        other: length of the other sequence.
    """
    if not common:
        return 0.0
    precision, recall = common / size, common / other
    return 2 * precision * recall / (precision + recall)
