"""Editors: who makes minimal edits of responses, and which edits are kept as pairs for fine-grained supervision.

The data of Xu et al. 2024 (arXiv 2406.02756): the less preferred response of a preference data set is edited, by people
or by a language model, so that it becomes better and keeps most of its text.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ....llm_backends import BackendError, Completion, Sampling, request_seed, resolve
from ....llm_backends.base import PromptStyle
from ....llm_backends.errors import InputError
from ....llm_backends.parts import Part
from ....llm_backends.prompting import build_prompt, few_shot, fill, load_prompts
from ....rewards import EditedPair, Pairs, Reward, Sample, edit_labels
from ....rewards.learned.edits import ADDED, DELETED


def respaced(original: str, edited: str) -> str:
    """The edited text with the original's blanks and line ends between words that stayed or were exchanged.

    Token by token, a line end that a language model dropped while it copied is a change; nobody meant it. The white
    space before the first and after the last word is always the original's.

    Args:
        original: the text.
        edited: an edit of it, not blank.
    """
    gaps, words = _split(original)
    new_gaps, new_words = _split(edited)
    labels = edit_labels(words, new_words)
    slots = (i for i, letter in enumerate(labels.original) if letter != DELETED)
    came_from = [None if letter == ADDED else next(slots) for letter in labels.edited]  # whose place each word has
    for j in range(1, len(new_words)):
        before, here = came_from[j - 1], came_from[j]
        if here and (before == here - 1 or "\n" in gaps[here]):
            new_gaps[j] = gaps[here]
    new_gaps[0], new_gaps[-1] = gaps[0], gaps[-1]
    return "".join(gap + word for gap, word in zip(new_gaps, [*new_words, ""], strict=True))


def _split(text: str) -> tuple[list[str], list[str]]:
    """The white space before each word and behind the last, and the words."""
    pieces = re.split(r"(\S+)", text)
    return pieces[::2], pieces[1::2]


TOKENS_PER_WORD, SPARE_TOKENS = 2.0, 32
"""Room for an edit: a minimal one is about as long as its original."""


@dataclass(frozen=True)
class EditRequest:
    """One response to be edited."""

    prompt: str
    """What the response answers."""
    response: str
    """The less preferred response."""
    id: str = ""
    """Stable id, which the pair inherits."""
    seed: int = 0
    """Seed of whatever the editor draws."""
    better: str | None = None
    """The preferred response, where there is one: an editor may borrow from it."""
    finished: bool = True
    """As of :class:`~instructgym.rewards.learned.edits.EditedPair`."""


class Editor(Part, ABC):
    """Who proposes minimal edits."""

    name: str = "editor"
    """Says who edited; pairs carry it in their metadata."""

    @abstractmethod
    def propose(self, requests: Sequence[EditRequest], attempt: int = 0) -> list[str | BackendError | None]:
        """Edits a batch of responses.

        Args:
            requests: n requests.
            attempt: how many proposals for these requests were rejected already; part of what seeds the draws.

        Returns:
            n edited texts, in order; None where the editor has nothing to propose, the error where its request failed.
        """


class FunctionEditor(Editor):
    """A user's function as an editor, ``(request) -> text or None``."""

    def __init__(self, function: Callable[[EditRequest], str | None]) -> None:
        self.function = function
        self.name = f"function:{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"

    def propose(self, requests: Sequence[EditRequest], attempt: int = 0) -> list[str | BackendError | None]:
        return [self.function(request) for request in requests]


class LLMEditor(Editor):
    """Asks a language model to mend a response with as few changed words as possible.

    The first attempt decodes greedily, later ones sample. Where words are unchanged, the line ends and blanks of the
    original are restored, since models reflow what they copy. An edit that the token limit cut off is a failed request.

    Args:
        backend: the language model.
        style: ``"chat"`` asks in words, ``"completion"`` by a few demonstrations (for small base models), ``"auto"``
            takes the form that the backend needs.
        goal: ``"helpful"`` corrects answers, ``"positive"`` turns a negative tone into a positive one.
        temperature: of the attempts after the first.

    Raises:
        InputError: for an unknown style or goal.
    """

    def __init__(
        self,
        backend: Any = "embedded",
        style: Literal["auto", "chat", "completion"] = "auto",
        goal: Literal["helpful", "positive"] = "helpful",
        temperature: float = 0.7,
    ) -> None:
        tables = load_prompts(__package__, "editing")
        if style not in ("auto", "chat", "completion"):
            raise InputError(f"unknown style {style!r}: use auto, chat or completion")
        if goal not in tables:
            raise InputError(f"unknown goal {goal!r}: use {' or '.join(tables)}")
        self.backend = resolve("backend", backend)
        self.style: PromptStyle = self.backend.prompt_style if style == "auto" else style
        self.name = f"{self.backend.name}, goal {goal}"
        self._table = tables[goal]
        self._later = Sampling(temperature=temperature)  # refuses a temperature out of range now

    def propose(self, requests: Sequence[EditRequest], attempt: int = 0) -> list[str | BackendError | None]:
        if not requests:
            return []
        prompts = [self.prompt(request) for request in requests]
        samplings = [self._sampling(request, attempt) for request in requests]
        results = self.backend.generate(prompts, samplings)
        return [
            result if isinstance(result, BackendError) else self._finish(request, result[0])
            for request, result in zip(requests, results, strict=True)
        ]

    def prompt(self, request: EditRequest) -> Any:
        """The request to the language model, in the editor's style."""
        table, better = self._table, request.better
        hint, names = "", ["prompt", "response", "edited"]
        labels = ["Request", "Response", "Corrected response"]
        values = {"prompt": request.prompt, "response": request.response}
        if better is not None:
            hint = "A better response is known, from which you may borrow:\n<better>\n{better}\n</better>\n"
            values["better"] = better
            names.insert(2, "better")
            labels.insert(2, "Better response")
        shots = [[shot[name] for name in names] for shot in table["demonstrations"]]
        completion = few_shot(table["header"], labels, shots, [values[name] for name in names[:-1]])
        chat = fill(table["chat"].replace("{better}", hint), values)
        return build_prompt(self.style, chat, completion)

    def _sampling(self, request: EditRequest, attempt: int) -> Sampling:
        words = len(request.response.split())
        return replace(
            self._later,
            max_tokens=SPARE_TOKENS + math.ceil(TOKENS_PER_WORD * words),
            temperature=self._later.temperature if attempt else 0.0,
            stop=("\n",) if self.style == "completion" else (),
            seed=request_seed(request.seed, "edit", attempt),
        )

    def _finish(self, request: EditRequest, completion: Completion) -> str | BackendError:
        if completion.finish_reason == "length":
            return BackendError(f"the edit was cut off after {len(completion.token_ids)} tokens")
        return respaced(request.response, completion.text) if completion.text.strip() else ""


@dataclass(frozen=True)
class EditBounds:
    """What counts as a minimal edit, by the words that changed.

    Raises:
        InputError: on construction, for bounds out of range.
    """

    min_changed: float = 0.0
    """Share of words that more than so many have to change."""
    max_changed: float = 0.4
    """Share of words that at most so many may change: Levenshtein distance over the longer text's words."""
    max_length_ratio: float = 1.5
    """The edit has at most so many times the original's words."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_changed < self.max_changed <= 1:
            raise InputError(
                f"min_changed {self.min_changed} and max_changed {self.max_changed} must be in order, within [0, 1]"
            )
        if not 1 <= self.max_length_ratio < math.inf:
            raise InputError(f"max_length_ratio must be at least 1, got {self.max_length_ratio}")

    def reason(self, original: str, edited: str) -> str | None:
        """Why an edit is rejected: ``empty``, ``copy``, ``too long`` or ``rewrite``; None where it is not."""
        before, after = original.split(), edited.split()
        if not after:
            return "empty"
        changed = edit_labels(before, after).distance / max(len(before), len(after))
        if changed <= self.min_changed:
            return "copy"
        if len(after) > self.max_length_ratio * len(before):
            return "too long"
        return "rewrite" if changed > self.max_changed else None


@dataclass(frozen=True)
class Edited:
    """Edits that were kept, and what became of the others."""

    pairs: Pairs
    """In the order of the requests; ``pairs.dropped`` counts the reasons of what was dropped."""
    attempts: int = 0
    """Proposals asked for."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Reason to number of proposals rejected, those included that a later attempt made up for."""

    @property
    def dropped(self) -> dict[str, int]:
        """The last reason of each request without a pair, to their number."""
        return self.pairs.dropped


def edit_responses(
    editor: Any,
    requests: Sequence[EditRequest],
    bounds: EditBounds = EditBounds(),
    improves: Any | None = None,
    retries: int = 2,
) -> Edited:
    """Has responses edited and keeps the edits that are minimal and, where a reward is given, better.

    A rejected proposal is asked for again under another seed. Requests whose last proposal is rejected are dropped:
    ``empty response`` (nothing to edit, nobody is asked), ``no edit`` (the editor has none), ``failed`` (its request
    failed), ``broken text`` (half a character), ``empty``, ``copy``, ``too long``, ``rewrite`` (:class:`EditBounds`),
    ``no better``, ``no verdict``.

    Args:
        editor: an :class:`Editor`, its id, or a function of a request.
        requests: what to edit.
        bounds: what counts as minimal.
        improves: a reward, or its id: an edit has to score higher than the original. It sees the request's prompt, and
            ``better`` as the reference.
        retries: how often to ask again.

    Raises:
        InputError: for a negative number of retries.
        BackendError: the first of them, where every request failed in every attempt: that is no property of the texts.
    """
    if retries < 0:
        raise InputError(f"retries must be at least 0, got {retries}")
    editor = resolve("editor", editor)
    reward = None if improves is None else resolve("reward", improves)
    last: dict[int, str] = {i: "empty response" for i, r in enumerate(requests) if not r.response.strip()}
    open_: list[int] = [i for i in range(len(requests)) if i not in last]
    baseline: dict[int, float | None] = {}
    kept: dict[int, tuple[str, int]] = {}
    rejected: Counter[str] = Counter()
    attempts, errors = 0, []
    for attempt in range(retries + 1):
        if not open_:
            break
        asked = [requests[i] for i in open_]
        attempts += len(asked)
        reasons: dict[int, str] = {}
        proposals: dict[int, str] = {}
        for i, text in zip(open_, editor.propose(asked, attempt), strict=True):
            if isinstance(text, str):
                # A server's JSON can hold half a character, which tokenizers and files cannot.
                broken = any("\ud800" <= letter <= "\udfff" for letter in text)
                reason = "broken text" if broken else bounds.reason(requests[i].response, text)
                if reason is None:
                    proposals[i] = text
                else:
                    reasons[i] = reason
            else:
                reasons[i] = "no edit" if text is None else "failed"
                errors.extend([] if text is None else [text])
        if reward is not None:
            reasons |= _not_better(reward, requests, proposals, baseline, attempt)
        kept |= {i: (text, attempt) for i, text in proposals.items() if i not in reasons}
        rejected.update(reasons.values())
        last |= reasons
        open_ = [i for i in open_ if i in reasons]
    if errors and len(errors) == attempts:
        raise errors[0]
    pairs = [_pair(requests[i], *kept[i], editor.name) for i in sorted(kept)]
    dropped = Counter(reason for i, reason in last.items() if i not in kept)
    return Edited(Pairs(pairs, dropped), attempts, dict(rejected))


def _not_better(
    reward: Reward,
    requests: Sequence[EditRequest],
    proposals: dict[int, str],
    baseline: dict[int, float | None],
    attempt: int,
) -> dict[int, str]:
    """Reasons against proposals that the reward does not score above their originals; fills ``baseline``."""

    def sample(i: int, text: str, role: str) -> Sample:
        request = requests[i]
        seed = request_seed(request.seed, role, attempt)
        return Sample(text, request.prompt, request.better, episode_id=request.id, seed=seed)

    unscored = [i for i in proposals if baseline.get(i) is None]  # no verdict on the original: asked again
    samples = [sample(i, text, "edited") for i, text in proposals.items()]
    scores = reward.reward([*samples, *(sample(i, requests[i].response, "original") for i in unscored)])
    values = [score.value if score.valid else None for score in scores]
    baseline |= dict(zip(unscored, values[len(samples) :], strict=True))
    reasons = {}
    for i, value in zip(proposals, values[: len(samples)], strict=True):
        before = baseline[i]
        if value is None or before is None:
            reasons[i] = "no verdict"
        elif value <= before:
            reasons[i] = "no better"
    return reasons


def _pair(request: EditRequest, edited: str, attempt: int, editor: str) -> EditedPair:
    metadata = {"editor": editor, "attempt": attempt}
    return EditedPair(request.prompt, request.response, edited, request.id, request.finished, metadata)
