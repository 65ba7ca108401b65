"""Holds the document of the prompt edit MDP: a task prompt, what edits may add to it, and the phrases they deleted.

:class:`PromptDraft` is what the operators in :mod:`~instructgym.envs.prompt_edit.operators` edit. Phrases are the
units that phrase edits delete, move and restore. GrIPS (Prasad et al. 2023, arXiv 2203.07281, section 3) uses the
constituents that a parser finds; the rule here needs no model: a phrase ends after punctuation and, once it has two
words, before a word that opens a constituent (a conjunction, a preposition, a relative).
"""

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
"""Words, in lower case, that begin a new phrase."""

SHORTEST = 2
"""Smallest number of words of a phrase that the next opener may end."""

_ENDS = re.compile(r"[.,;:!?][\"')\]]*$")


def split_phrases(text: str) -> tuple[str, ...]:
    """Returns the phrases of a text; joined by blanks they are the text again, except for runs of white space.

    A phrase ends at a punctuation mark, and before one of :data:`OPENERS` if it has :data:`SHORTEST` words.

    Example:
        >>> split_phrases("Read the review, and decide whether it is good or bad.")
        ('Read the review,', 'and decide', 'whether it is good', 'or bad.')
    """
    phrases: list[list[str]] = []
    # Whether the last phrase may take another word.
    open_phrase = False
    for word in text.split():
        starts = word.strip("\"'([").casefold() in OPENERS and open_phrase and len(phrases[-1]) >= SHORTEST
        if not open_phrase or starts:
            phrases.append([])
        phrases[-1].append(word)
        open_phrase = _ENDS.search(word) is None
    return tuple(" ".join(words) for words in phrases)


def join_phrases(phrases: Sequence[str]) -> str:
    """Returns the text that the phrases make, joined by blanks."""
    return " ".join(phrases)


@dataclass(frozen=True, eq=False)
class DraftContext:
    """The material that the edits of an episode may use, and the limits they must keep."""

    pool: tuple[Demonstration, ...] = ()
    """Demonstrations that may be added: solved inputs of the training split outside the episode's minibatch, with no
    text twice."""
    verbalizer_sets: tuple[tuple[str, ...], ...] = ()
    """The task's sets of verbalizers, in the order in which they are cycled through."""
    max_demonstrations: int = 4
    """Largest number of demonstrations of a prompt."""
    fits: Callable[[TaskPrompt], bool] = field(default=lambda prompt: True)
    """Returns whether a prompt can be scored, e.g. whether it fits into the task model's context; by default all do."""


@dataclass(frozen=True)
class PromptDraft:
    """A prompt that is being edited. Drafts are equal if their prompts are; ``str(draft)`` is the prompt's text."""

    prompt: TaskPrompt
    """The prompt as edited so far."""
    context: DraftContext = field(default_factory=DraftContext, compare=False, repr=False)
    """The material that edits may use."""
    phrases: tuple[str, ...] = field(default=(), compare=False)
    """The instruction's phrases, stored so that an edit keeps their boundaries; empty: split the instruction."""
    deleted: tuple[str, ...] = field(default=(), compare=False)
    """Phrases that were deleted and not added back, in the order of their deletion."""
    seed: int = field(default=0, compare=False)
    """Seed of the next edit's random choices."""

    def __str__(self) -> str:
        return self.prompt.text

    @property
    def instruction(self) -> str:
        """The prompt's instruction."""
        return self.prompt.instruction

    def split(self) -> tuple[str, ...]:
        """Returns the instruction's phrases, with the boundaries that the last phrase edit left."""
        return self.phrases or split_phrases(self.instruction)

    def with_prompt(self, **changes: Any) -> PromptDraft:
        """Returns the draft with fields of its prompt replaced.

        A new instruction also drops the stored phrases and the deleted ones.
        """
        if "instruction" in changes:
            return replace(self, prompt=replace(self.prompt, **changes), phrases=(), deleted=())
        return replace(self, prompt=replace(self.prompt, **changes))

    def with_phrases(self, phrases: tuple[str, ...], deleted: tuple[str, ...]) -> PromptDraft:
        """Returns the draft with the instruction that the phrases make."""
        prompt = replace(self.prompt, instruction=join_phrases(phrases))
        return replace(self, prompt=prompt, phrases=phrases, deleted=deleted)

    def next_demonstration(self) -> Demonstration | None:
        """Returns the demonstration to add, drawn by the seed among those of the pool that are not shown yet and fit.

        Returns:
            The demonstration; None if there is none, or the prompt has as many as it may.
        """
        shown = self.prompt.demonstrations
        if len(shown) >= self.context.max_demonstrations:
            return None
        texts = {demonstration.text for demonstration in shown}
        # A shuffled pass stops at the first demonstration that fits: not all of the pool has to be checked.
        for index in self._generator().permutation(len(self.context.pool)):
            demonstration = self.context.pool[index]
            if demonstration.text not in texts and self.context.fits(
                replace(self.prompt, demonstrations=(*shown, demonstration))
            ):
                return demonstration
        return None

    def swappable(self) -> list[tuple[int, int]]:
        """Returns the pairs (i, j), i < j, of demonstrations whose exchange changes the prompt."""
        shown = self.prompt.demonstrations
        return [(i, j) for j in range(len(shown)) for i in range(j) if shown[i] != shown[j]]

    def next_verbalizers(self) -> tuple[str, ...] | None:
        """Returns the next set of verbalizers in the cycle that fits; None if there is no other one."""
        sets, current = self.context.verbalizer_sets, self.prompt.verbalizers
        start = sets.index(current) + 1 if current in sets else 0
        for step in range(len(sets)):
            words = sets[(start + step) % len(sets)]
            if words != current and self.context.fits(replace(self.prompt, verbalizers=words)):
                return words
        return None

    def draw_index(self, count: int) -> int:
        """Returns an index below ``count``, drawn by the draft's seed."""
        return int(self._generator().integers(count))

    def _generator(self) -> np.random.Generator:
        # A new generator each time: mask and edit must draw the same, and a draft is immutable.
        return np.random.default_rng(self.seed)
