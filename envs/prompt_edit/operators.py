"""Operators on prompts: LLM and demonstration edits, phrase edits, and free text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from ...llm_backends import Completion
from ...llm_backends.base import PromptStyle
from ...llm_backends.errors import InputError
from ...llm_backends.prompting import build_prompt, few_shot, fill, load_prompts
from ...rewards.prompt_scoring.task_prompt import encodable
from ..edit.operators import NO_OP, Edit, Operator, RewriteRequests, best_reply, load_operations
from ..process import Unicode
from ..tasks.prompt_search.tasks import PromptTask
from .drafts import PromptDraft

FILE = "prompt_edits"


class PromptOperator(Operator[PromptDraft]):
    """The actions of ``instructgym/EditPrompt-v0``.

    A mask of 0 stands for an edit that is impossible on the draft and for nothing else; whatever it lets through
    changes the prompt, but for the no-op and for a rewriter that answers nothing new.
    """

    @abstractmethod
    def plan(self, action: Any, text: PromptDraft, style: PromptStyle) -> Edit:
        """What the action asks for; rules give the new draft at once."""

    def finish(self, edit: Edit, text: PromptDraft, completions: Sequence[Completion]) -> PromptDraft:
        """The draft with the most likely usable reply as its instruction."""
        reply = best_reply(completions)
        new = bool(reply) and reply != text.instruction and encodable(reply)
        return text.with_prompt(instruction=reply) if new else text


class PromptEdits(PromptOperator):
    """``Discrete(n)``: one edit of the whole prompt per action.

    ``rephrase``, ``shorten``, ``add_constraint``: an LLM rewrites the instruction, where there is one.
    ``add_demonstration``: one of the training split, drawn among those not shown. ``swap_demonstrations``,
    ``drop_demonstration``: two of them, or one, drawn; the last one stays in a prompt without instruction.
    ``swap_verbalizers``: the task's next set. ``no_op``, always the last: leaves the prompt alone and costs nothing, so
    that some action is always possible.

    Args:
        operations: names in action order; None for all seven.
        candidates: rewrites drawn per edit; the one with the highest mean token log-prob is taken.
        sampling: sampling parameters that replace the defaults of the prompt style.

    Raises:
        ValueError: for an unknown operation, a count below 1, or a sampling parameter that does not exist.
    """

    def __init__(
        self,
        operations: Sequence[str] | None = None,
        candidates: int = 1,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        if candidates < 1:
            raise InputError(f"candidates must be at least 1, got {candidates}")
        self._operations = load_operations(operations, no_op=True, tables=load_prompts(__package__, FILE)["operation"])
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
        can = [
            bool(text.instruction.strip()) if one.chat else self._rule(one.name, text) is not None
            for one in self._operations
        ]
        return np.array(can, dtype=np.int8)

    @staticmethod
    def _rule(name: str, draft: PromptDraft) -> PromptDraft | None:
        """The draft after an edit that needs no LLM; None where it is impossible."""
        shown = list(draft.prompt.demonstrations)
        if name == "add_demonstration":
            added = draft.next_demonstration()
            return None if added is None else draft.with_prompt(demonstrations=(*shown, added))
        if name == "drop_demonstration":
            if not shown or (len(shown) == 1 and not draft.instruction.strip()):  # nothing would be left
                return None
            del shown[draft.draw(len(shown))]
            return draft.with_prompt(demonstrations=tuple(shown))
        if name == "swap_demonstrations":
            pairs = draft.swappable()
            if not pairs:
                return None
            i, j = pairs[draft.draw(len(pairs))]
            shown[i], shown[j] = shown[j], shown[i]
            return draft.with_prompt(demonstrations=tuple(shown))
        if name == "swap_verbalizers":
            words = draft.next_verbalizers()
            return None if words is None else draft.with_prompt(verbalizers=words)
        return draft


class PhraseEdits(PromptOperator):
    """``MultiDiscrete[operation, position]``: edits of the instruction's phrases, without a rewriter.

    ``delete`` takes the phrase out, unless it is the only one; ``swap`` exchanges it with the next one, the last with
    the first; ``add_back`` puts the phrase that was deleted last behind it; ``no_op`` leaves the prompt alone. The
    edits of GrIPS (Prasad et al. 2023) and TEMPERA (Zhang et al. 2023); phrases are those of
    :func:`~instructgym.envs.prompt_edit.drafts.split_phrases`.

    The mask has one entry per operation, then one per position, as MaskablePPO reads it. All positions of an
    instruction admit the same operations, so no pair that it lets through is impossible, with one exception: swapping
    two equal phrases, where others differ, leaves the prompt as it was.

    Args:
        positions: phrases that can be named; those behind them are out of reach.

    Raises:
        InputError: for fewer than one position.
    """

    operations = ("delete", "swap", "add_back", NO_OP)

    def __init__(self, positions: int = 16) -> None:
        if positions < 1:
            raise InputError(f"positions must be at least 1, got {positions}")
        self.positions = positions
        self.action_space = spaces.MultiDiscrete([len(self.operations), positions])

    def plan(self, action: Any, text: PromptDraft, style: PromptStyle) -> Edit:
        operation, position = (int(value) for value in action)
        return Edit(operation, result=self._edited(self.operations[operation], position, text))

    def mask(self, text: PromptDraft) -> np.ndarray:
        count = len(text.split())
        reach = min(count, self.positions)
        can = {
            "delete": count > 1,
            "swap": any(self._edited("swap", position, text).split() != text.split() for position in range(reach)),
            "add_back": bool(text.deleted) and text.context.fits(self._edited("add_back", 0, text).prompt),
            NO_OP: True,
        }
        # Without a phrase the first position is on for the no-op, so that each dimension has something to choose.
        positions = [position < max(count, 1) for position in range(self.positions)]
        return np.array([*(can[name] for name in self.operations), *positions], dtype=np.int8)

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
    """Any text: a new instruction, the caller's own or a rewriter's.

    Args:
        by: ``caller``: the action is the new instruction, and an action without letters or digits is impossible;
            ``llm``: the action says how to change the instruction (the feedback in ``info``, or what someone made of
            it), and the rewriter does so; without text it is free to choose.
        candidates: rewrites drawn per edit; the one with the highest mean token log-prob is taken.
        sampling: sampling parameters that replace the defaults of the prompt style.

    Raises:
        ValueError: for anything else, a count below 1, or a sampling parameter that does not exist.
    """

    operations = ("rewrite",)

    def __init__(self, by: str = "caller", candidates: int = 1, sampling: Mapping[str, Any] | None = None) -> None:
        if by not in ("caller", "llm"):
            raise InputError(f"free text is written by 'caller' or 'llm', got {by!r}")
        if candidates < 1:
            raise InputError(f"candidates must be at least 1, got {candidates}")
        self.by = by
        self.action_space = Unicode()
        self._requests = RewriteRequests(candidates, sampling)

    def plan(self, action: Any, text: PromptDraft, style: PromptStyle) -> Edit:
        if self.by == "caller":
            return Edit(0, result=text.with_prompt(instruction=action.strip()))
        texts = load_prompts(__package__, FILE)["rewrite"]
        request = action.strip() or texts["default"]
        labels = ("Instruction", "Change", "New instruction")
        shots = [(shot["before"], shot["change"], shot["after"]) for shot in texts["demonstrations"]]
        completion = few_shot(texts["header"], labels, shots, [text.instruction, request])
        chat = fill(texts["chat"], {"text": text.instruction, "request": request})
        return Edit(0, build_prompt(style, chat, completion), self._requests.sampling(text.instruction, style))

    def possible(self, action: Any, text: PromptDraft) -> bool:
        """Whether the text can be an instruction: one with something to read in it, that UTF-8 can say."""
        return encodable(action) and (self.by == "llm" or any(letter.isalnum() for letter in action))


def verbalizer_sets(task: PromptTask) -> tuple[tuple[str, ...], ...]:
    """The task's verbalizers, then the packaged alternatives for labels of these names."""
    names = [label.casefold() for label in task.labels]
    sets = [task.verbalizers]
    for table in load_prompts(__package__, FILE)["verbalizers"]:
        if sorted(table["labels"]) == sorted(names):
            places = [table["labels"].index(name) for name in names]
            sets += [tuple(words[place] for place in places) for words in table["sets"]]
    return tuple(dict.fromkeys(sets))
