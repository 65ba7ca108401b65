"""Operators: what an action of the edit MDP means, and how it turns one text into the next."""

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
from ...llm_backends.parts import Part
from ...llm_backends.prompting import build_prompt, few_shot, fill, load_prompts, one_line

NO_OP = "no_op"


@dataclass(frozen=True)
class Operation:
    """One way to rewrite an instruction; ``no_op`` leaves it alone and costs nothing."""

    name: str
    summary: str
    chat: str = ""
    """Request to a chat model; ``{text}`` stands for the fenced instruction."""
    header: str = ""
    """First line of the few-shot form, for small models."""
    demonstrations: tuple[tuple[str, str], ...] = ()
    """Pairs (before, after) of the few-shot form."""

    def prompt(self, text: str, style: PromptStyle) -> Prompt:
        """The request to rewrite ``text``, in the form that the backend asks for."""
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
    """The six operations of the paper, in action order."""
    return tuple(operation.name for operation in load_operations())


def load_operations(
    names: Sequence[str] | None = None, no_op: bool = False, tables: Sequence[Mapping[str, Any]] | None = None
) -> tuple[Operation, ...]:
    """Operations by name.

    Args:
        names: which, and in which order; None for all of them, the no-op aside.
        no_op: append the operation that does nothing.
        tables: where they are described, the ``operation`` tables of a prompt file; None for TeaMs-RL's six.

    Raises:
        ValueError: for an unknown or repeated name, or no names at all.
    """
    known = _by_name(load_prompts(__package__, "operations")["operation"] if tables is None else tables)
    chosen = [name for name in known if name != NO_OP] if names is None else list(names)
    if no_op and NO_OP not in chosen:
        chosen.append(NO_OP)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(f"unknown operation {unknown[0]!r}: use {', '.join(known)}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"operations must be distinct and at least one, got {chosen}")
    return tuple(known[name] for name in chosen)


SAMPLING: dict[str, Sampling] = {
    "completion": Sampling(max_tokens=32, temperature=0.6, top_p=0.9, stop=("\n",)),
    "chat": Sampling(max_tokens=256, temperature=1.0, top_p=0.95, top_k=40),
}
"""Defaults by prompt style. Chat: the paper's. Completion: what SmolLM2-135M edits best with."""

TOKENS_PER_WORD = 1.4
"""Room for the text itself: a rewrite repeats most of it before it adds anything."""


@dataclass(frozen=True)
class Edit:
    """What an action asks for on a given text."""

    operation: int
    """Index into the operator's operations."""
    prompt: Prompt | None = None
    """Request to the rewriter; None if a rule made the result."""
    sampling: Sampling | None = None
    result: Any = None
    """The new text (or document), where no request is needed."""


DocumentT = TypeVar("DocumentT")
"""What is edited: a text, or an object whose ``str()`` is its text."""


class Operator(Part, ABC, Generic[DocumentT]):
    """The actions of a :class:`~instructgym.envs.edit.env.TextEditEnv`."""

    action_space: spaces.Space[Any]
    operations: tuple[str, ...]
    """Names of the operations, for logs and for the one-hot of the last edit."""

    @abstractmethod
    def plan(self, action: Any, text: DocumentT, style: PromptStyle) -> Edit:
        """What the action asks for; ``style`` is the form of prompt that the rewriter needs."""

    @abstractmethod
    def finish(self, edit: Edit, text: DocumentT, completions: Sequence[Completion]) -> DocumentT:
        """The new text, from the rewriter's replies to ``edit.prompt``; ``text`` itself where none is usable."""

    def mask(self, text: DocumentT) -> np.ndarray:
        """int8: 1 where an action is possible on this text.

        One entry per action of a ``Discrete`` space; for ``MultiDiscrete`` one per value of each dimension in turn,
        shape (sum of ``nvec``,), as MaskablePPO reads it; a single 1 for other spaces.
        """
        return np.ones(self.mask_size, dtype=np.int8)

    @property
    def mask_size(self) -> int:
        """Entries of a mask."""
        return int(np.sum(getattr(self.action_space, "nvec", getattr(self.action_space, "n", 1))))

    def possible(self, action: Any, text: DocumentT) -> bool:
        """Whether the mask lets an action through, in every dimension that it has."""
        if isinstance(self.action_space, spaces.Discrete | spaces.MultiDiscrete):
            sizes = np.atleast_1d(getattr(self.action_space, "nvec", 0))
            entries = np.atleast_1d(action) + np.concatenate([[0], np.cumsum(sizes)[:-1]])
            return bool(self.mask(text)[entries.astype(np.int64)].all())
        return True

    def operation_of(self, action: Any) -> int:
        """Index into ``operations`` of the operation that an action names."""
        return 0 if isinstance(action, str) else int(np.atleast_1d(action)[0])


class LLMOperator(Operator[str]):
    """One operation per action, carried out by a language model.

    Args:
        operations: names of operations in action order; None for the six of TeaMs-RL.
        no_op: append a seventh action that leaves the text alone and calls nobody.
        candidates: rewrites drawn per edit; the one with the highest mean token log-prob is taken.
        sampling: sampling parameters that replace the defaults of the prompt style, e.g. ``{"temperature": 1.0}``.
        max_words: on texts longer than this only operations that need not lengthen it (breadth, no-op) are possible.

    Raises:
        ValueError: for an unknown operation, a count below 1, or a sampling parameter that does not exist.
    """

    SHRINKING = frozenset({"breadth", NO_OP})

    def __init__(
        self,
        operations: Sequence[str] | None = None,
        no_op: bool = False,
        candidates: int = 1,
        sampling: Mapping[str, Any] | None = None,
        max_words: int = 200,
    ) -> None:
        if candidates < 1 or max_words < 1:
            raise ValueError(f"candidates and max_words must be at least 1, got {candidates} and {max_words}")
        self._operations = load_operations(operations, no_op)
        self.operations = tuple(operation.name for operation in self._operations)
        self.action_space = spaces.Discrete(len(self.operations))
        self.max_words = max_words
        self._requests = RewriteRequests(candidates, sampling)

    def operation(self, action: Any) -> Operation:
        """The operation behind an action."""
        return self._operations[int(action)]

    def plan(self, action: Any, text: str, style: PromptStyle) -> Edit:
        operation = self.operation(action)
        if operation.name == NO_OP:
            return Edit(int(action), result=text)
        return Edit(int(action), operation.prompt(text, style), self._requests.sampling(text, style))

    def finish(self, edit: Edit, text: str, completions: Sequence[Completion]) -> str:
        """The most likely candidate of which something is left after :func:`tidy`."""
        return best_reply(completions) or text

    def mask(self, text: str) -> np.ndarray:
        if len(text.split()) <= self.max_words:
            return np.ones(len(self.operations), dtype=np.int8)
        return np.array([name in self.SHRINKING for name in self.operations], dtype=np.int8)


class RewriteRequests:
    """How rewrites are sampled: :data:`SAMPLING` with room for the text itself.

    Args:
        candidates: rewrites drawn per request.
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
        """The parameters of a request to rewrite ``text``."""
        chosen = self._sampling[style]
        return replace(chosen, max_tokens=chosen.max_tokens + math.ceil(TOKENS_PER_WORD * len(text.split())))


def best_reply(completions: Sequence[Completion]) -> str:
    """The most likely completion of which something is left after :func:`tidy`; empty where nothing is left of any."""
    candidates = [(c.mean_logprob, tidy(c.text, cut=c.finish_reason == "length")) for c in completions]
    usable = [(score, reply) for score, reply in candidates if reply]
    return max(usable, key=lambda candidate: candidate[0])[1] if usable else ""


def tidy(reply: str, cut: bool = False) -> str:
    """A rewriter's reply without repeated sentences and, where it was cut off, without its unfinished last one.

    Small models run into loops of one sentence; what stands before the loop is often a good edit. Line ends are kept.

    Args:
        reply: the reply.
        cut: it ended at the token limit.
    """
    pieces = re.split(r"(?<=[.!?])(\s+)", reply.strip())
    sentences, gaps = pieces[::2], [*pieces[1::2], ""]
    if cut and not re.search(r"[.!?][\"')\]]*$", sentences[-1]):
        sentences.pop()
    seen: set[str] = set()
    kept = []
    for sentence, gap in zip(sentences, gaps, strict=False):
        key = one_line(sentence).casefold()
        if key not in seen:
            seen.add(key)
            kept.append(sentence + gap)
    return "".join(kept).strip()
