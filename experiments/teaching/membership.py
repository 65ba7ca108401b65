"""Membership inference: can rows that a model was fine-tuned on be told from rows of the same source that it was not?

Every attack gives a row one number, higher for a row taken for a member (Yeom et al. 2018, Carlini et al. 2022). The
area under its ROC curve is 0.5 where it does no better than guessing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from ...agents.policy.language_model import LanguageModelPolicy
from ...agents.supervised.sft import TokenizedDemonstration
from ...llm_backends.errors import InputError
from ...llm_backends.local.causal_lm import token_budget_chunks
from ..runs.report import COLOURS, panels
from ..runs.statistics import auc

ATTACKS = ("loss", "calibrated", "min_k")
"""``loss``: negative mean loss per token; ``calibrated``: the reference model's mean loss less the model's own;
``min_k``: mean log-prob of the least likely tokens (Min-K% Prob, Shi et al. 2023, arXiv 2310.16789)."""

TITLES = {"loss": "loss", "calibrated": "loss against the reference", "min_k": "Min-20% log-prob"}

SIDES = ("members", "nonmembers")

MIN_K = 20
"""Percent of a response's tokens that ``min_k`` takes, the value of Shi et al."""
FALSE_POSITIVES = 0.01
RESAMPLES = 2000


@dataclass(frozen=True)
class AttackMetrics:
    """How well one attack tells members from non-members."""

    auc: float
    """Area under the ROC curve: the chance that a member scores above a non-member, ties by halves."""
    auc_low: float
    auc_high: float
    """Percentile bootstrap 95% interval of the AUC, members and non-members resampled apart."""
    distance_to_chance: float
    """|AUC - 0.5|."""
    tpr_at_1_percent_fpr: float | None
    """Largest share of members found by a threshold that takes at most 1% of the non-members for members."""
    reason: str
    """Why that share is not known; empty where it is."""

    @property
    def verdict(self) -> str:
        """What the interval says, in words."""
        if self.auc_low > 0.5:
            return "members are told from non-members"
        if self.auc_high < 0.5:
            return "below 0.5: noise, or members and non-members differ otherwise; no sign of more privacy"
        return "no better than guessing, as far as these rows tell"

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return asdict(self) | {"verdict": self.verdict}


def attack_scores(logprobs: np.ndarray, reference: np.ndarray, k: int = MIN_K) -> dict[str, float]:
    """The score of one row by each of :data:`ATTACKS`, in nats per token.

    Args:
        logprobs: float, shape (tokens,): log-probs in nats of the response's tokens by the model, given its prompt.
        reference: float, shape (tokens,): by the reference model.
        k: percent of the tokens that ``min_k`` takes; at least one token.

    Raises:
        InputError: for an empty response, shapes that differ, and a k outside of (0, 100].
    """
    own, other = np.asarray(logprobs, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if own.ndim != 1 or not len(own) or own.shape != other.shape:
        raise InputError(f"log-probs of one response need one shape (tokens,), got {own.shape} and {other.shape}")
    if not 0 < k <= 100:
        raise InputError(f"min_k takes a percentage of the tokens, above 0 and at most 100, got {k}")
    count = max(int(len(own) * k // 100), 1)
    return {
        "loss": float(own.mean()),
        "calibrated": float((own - other).mean()),
        "min_k": float(np.sort(own)[:count].mean()),
    }


@torch.no_grad()
def score_rows(
    policy: LanguageModelPolicy,
    reference: LanguageModelPolicy,
    rows: Sequence[TokenizedDemonstration],
    token_budget: int,
) -> list[dict[str, float]]:
    """Scores rows by every attack.

    Both models read the same batches, so that a model that is its own reference gives ``calibrated`` scores of 0.

    Args:
        policy: the fine-tuned model, at temperature 1.
        reference: whose reference model is taken; the policy itself where that is the model without its adapter.
        rows: prompts and responses as in training.
        token_budget: tokens of a batch, padding included.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].response))
    scores: list[dict[str, float]] = [{}] * len(rows)
    lengths = [len(rows[i].prompt) + len(rows[i].response) for i in order]
    for chunk in token_budget_chunks(lengths, token_budget):
        members = [order[position] for position in chunk]
        prompts = [np.asarray(rows[i].prompt, dtype=np.int32) for i in members]
        responses = [np.asarray(rows[i].response, dtype=np.int32) for i in members]
        free = [None] * len(members)
        ends = np.cumsum([len(response) for response in responses])[:-1]
        own = policy.score(prompts, responses, free, values=False).logprobs.float().cpu().numpy()
        other = reference.reference_logprobs(prompts, responses, free).float().cpu().numpy()
        for i, mine, theirs in zip(members, np.split(own, ends), np.split(other, ends), strict=True):
            scores[i] = attack_scores(mine, theirs)
    return scores


def roc(members: Sequence[float], nonmembers: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every threshold, both float64, shape (thresholds,), rising from 0 to 1."""
    from sklearn.metrics import roc_curve

    labels = [1] * len(members) + [0] * len(nonmembers)
    false_positives, true_positives, _ = roc_curve(labels, [*members, *nonmembers], drop_intermediate=False)
    return false_positives, true_positives


def attack_metrics(
    member_scores: Sequence[float], nonmember_scores: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> AttackMetrics:
    """AUC with its interval, and the true positive rate at 1% false positives.

    With fewer than 100 non-members a single one is more than 1% of them: the rate is then None with the reason, for
    what lies between the curve's first points would be made up.

    Args:
        member_scores: of rows that the model was trained on, higher = taken for a member.
        nonmember_scores: of rows that it was not trained on.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        InputError: without members or non-members, and for a score that is not finite.
    """
    members, others = (np.asarray(scores, dtype=np.float64) for scores in (member_scores, nonmember_scores))
    if not len(members) or not len(others):
        raise InputError(f"an attack needs members and non-members, got {len(members)} and {len(others)} scores")
    if not (np.isfinite(members).all() and np.isfinite(others).all()):
        raise InputError("a score is not finite: the model gives a row's token no probability, or is broken")
    value = auc([*members, *others], [True] * len(members) + [False] * len(others))
    assert value is not None
    low, high = np.quantile(_resampled_aucs(members, others, seed, resamples), [0.025, 0.975])
    rate: float | None = None
    reason = ""
    if len(others) < math.ceil(1 / FALSE_POSITIVES):
        reason = f"{len(others)} non-members: one of them is more than 1%, at least 100 are needed"
    else:
        false_positives, true_positives = roc(members.tolist(), others.tolist())
        rate = float(true_positives[false_positives <= FALSE_POSITIVES + 1e-12].max())
    return AttackMetrics(value, float(low), float(high), abs(value - 0.5), rate, reason)


def _resampled_aucs(members: np.ndarray, others: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """float64, shape (resamples,): the AUC under draws with replacement from either side."""
    rng = np.random.default_rng(seed)
    count, pairs = len(members), len(members) * len(others)
    rows = max(1_000_000 // (count + len(others)), 1)  # drawn together: bounds memory
    found = []
    for start in range(0, resamples, rows):
        drawn = [rng.choice(side, (min(rows, resamples - start), len(side))) for side in (members, others)]
        ranks = stats.rankdata(np.concatenate(drawn, axis=1), axis=1)
        found.append((ranks[:, :count].sum(axis=1) - count * (count + 1) / 2) / pairs)
    return np.concatenate(found)


@dataclass(frozen=True)
class LengthShift:
    """Whether members and non-members differ in length, which an attack may find in the place of memory."""

    members: float
    nonmembers: float
    """Mean tokens per response."""
    p_value: float
    """Of Welch's t-test of equal means; 1 where neither side varies and the means are equal."""
    auc: float
    """What the length alone reaches as an attack, longer = taken for a member."""

    @property
    def found(self) -> bool:
        """Whether the means differ at the 5% level."""
        return self.p_value < 0.05


def length_shift(members: Sequence[int], nonmembers: Sequence[int]) -> LengthShift:
    """Compares the lengths of members and non-members.

    Args:
        members: tokens of each member's response.
        nonmembers: of each non-member's.
    """
    ours, theirs = np.asarray(members, dtype=np.float64), np.asarray(nonmembers, dtype=np.float64)
    if len(ours) < 2 or len(theirs) < 2 or ours.std() + theirs.std() == 0:
        p_value = 1.0 if min(len(ours), len(theirs)) < 2 or ours.mean() == theirs.mean() else 0.0
    else:
        p_value = float(stats.ttest_ind(ours, theirs, equal_var=False).pvalue)
    by_length = auc([*ours, *theirs], [True] * len(ours) + [False] * len(theirs))
    assert by_length is not None
    return LengthShift(float(ours.mean()), float(theirs.mean()), p_value, by_length)


def side_of(rows: Sequence[Mapping[str, Any]], side: str) -> list[Mapping[str, Any]]:
    """The rows of ``scores.jsonl`` that are of a side of :data:`SIDES`."""
    return [row for row in rows if row["member"] == (side == "members")]


def plot_roc(scores: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """ROC curves of all attacks, one panel per policy, with the diagonal of guessing.

    Args:
        scores: by policy, rows of ``scores.jsonl``.
        path: the PNG.
    """
    columns = min(len(scores), 3)
    figure, axes = panels(columns, -(-len(scores) // columns))
    for axis in list(axes.flat)[len(scores) :]:
        axis.set_axis_off()
    for axis, (name, rows) in zip(axes.flat, scores.items(), strict=False):
        axis.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--", label="guessing")
        for k, attack in enumerate(ATTACKS):
            sides = ([row[attack] for row in side_of(rows, side)] for side in SIDES)
            false_positives, true_positives = roc(*sides)
            area = auc([row[attack] for row in rows], [row["member"] for row in rows])
            axis.plot(
                false_positives, true_positives, color=COLOURS[k], linewidth=2, label=f"{TITLES[attack]}: {area:.2f}"
            )
        members, others = (len(side_of(rows, side)) for side in SIDES)
        axis.set(
            title=f"{name}: {members} members, {others} others",
            xlabel="false positive rate",
            ylabel="true positive rate",
            xlim=(0, 1),
            ylim=(0, 1.02),
        )
        axis.set_aspect("equal")
        axis.legend(frameon=False, fontsize=8, loc="lower right", title="AUC", title_fontsize=8)
    figure.savefig(path, dpi=130)
    return path
