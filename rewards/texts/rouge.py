"""ROUGE-L between a text and a growing pool: the nearest text, exactly, and a gate that keeps near-duplicates out.

ROUGE-L (Lin 2004) is the F-measure of the longest common subsequence (LCS) of two token sequences. The gate is that of
Self-Instruct (Wang et al., arXiv 2212.10560): a text enters if no text of the pool is more similar than 0.7.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

TOLERANCE = 1e-9
"""Similarities this close are equal: rouge-score's F-measure of 7 common tokens among 7 and 13 is 0.7 + 1e-16."""


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


@cache
def _rouge_tokenizer(stem: bool = False) -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=stem)


def rouge_l(text: str, other: str) -> float:
    """ROUGE-L F-measure of two texts (rouge-score, no stemming), in [0, 1]."""
    return float(_rouge_scorer().score(other, text)["rougeL"].fmeasure)


def pairwise_rouge_l(texts: Sequence[str], stem: bool = False) -> np.ndarray:
    """ROUGE-L F-measures between all texts, as rouge-score gives them.

    Args:
        texts: n texts.
        stem: compare stems of words (Porter), not words.

    Returns:
        float64, shape (n, n), symmetric, 1 on the diagonal. Texts that differ at most in white space get 1 as well,
        also where rouge-score finds no token in them: it knows the letters a to z and digits.
    """
    tokens = [_rouge_tokenizer(stem).tokenize(text) for text in texts]
    table = np.eye(len(texts))
    for i, first in enumerate(tokens):
        masks: dict[Any, int] = {}
        for position, token in enumerate(first):
            masks[token] = masks.get(token, 0) | 1 << position
        for j in range(i):
            same = texts[i].split() == texts[j].split()
            common = 0 if same else _lcs(masks, len(first), tokens[j])
            table[i, j] = table[j, i] = 1.0 if same else _f_measure(common, len(first), len(tokens[j]))
    return table


class RougePool:
    """A pool of texts that answers: which one is nearest by ROUGE-L? Exact; most pairs are never compared.

    The LCS is at most the overlap of the two bags of tokens, so 2 x overlap / (m + n) bounds the F-measure. An inverted
    index gives the overlap with every text of the pool at once; texts are then compared in descending order of their
    bound, by the bit-parallel LCS of Hyyrö (2004), until no bound reaches the best similarity found.

    Args:
        texts: the texts to start with.
    """

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self._vocabulary: dict[str, int] = {}
        self._forget()
        for text in texts:
            self.add(text)

    def _forget(self) -> None:
        self._tokens: list[list[int]] = []
        self._sizes = array("q")
        # Texts by (token, occurrence): the k-th occurrence of a token is a feature of its own, so that shared features
        # count the overlap of bags.
        self._postings: dict[tuple[int, int], array[int]] = {}
        self._discarded = 0

    def __len__(self) -> int:
        return len(self._tokens) - self._discarded

    def add(self, text: str) -> None:
        """Adds a text."""
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
        if self._discarded > 64 and 2 * self._discarded > len(self._tokens):  # now and then, so cheap on the whole
            kept = self._tokens[self._discarded :]
            self._forget()
            for tokens in kept:
                self._add(tokens)

    def nearest(self, text: str, floor: float = 0.0) -> float:
        """Largest ROUGE-L F-measure between the text and any in the pool.

        Args:
            text: the text.
            floor: similarities up to this do not interest; the answer is then ``floor``.
        """
        return self.most_similar(text, floor)[0]

    def most_similar(self, text: str, floor: float = 0.0) -> tuple[float, int]:
        """The largest similarity and who has it.

        Args:
            text: the text.
            floor: similarities up to this do not interest.

        Returns:
            ROUGE-L F-measure and index in the pool, oldest text first; among equals the lowest index. ``(floor, -1)``
            where no text is more similar than that.
        """
        # Tokens that the pool has never seen match nothing; -1 stands for all of them.
        tokens = [self._vocabulary.get(token, -1) for token in _rouge_tokenizer().tokenize(text)]
        masks: dict[int, int] = {}
        for position, token in enumerate(tokens):
            masks[token] = masks.get(token, 0) | 1 << position
        best, index = floor, -1
        for bound, other in self._bounds(tokens, floor):
            if bound < best - TOLERANCE:
                break
            similarity = _f_measure(
                _lcs(masks, len(tokens), self._tokens[other]), len(tokens), len(self._tokens[other])
            )
            if similarity > best or (similarity == best and other < index):
                best, index = similarity, other
        return best, index - self._discarded if index >= 0 else -1

    def _bounds(self, tokens: Sequence[int], floor: float) -> Iterator[tuple[float, int]]:
        """Upper bounds of the similarity above ``floor`` with the indices they belong to, highest first."""
        shared = [self._postings[feature] for feature in _features(tokens) if feature in self._postings]
        if not shared:
            return iter(())
        overlap = np.bincount(np.concatenate([np.frombuffer(row, np.int64) for row in shared]))
        bound = 2 * overlap / (len(tokens) + np.frombuffer(self._sizes, np.int64)[: len(overlap)])
        bound[: self._discarded] = 0.0
        candidates = np.flatnonzero(bound > max(floor - TOLERANCE, 0.0))
        ranked = candidates[np.argsort(-bound[candidates], kind="stable")]
        return zip(bound[ranked].tolist(), ranked.tolist(), strict=True)


class RougeGate:
    """Lets a text into the pool unless one is there that is too similar.

    Args:
        threshold: largest ROUGE-L F-measure to any text of the pool, in (0, 1]. A text of exactly this similarity is
            kept, up to floating-point noise (:data:`TOLERANCE`).
        texts: the texts to start with.

    Raises:
        ValueError: for a threshold out of range.
    """

    def __init__(self, threshold: float = 0.7, texts: Sequence[str] = ()) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"a ROUGE-L threshold must be in (0, 1], got {threshold}")
        self.threshold = threshold
        self.pool = RougePool(texts)

    def __len__(self) -> int:
        return len(self.pool)

    def nearest(self, text: str) -> tuple[float, int]:
        """Similarity and index of the nearest text of the pool; ``(0.0, -1)`` where none shares a token with it."""
        return self.pool.most_similar(text)

    def rejects(self, similarity: float) -> bool:
        """Whether a text whose nearest neighbour is this similar is kept out."""
        return similarity > self.threshold + TOLERANCE

    def accept(self, text: str) -> bool:
        """Adds the text unless it is too similar to one in the pool; says whether it was added."""
        if self.rejects(self.pool.nearest(text, self.threshold)):
            return False
        self.add(text)
        return True

    def add(self, text: str) -> None:
        """Adds a text, however similar."""
        self.pool.add(text)


def _features(tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    seen: dict[int, int] = {}
    for token in tokens:
        seen[token] = seen.get(token, 0) + 1
        yield token, seen[token]


def _lcs(masks: Mapping[Any, int], size: int, tokens: Sequence[Any]) -> int:
    """Length of the LCS of two sequences (Hyyrö 2004): a column of the table is one integer.

    Args:
        masks: of the first sequence, for each token the bits of its positions.
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
    """As rouge-score computes it, to the last bit."""
    if not common:
        return 0.0
    precision, recall = common / size, common / other
    return 2 * precision * recall / (precision + recall)
