"""Phrases of an instruction: the units that phrase edits delete, move and bring back.

GrIPS (Prasad et al. 2023, arXiv 2203.07281, section 3) takes the constituents that a parser finds. The rule here needs
no model: a phrase ends behind punctuation, and, once it is two words long, before a word that opens a constituent (a
conjunction, a preposition, a relative).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

OPENERS = frozenset(
    """
    about according after and as at based because before but by for from if in into of on or so than that then to
    using when where whether which while who with without
    """.split()
)
"""Words that begin a new phrase."""

SHORTEST = 2
"""Words a phrase has at least before an opener may end it."""

_ENDS = re.compile(r"[.,;:!?][\"')\]]*$")


def split_phrases(text: str) -> tuple[str, ...]:
    """The phrases of a text; joined by blanks they are the text again, but for runs of white space.

    Example:
        >>> split_phrases("Read the review, and decide whether it is good or bad.")
        ('Read the review,', 'and decide', 'whether it is good', 'or bad.')
    """
    phrases: list[list[str]] = []
    open_phrase = False
    for word in text.split():
        starts = word.strip("\"'([").casefold() in OPENERS and open_phrase and len(phrases[-1]) >= SHORTEST
        if not open_phrase or starts:
            phrases.append([])
        phrases[-1].append(word)
        open_phrase = _ENDS.search(word) is None
    return tuple(" ".join(words) for words in phrases)


def join_phrases(phrases: Sequence[str]) -> str:
    """The text of phrases."""
    return " ".join(phrases)
