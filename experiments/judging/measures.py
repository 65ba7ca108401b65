"""Metrics of a judge on labelled pairs: accuracy, position bias, self-consistency, invalid rate, and baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...llm_backends.errors import InputError
from ...llm_backends.records import read_user_rows, user_text
from ...rewards.judges.verdict import Verdict
from ...rewards.rank_statistics import auc
from ...rewards.texts.rouge import rouge_l
from ..runs.statistics import known_mean, wilson

PairKind = Literal["pairwise", "equality"]
"""``pairwise``: which of two responses is better; ``equality``: do two instructions ask for the same."""


LABELS: dict[PairKind, tuple[str, ...]] = {
    "pairwise": ("first", "second", "tie"),
    "equality": ("Not Equal", "Equal"),
}
"""Possible labels of each kind of pair. A judge gives the probability of the first one."""


COLUMNS: dict[PairKind, str] = {"pairwise": "better", "equality": "verdict"}
"""Column that holds the label; it determines the kind of a file."""


@dataclass(frozen=True)
class LabelledPair:
    """Two texts and the known answer."""

    first: str
    second: str
    label: str
    """Known answer, one of :data:`LABELS`."""
    prompt: str = ""
    """Prompt that both texts respond to; pairwise only."""


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
    kind = _kind(*rows[0])
    return kind, [_pair(kind, location, row) for location, row in rows]


def _kind(location: str, row: Mapping[str, Any]) -> PairKind:
    kinds = [kind for kind, column in COLUMNS.items() if column in row]
    if len(kinds) != 1:
        raise InputError(
            f"{location} must have either a field 'better' (which of two responses is better) or a field 'verdict' (do "
            f"two instructions ask for the same); it has {', '.join(map(repr, row)) or 'nothing'}"
        )
    return kinds[0]


def _pair(kind: PairKind, location: str, row: Mapping[str, Any]) -> LabelledPair:
    column = COLUMNS[kind]
    for field in (*(("prompt",) if kind == "pairwise" else ()), "first", "second", column):
        user_text(location, row, field)
    if row[column] not in LABELS[kind]:
        allowed = ", ".join(map(repr, LABELS[kind]))
        raise InputError(f"{location}: field '{column}' must be one of {allowed}, got {row[column]!r}")
    return LabelledPair(row["first"], row["second"], row[column], row["prompt"] if kind == "pairwise" else "")


@dataclass(frozen=True)
class Judgement:
    """Answers of the judge about one pair."""

    pair: LabelledPair
    outcome: str | None
    """A label of the pair's kind, ``tie`` if the two orders disagree, None if one of them has no verdict."""
    verdicts: tuple[Verdict, Verdict] | None = None
    """Verdicts on the order as given and on the swapped one; None if the texts are equal and no call was made."""
    probability: float | None = None
    """Probability of the first label of the pair's kind in :data:`LABELS`, over both orders; likelihood mode only."""
    repeats: tuple[bool | None, ...] = ()
    """Sampled answers on the order as given; None for a reply without an answer."""


def shares(right: int, total: int) -> dict[str, Any]:
    """Returns a share with its 95% Wilson interval and its total.

    Args:
        right: number of right answers.
        total: number of answers; if it is 0 the share is None.
    """
    return {"share": right / total if total else None, "interval": list(wilson(right, total)), "of": total}


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
    positive = LABELS[kind][0]
    right = [j.outcome == j.pair.label for j in judgements]
    decided = [
        j.outcome == j.pair.label for j in judgements if j.outcome not in (None, "tie") and j.pair.label != "tie"
    ]
    answer_pairs = [
        (j.verdicts[0].answer, j.verdicts[1].answer)
        for j in judgements
        if j.verdicts and None not in (j.verdicts[0].answer, j.verdicts[1].answer)
    ]
    # Consistent answers differ between the orders for a preference and are the same for equality.
    disagree = [(in_order == swapped) == (kind == "pairwise") for in_order, swapped in answer_pairs]
    metrics: dict[str, Any] = {
        "accuracy": shares(sum(right), len(right)),
        "accuracy_decided": shares(sum(decided), len(decided)),
        "order_disagreement": known_mean(disagree),
        "position_bias": None,
        "self_consistency": _consistency(judgements),
        "invalid_rate": float(np.mean([j.outcome is None for j in judgements])),
        "baselines": baselines(kind, [j.pair for j in judgements]),
    }
    if kind == "pairwise" and answer_pairs:
        metrics["position_bias"] = float(np.mean([in_order and swapped for in_order, swapped in answer_pairs])) - float(
            np.mean([not in_order and not swapped for in_order, swapped in answer_pairs])
        )
    labelled = [j for j in judgements if j.pair.label != "tie"]
    scored = [(j.probability, j.pair.label == positive) for j in labelled if j.probability is not None]
    if scored:
        agreeing = sum((probability > 0.5) == is_positive for probability, is_positive in scored)
        metrics["accuracy_by_probability"] = shares(agreeing, len(scored))
        metrics["auc"] = auc(*map(list, zip(*scored, strict=True)))
    return metrics


def count(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Returns the number of pairs by label and by result; right, wrong, ties and invalid sum to pairs."""
    # A tie that is also the label counts as right, not as a tie.
    ties = sum(j.outcome == "tie" != j.pair.label for j in judgements)
    invalid = sum(j.outcome is None for j in judgements)
    right = sum(j.outcome == j.pair.label for j in judgements)
    return {
        "pairs": len(judgements),
        "labels": dict(sorted(Counter(j.pair.label for j in judgements).items())),
        "right": right,
        "wrong": len(judgements) - right - ties - invalid,
        "ties": ties,
        "invalid": invalid,
        "invalid_repeats": sum(answer is None for j in judgements for answer in j.repeats),
    }


def _consistency(judgements: Sequence[Judgement]) -> float | None:
    """Returns the mean probability that two of a pair's sampled answers, drawn without replacement, are equal."""
    same = []
    for judgement in judgements:
        answers = [answer for answer in judgement.repeats if answer is not None]
        if len(answers) > 1:
            yes, no = sum(answers), len(answers) - sum(answers)
            same.append((yes * (yes - 1) + no * (no - 1)) / (len(answers) * (len(answers) - 1)))
    return known_mean(same)


def _longer(pair: LabelledPair) -> str:
    ahead = len(pair.first.split()) - len(pair.second.split())
    return "first" if ahead > 0 else "second" if ahead < 0 else "tie"


def _overlap(pair: LabelledPair) -> str:
    return "Equal" if rouge_l(pair.first, pair.second) > 0.5 else "Not Equal"


BASELINES: dict[PairKind, dict[str, Callable[[LabelledPair], str]]] = {
    "pairwise": {"the longer one is better": _longer},
    "equality": {"equal if ROUGE-L is above 0.5": _overlap},
}
"""Rules without a judge, by name; a useful judge is better than these."""


def baselines(kind: PairKind, pairs: Sequence[LabelledPair]) -> dict[str, dict[str, Any]]:
    """Returns the accuracy of the rules in :data:`BASELINES` and of always answering the most frequent label."""
    accuracies = {
        name: shares(sum(rule(pair) == pair.label for pair in pairs), len(pairs))
        for name, rule in BASELINES[kind].items()
    }
    [(label, frequency)] = Counter(pair.label for pair in pairs).most_common(1)
    return accuracies | {f"always '{label}'": shares(frequency, len(pairs))}
