"""The four elimination rules of Evol-Instruct (WizardLM), as TeaMs-RL lists them: string rules and judge rules.

1. no information gain: the new instruction asks for the same as the old one;
2. refusal: the text contains "sorry" and has fewer than 80 words;
3. no content: the text consists of punctuation and stop words only;
4. meta words: the text copies words of the rewriting request such as "rewritten prompt".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ..llm_backends import resolve
from ..llm_backends.prompting import load_prompts
from .base import Reward, Sample, Score
from .judges.verdict import (
    Question,
    VerdictMode,
    VerdictPrompt,
    check_mode,
    equality_prompt,
    judge_verdicts,
    temperature_for,
)

REFUSAL_WORDS = 80

STOP_WORDS = frozenset(
    """
    a about above after again against all am an and any are as at be because been before being below between
    both but by can could did do does doing down during each few for from further had has have having he her
    here hers him his how i if in into is it its itself just me more most my no nor not now of off on once
    only or other our ours out over own same she should so some such than that the their theirs them then
    there these they this those through to too under until up very was we were what when where which while
    who whom why will with would you your yours
    """.split()
)

META_WORDS = re.compile(
    r"\b(?:given|rewritten|created|original|new|final)\s+(?:prompt|instruction)s?\b|#\w+\s+prompt\b", re.IGNORECASE
)


def no_information_gain(text: str, previous: str | None = None) -> bool:
    """Rule 1 on strings: the same words in the same order, whatever their case and punctuation."""
    return previous is not None and _words(text) == _words(previous)


def refusal(text: str, previous: str | None = None) -> bool:
    """Rule 2: "sorry" in fewer than 80 words; not where the text before was about being sorry already."""
    words = _words(text)
    return "sorry" in words and len(words) < REFUSAL_WORDS and "sorry" not in _words(previous or "")


def no_content(text: str, previous: str | None = None) -> bool:
    """Rule 3: nothing but punctuation and stop words. A question word with something to it is content."""
    return all(word in STOP_WORDS for word in _words(text))


def meta_words(text: str, previous: str | None = None) -> bool:
    """Rule 4: words of the rewriting request that were not in the text before."""
    found = {match.casefold() for match in META_WORDS.findall(text)}
    return bool(found - {match.casefold() for match in META_WORDS.findall(previous or "")})


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


STRING_RULES: dict[str, Callable[[str, str | None], bool]] = {
    "no_information_gain": no_information_gain,
    "refusal": refusal,
    "no_content": no_content,
    "meta_words": meta_words,
}
"""Rule name to predicate ``(text, previous text) -> eliminate?``, in the paper's order."""


def eliminated_by(text: str, previous: str | None = None, rules: Sequence[str] = tuple(STRING_RULES)) -> str | None:
    """Name of the first string rule that eliminates the text; None if it survives.

    Raises:
        ValueError: for an unknown rule.
    """
    check_rules(rules)
    return next((rule for rule in rules if STRING_RULES[rule](text, previous)), None)


def check_rules(rules: Sequence[str]) -> None:
    """Refuses unknown rule names with a ValueError."""
    unknown = [rule for rule in rules if rule not in STRING_RULES]
    if unknown:
        raise ValueError(f"unknown elimination rule {unknown[0]!r}: use {', '.join(STRING_RULES)}")


class EliminationReward(Reward):
    """One point per string rule that the text survives; 0 to 4 with all rules (TeaMs-RL's inactive full reward).

    Args:
        rules: names of the rules to apply.
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
    """The judge's form of a rule; the positive answer means that the text survives."""
    if rule == "no_information_gain":
        return equality_prompt()
    data = load_prompts(__package__, "elimination")[rule]
    return VerdictPrompt.from_file(data, ("Text", "Verdict"), ("text",))


class JudgedElimination(Reward):
    """The same points by a judge LLM, all rules of all samples in one backend call.

    Args:
        backend: the judge LLM.
        rules: names of the rules to apply.
        mode: as of :class:`~instructgym.rewards.judges.verdict.EqualityJudge`.
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
        questions = [
            Question(
                prompt,
                {"first": sample.previous or "", "second": sample.response, "text": sample.response},
                sample.seed,
            )
            for sample in samples
            for prompt in self.prompts.values()
        ]
        verdicts = judge_verdicts(self.backend, questions, self.mode, temperature_for(samples))
        width = len(self.prompts)
        scores = []
        for index in range(len(samples)):
            mine = verdicts[index * width : (index + 1) * width]
            missing = next((verdict.why for verdict in mine if verdict.answer is None), None)
            if missing is not None:
                scores.append(Score.invalid(missing, calls=width))
                continue
            terms = {rule: float(bool(v.answer)) for rule, v in zip(self.prompts, mine, strict=True)}
            scores.append(Score(sum(terms.values()), terms=terms, calls=width))
        return scores
