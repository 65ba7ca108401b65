"""Metrics of a judge on labelled pairs: accuracy, position bias, self-consistency, invalid rate, and baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...llm_backends.errors import InputError
from ...llm_backends.records import read_user_rows, user_text
from ...rewards.judges.pairwise import pairwise_prompt
from ...rewards.judges.verdict import Verdict, VerdictPrompt, equality_prompt
from ...rewards.rank_statistics import auc
from ...rewards.texts.rouge import rouge_l
from ..runs.statistics import known_mean, wilson

PairKind = Literal["pairwise", "equality"]
"""``pairwise``: which of two responses is better; ``equality``: do two instructions ask for the same."""


@dataclass(frozen=True)
class LabelledPair:
    """Two texts and the known answer."""

    first: str
    second: str
    label: str
    """Known answer, one of the labels of the pair's kind."""
    prompt: str = ""
    """Prompt that both texts respond to; pairwise only."""


def longer(pair: LabelledPair) -> str:
    """Returns which of two texts has more words."""
    ahead = len(pair.first.split()) - len(pair.second.split())
    return "first" if ahead > 0 else "second" if ahead < 0 else "tie"


def overlap(pair: LabelledPair) -> str:
    """Returns whether two texts share most of their words."""
    return "Equal" if rouge_l(pair.first, pair.second) > 0.5 else "Not Equal"


@dataclass(frozen=True)
class Kind:
    """A kind of pair: its rows in files, the question to a judge, and a rule that needs no judge."""

    fields: tuple[str, ...]
    """Fields of a row; the last one holds the label and determines the kind of a file."""
    labels: tuple[str, ...]
    """Possible labels. A judge gives the probability of the first one."""
    prompt: Callable[[], VerdictPrompt]
    """Returns the question; the first label is its positive answer."""
    baselines: dict[str, Callable[[LabelledPair], str]]
    """Rules without a judge, by name; a useful judge is better than these."""


PREFERENCE = Kind(
    fields=("prompt", "first", "second", "better"),
    labels=("first", "second", "tie"),
    prompt=pairwise_prompt,
    baselines={"the longer one is better": longer},
)
EQUALITY = Kind(
    fields=("first", "second", "verdict"),
    labels=("Not Equal", "Equal"),
    prompt=equality_prompt,
    baselines={"equal if ROUGE-L is above 0.5": overlap},
)
KINDS: dict[PairKind, Kind] = {"pairwise": PREFERENCE, "equality": EQUALITY}

RESULTS = ("right", "wrong", "ties", "invalid")
"""Results of a pair, one of which each pair has."""


def read_labelled_pairs(path: str | Path) -> tuple[PairKind, list[LabelledPair]]:
    """Reads rows ``{"prompt", "first", "second", "better"}`` or ``{"first", "second", "verdict"}``.

    Unlike the rows of a run, a user's file may end without a line end, and no row is dropped.

    Returns:
        The kind of the pairs, and the pairs in file order.

    Raises:
        InputError: for a file that cannot be read or is empty, or a row with a missing or wrong field.
    """
    rows = read_user_rows(path, "--data")
    if not rows:
        raise InputError(f"--data {path} holds no pairs")
    location, first = rows[0]
    kinds = [kind for kind, about in KINDS.items() if about.fields[-1] in first]
    if len(kinds) != 1:
        raise InputError(
            f"{location} must have either a field 'better' (which of two responses is better) or a field 'verdict' (do "
            f"two instructions ask for the same); it has {', '.join(map(repr, first)) or 'nothing'}"
        )
    *texts, column = KINDS[kinds[0]].fields
    labels, pairs = KINDS[kinds[0]].labels, []
    for location, row in rows:
        for field in (*texts, column):
            user_text(location, row, field)
        if row[column] not in labels:
            allowed = ", ".join(map(repr, labels))
            raise InputError(f"{location}: field '{column}' must be one of {allowed}, got {row[column]!r}")
        pairs.append(LabelledPair(label=row[column], **{field: row[field] for field in texts}))
    return kinds[0], pairs


@dataclass(frozen=True)
class Judgement:
    """Answers of the judge about one pair."""

    pair: LabelledPair
    outcome: str | None
    """A label of the pair's kind, ``tie`` if the two orders disagree, None if one of them has no verdict."""
    verdicts: tuple[Verdict, Verdict] | None = None
    """Verdicts on the order as given and on the swapped one; None if the texts are equal and no call was made."""
    probability: float | None = None
    """Probability of the first label of the pair's kind, over both orders; likelihood mode only."""
    repeats: tuple[bool | None, ...] = ()
    """Sampled answers on the order as given; None for a reply without an answer."""

    @property
    def result(self) -> str:
        """One of :data:`RESULTS`. A tie that is also the label is right, not a tie."""
        if self.outcome is None:
            return "invalid"
        return "right" if self.outcome == self.pair.label else "ties" if self.outcome == "tie" else "wrong"


def share(right: Sequence[bool]) -> dict[str, Any]:
    """Returns the share of right answers (None without any answer), its 95% Wilson interval and their number."""
    return {"share": known_mean(right), "interval": list(wilson(sum(right), len(right))), "of": len(right)}


def scored(kind: PairKind, judgements: Sequence[Judgement]) -> list[tuple[float, bool]]:
    """Returns, of pairs with a label other than tie, the probability and whether the label is the first of its kind."""
    return [
        (j.probability, j.pair.label == KINDS[kind].labels[0])
        for j in judgements
        if j.probability is not None and j.pair.label != "tie"
    ]


def measure(kind: PairKind, judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Returns the metrics of a judge.

    * ``accuracy``: share of all pairs whose outcome equals the label. The outcome tie is right only if the label is
      tie; a pair without an outcome is never right.
    * ``accuracy_decided``: the same share among pairs where neither label nor outcome is a tie.
    * ``accuracy_by_probability``: share of pairs, among those with a label other than tie, whose label is the answer
      that the probability gives when it is cut at 1/2 (likelihood mode).
    * ``auc``: AUC of the probability on the same pairs (likelihood mode).
    * ``position_bias``, in [-1, 1]: share of pairs where the text shown first was preferred in both orders, minus the
      share where the text shown second was preferred in both; among pairs with two verdicts, pairwise only.
    * ``order_disagreement``: share of pairs whose verdicts contradict each other, among pairs with two verdicts.
    * ``self_consistency``: probability that two sampled verdicts on a pair are equal, mean over pairs with two or more.
    * ``invalid_rate``: share of pairs without an outcome.
    * ``baselines``: accuracy of rules that need no judge.

    Args:
        kind: kind of the pairs.
        judgements: at least one.
    """
    labelled = [j for j in judgements if j.pair.label != "tie"]
    both_answers = [(j.verdicts[0].answer, j.verdicts[1].answer) for j in judgements if j.verdicts]
    # Shape (pairs, 2): the answers about pairs with two verdicts.
    answers = np.array([pair for pair in both_answers if None not in pair], dtype=bool).reshape(-1, 2)
    # Consistent answers differ between the orders for a preference and are the same for equality.
    disagree = (answers[:, 0] == answers[:, 1]) == (kind == "pairwise")
    metrics: dict[str, Any] = {
        "accuracy": share([j.result == "right" for j in judgements]),
        "accuracy_decided": share([j.result == "right" for j in labelled if j.outcome not in (None, "tie")]),
        "order_disagreement": known_mean(disagree.tolist()),
        "position_bias": None,
        "self_consistency": known_mean(map(_consistency, judgements)),
        "invalid_rate": known_mean(j.result == "invalid" for j in judgements),
        "baselines": baselines(kind, [j.pair for j in judgements]),
    }
    if kind == "pairwise" and len(answers):
        metrics["position_bias"] = float(answers.all(axis=1).mean()) - float((~answers.any(axis=1)).mean())
    if with_probability := scored(kind, judgements):
        right = [(probability > 0.5) == positive for probability, positive in with_probability]
        metrics["accuracy_by_probability"] = share(right)
        metrics["auc"] = auc(*zip(*with_probability, strict=True))
    return metrics


def count(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Returns the number of pairs by label and by result; right, wrong, ties and invalid sum to pairs."""
    results = Counter(j.result for j in judgements)
    return {
        "pairs": len(judgements),
        "labels": dict(sorted(Counter(j.pair.label for j in judgements).items())),
        **{result: results[result] for result in RESULTS},
        "invalid_repeats": sum(answer is None for j in judgements for answer in j.repeats),
    }


def _consistency(judgement: Judgement) -> float | None:
    """Returns the probability that two sampled answers, drawn without replacement, are equal; None for fewer."""
    answers = Counter(answer for answer in judgement.repeats if answer is not None)
    total = comb(answers.total(), 2)
    return sum(comb(number, 2) for number in answers.values()) / total if total else None


def baselines(kind: PairKind, pairs: Sequence[LabelledPair]) -> dict[str, dict[str, Any]]:
    """Returns the accuracy of the kind's rules and of always answering the most frequent label."""
    [(label, _)] = Counter(pair.label for pair in pairs).most_common(1)
    rules = KINDS[kind].baselines | {f"always '{label}'": lambda _: label}
    return {name: share([rule(pair) == pair.label for pair in pairs]) for name, rule in rules.items()}
