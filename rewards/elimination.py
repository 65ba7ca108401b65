"""The four elimination rules of Evol-Instruct (WizardLM), as TeaMs-RL lists them, as string rules and as judge rules.

1. no information gain: the new instruction asks for the same as the old one;
2. refusal: the text contains "sorry" and has fewer than 80 words;
3. no content: the text consists of punctuation and stop words only;
4. meta words: the text copies words of the rewriting request such as "rewritten prompt".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from ..llm_backends import resolve
from ..llm_backends.errors import check_known
from ..llm_backends.prompting import load_prompts
from .base import Reward, Sample, Score
from .judges.verdict import (
    Question,
    VerdictMode,
    VerdictPrompt,
    check_mode,
    equality_prompt,
    judge_temperature,
    judge_verdicts,
)

REFUSAL_WORDS = 80
"""A text of at least this many words is no refusal."""

META_WORDS = re.compile(
    r"\b(?:given|rewritten|created|original|new|final)\s+(?:prompt|instruction)s?\b|#\w+\s+prompt\b", re.IGNORECASE
)
"""Matches words of the rewriting request (rule 4)."""


def no_information_gain(text: str, previous: str | None = None) -> bool:
    """Checks rule 1 on strings: True for the same words in the same order, ignoring case and punctuation."""
    return previous is not None and _words(text) == _words(previous)


def refusal(text: str, previous: str | None = None) -> bool:
    """Checks rule 2: True for "sorry" in fewer than 80 words, unless the previous text contains "sorry" too."""
    words = _words(text)
    return "sorry" in words and len(words) < REFUSAL_WORDS and "sorry" not in _words(previous or "")


def no_content(text: str, previous: str | None = None) -> bool:
    """Checks rule 3: True if there are only punctuation and stop words; any other word is content."""
    stop_words = _stop_words()
    return all(word in stop_words for word in _words(text))


def meta_words(text: str, previous: str | None = None) -> bool:
    """Checks rule 4: True for words of the rewriting request that were not in the previous text."""
    matches = {match.casefold() for match in META_WORDS.findall(text)}
    return bool(matches - {match.casefold() for match in META_WORDS.findall(previous or "")})


@cache
def _stop_words() -> frozenset[str]:
    """Returns words without content of their own."""
    return frozenset(load_prompts(__package__, "elimination")["stop_words"].split())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


STRING_RULES: dict[str, Callable[[str, str | None], bool]] = {
    "no_information_gain": no_information_gain,
    "refusal": refusal,
    "no_content": no_content,
    "meta_words": meta_words,
}
"""Predicate ``(text, previous text) -> eliminate?`` by rule name, in the paper's order."""


def eliminated_by(text: str, previous: str | None = None, rules: Sequence[str] = tuple(STRING_RULES)) -> str | None:
    """Returns the name of the first string rule that eliminates the text; None if it survives all.

    Raises:
        ValueError: for an unknown rule.
    """
    check_rules(rules)
    return next((rule for rule in rules if STRING_RULES[rule](text, previous)), None)


def check_rules(rules: Sequence[str]) -> None:
    """Raises a ValueError for an unknown rule name."""
    for rule in rules:
        check_known("elimination rule", rule, STRING_RULES)


class EliminationReward(Reward):
    """Gives one point per string rule that the text survives, 0 to 4 with all rules (TeaMs-RL's inactive full reward).

    Args:
        rules: names of the rules to apply.

    Raises:
        ValueError: for an unknown rule.
    """

    name = "elimination"

    def __init__(self, rules: Sequence[str] = tuple(STRING_RULES)) -> None:
        check_rules(rules)
        self.rules = tuple(rules)

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        scores = []
        for sample in samples:
            terms = {rule: float(not STRING_RULES[rule](sample.response, sample.previous)) for rule in self.rules}
            scores.append(Score(sum(terms.values()), terms=terms))
        return scores


def elimination_prompt(rule: str) -> VerdictPrompt:
    """Returns the judge's question for a rule; the positive answer means that the text survives."""
    if rule == "no_information_gain":
        return equality_prompt()
    data = load_prompts(__package__, "elimination")[rule]
    return VerdictPrompt.from_file(data, ("Text", "Verdict"), ("text",))


class JudgedElimination(Reward):
    """Gives one point per rule that the text survives, by the verdicts of a judge LLM.

    All rules of all samples are judged in one backend call. The score is invalid if the verdict on any rule is missing.

    Args:
        backend: the judge LLM.
        rules: names of the rules to apply.
        mode: see :data:`~instructgym.rewards.judges.verdict.VerdictMode`.

    Raises:
        ValueError: for an unknown rule or mode.
    """

    name = "judged_elimination"

    def __init__(
        self, backend: Any = "embedded", rules: Sequence[str] = tuple(STRING_RULES), mode: VerdictMode = "auto"
    ) -> None:
        check_rules(rules)
        check_mode(mode)
        self.backend, self.mode = resolve("backend", backend), mode
        self.prompts = {rule: elimination_prompt(rule) for rule in rules}
        self.calls_per_sample = len(self.prompts)

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        # Every question gets the fields of all prompts: rule 1 compares two texts, the others read one.
        questions = []
        for sample in samples:
            texts = {"first": sample.previous or "", "second": sample.response, "text": sample.response}
            questions += [Question(prompt, texts, sample.seed) for prompt in self.prompts.values()]
        verdicts = judge_verdicts(self.backend, questions, self.mode, judge_temperature(samples))
        width = len(self.prompts)
        scores = []
        for index in range(len(samples)):
            # The verdicts are in the order of the questions: sample by sample, one per rule.
            sample_verdicts = verdicts[index * width : (index + 1) * width]
            missing = next((verdict.why for verdict in sample_verdicts if verdict.answer is None), None)
            if missing is not None:
                scores.append(Score.invalid(missing, calls=width))
                continue
            terms = {rule: float(bool(v.answer)) for rule, v in zip(self.prompts, sample_verdicts, strict=True)}
            scores.append(Score(sum(terms.values()), terms=terms, calls=width))
        return scores
