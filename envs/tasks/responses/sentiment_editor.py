"""A rule that turns sentences of film reviews positive by exchanging a few words, without a language model."""

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

BE = frozenset(
    "is are was were be been being isn't aren't wasn't weren't feels seems feel seem it's he's she's".split()
)
AND = frozenset(["and", "but", "or", "yet"])
FILLERS = frozenset("very particularly really especially that as a an the all exactly terribly quite even so".split())
NEGATORS = frozenset(
    "not never no nor neither without hardly barely scarcely rarely seldom nothing nobody none cannot avoid avoids "
    "avoiding avoided despite spite overcome overcomes transcend transcends forgive few less least than instead "
    "against".split()
)
NEGATING_PAIRS = frozenset([("far", "from"), ("anything", "but"), ("free", "of"), ("devoid", "of")])
INTENSIFIERS = frozenset("far much way all just".split())
NOT_DEGREES = frozenset("much many often late little few far soon bad close well".split())
ANY_WORDS = frozenset("any anything anyone anywhere much enough either anymore many at until".split())
AUXILIARIES = {"isn't": "is", "aren't": "are", "wasn't": "was", "weren't": "were"}
DO = {"does": 0, "doesn't": 0, "did": 1, "didn't": 1}
CAN = {"can't": "can", "cannot": "can", "couldn't": "could", "won't": "will"}
SOFTENERS = frozenset(["quite", "ever", "really", "fully", "entirely"])
VOWEL_EXCEPTIONS = ("one", "uni", "use", "eu")
"""Beginnings that are spelled with a vowel and said with a consonant."""


@dataclass(frozen=True)
class _Word:
    start: int
    end: int
    text: str
    """Lower-case, with straight apostrophes."""
    opens: bool
    """It is the first of its clause: the text's first word, or one behind punctuation."""
    named: bool
    """It looks like a part of a name: it has a capital in the middle of a sentence, or before a word that does."""


@dataclass(frozen=True)
class _Swap:
    """Words ``first`` to ``last`` (inclusive) become ``text``; nothing where it is empty."""

    first: int
    last: int
    text: str


class SentimentEditor(Editor):
    """Exchanges words of negative sentiment for opposites of the same part of speech, and turns some negations.

    A table of everyday film-review English (``prompts/sentiment_swaps.toml``) holds the opposites; where it has
    several, the request's seed and the attempt choose. Negations are taken off words of praise ("not funny", "doesn't
    work", "neither sharp nor new", "no charm"), and "too slow to" becomes "slow enough to". Words that are themselves
    negated ("never dull") stay. Capitals and "a" / "an" are kept right; every other character stays as it is.

    It knows no syntax: on sentences whose verdict hangs on irony or context it finds nothing (None), or too little.
    """

    name = "sentiment-swaps"

    def propose(self, requests: Sequence[EditRequest], attempt: int = 0) -> list[str | BackendError | None]:
        return [self.edit(request.response, request_seed(request.seed, "edit", attempt)) for request in requests]

    def edit(self, text: str, seed: int = 0) -> str | None:
        """The edited text; None where there is nothing to swap.

        Args:
            text: the text.
            seed: of the choice among opposites.
        """
        words = _words(text)
        swaps: list[_Swap] = []
        at = 0
        while at < len(words):
            swap = next((found for rule in RULES if (found := rule(words, at, seed)) is not None), None)
            at += 1
            if swap is not None:
                swaps.append(swap)
                at = swap.last + 1
                _rewrite(words, swap)
        edited = _applied(text, words, swaps)
        return None if edited == text else edited


def _words(text: str) -> list[_Word]:
    matches = list(WORD.finditer(text))
    gaps = [text[last.end() : match.start()] for last, match in pairwise(matches)]
    if not matches:
        return []
    opens = [True, *(bool(gap.strip(" \t\n\"'()*")) for gap in gaps)]
    starts = [True, *(bool(re.search(r"[^\s,')]", gap)) for gap in gaps)]  # of a sentence, a quotation or the like
    titled = [match[0][0].isupper() and not match[0].isupper() for match in matches]
    inner = [title and not start for title, start in zip(titled, starts, strict=True)]
    return [
        _Word(
            match.start(),
            match.end(),
            match[0].lower().replace("’", "'"),
            opens[i],
            inner[i] or (titled[i] and i + 1 < len(matches) and inner[i + 1] and not opens[i + 1]),
        )
        for i, match in enumerate(matches)
    ]


def _rewrite(words: list[_Word], swap: _Swap) -> None:
    """Makes the words what they are after a swap: a negation that is gone negates nothing any more."""
    new = swap.text.lower().split()[-1:]
    for at in range(swap.first, swap.last + 1):
        stays = at == swap.last and new and new[0] not in NEGATORS
        words[at] = replace(words[at], text=new[0] if stays else "")


def _applied(text: str, words: Sequence[_Word], swaps: Sequence[_Swap]) -> str:
    pieces, done = [], 0
    capital = False
    for swap in swaps:
        start, end = words[swap.first].start, words[swap.last].end
        new = swap.text
        old = text[start:end]
        before = text[done:start]
        if capital:
            before, capital = _capitalised(before), not before.strip()
        if new:
            new = new.upper() if old.isupper() and len(old) > 1 else _capitalised(new) if old[0].isupper() else new
            article = re.search(r"(?<![\w'’])(a|an)(\s+)$", before, re.IGNORECASE)
            if article:
                right = "an" if _vowel(new) else "a"
                before = before[: article.start()] + (article[1][0] + right[1:]) + article[2]
        else:
            capital = old[0].isupper()
            end += len(text[end:]) - len(text[end:].lstrip())
        pieces += [before, new]
        done = end
    rest = text[done:]
    return "".join(pieces) + (_capitalised(rest) if capital else rest)


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _vowel(text: str) -> bool:
    text = text.lower()
    return (text[0] in "aeiou" and not text.startswith(VOWEL_EXCEPTIONS)) or text.startswith(("honest", "hour"))


@cache
def _table(name: str) -> dict[str, tuple[str, ...]]:
    entries = load_prompts(__package__, "sentiment_swaps")[name]
    return {key: (value,) if isinstance(value, str) else tuple(value) for key, value in entries.items()}


@cache
def _single() -> dict[str, tuple[str, ...]]:
    return {**_table("nouns"), **_table("verbs"), **_table("adverbs"), **_table("adjectives")}


@cache
def _praise() -> frozenset[str]:
    opposites = {word for words in _table("adjectives").values() for word in words}
    return frozenset(_lists("positive")) | opposites - set(_table("adjectives"))


@cache
def _lists(name: str) -> frozenset[str]:
    return frozenset(load_prompts(__package__, "sentiment_swaps")["lists"][name].split())


@cache
def _forms() -> dict[str, str]:
    """Each form of a verb of ``[negated]`` that follows "never": he, and in the past."""
    return {form: base for base, forms in _table("negated").items() for form in forms}


def _text(words: Sequence[_Word], at: int) -> str:
    """The word at a place; nothing behind the end or where a new clause starts there."""
    return words[at].text if at < len(words) and not words[at].opens else ""


def _negated(words: Sequence[_Word], at: int) -> bool:
    """Whether one of the three words before, in the same clause, turns the meaning round."""
    for back in range(at - 1, max(at - 4, -1), -1):
        if words[back + 1].opens:
            return False
        if words[back].text in NEGATORS or words[back].text.endswith("n't"):
            return True
        if back and (words[back - 1].text, words[back].text) in NEGATING_PAIRS:
            return True
    return False


def _chosen(options: Sequence[str], at: int, seed: int) -> str:
    return options[request_seed(seed, at) % len(options)]


def _praised(words: Sequence[_Word], at: int) -> bool:
    """Whether praise stands here, behind at most two words of degree."""
    for ahead in range(at, at + 3):
        word = _text(words, ahead)
        if word in _praise():
            return True
        if word not in FILLERS:
            return False
    return False


def _phrase(words: Sequence[_Word], at: int, seed: int) -> _Swap | None:
    for length in range(LONGEST_PHRASE, 1, -1):
        found = [words[at].text, *(_text(words, at + ahead) for ahead in range(1, length))]
        options = _table("phrases").get(" ".join(found))
        if options and not _negated(words, at) and not any(word.named for word in words[at : at + length]):
            return _Swap(at, at + length - 1, _chosen(options, at, seed))
    return None


def _not(words: Sequence[_Word], at: int, seed: int) -> _Swap | None:
    """Takes the negation off praise: "isn't very funny", "is not a good film", "never funny", "nothing new"."""
    word = words[at].text
    before = words[at - 1].text if at and not words[at].opens else ""
    if word in AUXILIARIES and _praised(words, at + 1):
        return _Swap(at, at, AUXILIARIES[word])
    if word == "not" and (before in BE | AND or before.endswith("'s") or words[at].opens) and _praised(words, at + 1):
        return _Swap(at, at, "")
    if word == "never" and before in BE and _praised(words, at + 1):
        return _Swap(at, at, "always")
    if word == "nothing" and _text(words, at + 1) in _praise() - {"well", "good"}:
        return _Swap(at, at, "something")
    if word == "less" and _text(words, at + 1 + (_text(words, at + 1) == "than")) in _praise():
        return _Swap(at, at, "more")
    if word in ("rarely", "seldom") and (_praised(words, at + 1) or _text(words, at + 1) in _forms()):
        return _Swap(at, at, "often")
    if word in ("hardly", "barely", "scarcely") and _praised(words, at + 1):
        return _Swap(at, at, "truly")
    return None


def _verb(words: Sequence[_Word], at: int, seed: int) -> _Swap | None:
    """Takes the negation off a verb of success: "doesn't work", "can't sustain", "never quite finds"."""
    word, verb = words[at].text, at + 1
    if word in ("does", "did"):
        if _text(words, verb) != "not":
            return None
        verb += 1
    soft = _text(words, verb) in SOFTENERS
    verb += soft
    base = _text(words, verb)
    if _text(words, verb + 1) in ANY_WORDS:
        return None
    if word in DO and base in _table("negated"):
        return _Swap(at, verb, _table("negated")[base][DO[word]])
    if word == "don't" and base in _table("negated") and at and not words[at].opens:
        return _Swap(at, verb, base)
    if word in CAN and base in _table("negated") and base not in ("help", "have"):  # "can't help", "can't have"
        return _Swap(at, verb - 1, CAN[word])
    if word == "never" and base in _forms():
        return _Swap(at, verb - 1, "always")
    return None


def _too(words: Sequence[_Word], at: int, seed: int) -> _Swap | None:
    """Turns "too slow to" into "slow enough to", and "is too slow" into "is never too slow"."""
    first = at
    at += words[at].text in INTENSIFIERS
    if at >= len(words) or words[at].text != "too" or (at > first and words[at].opens) or _negated(words, first):
        return None
    degree = _text(words, at + 1)
    if not degree or degree in NOT_DEGREES or degree.endswith("ly"):
        return None
    if _text(words, at + 2) == "to":
        options = _table("adjectives").get(degree, (degree,))
        return _Swap(first, at + 1, f"{_chosen(options, at, seed)} enough")
    before = words[first - 1].text if first else ""
    if words[first].opens or before in BE or before.endswith("'s"):
        return _Swap(first, at + 1, f"never too {degree}")
    return None


def _goods(words: Sequence[_Word], at: int, seed: int) -> _Swap | None:
    """Turns the want of something good round: "no charm", "little suspense", "without any wit"."""
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
    """Turns "neither funny" into "both funny"; the "nor" that follows is turned by :func:`_nor`."""
    ahead = [_text(words, at + step) for step in range(1, 7)]
    if words[at].text == "neither" and "nor" in ahead and _praised(words, at + 1):
        return _Swap(at, at, "both")
    return None


def _nor(words: Sequence[_Word], at: int, seed: int) -> _Swap | None:
    back = range(max(at - 6, 0), at)
    if words[at].text == "nor" and any(words[place].text == "both" for place in back):
        return _Swap(at, at, "and")
    return None


def _opposite(words: Sequence[_Word], at: int, seed: int) -> _Swap | None:
    """An opposite from the table, for a word that is not itself negated."""
    options = _single().get(words[at].text)
    if not options or words[at].named or _negated(words, at):
        return None
    return _Swap(at, at, _chosen(options, at, seed))


RULES: tuple[Callable[[Sequence[_Word], int, int], _Swap | None], ...] = (
    _too,
    _phrase,
    _not,
    _verb,
    _goods,
    _neither,
    _nor,
    _opposite,
)
"""What is tried at each word, in order; the first that applies is taken."""
