"""Ranking by a judge LLM: several responses to one request, put in order in one reply (Tuna's contextual ranking)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from string import ascii_uppercase
from typing import Any, Literal, get_args

import numpy as np

from ...llm_backends import Backend, BackendError, Prompt, Sampling, request_seed, resolve
from ...llm_backends.errors import InputError
from ...llm_backends.prompting import build_prompt, few_shot, fill, load_prompts
from ..base import Reward, Sample, Score
from .verdict import temperature_for

RequestKind = Literal["open", "closed", "either"]
"""By which criteria responses are judged: those for a request to which many responses can be good, those for one with a
right answer, or those that fit by the judge's own decision."""


@dataclass(frozen=True)
class RankingQuestion:
    """Responses to one request."""

    prompt: str
    candidates: tuple[str, ...]
    seed: int = 0
    """Of the presentation's order and of the requests."""
    kind: RequestKind = "open"
    """What kind of request it is."""


@dataclass(frozen=True)
class RankingVerdict:
    """What the judge said of one question."""

    ranks: tuple[float, ...] | None
    """Of each candidate: 0 for the best, the mean over all valid rounds; duplicates share theirs. None without one."""
    distinct: int
    """Candidates that differ in more than white space; the worst rank is one less."""
    agreement: float | None = None
    """Mean Kendall tau, in [-1, 1], over all pairs of valid rounds; None for fewer than two."""
    why: str = ""
    """The reason, where there are no ranks."""
    calls: int = 0
    """LLM requests it took."""


def parse_ranking(reply: str, letters: Sequence[str]) -> list[int] | None:
    """Positions in ``letters`` from best to worst, from a reply like ``B > A > C``; None for anything else.

    Each letter has to be there once and nothing else. White space and one trailing period do not matter.
    """
    named = [piece.strip() for piece in reply.strip().removesuffix(".").split(">")]
    return [letters.index(name) for name in named] if sorted(named) == sorted(letters) else None


def check_count(style: str, count: int) -> None:
    """Refuses, with an InputError, more candidates than there are letters, or than the few-shot form shows."""
    shown = min(len(shot["candidates"]) for shot in load_prompts(__package__, "ranking")["demonstrations"])
    most = len(ascii_uppercase) if style == "chat" else shown
    if count > most:
        raise InputError(f"a ranking in {style} form takes at most {most} different candidates, got {count}")


def check_kind(kind: str) -> None:
    """Refuses an unknown kind of request with a ValueError."""
    if kind not in get_args(RequestKind):
        raise ValueError(f"unknown kind of request {kind!r}: use {', '.join(get_args(RequestKind))}")


def ranking_prompt(style: str, prompt: str, candidates: Sequence[str], kind: RequestKind = "open") -> Prompt:
    """The request to rank candidates, which get the letters A, B, ... in this order.

    Raises:
        InputError: if there are more of them than letters, or than the few-shot form shows.
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
        # The blocks go in before the texts, so that the fences of all candidates are broken inside every text.
        template = data["chat"].replace("{candidates}", blocks).replace("{criteria}", criteria["chat"])
        return build_prompt("chat", fill(template, texts | {"prompt": prompt, "labels": ", ".join(letters)}), "")
    shots = [
        (shot["prompt"], *shot["candidates"][:count], " > ".join(x for x in shot["ranking"] if x in letters))
        for shot in data["demonstrations"]
    ]
    return few_shot(criteria["header"], ("Request", *letters, "Ranking"), shots, (prompt, *candidates))


def distinct_texts(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The texts that differ in more than white space, and for each text its number among them."""
    keys = [tuple(text.split()) for text in texts]
    distinct = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [texts[keys.index(key)] for key in distinct], [distinct[key] for key in keys]


def prompt_groups(samples: Sequence[Sample], who: str) -> dict[str, list[int]]:
    """The places of the samples of each group (or, where it is empty, of each episode id).

    Args:
        samples: the samples.
        who: compares them; for the error.

    Raises:
        InputError: if a group's samples answer different prompts.
    """
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.group or sample.episode_id, []).append(index)
    for group, members in groups.items():
        if len({samples[i].prompt for i in members}) > 1:
            raise InputError(
                f"{who} compares responses to one prompt: group {group!r} holds different prompts; "
                "give each prompt its own Sample.group"
            )
    return groups


def ranking_sampling(count: int, temperature: float, seed: int) -> Sampling:
    """How the order of some candidates is generated."""
    return Sampling(4 * count + 8, temperature, stop=("\n",), seed=seed)


def rank(
    backend: Backend, questions: Sequence[RankingQuestion], rounds: int = 1, temperature: float = 0.0
) -> list[RankingVerdict]:
    """Ranks the candidates of every question, all rounds of all questions in one backend call.

    Candidates that differ at most in white space are shown once. Every round shows them in another order, drawn from
    the question's seed. A round whose reply is no ranking is left out.

    Args:
        backend: the judge.
        questions: n questions of at least two candidates.
        rounds: how often each is asked.
        temperature: of the replies.

    Returns:
        n rankings, in order.

    Raises:
        InputError: for fewer than two candidates, or more than the prompt's form takes.
        ValueError: for fewer than one round, or an unknown kind of request.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    prompts: list[Prompt] = []
    samplings: list[Sampling] = []
    orders: list[list[np.ndarray]] = []
    twins: list[list[int]] = []
    for question in questions:
        if len(question.candidates) < 2:
            raise InputError(f"a ranking needs at least two candidates, {question.prompt[:40]!r} has fewer")
        texts, mine = distinct_texts(question.candidates)
        twins.append(mine)
        seeds = [request_seed(question.seed, "round", number) for number in range(rounds)] if len(texts) > 1 else []
        orders.append([np.random.default_rng(seed).permutation(len(texts)) for seed in seeds])
        prompts += [
            ranking_prompt(backend.prompt_style, question.prompt, [texts[i] for i in order], question.kind)
            for order in orders[-1]
        ]
        samplings += [ranking_sampling(len(texts), temperature, seed) for seed in seeds]
    replies = iter(backend.generate(prompts, samplings))
    return [_ranking(mine, [next(replies) for _ in order], order) for mine, order in zip(twins, orders, strict=True)]


def _ranking(twins: Sequence[int], replies: Sequence[Any], orders: Sequence[np.ndarray]) -> RankingVerdict:
    """The mean ranks over rounds.

    Args:
        twins: for each candidate its number among the distinct ones.
        replies: one result per round; none where there is nothing to rank.
        orders: of each round, which distinct candidate stood under which letter.
    """
    distinct = max(twins) + 1
    if not replies:
        return RankingVerdict((0.0,) * len(twins), distinct)
    rows, why = [], ""
    for reply, order in zip(replies, orders, strict=True):
        if isinstance(reply, BackendError):
            why = str(reply)
            continue
        positions = parse_ranking(reply[0].text, ascii_uppercase[:distinct])
        if positions is None:
            why = f"not a ranking of {distinct} candidates: {reply[0].text[:80]!r}"
            continue
        rows.append(np.argsort(order[positions]))  # from who stands where to where each one stands
    if not rows:
        return RankingVerdict(None, distinct, why=why, calls=len(replies))
    mean = np.mean(rows, axis=0)
    taus = [kendall_tau(a, b) for a, b in combinations(rows, 2)]
    agreement = float(np.mean(taus)) if taus else None
    return RankingVerdict(tuple(float(mean[i]) for i in twins), distinct, agreement, calls=len(replies))


def kendall_tau(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's tau of two rankings without ties: 1 for the same order, -1 for the opposite one."""
    upper = np.triu_indices(len(first), k=1)
    signs = [np.sign(np.subtract.outer(ranks, ranks))[upper] for ranks in (first, second)]
    return float((signs[0] * signs[1]).mean())


class RankingJudge(Reward):
    """The normalised rank of a response within its group: 1 for the best, 0 for the worst.

    Samples of one ``group`` (or, where it is empty, of one ``episode_id``) are ranked together, in one request per
    round. Duplicates share a rank; a group of nothing but duplicates gets 1/2. Where no round gives a ranking, the
    scores of the whole group are invalid, so a retry ranks it as a whole. Within a weighted sum, a term beside this one
    that has no verdict on a part of a group makes a retry rank that part alone.

    The terms are the value, ``mean_rank`` (1 for the best) and, over several rounds, ``agreement``: the mean Kendall
    tau between them. The requests of a group are counted on its first sample.

    Args:
        backend: the judge LLM.
        rounds: how often a group is ranked, in another order of presentation each time; ranks are averaged.

    Raises:
        ValueError: for fewer than one round.
    """

    name = "ranking"

    def __init__(self, backend: Any = "embedded", rounds: int = 1) -> None:
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        self.backend, self.rounds = resolve("backend", backend), rounds
        self.calls_per_sample = rounds

    def reward(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores groups of responses to one prompt each.

        A sample that stands alone cannot be ranked. That is an error, except in a retry: there the others of its group
        may have had their score already, and it stays without a verdict.

        Raises:
            InputError: if a group has one sample or samples with different prompts.
        """
        groups = prompt_groups(samples, "the ranking judge")
        scores: list[Score] = [Score.invalid("the only sample of its group")] * len(samples)
        asked: dict[str, RankingQuestion] = {}
        for group, members in groups.items():
            first = samples[members[0]]
            if len(members) > 1:
                asked[group] = RankingQuestion(first.prompt, tuple(samples[i].response for i in members), first.seed)
            elif not first.metadata.get("attempt"):
                raise InputError(
                    f"the ranking judge compares the responses of a group: group {group!r} has only one; score several "
                    "responses to a prompt in one batch (a group size of at least 2)"
                )
        rankings = rank(self.backend, list(asked.values()), self.rounds, temperature_for(samples))
        for group, ranking in zip(asked, rankings, strict=True):
            for place, index in enumerate(groups[group]):
                scores[index] = self._score(ranking, place)
        return scores

    def _score(self, ranking: RankingVerdict, place: int) -> Score:
        calls = ranking.calls if place == 0 else 0
        if ranking.ranks is None:
            return Score.invalid(ranking.why, calls=calls)
        position = ranking.ranks[place]
        value = 1 - position / (ranking.distinct - 1) if ranking.distinct > 1 else 0.5
        terms = {self.name: value, "mean_rank": position + 1}
        if ranking.agreement is not None:
            terms["agreement"] = ranking.agreement
        return Score(value, terms=terms, feedback=f"rank {position + 1:.3g} of {ranking.distinct}", calls=calls)
