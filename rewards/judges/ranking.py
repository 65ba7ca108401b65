"""Ranking by a judge LLM, which orders several responses to one request in one reply (Tuna's contextual ranking)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from string import ascii_uppercase
from typing import Any, Literal, get_args

import numpy as np

from ...llm_backends import Backend, BackendError, Prompt, Sampling, request_seed, resolve
from ...llm_backends.errors import InputError, check_at_least, check_known
from ...llm_backends.prompting import build_prompt, few_shot, fill, load_prompts
from ..base import Reward, Sample, Score
from ..rank_statistics import mean_kendall_tau
from .verdict import judge_temperature

RequestKind = Literal["open", "closed", "either"]
"""Kind of request, which sets the criteria of the judge.

``open``: many responses can be good; ``closed``: there is a right answer; ``either``: the judge decides which kind it
is."""


@dataclass(frozen=True)
class RankingQuestion:
    """Responses to one request that a judge is to rank."""

    prompt: str
    """The request."""
    candidates: tuple[str, ...]
    """The responses."""
    seed: int = 0
    """Seed of the orders in which candidates are shown, and of the LLM requests."""
    kind: RequestKind = "open"
    """Kind of request."""


@dataclass(frozen=True)
class RankingVerdict:
    """The judge's ranking for one question."""

    ranks: tuple[float, ...] | None
    """Rank of each candidate, 0 for the best: the mean over all valid rounds. Duplicates share one; None: no ranks."""
    distinct: int
    """Number of candidates that differ in more than white space; the worst rank is this minus 1."""
    agreement: float | None = None
    """Mean Kendall tau, in [-1, 1], over all pairs of valid rounds; None for fewer than two rounds."""
    why: str = ""
    """Why there are no ranks; empty if there are."""
    calls: int = 0
    """Number of LLM requests that the ranking took."""


def parse_ranking(reply: str, letters: Sequence[str]) -> list[int] | None:
    """Parses a reply like ``B > A > C`` into indices of ``letters`` from best to worst; returns None for anything else.

    Each letter must occur once and nothing else may. White space and one trailing period are ignored.
    """
    names = [piece.strip() for piece in reply.strip().removesuffix(".").split(">")]
    return [letters.index(name) for name in names] if sorted(names) == sorted(letters) else None


def check_count(style: str, count: int) -> None:
    """Raises an InputError for more candidates than a request can hold.

    The limit is the number of letters in chat form, and the number of candidates in the demonstrations in few-shot
    form.
    """
    demonstrated = min(len(shot["candidates"]) for shot in load_prompts(__package__, "ranking")["demonstrations"])
    limit = len(ascii_uppercase) if style == "chat" else demonstrated
    if count > limit:
        raise InputError(f"a ranking in {style} form takes at most {limit} different candidates, got {count}")


def check_kind(kind: str) -> None:
    """Raises an InputError for an unknown kind of request."""
    check_known("kind of request", kind, get_args(RequestKind))


def ranking_prompt(style: str, prompt: str, candidates: Sequence[str], kind: RequestKind = "open") -> Prompt:
    """Returns the request to rank candidates, which are labelled with the letters A, B, ... in this order.

    Raises:
        InputError: for more candidates than there are letters, or than the few-shot demonstrations hold.
        ValueError: for an unknown kind.
    """
    check_kind(kind)
    check_count(style, len(candidates))
    data = load_prompts(__package__, "ranking")
    criteria = data["criteria"][kind]
    count = len(candidates)
    letters = ascii_uppercase[:count]
    if style == "chat":
        blocks = "".join(data["candidate"].replace("LABEL", letter) for letter in letters).strip()
        texts = {f"candidate_{letter}": text for letter, text in zip(letters, candidates, strict=True)}
        # The blocks are put in before the texts, so that fill() sees the tags of all candidates and breaks each of them
        # inside every text.
        template = data["chat"].replace("{candidates}", blocks).replace("{criteria}", criteria["chat"])
        return build_prompt("chat", fill(template, texts | {"prompt": prompt, "labels": ", ".join(letters)}), "")
    # Demonstrations show as many candidates as the query, or their lines would not match its labels.
    shots = [
        (shot["prompt"], *shot["candidates"][:count], " > ".join(x for x in shot["ranking"] if x in letters))
        for shot in data["demonstrations"]
    ]
    return few_shot(criteria["header"], ("Request", *letters, "Ranking"), shots, (prompt, *candidates))


def distinct_texts(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Returns the texts that differ in more than white space, and for each input text its index among them."""
    keys = [tuple(text.split()) for text in texts]
    distinct = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [texts[keys.index(key)] for key in distinct], [distinct[key] for key in keys]


def prompt_groups(samples: Sequence[Sample], caller: str) -> dict[str, list[int]]:
    """Returns the indices of the samples of each group (of each episode id for samples with an empty group).

    Args:
        samples: the samples.
        caller: name of the caller in the error message.

    Raises:
        InputError: if a group's samples answer different prompts.
    """
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.group or sample.episode_id, []).append(index)
    for group, members in groups.items():
        if len({samples[i].prompt for i in members}) > 1:
            raise InputError(
                f"{caller} compares responses to one prompt: group {group!r} holds different prompts; "
                "give each prompt its own Sample.group"
            )
    return groups


def ranking_sampling(count: int, temperature: float, seed: int) -> Sampling:
    """Returns the sampling of a reply that orders ``count`` candidates."""
    return Sampling(4 * count + 8, temperature, stop=("\n",), seed=seed)


def rank(
    backend: Backend, questions: Sequence[RankingQuestion], rounds: int = 1, temperature: float = 0.0
) -> list[RankingVerdict]:
    """Ranks the candidates of every question, with all rounds of all questions in one backend call.

    Candidates that differ at most in white space are shown once. Every round shows them in another order, drawn from
    the question's seed. A round whose reply is no ranking is left out.

    Args:
        backend: the judge LLM.
        questions: n questions of at least two candidates.
        rounds: how often the candidates of each question are ranked.
        temperature: sampling temperature of the replies; 0: greedy.

    Returns:
        n rankings, in order.

    Raises:
        InputError: for fewer than two candidates, or more than a request in this form can hold.
        ValueError: for fewer than one round, or an unknown kind of request.
    """
    check_at_least(1, rounds=rounds)
    prompts: list[Prompt] = []
    samplings: list[Sampling] = []
    orders: list[list[np.ndarray]] = []
    distinct_indices: list[list[int]] = []
    for question in questions:
        if len(question.candidates) < 2:
            raise InputError(f"a ranking needs at least two candidates, {question.prompt[:40]!r} has fewer")
        texts, indices = distinct_texts(question.candidates)
        distinct_indices.append(indices)
        # Candidates that are all the same need no request: they share the best rank.
        seeds = [request_seed(question.seed, "round", number) for number in range(rounds)] if len(texts) > 1 else []
        orders.append([np.random.default_rng(seed).permutation(len(texts)) for seed in seeds])
        prompts += [
            ranking_prompt(backend.prompt_style, question.prompt, [texts[i] for i in order], question.kind)
            for order in orders[-1]
        ]
        samplings += [ranking_sampling(len(texts), temperature, seed) for seed in seeds]
    replies = iter(backend.generate(prompts, samplings))
    return [
        _ranking(indices, [next(replies) for _ in order], order)
        for indices, order in zip(distinct_indices, orders, strict=True)
    ]


def _ranking(distinct_indices: Sequence[int], replies: Sequence[Any], orders: Sequence[np.ndarray]) -> RankingVerdict:
    """Returns the mean ranks over rounds.

    Args:
        distinct_indices: for each candidate its index among the distinct ones.
        replies: one result per round; empty if there is nothing to rank.
        orders: for each round an array of shape (distinct candidates,): the distinct candidate that each letter showed.
    """
    distinct = max(distinct_indices) + 1
    if not replies:
        return RankingVerdict((0.0,) * len(distinct_indices), distinct)
    rows, why = [], ""
    for reply, order in zip(replies, orders, strict=True):
        if isinstance(reply, BackendError):
            why = str(reply)
            continue
        positions = parse_ranking(reply[0].text, ascii_uppercase[:distinct])
        if positions is None:
            why = f"not a ranking of {distinct} candidates: {reply[0].text[:80]!r}"
            continue
        # order[positions] holds the candidates from best to worst; argsort inverts it to the rank of each candidate.
        rows.append(np.argsort(order[positions]))
    if not rows:
        return RankingVerdict(None, distinct, why=why, calls=len(replies))
    mean = np.mean(rows, axis=0)
    agreement = mean_kendall_tau(combinations(rows, 2))
    return RankingVerdict(tuple(float(mean[i]) for i in distinct_indices), distinct, agreement, calls=len(replies))


class RankingJudge(Reward):
    """Gives a response its normalised rank within its group: 1 for the best, 0 for the worst.

    Samples of one ``group`` (or, if it is empty, of one ``episode_id``) are ranked together, in one request per round.
    Duplicates share a rank; a group of nothing but duplicates gets 1/2. If no round gives a ranking, the scores of the
    whole group are invalid, so a retry ranks it as a whole. In a weighted sum, if another term has no verdict on some
    samples of a group, the retry ranks only these among themselves.

    The terms are the value, ``mean_rank`` (1 for the best) and, for at least two valid rounds, ``agreement``: the mean
    Kendall tau between them. The requests of a group are counted on its first sample.

    Args:
        backend: the judge LLM.
        rounds: how often a group is ranked, each time shown in another order; ranks are averaged.

    Raises:
        ValueError: for fewer than one round.
    """

    name = "ranking"

    def __init__(self, backend: Any = "embedded", rounds: int = 1) -> None:
        check_at_least(1, rounds=rounds)
        self.backend, self.rounds = resolve("backend", backend), rounds
        self.calls_per_sample = rounds

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores groups of responses to one prompt each.

        A sample alone in its group cannot be ranked. That is an error, except in a retry: there the others of its group
        may have a score already, and the score of this sample stays invalid.

        Raises:
            InputError: if a group has one sample or samples with different prompts.
        """
        groups = prompt_groups(samples, "the ranking judge")
        scores: list[Score] = [Score.invalid("the only sample of its group")] * len(samples)
        questions: dict[str, RankingQuestion] = {}
        for group, members in groups.items():
            first = samples[members[0]]
            if len(members) > 1:
                questions[group] = RankingQuestion(
                    first.prompt, tuple(samples[i].response for i in members), first.seed
                )
            elif not first.metadata.get("attempt"):
                raise InputError(
                    f"the ranking judge compares the responses of a group: group {group!r} has only one; score several "
                    "responses to a prompt in one batch (a group size of at least 2)"
                )
        rankings = rank(self.backend, list(questions.values()), self.rounds, judge_temperature(samples))
        for group, ranking in zip(questions, rankings, strict=True):
            for place, index in enumerate(groups[group]):
                scores[index] = self._score(ranking, place)
        return scores

    def _score(self, ranking: RankingVerdict, place: int) -> Score:
        # A request ranks the whole group: counting it on every sample would count it several times.
        calls = ranking.calls if place == 0 else 0
        if ranking.ranks is None:
            return Score.invalid(ranking.why, calls=calls)
        position = ranking.ranks[place]
        value = 1 - position / (ranking.distinct - 1) if ranking.distinct > 1 else 0.5
        terms = {self.name: value, "mean_rank": position + 1}
        if ranking.agreement is not None:
            terms["agreement"] = ranking.agreement
        return Score(value, terms=terms, feedback=f"rank {position + 1:.3g} of {ranking.distinct}", calls=calls)
