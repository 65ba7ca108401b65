"""The document of the prompt edit MDP: a task prompt, with what edits may draw on and what they took away."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...rewards.prompt_scoring.task_prompt import Demonstration, TaskPrompt

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


@dataclass(frozen=True, eq=False)
class DraftContext:
    """What an episode's edits may draw on."""

    pool: tuple[Demonstration, ...] = ()
    """Solved inputs of the training split outside the episode's minibatch, no text twice."""
    verbalizer_sets: tuple[tuple[str, ...], ...] = ()
    """The task's sets of verbalizers, in the order in which they are cycled through."""
    max_demonstrations: int = 4
    """Demonstrations that a prompt may have."""
    fits: Callable[[TaskPrompt], bool] = field(default=lambda prompt: True)
    """Whether a prompt can be scored: whether it fits into the context, where that is known."""


@dataclass(frozen=True)
class PromptDraft:
    """A prompt being edited. Drafts are equal if their prompts are; ``str(draft)`` is the prompt's text."""

    prompt: TaskPrompt
    context: DraftContext = field(default_factory=DraftContext, compare=False, repr=False)
    phrases: tuple[str, ...] = field(default=(), compare=False)
    """The instruction's phrases, kept apart so that an edit moves no boundary; empty: split the instruction."""
    deleted: tuple[str, ...] = field(default=(), compare=False)
    """Phrases deleted and not added back, the last one last."""
    seed: int = field(default=0, compare=False)
    """Of what the next edit draws."""

    def __str__(self) -> str:
        return self.prompt.text

    @property
    def instruction(self) -> str:
        """The prompt's instruction."""
        return self.prompt.instruction

    def split(self) -> tuple[str, ...]:
        """The instruction's phrases, as the last phrase edit left them."""
        return self.phrases or split_phrases(self.instruction)

    def with_prompt(self, **changes: Any) -> PromptDraft:
        """The draft with fields of its prompt replaced; a new instruction is split anew."""
        if "instruction" in changes:
            return replace(self, prompt=replace(self.prompt, **changes), phrases=(), deleted=())
        return replace(self, prompt=replace(self.prompt, **changes))

    def with_phrases(self, phrases: tuple[str, ...], deleted: tuple[str, ...]) -> PromptDraft:
        """The draft with the instruction that the phrases make."""
        changed = replace(self.prompt, instruction=join_phrases(phrases))
        return replace(self, prompt=changed, phrases=phrases, deleted=deleted)

    def next_demonstration(self) -> Demonstration | None:
        """The demonstration that adding would add: drawn among those that are not shown yet and still fit.

        None where there is none, be it that the prompt holds as many as it may.
        """
        shown = self.prompt.demonstrations
        if len(shown) >= self.context.max_demonstrations:
            return None
        texts = {one.text for one in shown}
        for index in self._draws().permutation(len(self.context.pool)):
            one = self.context.pool[index]
            if one.text not in texts and self.context.fits(replace(self.prompt, demonstrations=(*shown, one))):
                return one
        return None

    def swappable(self) -> list[tuple[int, int]]:
        """The pairs of demonstrations whose exchange changes the prompt."""
        shown = self.prompt.demonstrations
        return [(i, j) for j in range(len(shown)) for i in range(j) if shown[i] != shown[j]]

    def next_verbalizers(self) -> tuple[str, ...] | None:
        """The next of the task's sets of verbalizers that fits, in a cycle; None where there is no other one."""
        sets, now = self.context.verbalizer_sets, self.prompt.verbalizers
        start = sets.index(now) + 1 if now in sets else 0
        for step in range(len(sets)):
            words = sets[(start + step) % len(sets)]
            if words != now and self.context.fits(replace(self.prompt, verbalizers=words)):
                return words
        return None

    def draw(self, count: int) -> int:
        """An index below ``count``, drawn by the draft's seed."""
        return int(self._draws().integers(count))

    def _draws(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)
