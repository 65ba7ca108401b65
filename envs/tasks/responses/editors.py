"""Editors, which propose minimal edits of responses, and the selection of edits for fine-grained supervision.

The idea is that of Xu et al. 2024 (arXiv 2406.02756): the less preferred response of a preference data set is edited,
by people or by a language model, so that it becomes better and keeps most of its text. The pairs are those of
:mod:`~instructgym.rewards.learned.edits`.
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
from ....llm_backends.errors import InputError, check_at_least, check_known
from ....llm_backends.parts import Part
from ....llm_backends.prompting import build_prompt, few_shot, fill, load_prompts
from ....rewards import EditedPair, Pairs, Reward, Sample, edit_labels
from ....rewards.base import scores_of
from ....rewards.learned.edits import ADDED, DELETED


def respaced(original: str, edited: str) -> str:
    """Restores the original's white space in an edited text, between words that are unchanged or substituted.

    A line end that a language model dropped while copying would count as an edit of a token, although it was not meant
    as one. The white space before the first and after the last word is always the original's.

    Args:
        original: the text.
        edited: an edit of it, not blank.
    """
    gaps, words = _split(original)
    new_gaps, new_words = _split(edited)
    labels = edit_labels(words, new_words)
    # The k-th word of the edit that was not added has the place of the k-th word of the original that was not deleted.
    slots = (i for i, letter in enumerate(labels.original) if letter != DELETED)
    came_from = [None if letter == ADDED else next(slots) for letter in labels.edited]
    for j in range(1, len(new_words)):
        before, here = came_from[j - 1], came_from[j]
        # Neighbours keep the gap between them; a line end before a word is kept whatever precedes the word. `here` is
        # None for an added word, and 0 for the original's first word, which has no gap between words before it.
        if here and (before == here - 1 or "\n" in gaps[here]):
            new_gaps[j] = gaps[here]
    new_gaps[0], new_gaps[-1] = gaps[0], gaps[-1]
    return "".join(gap + word for gap, word in zip(new_gaps, [*new_words, ""], strict=True))


def _split(text: str) -> tuple[list[str], list[str]]:
    """Splits a text into the white space before each word and after the last one, and the words."""
    pieces = re.split(r"(\S+)", text)
    return pieces[::2], pieces[1::2]


TOKENS_PER_WORD, SPARE_TOKENS = 2.0, 32
"""Token limit of an edit, per word of the original and in addition: a minimal edit is about as long as its original."""


@dataclass(frozen=True)
class EditRequest:
    """One response to be edited."""

    prompt: str
    """The prompt that the response answers."""
    response: str
    """The less preferred response."""
    id: str = ""
    """Stable id, which the pair inherits."""
    seed: int = 0
    """Seed of the editor's random draws."""
    better: str | None = None
    """The preferred response, from which an editor may borrow; None if there is none."""
    finished: bool = True
    """True if the writer ended the response, False if a token limit cut it off; the pair inherits it
    (:class:`~instructgym.rewards.learned.edits.EditedPair`)."""
    markup: bool = False
    """Whether the prompt is a chat as ``Tokenizer.chat_text`` writes it; the pair inherits it."""


class Editor(Part, ABC):
    """Base class of editors, which propose minimal edits of responses."""

    name: str = "editor"
    """Name of the editor in the metadata of pairs."""

    @abstractmethod
    def propose(self, requests: Sequence[EditRequest], attempt: int = 0) -> list[str | BackendError | None]:
        """Edits a batch of responses.

        Args:
            requests: n requests.
            attempt: number of proposals for these requests that were rejected before; together with a request's seed
                it seeds the draws.

        Returns:
            n edited texts, in order; None if the editor has nothing to propose, the error if its request failed.
        """


class FunctionEditor(Editor):
    """An editor that calls a user's function, ``(request) -> text or None``."""

    def __init__(self, function: Callable[[EditRequest], str | None]) -> None:
        self.function = function
        self.name = f"function:{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"

    def propose(self, requests: Sequence[EditRequest], attempt: int = 0) -> list[str | BackendError | None]:
        return [self.function(request) for request in requests]


class LLMEditor(Editor):
    """An editor that asks a language model to correct a response with as few changed words as possible.

    The first attempt decodes greedily, later ones sample. Between unchanged words the white space of the original is
    restored, because models reflow the text that they copy. An edit that the token limit cut off is a failed request.

    Args:
        backend: the language model.
        style: ``"chat"`` asks with an instruction, ``"completion"`` with a few demonstrations (for small base models),
            ``"auto"`` with the form that the backend needs.
        goal: ``"helpful"`` corrects answers, ``"positive"`` turns a negative tone into a positive one.
        temperature: sampling temperature of the attempts after the first.

    Raises:
        InputError: if the style or goal is unknown.
        ValueError: if the temperature is out of range.
    """

    def __init__(
        self,
        backend: Any = "embedded",
        style: Literal["auto", "chat", "completion"] = "auto",
        goal: Literal["helpful", "positive"] = "helpful",
        temperature: float = 0.7,
    ) -> None:
        tables = load_prompts(__package__, "editing")
        check_known("style", style, ("auto", "chat", "completion"))
        check_known("goal", goal, tables)
        self.backend = resolve("backend", backend)
        self.style: PromptStyle = self.backend.prompt_style if style == "auto" else style
        self.name = f"{self.backend.name}, goal {goal}"
        self._table = tables[goal]
        self._later = Sampling(
            temperature=temperature
        )  # built here so that a temperature out of range is an error at once

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
        """Returns the prompt for the language model, in the editor's style."""
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
        # The hint is put into the template before filling, so that `fill` sees its tags and escapes them in values.
        chat = fill(table["chat"].replace("{better}", hint), values)
        return build_prompt(self.style, chat, completion)

    def _sampling(self, request: EditRequest, attempt: int) -> Sampling:
        words = len(request.response.split())
        return replace(
            self._later,
            max_tokens=SPARE_TOKENS + math.ceil(TOKENS_PER_WORD * words),
            temperature=self._later.temperature if attempt else 0.0,
            # A demonstration is one line per field: a line end closes the edit.
            stop=("\n",) if self.style == "completion" else (),
            seed=request_seed(request.seed, "edit", attempt),
        )

    def _finish(self, request: EditRequest, completion: Completion) -> str | BackendError:
        """Returns the edit with the original's white space, or an error if it was cut off."""
        if completion.finish_reason == "length":
            return BackendError(f"the edit was cut off after {len(completion.token_ids)} tokens")
        return respaced(request.response, completion.text) if completion.text.strip() else ""


@dataclass(frozen=True)
class EditBounds:
    """Bounds of a minimal edit, in words.

    Raises:
        InputError: on construction, if a bound is out of range.
    """

    min_changed: float = 0.0
    """Share of changed words that an edit must exceed; the share is the Levenshtein distance in words divided by the
    number of words of the longer text."""
    max_changed: float = 0.4
    """Largest share of changed words."""
    max_length_ratio: float = 1.5
    """Largest number of words of the edit, as a multiple of the original's."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_changed < self.max_changed <= 1:
            raise InputError(
                f"min_changed {self.min_changed} and max_changed {self.max_changed} must be in order, within [0, 1]"
            )
        if not 1 <= self.max_length_ratio < math.inf:
            raise InputError(f"max_length_ratio must be at least 1, got {self.max_length_ratio}")

    def reason(self, original: str, edited: str) -> str | None:
        """Returns why an edit is rejected: ``empty``, ``copy``, ``too long`` or ``rewrite``; None if it is accepted."""
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
    """The edits that were kept, and counts of the others."""

    pairs: Pairs
    """The kept edits in the order of the requests; ``pairs.dropped`` counts the reasons of dropped requests."""
    attempts: int = 0
    """Number of proposals requested from the editor."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Number of rejected proposals by reason, including those of requests for which a later attempt was accepted."""

    @property
    def dropped(self) -> dict[str, int]:
        """Number of requests without a pair by the reason of their last rejection."""
        return self.pairs.dropped


def edit_responses(
    editor: Any,
    requests: Sequence[EditRequest],
    bounds: EditBounds = EditBounds(),
    improves: Any | None = None,
    retries: int = 2,
) -> Edited:
    """Edits responses and keeps the edits that are minimal and, if a reward is passed, score higher.

    After a rejected proposal the editor is called again with another seed. Requests whose last proposal is rejected are
    dropped, with one of the reasons ``empty response`` (nothing to edit; the editor is not called), ``no edit`` (the
    editor proposes none), ``failed`` (its request failed), ``broken text`` (a lone surrogate, which UTF-8 cannot
    encode), ``empty``, ``copy``, ``too long``, ``rewrite`` (see :class:`EditBounds`), ``no better`` (the score is not
    higher than the original's) and ``no verdict`` (the reward gives no valid score to one of the two).

    Args:
        editor: an :class:`Editor`, its id, or a function of a request.
        requests: the responses to edit.
        bounds: bounds of a minimal edit.
        improves: a reward, or its id: an edit has to score higher than the original. The reward gets the request's
            prompt, and ``better`` as the reference. None: no such condition.
        retries: number of further attempts after the first.

    Raises:
        InputError: if the number of retries is negative.
        BackendError: if every request failed in every attempt, which is no property of the texts; the first error.
    """
    check_at_least(0, retries=retries)
    editor = resolve("editor", editor)
    reward = None if improves is None else resolve("reward", improves)
    last: dict[int, str] = {i: "empty response" for i, r in enumerate(requests) if not r.response.strip()}
    open_: list[int] = [i for i in range(len(requests)) if i not in last]
    baseline: dict[int, float | None] = {}
    kept: dict[int, tuple[str, int]] = {}
    rejected: Counter[str] = Counter()
    attempts, errors = 0, []
    # Each attempt: propose edits, check their bounds, score them, and try the rejected ones again.
    for attempt in range(retries + 1):
        if not open_:
            break
        batch = [requests[i] for i in open_]
        attempts += len(batch)
        reasons: dict[int, str] = {}
        proposals: dict[int, str] = {}
        for i, text in zip(open_, editor.propose(batch, attempt), strict=True):
            if isinstance(text, str):
                # A server's JSON can hold a lone surrogate, which tokenizers and files cannot.
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
    """Returns the reason for each proposal that scores no higher than its original, and updates ``baseline``.

    Args:
        reward: the reward.
        requests: all requests.
        proposals: index of a request to its proposal.
        baseline: index of a request to the score of its original response, None without a valid score; updated.
        attempt: number of the attempt, from 0; part of the seeds.
    """

    def sample(i: int, text: str, role: str) -> Sample:
        request = requests[i]
        seed = request_seed(request.seed, role, attempt)
        return Sample(text, request.prompt, request.better, episode_id=request.id, seed=seed)

    unscored = [i for i in proposals if baseline.get(i) is None]  # score the original again if it had no valid score
    samples = [sample(i, text, "edited") for i, text in proposals.items()]
    scores = scores_of(reward, [*samples, *(sample(i, requests[i].response, "original") for i in unscored)])
    # Edits and originals are scored in one call; the originals come last.
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
    return EditedPair(request.prompt, request.response, edited, request.id, request.finished, metadata, request.markup)
