"""Candidates for rankings: drawing several different responses to one prompt, and files of responses with scores.

Tuna (Li et al. 2023, arXiv 2310.13385) draws four responses again and again, each time at a higher temperature, until
they differ enough from each other by ROUGE-L.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le, Lt

from ....llm_backends import Backend, BackendError, ContextLengthError, Prompt, Sampling, request_seed
from ....llm_backends.errors import InputError, check_fields
from ....llm_backends.records import check_distinct_ids, check_encodable, read_user_rows, replaced, user_text
from ....rewards.judges.ranking import distinct_texts
from ....rewards.texts.rouge import TOLERANCE, pairwise_rouge_l


@dataclass(frozen=True)
class DiverseSampling:
    """Settings for drawing different responses. The defaults are those of Tuna's released code.

    Raises:
        InputError: on construction, if a value is out of range.
    """

    n: Annotated[int, Ge(2)] = 4
    """Responses per prompt."""
    temperature: Annotated[float, Gt(0), Lt(math.inf)] = 1.0
    """Sampling temperature of the first try."""
    step: Annotated[float, Ge(0), Lt(math.inf)] = 0.1
    """Increase of the temperature from try to try."""
    tries: Annotated[int, Ge(1)] = 3
    """Largest number of tries."""
    threshold: Annotated[float, Gt(0), Le(1)] = 0.8
    """Responses differ enough if the ROUGE-L F-measure (on stems) of every two of them is below this."""
    max_tokens: Annotated[int, Ge(1)] = 512
    """Tokens of a response at most."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Probability mass of nucleus sampling; 1 samples from all tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a response."""

    def __post_init__(self) -> None:
        check_fields(self)

    def request(self, attempt: int, seed: int) -> Sampling:
        """Returns the sampling settings of a try.

        Args:
            attempt: number of the try, from 0.
            seed: seed of the request.
        """
        temperature = round(self.temperature + attempt * self.step, 6)  # 1.2, not 1.2000000000000002
        return Sampling(self.max_tokens, temperature, self.top_p, stop=self.stop, n=self.n, seed=seed)


@dataclass(frozen=True)
class Candidates:
    """The responses drawn for one prompt."""

    texts: tuple[str, ...]
    """n responses; none if every try failed. One may be empty or the same as another: see :attr:`distinct`."""
    temperature: float
    """Temperature of the try that the responses are from; that of the last try if all failed."""
    tries: int
    """Number of requests made."""
    max_rouge: float | None
    """Largest ROUGE-L F-measure of two of the responses; None if there are none."""
    errors: tuple[BackendError, ...] = ()
    """Errors of the tries that failed."""
    finished: tuple[bool, ...] = ()
    """For each of the n responses, whether the writer ended it, and not the token limit."""

    @property
    def distinct(self) -> tuple[str, ...]:
        """The responses that are not blank and differ from all earlier ones in more than white space, in order."""
        return tuple(self.texts[number] for number in self.distinct_indices)

    @property
    def distinct_indices(self) -> tuple[int, ...]:
        """Indices of the responses in :attr:`distinct`."""
        twins = distinct_texts(self.texts)[1]
        return tuple(n for n, text in enumerate(self.texts) if text.strip() and twins.index(twins[n]) == n)


def sample_candidates(
    backend: Backend,
    prompts: Sequence[Prompt],
    settings: DiverseSampling = DiverseSampling(),
    seed: int = 0,
    rows: Sequence[int] | None = None,
) -> list[Candidates]:
    """Draws responses that differ from each other, for all prompts together: one backend call per try.

    All responses to a prompt are drawn again, at a higher temperature, until every two of them have a ROUGE-L below the
    threshold. If no try reaches that, the set with the lowest mean ROUGE-L is kept. A request that fails counts as a
    try; a prompt that is too long for the context is not tried again.

    Args:
        backend: a backend that can generate.
        prompts: k prompts.
        settings: settings of the draw.
        seed: seed of the run. The request of a try has the seed ``request_seed(seed, row, try)``, with tries from 0.
        rows: numbers of the prompts in the run, so that a subset of prompts gets the same responses; None: 0 to k-1.

    Returns:
        k results, in order.

    Raises:
        InputError: if the lengths differ.
        ValueError: if a prompt is empty.
    """
    rows = range(len(prompts)) if rows is None else rows
    if len(rows) != len(prompts):
        raise InputError(f"sample_candidates got {len(prompts)} prompts but {len(rows)} row numbers")
    draws = [_Draw() for _ in prompts]
    for attempt in range(settings.tries):
        unfinished = [i for i, draw in enumerate(draws) if not draw.done]
        if not unfinished:
            break
        samplings = [settings.request(attempt, request_seed(seed, rows[i], attempt)) for i in unfinished]
        results = backend.generate([prompts[i] for i in unfinished], samplings)
        for i, sampling, result in zip(unfinished, samplings, results, strict=True):
            draws[i].record(sampling.temperature, result, settings.threshold)
    return [draw.result() for draw in draws]


class _Draw:
    """The tries of one prompt."""

    def __init__(self) -> None:
        self.done = False
        self.tries, self.mean = 0, math.inf
        self.errors: list[BackendError] = []
        self.best = Candidates((), 0.0, 0, None)
        """The responses of the best try; ``mean`` is their mean ROUGE-L."""

    def record(self, temperature: float, result: Any, threshold: float) -> None:
        """Records the result of a try."""
        self.tries += 1
        if isinstance(result, BackendError):
            self.errors.append(result)
            self.done = isinstance(result, ContextLengthError)
            if not self.best.texts:
                self.best = Candidates((), temperature, 0, None)
            return
        texts = tuple(completion.text for completion in result)
        # Each pair of responses once.
        similarities = pairwise_rouge_l(texts, stem=True)[np.triu_indices(len(texts), k=1)]
        mean, largest = float(similarities.mean()), float(similarities.max())
        self.done = largest < threshold - TOLERANCE
        # A set below the threshold is always kept; otherwise, of tries with equal means, the first is kept.
        if self.done or mean < self.mean - TOLERANCE:
            finished = tuple(completion.finish_reason != "length" for completion in result)
            self.mean, self.best = mean, Candidates(texts, temperature, 0, largest, finished=finished)

    def result(self) -> Candidates:
        """Returns the responses of the best try."""
        return replace(self.best, tries=self.tries, errors=tuple(self.errors))


@dataclass(frozen=True)
class RankedList:
    """Candidates for one prompt and their scores.

    Raises:
        InputError: on construction, if there are no candidates, one is blank, or the scores are not one finite number
            per candidate.
    """

    id: str
    """Stable id of the prompt."""
    prompt: str
    """The prompt that the candidates answer, as the model reads it."""
    candidates: tuple[str, ...]
    """n different or equal responses, none of them blank."""
    scores: tuple[float, ...]
    """n finite numbers, higher for the better candidate, equal for ties."""
    reference: str | None = None
    """The right answer; None if there is none."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able."""

    def __post_init__(self) -> None:
        # `__setattr__` of the base class, because the dataclass is frozen.
        object.__setattr__(self, "candidates", tuple(self.candidates))
        object.__setattr__(self, "scores", tuple(map(float, self.scores)))
        where = f"ranked list {self.id!r}"
        if not self.candidates:
            raise InputError(f"{where}: field 'candidates' is empty: give at least one")
        for number, text in enumerate(self.candidates):
            if not text.strip():
                raise InputError(f"{where}: field 'candidates' has a blank text in place {number}: leave it out")
            check_encodable(f"{where}: field 'candidates' in place {number}", text)
        if len(self.scores) != len(self.candidates):
            raise InputError(
                f"{where}: field 'scores' has {len(self.scores)} numbers for {len(self.candidates)} candidates"
            )
        for number, score in enumerate(self.scores):
            if not math.isfinite(score):
                raise InputError(f"{where}: field 'scores' has {score} in place {number}: make it a finite number")


FIELDS = ("id", "prompt", "candidates", "scores", "reference", "metadata")
"""Fields of a row in a file of ranked lists; the last two are optional."""


def write_ranked_lists(path: str | Path, lists: Iterable[RankedList]) -> None:
    """Writes ranked lists as JSONL for :func:`read_ranked_lists`; the file appears at once, whole.

    Args:
        path: the file; missing folders are created.
        lists: the ranked lists.
    """
    with replaced(path) as scratch, scratch.open("w", encoding="utf-8", newline="\n") as file:
        for ranked in lists:
            file.write(json.dumps(ranked_row(ranked), ensure_ascii=False, allow_nan=False) + "\n")


def ranked_row(ranked_list: RankedList) -> dict[str, Any]:
    """Returns the row of a ranked list in a file; a missing reference and empty metadata are left out."""
    row = {
        "id": ranked_list.id,
        "prompt": ranked_list.prompt,
        "candidates": list(ranked_list.candidates),
        "scores": list(ranked_list.scores),
    }
    row |= {} if ranked_list.reference is None else {"reference": ranked_list.reference}
    return row | ({"metadata": dict(ranked_list.metadata)} if ranked_list.metadata else {})


def read_ranked_lists(path: str | Path) -> list[RankedList]:
    """Reads ranked lists from a JSONL file.

    A row has the texts ``id`` and ``prompt``, the list of texts ``candidates``, as many numbers ``scores``, and may
    have ``reference`` and the object ``metadata``.

    Args:
        path: the file.

    Returns:
        The lists in file order.

    Raises:
        InputError: if the file cannot be read, is not UTF-8 or has no rows; if a line is not a JSON object, a field is
            missing, unknown, of a wrong type or unusable, or an id occurs twice; the message names row and field.
    """
    rows = read_user_rows(path, "the ranked lists")
    lists = [_ranked_list(where, row) for where, row in rows]
    check_distinct_ids((where, ranked.id) for (where, _), ranked in zip(rows, lists, strict=True))
    if not lists:
        raise InputError(f"{path} holds no ranked list: it is empty")
    return lists


def _ranked_list(where: str, row: Mapping[str, Any]) -> RankedList:
    if unknown := set(row) - set(FIELDS):
        raise InputError(f"{where}: unknown field {min(unknown)!r}: use {', '.join(FIELDS)}")
    texts, scores = _list_field(where, row, "candidates"), _list_field(where, row, "scores")
    # Each candidate gets a field name, so that an error names the one that is wrong.
    candidates = {f"candidates[{number}]": text for number, text in enumerate(texts)}
    for number, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise InputError(f"{where}: field 'scores[{number}]' must be a number, got {json.dumps(score)[:60]}")
    metadata = row.get("metadata", {})
    if not isinstance(metadata, dict):
        raise InputError(f"{where}: field 'metadata' is a {type(metadata).__name__}: make it an object")
    row_id, prompt = user_text(where, row, "id"), user_text(where, row, "prompt")
    checked = tuple(user_text(where, candidates, name) for name in candidates)
    reference = None if row.get("reference") is None else user_text(where, row, "reference")
    try:
        return RankedList(row_id, prompt, checked, tuple(scores), reference, metadata)
    except (InputError, OverflowError) as error:  # OverflowError: an integer too large for a float
        raise InputError(f"{where}: {error}") from error


def _list_field(where: str, row: Mapping[str, Any], name: str) -> list[Any]:
    """Returns the list in a field of a row, or raises InputError."""
    value = row.get(name)
    if not isinstance(value, list):
        has = "it is missing" if name not in row else f"got {json.dumps(value)[:60]}"
        raise InputError(f"{where}: field {name!r} must be a list, {has}")
    return value
