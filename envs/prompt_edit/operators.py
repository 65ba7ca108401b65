"""Holds the operators on prompts: edits of the whole prompt, edits of phrases, and free text.

The documents that they edit are in :mod:`~instructgym.envs.prompt_edit.drafts`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from ...llm_backends import Completion
from ...llm_backends.base import PromptStyle
from ...llm_backends.errors import check_at_least, check_known
from ...llm_backends.prompting import build_prompt, few_shot, fill, load_prompts
from ...rewards.prompt_scoring.task_prompt import encodable
from ..edit.operators import NO_OP, Edit, Operator, RewriteRequests, best_reply, load_operations
from ..process import Unicode
from ..tasks.prompt_search.tasks import PromptTask
from .drafts import PromptDraft

PROMPT_FILE = "prompt_edits"
"""Name of the prompt file of the operations."""


class PromptOperator(Operator[PromptDraft]):
    """A definition of the actions of ``instructgym/EditPrompt-v0``.

    A mask entry is 0 if the edit is impossible on the draft, and for no other reason. An edit that the mask admits
    changes the prompt, except for the no-op and for a rewriter that replies nothing new.
    """

    @abstractmethod
    def plan(self, action: Any, text: PromptDraft, style: PromptStyle) -> Edit:
        """Returns the edit that an action means; edits by rule have the new draft as their result."""

    def finish(self, edit: Edit, text: PromptDraft, completions: Sequence[Completion]) -> PromptDraft:
        """Returns the draft with the most likely usable reply as its instruction, else the draft itself."""
        reply = best_reply(completions)
        # A reply that UTF-8 cannot encode, with a lone surrogate, could not be sent to the task model.
        new = bool(reply) and reply != text.instruction and encodable(reply)
        return text.with_prompt(instruction=reply) if new else text


class PromptEdits(PromptOperator):
    """An operator with one edit of the whole prompt per action; the action space is ``Discrete(n)``.

    ``rephrase``, ``shorten``, ``add_constraint``: an LLM rewrites the instruction, if there is one.
    ``add_demonstration``: adds one of the training split, drawn among those that are not shown.
    ``swap_demonstrations``: exchanges two that are shown, drawn. ``drop_demonstration``: removes one, drawn; impossible
    for the only one in a prompt without instruction. ``swap_verbalizers``: takes the task's next set. ``no_op``, always
    among the actions and by default the last: leaves the prompt alone and calls no LLM, so that some action is always
    possible.

    Args:
        operations: names of the operations, in action order; None for all seven. ``no_op`` is appended if missing.
        candidates: number of rewrites sampled per edit; the one with the highest mean token log-prob is used.
        sampling: sampling parameters that replace the defaults of the prompt style.

    Raises:
        ValueError: for an unknown operation, a count below 1, or a sampling parameter that does not exist.
    """

    def __init__(
        self, operations: Sequence[str] | None = None, candidates: int = 1, sampling: Mapping[str, Any] | None = None
    ) -> None:
        check_at_least(1, candidates=candidates)
        self._operations = load_operations(
            operations, no_op=True, tables=load_prompts(__package__, PROMPT_FILE)["operation"]
        )
        self.operations = tuple(operation.name for operation in self._operations)
        self.action_space = spaces.Discrete(len(self.operations))
        self._requests = RewriteRequests(candidates, sampling)

    def plan(self, action: Any, text: PromptDraft, style: PromptStyle) -> Edit:
        index = int(action)
        operation = self._operations[index]
        if operation.chat:
            sampling = self._requests.sampling(text.instruction, style)
            return Edit(index, operation.prompt(text.instruction, style), sampling)
        return Edit(index, result=self._rule(operation.name, text) or text)

    def mask(self, text: PromptDraft) -> np.ndarray:
        possible = [
            bool(text.instruction.strip()) if operation.chat else self._rule(operation.name, text) is not None
            for operation in self._operations
        ]
        return np.array(possible, dtype=np.int8)

    @staticmethod
    def _rule(name: str, draft: PromptDraft) -> PromptDraft | None:
        """Returns the draft after an edit that needs no LLM; None if the edit is impossible."""
        shown = list(draft.prompt.demonstrations)
        if name == "add_demonstration":
            added = draft.next_demonstration()
            return None if added is None else draft.with_prompt(demonstrations=(*shown, added))
        if name == "drop_demonstration":
            # A prompt needs an instruction or a demonstration.
            if not shown or (len(shown) == 1 and not draft.instruction.strip()):
                return None
            del shown[draft.draw_index(len(shown))]
            return draft.with_prompt(demonstrations=tuple(shown))
        if name == "swap_demonstrations":
            pairs = draft.swappable()
            if not pairs:
                return None
            i, j = pairs[draft.draw_index(len(pairs))]
            shown[i], shown[j] = shown[j], shown[i]
            return draft.with_prompt(demonstrations=tuple(shown))
        if name == "swap_verbalizers":
            words = draft.next_verbalizers()
            return None if words is None else draft.with_prompt(verbalizers=words)
        return draft


class PhraseEdits(PromptOperator):
    """An operator that edits single phrases of the instruction, without a rewriter.

    The action space is ``MultiDiscrete([4, positions])``: an operation and the position of a phrase. ``delete`` removes
    the phrase, unless it is the only one; ``swap`` exchanges it with the next one, and the last with the first;
    ``add_back`` inserts the phrase that was deleted last after it; ``no_op`` leaves the prompt alone. These are edits
    of GrIPS (Prasad et al. 2023) and TEMPERA (Zhang et al. 2023); phrases are those of
    :func:`~instructgym.envs.prompt_edit.drafts.split_phrases`.

    The mask has one entry per operation, then one per position, as MaskablePPO expects it. All positions of an
    instruction admit the same operations, so every pair that the mask admits is possible, with one exception: swapping
    two equal phrases, while others differ, leaves the prompt as it was.

    Args:
        positions: number of phrases that actions can select; those after them cannot be edited.

    Raises:
        InputError: for fewer than one position.
    """

    operations = ("delete", "swap", "add_back", NO_OP)

    def __init__(self, positions: int = 16) -> None:
        check_at_least(1, positions=positions)
        self.positions = positions
        self.action_space = spaces.MultiDiscrete([len(self.operations), positions])

    def plan(self, action: Any, text: PromptDraft, style: PromptStyle) -> Edit:
        operation, position = (int(value) for value in action)
        return Edit(operation, result=self._edited(self.operations[operation], position, text))

    def mask(self, text: PromptDraft) -> np.ndarray:
        count = len(text.split())
        reach = min(count, self.positions)
        possible = {
            "delete": count > 1,
            "swap": any(self._edited("swap", position, text).split() != text.split() for position in range(reach)),
            "add_back": bool(text.deleted) and text.context.fits(self._edited("add_back", 0, text).prompt),
            NO_OP: True,
        }
        # Without a phrase the first position is on for the no-op, so that no dimension of the mask is all zeros.
        positions = [position < max(count, 1) for position in range(self.positions)]
        return np.array([*(possible[name] for name in self.operations), *positions], dtype=np.int8)

    @staticmethod
    def _edited(name: str, position: int, draft: PromptDraft) -> PromptDraft:
        phrases, deleted = list(draft.split()), draft.deleted
        if name == "delete":
            deleted = (*deleted, phrases.pop(position))
        elif name == "swap":
            other = (position + 1) % len(phrases)
            phrases[position], phrases[other] = phrases[other], phrases[position]
        elif name == "add_back":
            phrases.insert(position + 1, deleted[-1])
            deleted = deleted[:-1]
        else:
            return draft
        return draft.with_phrases(tuple(phrases), deleted)


class FreeText(PromptOperator):
    """An operator whose action is any text: a new instruction, or a request to the rewriter to change it.

    Args:
        by: ``caller``: the action is the new instruction, and an action without letters or digits is impossible;
            ``llm``: the action tells the rewriter how to change the instruction, for instance with the feedback in
            ``info``; an empty action leaves the change to the rewriter.
        candidates: number of rewrites sampled per edit; the one with the highest mean token log-prob is used.
        sampling: sampling parameters that replace the defaults of the prompt style.

    Raises:
        ValueError: for any other ``by``, a count below 1, or a sampling parameter that does not exist.
    """

    operations = ("rewrite",)

    def __init__(self, by: str = "caller", candidates: int = 1, sampling: Mapping[str, Any] | None = None) -> None:
        check_known("writer of free text", by, ("caller", "llm"))
        check_at_least(1, candidates=candidates)
        self.by = by
        self.action_space = Unicode()
        self._requests = RewriteRequests(candidates, sampling)

    def plan(self, action: Any, text: PromptDraft, style: PromptStyle) -> Edit:
        if self.by == "caller":
            return Edit(0, result=text.with_prompt(instruction=action.strip()))
        texts = load_prompts(__package__, PROMPT_FILE)["rewrite"]
        request = action.strip() or texts["default"]
        labels = ("Instruction", "Change", "New instruction")
        shots = [(shot["before"], shot["change"], shot["after"]) for shot in texts["demonstrations"]]
        completion = few_shot(texts["header"], labels, shots, [text.instruction, request])
        chat = fill(texts["chat"], {"text": text.instruction, "request": request})
        return Edit(0, build_prompt(style, chat, completion), self._requests.sampling(text.instruction, style))

    def possible(self, action: Any, text: PromptDraft) -> bool:
        """Returns whether UTF-8 can encode the action and, if it is the instruction, it has a letter or digit."""
        return encodable(action) and (self.by == "llm" or any(letter.isalnum() for letter in action))


def verbalizer_sets(task: PromptTask) -> tuple[tuple[str, ...], ...]:
    """Returns the task's own verbalizers, then the package's other sets for labels of these names; none twice."""
    names = [label.casefold() for label in task.labels]
    sets = [task.verbalizers]
    for table in load_prompts(__package__, PROMPT_FILE)["verbalizers"]:
        if sorted(table["labels"]) == sorted(names):
            # The table may list the labels in another order than the task.
            places = [table["labels"].index(name) for name in names]
            sets += [tuple(words[place] for place in places) for words in table["sets"]]
    return tuple(dict.fromkeys(sets))
