"""Holds the operators of the edit MDP: what an action means, and how it turns one text into the next.

An :class:`Operator` plans an :class:`Edit` for an action, which is either a result or a request to the rewriter, and
finishes it with the rewriter's replies. :class:`LLMOperator` is that of TeaMs-RL.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
from gymnasium import spaces

from ...llm_backends import Completion, Sampling
from ...llm_backends.base import Prompt, PromptStyle
from ...llm_backends.errors import check_at_least, check_known
from ...llm_backends.parts import Part
from ...llm_backends.prompting import build_prompt, few_shot, fill, load_prompts, one_line

NO_OP = "no_op"
"""Name of the operation that leaves the text alone and calls no LLM."""


@dataclass(frozen=True)
class Operation:
    """One way to rewrite an instruction; ``no_op`` leaves it alone and costs nothing."""

    name: str
    """Name of the operation."""
    summary: str
    """What the operation does, in one sentence."""
    chat: str = ""
    """Request to a chat model, with ``{text}`` in the place of the fenced instruction."""
    header: str = ""
    """First line of the few-shot form, which small models need."""
    demonstrations: tuple[tuple[str, str], ...] = ()
    """Pairs (before, after) of the few-shot form."""

    def prompt(self, text: str, style: PromptStyle) -> Prompt:
        """Returns the request to rewrite ``text`` in the prompt style of the backend."""
        shots = few_shot(self.header, ("Instruction", "New instruction"), self.demonstrations, [text])
        return build_prompt(style, fill(self.chat, {"text": text}), shots)


def _by_name(tables: Sequence[Mapping[str, Any]]) -> dict[str, Operation]:
    return {
        table["name"]: Operation(
            **{k: v for k, v in table.items() if k != "demonstrations"},
            demonstrations=tuple((shot["before"], shot["after"]) for shot in table.get("demonstrations", ())),
        )
        for table in tables
    }


def operation_names() -> tuple[str, ...]:
    """Returns the names of the paper's six operations, in action order."""
    return tuple(operation.name for operation in load_operations())


def load_operations(
    names: Sequence[str] | None = None, no_op: bool = False, tables: Sequence[Mapping[str, Any]] | None = None
) -> tuple[Operation, ...]:
    """Returns operations by name.

    Args:
        names: names of the operations, in action order; None for all except the no-op.
        no_op: whether to append the operation that does nothing.
        tables: the ``operation`` tables of a prompt file, which describe the operations; None for TeaMs-RL's.

    Raises:
        ValueError: for an unknown or repeated name, or no names at all.
    """
    known = _by_name(load_prompts(__package__, "operations")["operation"] if tables is None else tables)
    selected = [name for name in known if name != NO_OP] if names is None else list(names)
    if no_op and NO_OP not in selected:
        selected.append(NO_OP)
    for name in selected:
        check_known("operation", name, known)
    if not selected or len(set(selected)) < len(selected):
        raise ValueError(f"operations must be distinct and at least one, got {selected}")
    return tuple(known[name] for name in selected)


SAMPLING: dict[str, Sampling] = {
    "completion": Sampling(max_tokens=32, temperature=0.6, top_p=0.9, stop=("\n",)),
    "chat": Sampling(max_tokens=256, temperature=1.0, top_p=0.95, top_k=40),
}
"""Default sampling parameters by prompt style: ``chat``: those of the paper; ``completion``: those that SmolLM2-135M
edits best with. :data:`TOKENS_PER_WORD` is added to ``max_tokens`` for each word of the text."""

TOKENS_PER_WORD = 1.4
"""Tokens per word of the text that a rewrite gets on top: it repeats most of the text before it adds anything."""


@dataclass(frozen=True)
class Edit:
    """The edit that an action means on one text: a finished result, or a request to the rewriter."""

    operation: int
    """Index into the operator's operations."""
    prompt: Prompt | None = None
    """Request to the rewriter; None if no request is needed."""
    sampling: Sampling | None = None
    """Sampling parameters of the request."""
    result: Any = None
    """The new text (or document) if no request is needed; None leaves it as it is."""


DocumentT = TypeVar("DocumentT")
"""Type of what is edited: a text, or an object whose ``str()`` is its text."""


class Operator(Part, ABC, Generic[DocumentT]):
    """A definition of the actions of a :class:`~instructgym.envs.edit.env.TextEditEnv`."""

    action_space: spaces.Space[Any]
    """The action space of the env."""
    operations: tuple[str, ...]
    """Names of the operations, for logs and for the one-hot of the last edit."""

    @abstractmethod
    def plan(self, action: Any, text: DocumentT, style: PromptStyle) -> Edit:
        """Returns the edit that an action means.

        Args:
            action: an element of the action space.
            text: the text to edit.
            style: the prompt style of the rewriter.
        """

    @abstractmethod
    def finish(self, edit: Edit, text: DocumentT, completions: Sequence[Completion]) -> DocumentT:
        """Returns the new text.

        Args:
            edit: the edit that :meth:`plan` returned.
            text: the text to edit.
            completions: the rewriter's replies to ``edit.prompt``.

        Returns:
            The new text; ``text`` itself if no reply is usable.
        """

    def mask(self, text: DocumentT) -> np.ndarray:
        """Returns the mask of the actions that are possible on a text: int8, 1 where possible.

        It has one entry per action of a ``Discrete`` space; for ``MultiDiscrete`` one per value of each dimension in
        turn, shape (sum of ``nvec``,), as MaskablePPO expects it; for other spaces a single 1.
        """
        return np.ones(self.mask_size, dtype=np.int8)

    @property
    def mask_size(self) -> int:
        """Number of entries of a mask."""
        return int(np.sum(getattr(self.action_space, "nvec", getattr(self.action_space, "n", 1))))

    def possible(self, action: Any, text: DocumentT) -> bool:
        """Returns whether the mask admits an action, in each of its dimensions."""
        if isinstance(self.action_space, spaces.Discrete | spaces.MultiDiscrete):
            # The mask lists the values of each dimension in turn: a dimension starts where those before it end.
            sizes = np.atleast_1d(getattr(self.action_space, "nvec", 0))
            entries = np.atleast_1d(action) + np.concatenate([[0], np.cumsum(sizes)[:-1]])
            return bool(self.mask(text)[entries.astype(np.int64)].all())
        return True

    def operation_of(self, action: Any) -> int:
        """Returns the index into ``operations`` that an action selects: its first component, 0 for a text."""
        return 0 if isinstance(action, str) else int(np.atleast_1d(action)[0])


class LLMOperator(Operator[str]):
    """An operator with one operation per action, each carried out by a language model.

    Args:
        operations: names of the operations, in action order; None for the six of TeaMs-RL.
        no_op: whether to append an action that leaves the text alone and calls no LLM.
        candidates: number of rewrites sampled per edit; the one with the highest mean token log-prob is used.
        sampling: sampling parameters that replace the defaults of the prompt style, e.g. ``{"temperature": 1.0}``.
        max_words: number of words beyond which only operations that need not lengthen a text (breadth, no-op) are
            possible.

    Raises:
        ValueError: for an unknown operation, a count below 1, or a sampling parameter that does not exist.
    """

    SHRINKING = frozenset({"breadth", NO_OP})
    """Operations that need not lengthen a text."""

    def __init__(
        self,
        operations: Sequence[str] | None = None,
        no_op: bool = False,
        candidates: int = 1,
        sampling: Mapping[str, Any] | None = None,
        max_words: int = 200,
    ) -> None:
        check_at_least(1, candidates=candidates, max_words=max_words)
        self._operations = load_operations(operations, no_op)
        self.operations = tuple(operation.name for operation in self._operations)
        self.action_space = spaces.Discrete(len(self.operations))
        self.max_words = max_words
        self._requests = RewriteRequests(candidates, sampling)

    def operation(self, action: Any) -> Operation:
        """Returns the operation of an action."""
        return self._operations[int(action)]

    def plan(self, action: Any, text: str, style: PromptStyle) -> Edit:
        operation = self.operation(action)
        if operation.name == NO_OP:
            return Edit(int(action), result=text)
        return Edit(int(action), operation.prompt(text, style), self._requests.sampling(text, style))

    def finish(self, edit: Edit, text: str, completions: Sequence[Completion]) -> str:
        """Returns the most likely reply that :func:`tidy` leaves non-empty; ``text`` itself if there is none."""
        return best_reply(completions) or text

    def mask(self, text: str) -> np.ndarray:
        if len(text.split()) <= self.max_words:
            return np.ones(len(self.operations), dtype=np.int8)
        return np.array([name in self.SHRINKING for name in self.operations], dtype=np.int8)


class RewriteRequests:
    """Sampling parameters of rewrites: :data:`SAMPLING`, with tokens added for the length of the text.

    Args:
        candidates: number of rewrites sampled per request.
        sampling: sampling parameters that replace the defaults of the prompt style.

    Raises:
        ValueError: for a sampling parameter that does not exist or is out of range.
    """

    def __init__(self, candidates: int = 1, sampling: Mapping[str, Any] | None = None) -> None:
        try:
            overrides = dict(sampling or {}) | {"n": candidates}
            self._sampling = {style: replace(default, **overrides) for style, default in SAMPLING.items()}
        except TypeError as error:
            raise ValueError(f"unknown sampling parameter in {dict(sampling or {})}: {error}") from error

    def sampling(self, text: str, style: PromptStyle) -> Sampling:
        """Returns the sampling parameters of a request to rewrite ``text``."""
        base = self._sampling[style]
        return replace(base, max_tokens=base.max_tokens + math.ceil(TOKENS_PER_WORD * len(text.split())))


def best_reply(completions: Sequence[Completion]) -> str:
    """Returns the text of the most likely completion that :func:`tidy` leaves non-empty; empty if there is none."""
    candidates = [(c.mean_logprob, tidy(c.text, cut=c.finish_reason == "length")) for c in completions]
    usable = [(score, reply) for score, reply in candidates if reply]
    # ``max`` returns the first of equal scores, so the order of the completions breaks ties.
    return max(usable, key=lambda candidate: candidate[0])[1] if usable else ""


def tidy(reply: str, cut: bool = False) -> str:
    """Returns a rewriter's reply without repeated sentences and, if it was cut off, without its unfinished last one.

    Small models run into loops of one sentence; the text before the loop is often a good edit. Line ends are kept.

    Args:
        reply: the reply.
        cut: whether the reply ended at the token limit.
    """
    # The split has a capture group: sentences alternate with the white space between them.
    pieces = re.split(r"(?<=[.!?])(\s+)", reply.strip())
    sentences, gaps = pieces[::2], [*pieces[1::2], ""]
    # A cut reply ends inside a sentence, unless the last one has its end mark.
    if cut and not re.search(r"[.!?][\"')\]]*$", sentences[-1]):
        sentences.pop()
    seen: set[str] = set()
    unique = []
    for sentence, gap in zip(sentences, gaps, strict=False):
        key = one_line(sentence).casefold()
        if key not in seen:
            seen.add(key)
            unique.append(sentence + gap)
    return "".join(unique).strip()
