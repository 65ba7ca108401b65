"""Which generated instructions are kept: the filters of Self-Instruct, as a table of named rules.

Source: Self-Instruct (Wang et al., arXiv 2212.10560) and its code, whose rules REFINE-AF (arXiv 2505.06548) takes over.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass

from ....llm_backends.prompting import one_line

MIN_WORDS, MAX_WORDS = 4, 150
BLOCKED_WORDS = [*"image images graph graphs picture pictures file files map maps draw plot".split(), "go to"]
"""What a model of text cannot do; matched as whole words in any case."""
_BLOCKED = re.compile(rf"\b(?:{'|'.join(BLOCKED_WORDS)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """One reason to drop an instruction."""

    name: str
    reason: str
    """Why such instructions are unwanted."""
    drops: Callable[[str], bool]
    """Takes the normalized text."""


FILTERS: tuple[Rule, ...] = (
    Rule("empty", "nothing was written", lambda text: not text),
    Rule("punctuation_first", "a fragment of a list or of markup", lambda text: text[0] in string.punctuation),
    Rule("non_ascii_first", "not in English, or a decoration", lambda text: not text[0].isascii()),
    Rule("too_short", f"fewer than {MIN_WORDS} words are no task", lambda text: len(text.split()) < MIN_WORDS),
    Rule(
        "too_long", f"more than {MAX_WORDS} words hold an input or answer", lambda text: len(text.split()) > MAX_WORDS
    ),
    Rule("blocked_word", "needs more than text", lambda text: _BLOCKED.search(text) is not None),
    Rule(
        "write_program",
        "models put this before instructions that they know; whether it asks for code is unclear",
        lambda text: text.casefold().startswith("write a program"),
    ),
)
"""The rules in the order in which they are asked; the first that drops a text names the reason."""


def normalized(text: str) -> str:
    """The text on one line, its first letter upper case."""
    text = one_line(text)
    return text[:1].upper() + text[1:]


def dropped_by(text: str) -> str | None:
    """Name of the first rule of :data:`FILTERS` that drops the normalized text; None if it is kept."""
    return next((rule.name for rule in FILTERS if rule.drops(text)), None)


_NUMBER = re.compile(r"\s*(\d{1,4}) ?[.)](?:\s+|$)")


def parse_numbered(reply: str, first: int = 9, last: int = 15, continues: bool = False) -> list[str]:
    """The items of a numbered list that a model wrote.

    Numbers must count up by one from ``first``; a line with another number ends the list. An item goes on until the
    next number or blank line; whatever stands between a blank line and the next number is no part of the list.

    Args:
        reply: the model's reply.
        first: number of the first item.
        last: items above this number are left out.
        continues: the prompt ends in the first number, so that the reply begins with the first item's text.

    Returns:
        The items in order, each on one line; those with no text are empty.
    """
    items: list[list[str]] = []
    is_open = False
    lines = (f"{first}. {reply.lstrip(' ')}" if continues else reply).splitlines()
    for line in lines:
        number = _NUMBER.match(line)
        if number is not None and int(number[1]) == first + len(items):
            if int(number[1]) > last:
                break
            items.append([line[number.end() :]])
            is_open = True
        elif number is not None and items:
            break
        elif not line.strip():
            is_open = False
        elif is_open:
            items[-1].append(line)
    return [one_line(" ".join(item)) for item in items]
