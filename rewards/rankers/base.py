"""The ranker contract, the rankers that need no judge, and the reward that gives samples their rank.

A ranker takes several candidates for one prompt and returns one score per candidate, higher for the better one. List
losses learn from these scores (Tuna, Li et al. 2023, arXiv 2310.13385), and
:class:`~instructgym.rewards.rankers.base.RankReward` turns them into rewards of an environment.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, get_args

import numpy as np

from ...llm_backends import BackendError, Prompt, UnsupportedRequestError, request_seed, resolve
from ...llm_backends.errors import InputError, check_known
from ...llm_backends.local.tokenization import Tokenizer
from ...llm_backends.parts import Part
from ..base import NonFiniteRewardError, Reward, Sample, Score, scores_of
from ..judges.ranking import prompt_groups
from ..quality.likelihood import EMBEDDED, Likelihoods
from ..texts.rouge import rouge_l

PromptForm = Literal["backend", "chat", "raw"]
"""How prompts are sent to a teacher; see :class:`ProbabilisticRanker`."""

TEACHER_BETA = 1.3
"""Exponent of the length that divides the teacher's log-likelihood; default of an independent Tuna implementation."""


@dataclass(frozen=True, eq=False)
class CandidateScores:
    """A ranker's scores of one prompt's candidates.

    Raises:
        NonFiniteRewardError: on construction, for a score that is not finite.
        InputError: on construction, if the numbers of added candidates and of their scores differ.
    """

    scores: np.ndarray
    """float32, shape (n,): higher for the better candidate, equal for ties. All 0, and to be ignored, if not valid."""
    valid: bool = True
    """False if there is no ranking."""
    calls: int = 0
    """Number of LLM requests that the ranking took (a logical count, cache hits included)."""
    feedback: str = ""
    """In words: why there is no ranking, or a remark about it."""
    added: tuple[str, ...] = ()
    """Candidates that the ranker added, such as a judge's own answer."""
    added_scores: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """float32, shape (len(added),): the scores of the added candidates, on the same scale."""

    def __post_init__(self) -> None:
        for name in ("scores", "added_scores"):
            scores = np.asarray(getattr(self, name), np.float32)
            if scores.ndim != 1 or not np.isfinite(scores).all():
                raise NonFiniteRewardError(f"{name} must be one finite number per candidate, got {scores.tolist()}")
            object.__setattr__(self, name, scores)
        if len(self.added) != len(self.added_scores):
            raise InputError(f"{len(self.added)} added candidates have {len(self.added_scores)} scores")

    @classmethod
    def invalid(cls, count: int, feedback: str, calls: int = 0) -> CandidateScores:
        """Returns the result for ``count`` candidates without a ranking; ``feedback`` is the reason."""
        return cls(np.zeros(count, np.float32), False, calls, feedback)

    @property
    def places(self) -> np.ndarray:
        """int64, shape (n,): 0 for the best candidates, 1 for the next ones; ties share a place, none is skipped."""
        # np.unique sorts ascending: negated, the best score comes first.
        return np.unique(-self.scores, return_inverse=True)[1].reshape(-1)


class Ranker(Part, ABC):
    """Ranks candidates in batches over prompts, because judges need concurrency."""

    name: str = "ranker"
    """Name of the ranker in error messages."""

    def rank(
        self,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        references: Sequence[str | None] | None = None,
        seeds: Sequence[int] | None = None,
        attempt: int = 0,
    ) -> list[CandidateScores]:
        """Ranks the candidates of every prompt.

        Args:
            prompts: n prompts.
            candidates: for each prompt at least one candidate; their numbers may differ.
            references: for each prompt its right answer, which some rankers need; None: no references.
            seeds: for each prompt the seed of whatever is sampled; None: a hash of the prompt.
            attempt: 0, or the number of the retry, in which judges sample their replies.

        Returns:
            n rankings, in order. A single candidate gets score 0 or, where the ranker scores one by one, its score.

        Raises:
            InputError: if the lengths differ, a prompt has no candidate, or a candidate is no text.
        """
        for name, values in (("lists of candidates", candidates), ("references", references), ("seeds", seeds)):
            if values is not None and len(values) != len(prompts):
                raise InputError(f"a ranker got {len(prompts)} prompts but {len(values)} {name}")
        groups = []
        for row, (prompt, texts) in enumerate(zip(prompts, candidates, strict=True)):
            # A string is a sequence of strings too: each character would be ranked as a candidate.
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                raise InputError(f"the candidates of prompt {row} ({prompt[:40]!r}) must be a list of texts")
            reference = None if references is None else references[row]
            seed = request_seed("rank", prompt) if seeds is None else seeds[row]
            metadata = {"finish_reason": "stop"} | ({"attempt": attempt} if attempt else {})
            groups.append(
                [Sample(text, prompt, reference, group=str(row), seed=seed, metadata=metadata) for text in texts]
            )
        return self.rank_samples(groups)

    def rank_samples(self, groups: Sequence[Sequence[Sample]]) -> list[CandidateScores]:
        """Ranks the samples of every group.

        Args:
            groups: for each prompt the samples that answer it. Rankers may read the seed and the reference of the first
                sample alone.

        Returns:
            One ranking per group, in order.

        Raises:
            InputError: if a group is empty.
        """
        for row, group in enumerate(groups):
            if not group:
                raise InputError(f"prompt {row} has no candidates to rank: give each prompt at least one")
        return self._rank(groups) if groups else []

    @abstractmethod
    def _rank(self, groups: Sequence[Sequence[Sample]]) -> list[CandidateScores]:
        """Ranks at least one group, none of them empty."""

    def max_calls(self, count: int) -> int:
        """Returns the maximum number of LLM requests that a ranking of ``count`` candidates takes."""
        return 0

    def reset(self) -> None:
        """Forgets all candidates seen so far."""

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Checks that the ranker reads the token ids of this tokenizer.

        See :meth:`~instructgym.rewards.base.Reward.check_tokenizer`.
        """


class FunctionRanker(Ranker):
    """A ranker that calls a plain function.

    Args:
        function: ``(prompt, candidates) -> scores``, one finite number per candidate.

    Raises:
        InputError: when ranking, if the numbers of scores and candidates differ.
    """

    def __init__(self, function: Callable[[str, list[str]], Sequence[float]]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", "function").strip("<>")

    def _rank(self, groups: Sequence[Sequence[Sample]]) -> list[CandidateScores]:
        results = []
        for group in groups:
            result = CandidateScores(np.asarray(self.function(group[0].prompt, [s.response for s in group])))
            if len(result.scores) != len(group):
                raise InputError(f"ranker {self.name!r} gave {len(result.scores)} scores for {len(group)} candidates")
            results.append(result)
        return results


class ProbabilisticRanker(Ranker):
    """Scores candidates by a teacher's length-normalised log-likelihood: Tuna's probabilistic ranking.

    v(x, y) = sum_t log p(y_t | x, y_<t) / |y|^beta (Li et al. 2023, arXiv 2310.13385), over the teacher's tokens of the
    candidate, in nats. With beta = 1 it is the mean log-prob; a larger beta favours longer candidates. An empty
    candidate has no likelihood: its score is one nat below the lowest of the others. If any log-prob is missing, there
    is no ranking.

    Args:
        backend: the teacher, a language model that reports log-probs; or
            :class:`~instructgym.rewards.quality.likelihood.Likelihoods` to share.
        beta: exponent of the length, finite and at least 0.
        form: how prompts are sent to the teacher; best the form in which it generated the candidates. ``backend``: as
            requests in the backend's own form, few-shot for small models; ``chat``: as a user message; ``raw``:
            unchanged, as texts that the candidate continues.

    Raises:
        ValueError: for a beta out of range or an unknown form.
        UnsupportedRequestError: if the backend reports no log-probs.
    """

    name = "probabilistic"

    def __init__(self, backend: Any = EMBEDDED, beta: float = TEACHER_BETA, form: PromptForm = "backend") -> None:
        if not 0 <= beta < np.inf:
            raise ValueError(f"beta must be a finite number of at least 0, got {beta}")
        check_known("form", form, get_args(PromptForm))
        self.likelihoods = Likelihoods.of(backend)
        if not self.likelihoods.backend.supports_logprobs:
            raise UnsupportedRequestError(
                f"backend {self.likelihoods.backend.name!r} reports no log-probs, by which candidates are ranked: use "
                "another one, or a judge"
            )
        self.beta, self.form = beta, form

    def max_calls(self, count: int) -> int:
        return count

    def _rank(self, groups: Sequence[Sequence[Sample]]) -> list[CandidateScores]:
        # A backend refuses an empty completion.
        nonempty = [sample for group in groups for sample in group if sample.response]
        rows = iter(
            self.likelihoods.conditional_logprobs(nonempty) if self.form == "backend" else self._form_logprobs(nonempty)
        )
        return [self._scores([next(rows) if sample.response else None for sample in group]) for group in groups]

    def _form_logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray | BackendError]:
        prompts: list[Prompt] = []
        texts = []
        for sample in samples:
            # A raw prompt and its candidate are one text, which needs white space between them.
            separated = self.form == "chat" or sample.prompt[-1:].isspace() or sample.response[:1].isspace()
            texts.append(sample.response if separated else f" {sample.response}")
            prompts.append([{"role": "user", "content": sample.prompt}] if self.form == "chat" else sample.prompt)
        rows = self.likelihoods.backend.logprobs(prompts, texts)
        for row in rows:
            if isinstance(row, UnsupportedRequestError):
                raise row
        return rows

    def _scores(self, rows: Sequence[np.ndarray | BackendError | None]) -> CandidateScores:
        """Returns the scores of a group from the log-probs of each candidate, which are None for an empty one."""
        calls = sum(row is not None for row in rows)
        values: dict[int, float] = {}
        for number, row in enumerate(rows):
            if isinstance(row, BackendError):
                return CandidateScores.invalid(len(rows), f"candidate {number}: {row}", calls)
            if row is not None:
                value = float(row.sum(dtype=np.float64)) / len(row) ** self.beta if len(row) else -np.inf
                if not np.isfinite(value):
                    return CandidateScores.invalid(len(rows), f"candidate {number}: its log-probs are unusable", calls)
                values[number] = value
        lowest = min(values.values(), default=1.0) - 1.0
        return CandidateScores(np.array([values.get(i, lowest) for i in range(len(rows))]), calls=calls)


class GroundTruthRanker(Ranker):
    """Ranks candidates by the value that a reward gives each of them, or by ROUGE-L to the reference.

    If the score of any candidate is invalid, there is no ranking.

    Args:
        score: ``"rouge-l"`` (F-measure to the reference, without stemming), or a reward or its id.

    Raises:
        InputError: when ranking, for a candidate without the reference that the score needs.
    """

    name = "ground-truth"

    def __init__(self, score: Any = "rouge-l") -> None:
        self.score: Reward | None = None if isinstance(score, str) and score == "rouge-l" else resolve("reward", score)

    def max_calls(self, count: int) -> int:
        return count * self.score.calls_per_sample if self.score else 0

    def reset(self) -> None:
        if self.score:
            self.score.reset()

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        if self.score:
            self.score.check_tokenizer(tokenizer)

    def _rank(self, groups: Sequence[Sequence[Sample]]) -> list[CandidateScores]:
        if self.score is None:
            return [CandidateScores(np.array([_to_reference(sample) for sample in group])) for group in groups]
        scores = iter(scores_of(self.score, list(chain.from_iterable(groups))))
        results = []
        for group in groups:
            group_scores = [next(scores) for _ in group]
            calls = sum(score.calls for score in group_scores)
            missing = next((i for i, score in enumerate(group_scores) if not score.valid), None)
            if missing is None:
                results.append(CandidateScores(np.array([score.value for score in group_scores]), calls=calls))
            else:
                why = f"candidate {missing}: {group_scores[missing].feedback}"
                results.append(CandidateScores.invalid(len(group), why, calls))
        return results


def _to_reference(sample: Sample) -> float:
    if sample.reference is None:
        raise InputError(
            f"the ground-truth ranker compares candidates with the reference: prompt {sample.prompt[:40]!r} has none; "
            "use data with references, or rank by a reward"
        )
    return rouge_l(sample.response, sample.reference)


TIE_VALUE = 0.5
"""Reward of a sample that is alone in its group, and of each sample of a group that all tie."""


class RankReward(Reward):
    """Gives 1 to the best sample of a group, 0 to the worst, and evenly spaced values to the places in between.

    Samples of one ``group`` (or, if it is empty, of one ``episode_id``) are ranked together. Ties share a place and no
    place is skipped, so the value does not depend on how many duplicates there are; if all tie, it is 1/2. A sample
    alone in its group has no rank: its value is 1/2 as well, and its term ``alone`` is 1 (in a retry its score is
    invalid instead, as the others of its group may have a score already). If the ranker returns no ranking, the scores
    of the whole group are invalid, so a retry ranks it as a whole.

    The terms are the value; ``alone``; and, for ranked samples, ``place`` (1 for the best) and ``ranker_score``. The
    requests of a group are counted on its first sample.

    Args:
        ranker: a ranker or its id (``probabilistic``, ``contextual``, ``pairwise``, ``ground-truth``), or a function
            ``(prompt, candidates) -> scores``.
        largest_group: maximum number of samples in a group, from which ``calls_per_sample`` is computed.

    Raises:
        InputError: for a largest group below 1; when scoring, for a larger group or one with different prompts.
    """

    name = "rank"

    def __init__(self, ranker: Any, largest_group: int = 16) -> None:
        if largest_group < 1:
            raise InputError(f"the largest group must have at least 1 sample, got {largest_group}")
        self.ranker: Ranker = resolve("ranker", ranker)
        self.largest_group = largest_group
        # The samples of a group share its requests. Rounded up and maximal over the sizes, so that the reserve always
        # suffices; a single sample is not ranked.
        sizes = range(2, largest_group + 1)
        self.calls_per_sample = max((-(-self.ranker.max_calls(size) // size) for size in sizes), default=0)

    def reset(self) -> None:
        self.ranker.reset()

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        self.ranker.check_tokenizer(tokenizer)

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        groups = prompt_groups(samples, "the rank reward")
        for group, members in groups.items():
            if len(members) > self.largest_group:
                raise InputError(
                    f"group {group!r} has {len(members)} samples, the rank reward was built for {self.largest_group}: "
                    "raise largest_group"
                )
        scores = [_lone_score(sample) for sample in samples]
        ranked = [members for members in groups.values() if len(members) > 1]
        rankings = self.ranker.rank_samples([[samples[i] for i in members] for members in ranked])
        for members, ranking in zip(ranked, rankings, strict=True):
            for number, index in enumerate(members):
                scores[index] = self._score(ranking, number)
        return scores

    def _score(self, ranking: CandidateScores, number: int) -> Score:
        # A ranking is of the whole group: counting its requests on every sample would count them several times.
        calls = ranking.calls if number == 0 else 0
        if not ranking.valid:
            return Score.invalid(ranking.feedback, calls=calls)
        place, last = int(ranking.places[number]), int(ranking.places.max())
        value = 1 - place / last if last else TIE_VALUE
        terms = {self.name: value, "alone": 0.0, "place": place + 1.0, "ranker_score": float(ranking.scores[number])}
        feedback = f"place {place + 1} of {last + 1}" + (f"; {ranking.feedback}" if ranking.feedback else "")
        return Score(value, terms=terms, feedback=feedback, calls=calls)


def _lone_score(sample: Sample) -> Score:
    feedback = "the only sample of its group: it has no rank"
    if sample.metadata.get("attempt"):
        return Score.invalid(feedback)
    return Score(TIE_VALUE, terms={RankReward.name: TIE_VALUE, "alone": 1.0}, feedback=feedback)
