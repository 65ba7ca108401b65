"""The white space of a text, restored in a copy of it that was reflowed."""

from __future__ import annotations

import re

from ....rewards import edit_labels
from ....rewards.learned.edits import ADDED, DELETED


def respaced(original: str, edited: str) -> str:
    """The edited text with the original's blanks and line ends between words that stayed or were exchanged.

    Token by token, a line end that a language model dropped while it copied is a change; nobody meant it. The white
    space before the first and after the last word is always the original's.

    Args:
        original: the text.
        edited: an edit of it, not blank.
    """
    gaps, words = _split(original)
    new_gaps, new_words = _split(edited)
    labels = edit_labels(words, new_words)
    slots = (i for i, letter in enumerate(labels.original) if letter != DELETED)
    came_from = [None if letter == ADDED else next(slots) for letter in labels.edited]  # whose place each word has
    for j in range(1, len(new_words)):
        before, here = came_from[j - 1], came_from[j]
        if here and (before == here - 1 or "\n" in gaps[here]):
            new_gaps[j] = gaps[here]
    new_gaps[0], new_gaps[-1] = gaps[0], gaps[-1]
    return "".join(gap + word for gap, word in zip(new_gaps, [*new_words, ""], strict=True))


def _split(text: str) -> tuple[list[str], list[str]]:
    """The white space before each word and behind the last, and the words."""
    pieces = re.split(r"(\S+)", text)
    return pieces[::2], pieces[1::2]
