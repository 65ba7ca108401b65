"""How good a judge is on labelled pairs: accuracy, position bias, self-consistency, invalid rate, and baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...llm_backends.errors import InputError
from ...llm_backends.records import read_user_rows, user_text
from ...rewards.judges.verdict import (
    Verdict,
)
from ...rewards.texts.rouge import rouge_l
from ..runs.statistics import auc, wilson

PairKind = Literal["pairwise", "equality"]
"""``pairwise``: which of two responses is better; ``equality``: do two instructions ask for the same."""


LABELS: dict[PairKind, tuple[str, ...]] = {
    "pairwise": ("first", "second", "tie"),
    "equality": ("Not Equal", "Equal"),
}
"""What a pair may be labelled. The first is the one whose probability a judge gives."""


COLUMNS: dict[PairKind, str] = {"pairwise": "better", "equality": "verdict"}
"""The column of the label, which says of which kind a file is."""


@dataclass(frozen=True)
class LabelledPair:
    """Two texts and what is known of them."""

    first: str
    second: str
    label: str
    """One of :data:`LABELS`."""
    prompt: str = ""
    """What both respond to; pairwise only."""


def read_labelled_pairs(path: str | Path) -> tuple[PairKind, list[LabelledPair]]:
    """Reads rows ``{"prompt", "first", "second", "better"}`` or ``{"first", "second", "verdict"}``.

    Unlike the rows of a run, a user's file may end without a line end, and none of its rows is ever dropped.

    Raises:
        InputError: for a file that cannot be read or is empty, or a row with a missing or wrong field.
    """
    rows = read_user_rows(path, "--data")
    if not rows:
        raise InputError(f"--data {path} holds no pairs")
    kind = _kind(*rows[0])
    return kind, [_pair(kind, where, row) for where, row in rows]


def _kind(where: str, row: Mapping[str, Any]) -> PairKind:
    kinds = [kind for kind, column in COLUMNS.items() if column in row]
    if len(kinds) != 1:
        raise InputError(
            f"{where} must have either a field 'better' (which of two responses is better) or a field 'verdict' (do "
            f"two instructions ask for the same); it has {', '.join(map(repr, row)) or 'nothing'}"
        )
    return kinds[0]


def _pair(kind: PairKind, where: str, row: Mapping[str, Any]) -> LabelledPair:
    column = COLUMNS[kind]
    for field in (*(("prompt",) if kind == "pairwise" else ()), "first", "second", column):
        user_text(where, row, field)
    if row[column] not in LABELS[kind]:
        allowed = ", ".join(map(repr, LABELS[kind]))
        raise InputError(f"{where}: field '{column}' must be one of {allowed}, got {row[column]!r}")
    return LabelledPair(row["first"], row["second"], row[column], row["prompt"] if kind == "pairwise" else "")


@dataclass(frozen=True)
class Judgement:
    """What the judge said of one pair."""

    pair: LabelledPair
    outcome: str | None
    """A label of the pair's kind, ``tie`` where the two orders disagree, None where one of them has no verdict."""
    verdicts: tuple[Verdict, Verdict] | None = None
    """On the order as given and the swapped one; None where the texts are the same and no one was asked."""
    probability: float | None = None
    """Of the kind's first label, over both orders; likelihood mode only."""
    repeats: tuple[bool | None, ...] = ()
    """Sampled answers on the order as given."""


def shares(right: int, total: int) -> dict[str, Any]:
    """A share with its 95% Wilson interval; None where nothing was counted."""
    return {"share": right / total if total else None, "interval": list(wilson(right, total)), "of": total}


def measure(kind: PairKind, judgements: Sequence[Judgement]) -> dict[str, Any]:
    """The metrics of a judge.

    * ``accuracy``: share of all pairs whose outcome is the label. A tie is right only where the label says tie; a pair
      without an outcome never is.
    * ``accuracy_decided``: the same among pairs where label and outcome are both no tie.
    * ``accuracy_by_probability``: share of pairs with a label other than tie on whose side the probability is
      (likelihood mode).
    * ``auc``: of that probability (likelihood mode).
    * ``position_bias``, in [-1, 1]: share of pairs where the text shown first was preferred in both orders, less the
      share where the one shown second was. Of pairs with two verdicts; pairwise only.
    * ``order_disagreement``: share of pairs with two verdicts that contradict each other.
    * ``self_consistency``: chance that two sampled verdicts on a pair are the same, mean over pairs with two or more.
    * ``invalid_rate``: share of pairs without an outcome.
    * ``baselines``: accuracy of what needs no judge.

    Args:
        kind: of the pairs.
        judgements: at least one.
    """
    positive = LABELS[kind][0]
    right = [j.outcome == j.pair.label for j in judgements]
    decided = [
        j.outcome == j.pair.label for j in judgements if j.outcome not in (None, "tie") and j.pair.label != "tie"
    ]
    both = [
        (j.verdicts[0].answer, j.verdicts[1].answer)
        for j in judgements
        if j.verdicts and None not in (j.verdicts[0].answer, j.verdicts[1].answer)
    ]
    # A preference has to turn around with the order, sameness has not.
    disagree = [(given == swapped) == (kind == "pairwise") for given, swapped in both]
    metrics: dict[str, Any] = {
        "accuracy": shares(sum(right), len(right)),
        "accuracy_decided": shares(sum(decided), len(decided)),
        "order_disagreement": float(np.mean(disagree)) if both else None,
        "position_bias": None,
        "self_consistency": _consistency(judgements),
        "invalid_rate": float(np.mean([j.outcome is None for j in judgements])),
        "baselines": baselines(kind, [j.pair for j in judgements]),
    }
    if kind == "pairwise" and both:
        metrics["position_bias"] = float(np.mean([given and swapped for given, swapped in both])) - float(
            np.mean([not given and not swapped for given, swapped in both])
        )
    labelled = [j for j in judgements if j.pair.label != "tie"]
    known = [(j.probability, j.pair.label == positive) for j in labelled if j.probability is not None]
    if known:
        agreeing = sum((probability > 0.5) == is_so for probability, is_so in known)
        metrics["accuracy_by_probability"] = shares(agreeing, len(known))
        metrics["auc"] = auc(*map(list, zip(*known, strict=True)))
    return metrics


def count(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """The pairs by label and by what became of them; right, wrong, ties and invalid add up to pairs."""
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
    same = []
    for judgement in judgements:
        answers = [answer for answer in judgement.repeats if answer is not None]
        if len(answers) > 1:
            yes, no = sum(answers), len(answers) - sum(answers)
            same.append((yes * (yes - 1) + no * (no - 1)) / (len(answers) * (len(answers) - 1)))
    return float(np.mean(same)) if same else None


def _longer(pair: LabelledPair) -> str:
    ahead = len(pair.first.split()) - len(pair.second.split())
    return "first" if ahead > 0 else "second" if ahead < 0 else "tie"


def _overlap(pair: LabelledPair) -> str:
    return "Equal" if rouge_l(pair.first, pair.second) > 0.5 else "Not Equal"


BASELINES: dict[PairKind, dict[str, Callable[[LabelledPair], str]]] = {
    "pairwise": {"the longer one is better": _longer},
    "equality": {"equal if ROUGE-L is above 0.5": _overlap},
}
"""Rules that any judge has to beat, by name."""


def baselines(kind: PairKind, pairs: Sequence[LabelledPair]) -> dict[str, dict[str, Any]]:
    """Accuracy, as of a judge, of the simple rules and of always giving the most frequent label."""
    found = {
        name: shares(sum(rule(pair) == pair.label for pair in pairs), len(pairs))
        for name, rule in BASELINES[kind].items()
    }
    [(label, most)] = Counter(pair.label for pair in pairs).most_common(1)
    return found | {f"always '{label}'": shares(most, len(pairs))}
