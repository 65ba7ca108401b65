"""An editor that makes sentences of film reviews positive with word-exchange rules, without a language model.

The text is split into words; at each word the rules of :data:`RULES` are tried in order, and the swaps they return are
written into the text. The opposites are in ``prompts/sentiment_swaps.toml``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from ....llm_backends import BackendError, request_seed
from ....llm_backends.prompting import load_prompts
from .editors import Editor, EditRequest

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
LONGEST_PHRASE = 4

NEGATING_PAIRS = frozenset(["far from", "anything but", "free of", "devoid of"])
AUXILIARIES = {"isn't": "is", "aren't": "are", "wasn't": "was", "weren't": "were"}
# Index of the verb form, in the table [negated], that replaces the auxiliary and its verb.
DO = {"does": 0, "doesn't": 0, "did": 1, "didn't": 1}
CAN = {"can't": "can", "cannot": "can", "couldn't": "could", "won't": "will"}
VOWEL_EXCEPTIONS = ("one", "uni", "use", "eu")
"""Beginnings of words that are spelled with a vowel but pronounced with a consonant, so that they take "a"."""


@dataclass(frozen=True)
class _Word:
    """One word and its place in the text."""

    start: int
    """Index of its first character."""
    end: int
    """Index after its last character."""
    text: str
    """The word in lower case with straight apostrophes; empty if a swap has removed it."""
    starts_clause: bool
    """Whether it is the first word of a clause: the text's first word, or one after punctuation."""
    named: bool
    """Whether it looks like part of a name: capitalised within a sentence, or capitalised before such a word."""


@dataclass(frozen=True)
class _Swap:
    """A replacement of the words ``first`` to ``last`` (indices, inclusive) by ``text``; empty: they are removed."""

    first: int
    last: int
    text: str


class SentimentEditor(Editor):
    """An editor that replaces words of negative sentiment by opposites of the same part of speech.

    A table of everyday film-review English (``prompts/sentiment_swaps.toml``) holds the opposites; if a word has
    several, the request's seed and the attempt select one. Negations of words of praise are removed ("not funny",
    "doesn't work", "neither sharp nor new", "no charm"), and "too slow to" becomes "slow enough to". Negative words
    that are themselves negated ("never dull") are unchanged. Capitals and "a" / "an" are adapted; every other character
    is unchanged.

    The rules do not parse: on sentences whose sentiment depends on irony or context they change nothing (None), or too
    little.
    """

    name = "sentiment-swaps"

    def propose(self, requests: Sequence[EditRequest], attempt: int = 0) -> list[str | BackendError | None]:
        return [self.edit(request.response, request_seed(request.seed, "edit", attempt)) for request in requests]

    def edit(self, text: str, seed: int = 0) -> str | None:
        """Returns the edited text; None if there is nothing to swap.

        Args:
            text: the text.
            seed: seed of the selection among several opposites.
        """
        words = _tokenize(text)
        swaps: list[_Swap] = []
        at = 0
        while at < len(words):
            swap = next((candidate for rule in RULES if (candidate := rule(words, at, seed)) is not None), None)
            at += 1
            if swap is not None:
                swaps.append(swap)
                at = swap.last + 1
                # Later rules have to see the words as they are after this swap.
                _rewrite(words, swap)
        edited = _apply(text, words, swaps)
        return None if edited == text else edited


def _tokenize(text: str) -> list[_Word]:
    """Splits a text into words, with the first words of clauses and the likely names marked."""
    matches = list(WORD.finditer(text))
    gaps = [text[last.end() : match.start()] for last, match in pairwise(matches)]
    if not matches:
        return []
    # Quotation marks, brackets and asterisks alone do not start a clause; commas, apostrophes and closing brackets do
    # not start a sentence (or quotation), at whose beginning a capital is no sign of a name.
    starts_clause = [True, *(bool(gap.strip(" \t\n\"'()*")) for gap in gaps)]
    starts_sentence = [True, *(bool(re.search(r"[^\s,')]", gap)) for gap in gaps)]
    title_case = [match[0][0].isupper() and not match[0].isupper() for match in matches]
    mid_sentence = [title and not start for title, start in zip(title_case, starts_sentence, strict=True)]
    return [
        _Word(
            match.start(),
            match.end(),
            match[0].lower().replace("’", "'"),
            starts_clause[i],
            mid_sentence[i]
            or (title_case[i] and i + 1 < len(matches) and mid_sentence[i + 1] and not starts_clause[i + 1]),
        )
        for i, match in enumerate(matches)
    ]


def _rewrite(words: list[_Word], swap: _Swap) -> None:
    """Updates the words of a swap, so that a negation that was removed no longer negates the words after it.

    Only the last word of the new text is kept, at the swap's last place, and not if it is a negation itself.
    """
    new = swap.text.lower().split()[-1:]
    for at in range(swap.first, swap.last + 1):
        stays = at == swap.last and new and new[0] not in _lists("negators")
        words[at] = replace(words[at], text=new[0] if stays else "")


def _apply(text: str, words: Sequence[_Word], swaps: Sequence[_Swap]) -> str:
    """Returns the text with the swaps, which are in order, written into it."""
    pieces, done = [], 0
    capital = False  # a removed word had a capital, which the next text inherits
    for swap in swaps:
        start, end = words[swap.first].start, words[swap.last].end
        new = swap.text
        old = text[start:end]
        before = text[done:start]
        if capital:
            before, capital = _capitalised(before), not before.strip()
        if new:
            new = new.upper() if old.isupper() and len(old) > 1 else _capitalised(new) if old[0].isupper() else new
            # An article directly before the new word has to fit its first sound.
            article = re.search(r"(?<![\w'’])(a|an)(\s+)$", before, re.IGNORECASE)
            if article:
                right = "an" if _vowel(new) else "a"
                before = before[: article.start()] + (article[1][0] + right[1:]) + article[2]
        else:
            capital = old[0].isupper()
            # The white space after a removed word is removed as well.
            end += len(text[end:]) - len(text[end:].lstrip())
        pieces += [before, new]
        done = end
    rest = text[done:]
    return "".join(pieces) + (_capitalised(rest) if capital else rest)


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _vowel(text: str) -> bool:
    """Returns whether a text takes "an" as its article."""
    text = text.lower()
    return (text[0] in "aeiou" and not text.startswith(VOWEL_EXCEPTIONS)) or text.startswith(("honest", "hour"))


@cache
def swap_table(name: str) -> dict[str, tuple[str, ...]]:
    """Returns a table of the file, with every value as a tuple."""
    entries = load_prompts(__package__, "sentiment_swaps")[name]
    return {key: (value,) if isinstance(value, str) else tuple(value) for key, value in entries.items()}


@cache
def _single() -> dict[str, tuple[str, ...]]:
    """Returns the opposites of single words."""
    # For a word in several tables the last one wins.
    return {**swap_table("nouns"), **swap_table("verbs"), **swap_table("adverbs"), **swap_table("adjectives")}


@cache
def _praise() -> frozenset[str]:
    """Returns the words of praise: a list, and the opposites of negative adjectives."""
    opposites = {word for words in swap_table("adjectives").values() for word in words}
    return frozenset(_lists("positive")) | opposites - set(swap_table("adjectives"))


@cache
def _lists(name: str) -> frozenset[str]:
    """Returns a word list of the file."""
    return frozenset(load_prompts(__package__, "sentiment_swaps")["lists"][name].split())


@cache
def _forms() -> dict[str, str]:
    """Maps each form of a verb of ``[negated]`` that follows "never" (third person, past) to its base form."""
    return {form: base for base, forms in swap_table("negated").items() for form in forms}


def _text(words: Sequence[_Word], at: int) -> str:
    """Returns the word at an index; an empty string after the end, or if a new clause starts there."""
    return words[at].text if at < len(words) and not words[at].starts_clause else ""


def _negated(words: Sequence[_Word], at: int) -> bool:
    """Returns whether one of the three words before, in the same clause, is a negation."""
    negators = _lists("negators")
    for back in range(at - 1, max(at - 4, -1), -1):
        if words[back + 1].starts_clause:
            return False
        if words[back].text in negators or words[back].text.endswith("n't"):
            return True
        if back and f"{words[back - 1].text} {words[back].text}" in NEGATING_PAIRS:
            return True
    return False


def _pick(options: Sequence[str], at: int, seed: int) -> str:
    # Hashing the word's index with the seed makes the draws within a text independent of each other.
    return options[request_seed(seed, at) % len(options)]


def _praise_follows(words: Sequence[_Word], at: int) -> bool:
    """Returns whether a word of praise follows from ``at`` on, after at most two filler words."""
    for ahead in range(at, at + 3):
        word = _text(words, ahead)
        if word in _praise():
            return True
        if word not in _lists("fillers"):
            return False
    return False


def _phrase(words: Sequence[_Word], at: int, seed: int) -> _Swap | None:
    """Replaces a phrase of the table, the longest that begins here, by an opposite."""
    for length in range(LONGEST_PHRASE, 1, -1):
        window = [words[at].text, *(_text(words, at + ahead) for ahead in range(1, length))]
        options = swap_table("phrases").get(" ".join(window))
        if options and not _negated(words, at) and not any(word.named for word in words[at : at + length]):
            return _Swap(at, at + length - 1, _pick(options, at, seed))
    return None


def _not(words: Sequence[_Word], at: int, seed: int) -> _Swap | None:
    """Removes the negation of praise: "isn't very funny", "is not a good film", "never funny", "nothing new"."""
    word = words[at].text
    before = words[at - 1].text if at and not words[at].starts_clause else ""
    if word in AUXILIARIES and _praise_follows(words, at + 1):
        return _Swap(at, at, AUXILIARIES[word])
    if (
        word == "not"
        and (before in _lists("be") | _lists("and") or before.endswith("'s") or words[at].starts_clause)
        and _praise_follows(words, at + 1)
    ):
        return _Swap(at, at, "")
    if word == "never" and before in _lists("be") and _praise_follows(words, at + 1):
        return _Swap(at, at, "always")
    if word == "nothing" and _text(words, at + 1) in _praise() - {"well", "good"}:
        return _Swap(at, at, "something")
    # "less funny" as well as "less than funny"
    if word == "less" and _text(words, at + 1 + (_text(words, at + 1) == "than")) in _praise():
        return _Swap(at, at, "more")
    if word in ("rarely", "seldom") and (_praise_follows(words, at + 1) or _text(words, at + 1) in _forms()):
        return _Swap(at, at, "often")
    if word in ("hardly", "barely", "scarcely") and _praise_follows(words, at + 1):
        return _Swap(at, at, "truly")
    return None


def _verb(words: Sequence[_Word], at: int, seed: int) -> _Swap | None:
    """Removes the negation of a verb of success: "doesn't work", "can't sustain", "never quite finds"."""
    word, verb = words[at].text, at + 1
    if word in ("does", "did"):
        if _text(words, verb) != "not":
            return None
        verb += 1
    soft = _text(words, verb) in _lists("softeners")
    verb += soft
    base = _text(words, verb)
    if _text(words, verb + 1) in _lists("any_words"):
        return None
    if word in DO and base in swap_table("negated"):
        return _Swap(at, verb, swap_table("negated")[base][DO[word]])
    # At the start of a clause "don't" is an imperative: "Don't work too hard."
    if word == "don't" and base in swap_table("negated") and at and not words[at].starts_clause:
        return _Swap(at, verb, base)
    if (
        word in CAN and base in swap_table("negated") and base not in ("help", "have")
    ):  # "can't help laughing", "can't have"
        return _Swap(at, verb - 1, CAN[word])
    if word == "never" and base in _forms():
        return _Swap(at, verb - 1, "always")
    return None


def _too(words: Sequence[_Word], at: int, seed: int) -> _Swap | None:
    """Changes "too slow to" to "slow enough to", and "is too slow" to "is never too slow"."""
    first = at
    at += words[at].text in _lists("intensifiers")
    if (
        at >= len(words)
        or words[at].text != "too"
        or (at > first and words[at].starts_clause)
        or _negated(words, first)
    ):
        return None
    degree = _text(words, at + 1)
    if not degree or degree in _lists("not_degrees") or degree.endswith("ly"):
        return None
    if _text(words, at + 2) == "to":
        options = swap_table("adjectives").get(degree, (degree,))
        return _Swap(first, at + 1, f"{_pick(options, at, seed)} enough")
    before = words[first - 1].text if first else ""
    if words[first].starts_clause or before in _lists("be") or before.endswith("'s"):
        return _Swap(first, at + 1, f"never too {degree}")
    return None


def _lacking_merit(words: Sequence[_Word], at: int, seed: int) -> _Swap | None:
    """Changes the absence of a merit to its presence: "no charm", "little suspense", "without any wit"."""
    word, place = words[at].text, at + 1
    if word not in ("no", "little", "without"):
        return None
    degree = _text(words, place)
    place += degree in ("any", "much", "real", "genuine", "or", "true")
    if degree == "or" and _text(words, place) == "no":
        place += 1
    if _text(words, place) not in _lists("goods") or _text(words, place + 1).startswith("than"):
        return None
    new = {"no": "real", "little": "great", "without": "with real"}[word]
    return _Swap(at, place - 1, new)


def _neither(words: Sequence[_Word], at: int, seed: int) -> _Swap | None:
    """Changes "neither funny" to "both funny"; :func:`_nor` changes the "nor" that follows."""
    ahead = [_text(words, at + step) for step in range(1, 7)]
    if words[at].text == "neither" and "nor" in ahead and _praise_follows(words, at + 1):
        return _Swap(at, at, "both")
    return None


def _nor(words: Sequence[_Word], at: int, seed: int) -> _Swap | None:
    """Changes "nor" to "and" after a "neither" that has become "both"."""
    back = range(max(at - 6, 0), at)
    if words[at].text == "nor" and any(words[place].text == "both" for place in back):
        return _Swap(at, at, "and")
    return None


def _opposite(words: Sequence[_Word], at: int, seed: int) -> _Swap | None:
    """Replaces a word by an opposite from the table, unless it is negated or part of a name."""
    options = _single().get(words[at].text)
    if not options or words[at].named or _negated(words, at):
        return None
    return _Swap(at, at, _pick(options, at, seed))


RULES: tuple[Callable[[Sequence[_Word], int, int], _Swap | None], ...] = (
    _too,
    _phrase,
    _not,
    _verb,
    _lacking_merit,
    _neither,
    _nor,
    _opposite,
)
"""The rules that are tried at each word, in order; the first that returns a swap is applied."""
