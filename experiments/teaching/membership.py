"""Membership inference: do a model's log-probs reveal which rows of a data set it was fine-tuned on?

Members are the rows that the model was fine-tuned on, non-members other rows of the same source. An attack gives every
row a score, higher for a row that it takes for a member (Yeom et al. 2018, Carlini et al. 2022). The area under its ROC
curve (AUC) is 0.5 if the attack is no better than guessing.
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
from ...rewards.rank_statistics import auc_between
from ..runs.report import COLOURS, panels

ATTACKS = ("loss", "calibrated", "min_k")
"""Names of the attacks. ``loss``: negative mean loss per token; ``calibrated``: mean loss of the reference model minus
that of the model; ``min_k``: mean log-prob of the least likely tokens (Min-K% Prob, Shi et al. 2023, arXiv
2310.16789)."""

TITLES = {"loss": "loss", "calibrated": "loss against the reference", "min_k": "Min-20% log-prob"}

SIDES = ("members", "nonmembers")

MIN_K = 20
"""Percentage of a response's tokens that ``min_k`` averages over, the value of Shi et al."""
FALSE_POSITIVES = 0.01
"""False positive rate at which the true positive rate is reported."""
RESAMPLES = 2000
"""Bootstrap samples behind an interval."""


@dataclass(frozen=True)
class AttackMetrics:
    """How well one attack separates members from non-members."""

    auc: float
    """Area under the ROC curve: the probability that a member scores above a non-member, a tie counting one half."""
    auc_low: float
    """Lower end of the 95% percentile bootstrap interval of the AUC; members and non-members are resampled
    separately."""
    auc_high: float
    """Upper end of that interval."""
    distance_to_chance: float
    """|AUC - 0.5|."""
    tpr_at_1_percent_fpr: float | None
    """Largest true positive rate of a threshold whose false positive rate is at most 1%; None with too few rows."""
    reason: str
    """Why that rate is None; empty if it is not."""

    @property
    def verdict(self) -> str:
        """Meaning of the AUC's interval, in words."""
        if self.auc_low > 0.5:
            return "members are told from non-members"
        if self.auc_high < 0.5:
            return "below 0.5: noise, or members and non-members differ otherwise; no sign of more privacy"
        return "no better than guessing, as far as these rows tell"

    def as_dict(self) -> dict[str, Any]:
        """Returns the metrics and the verdict, JSON-able."""
        return asdict(self) | {"verdict": self.verdict}


def attack_scores(logprobs: np.ndarray, reference: np.ndarray, k: int = MIN_K) -> dict[str, float]:
    """Scores one row by each of :data:`ATTACKS`, in nats per token.

    Args:
        logprobs: log-probs of the response's tokens by the model, given the prompt; float, shape (tokens,), in nats.
        reference: log-probs of the same tokens by the reference model; float, shape (tokens,), in nats.
        k: percentage of the tokens, the least likely ones, that ``min_k`` averages over; at least one token.

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

    Both models get the same batches, so a model that is its own reference gives ``calibrated`` scores of 0.

    Args:
        policy: the fine-tuned model, at temperature 1.
        reference: policy whose reference model is the reference of the attack; ``policy`` itself if that is the model
            without its adapter.
        rows: prompts and responses as in training.
        token_budget: maximum tokens of a batch, padding included.

    Returns:
        For each row, its score by attack.
    """
    # Rows of similar length share a batch, which saves padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].response))
    scores: list[dict[str, float]] = [{}] * len(rows)
    lengths = [len(rows[i].prompt) + len(rows[i].response) for i in order]
    for chunk in token_budget_chunks(lengths, token_budget):
        indices = [order[position] for position in chunk]
        prompts = [np.asarray(rows[i].prompt, dtype=np.int32) for i in indices]
        responses = [np.asarray(rows[i].response, dtype=np.int32) for i in indices]
        free = [None] * len(indices)
        # The models return the log-probs of all responses in one array: split it by response.
        ends = np.cumsum([len(response) for response in responses])[:-1]
        own = policy.score(prompts, responses, free, values=False).logprobs.float().cpu().numpy()
        other = reference.reference_logprobs(prompts, responses, free).float().cpu().numpy()
        for i, row_own, row_other in zip(indices, np.split(own, ends), np.split(other, ends), strict=True):
            scores[i] = attack_scores(row_own, row_other)
    return scores


def roc(members: Sequence[float], nonmembers: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns false and true positive rates at every threshold, both float64, shape (thresholds,), from 0 to 1."""
    from sklearn.metrics import roc_curve

    labels = [1] * len(members) + [0] * len(nonmembers)
    false_positives, true_positives, _ = roc_curve(labels, [*members, *nonmembers], drop_intermediate=False)
    return false_positives, true_positives


def attack_metrics(
    member_scores: Sequence[float], nonmember_scores: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> AttackMetrics:
    """Computes the AUC of an attack with its interval, and the true positive rate at 1% false positives.

    With fewer than 100 non-members, a single one is more than 1% of them. The rate is then None, with the reason: it
    could only be interpolated between the first points of the curve.

    Args:
        member_scores: scores of rows that the model was trained on; higher means more likely a member.
        nonmember_scores: scores of rows that it was not trained on.
        seed: seed of the bootstrap.
        resamples: number of bootstrap samples.

    Raises:
        InputError: without members or non-members, and for a score that is not finite.
    """
    members, others = (np.asarray(scores, dtype=np.float64) for scores in (member_scores, nonmember_scores))
    if not len(members) or not len(others):
        raise InputError(f"an attack needs members and non-members, got {len(members)} and {len(others)} scores")
    if not (np.isfinite(members).all() and np.isfinite(others).all()):
        raise InputError("a score is not finite: the model gives a row's token no probability, or is broken")
    value = float(auc_between(members, others))
    low, high = np.quantile(_resampled_aucs(members, others, seed, resamples), [0.025, 0.975])
    rate: float | None = None
    reason = ""
    if len(others) < math.ceil(1 / FALSE_POSITIVES):
        reason = f"{len(others)} non-members: one of them is more than 1%, at least 100 are needed"
    else:
        false_positives, true_positives = roc(members.tolist(), others.tolist())
        # The tolerance keeps a threshold at exactly 1%, whatever the rounding.
        rate = float(true_positives[false_positives <= FALSE_POSITIVES + 1e-12].max())
    return AttackMetrics(value, float(low), float(high), abs(value - 0.5), rate, reason)


def _resampled_aucs(members: np.ndarray, others: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Returns the AUC of bootstrap samples of members and of non-members; float64, shape (resamples,)."""
    rng = np.random.default_rng(seed)
    # The number of bootstrap samples that are drawn together bounds the memory.
    rows = max(1_000_000 // (len(members) + len(others)), 1)
    aucs = []
    for start in range(0, resamples, rows):
        drawn = [rng.choice(side, (min(rows, resamples - start), len(side))) for side in (members, others)]
        aucs.append(auc_between(*drawn))
    return np.concatenate(aucs)


@dataclass(frozen=True)
class LengthShift:
    """Whether members and non-members differ in length, which an attack may detect instead of memorisation."""

    members: float
    """Mean tokens per response of members."""
    nonmembers: float
    """Mean tokens per response of non-members."""
    p_value: float
    """p-value of Welch's t-test of equal means; 1 if a side has fewer than two rows, or if neither side varies and the
    means are equal."""
    auc: float
    """AUC of the length alone as an attack; longer means more likely a member."""

    @property
    def significant(self) -> bool:
        """Whether the means differ significantly at the 5% level."""
        return self.p_value < 0.05


def length_shift(members: Sequence[int], nonmembers: Sequence[int]) -> LengthShift:
    """Compares the lengths of members and non-members.

    Args:
        members: tokens of each member's response.
        nonmembers: tokens of each non-member's response.
    """
    inside, outside = np.asarray(members, dtype=np.float64), np.asarray(nonmembers, dtype=np.float64)
    # The t-test is undefined for fewer than two rows and without any variance.
    if len(inside) < 2 or len(outside) < 2 or inside.std() + outside.std() == 0:
        p_value = 1.0 if min(len(inside), len(outside)) < 2 or inside.mean() == outside.mean() else 0.0
    else:
        p_value = float(stats.ttest_ind(inside, outside, equal_var=False).pvalue)
    return LengthShift(float(inside.mean()), float(outside.mean()), p_value, float(auc_between(inside, outside)))


def side_of(rows: Sequence[Mapping[str, Any]], side: str) -> list[Mapping[str, Any]]:
    """Returns the rows of ``scores.jsonl`` that belong to one of :data:`SIDES`."""
    return [row for row in rows if row["member"] == (side == "members")]


def plot_roc(scores: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """Plots the ROC curves of all attacks, one panel per policy, and returns the path; the diagonal is guessing.

    Args:
        scores: rows of ``scores.jsonl`` by policy.
        path: PNG file to write.
    """
    columns = min(len(scores), 3)
    figure, axes = panels(columns, -(-len(scores) // columns))
    # The grid of panels may have more places than there are policies.
    for axis in list(axes.flat)[len(scores) :]:
        axis.set_axis_off()
    for axis, (name, rows) in zip(axes.flat, scores.items(), strict=False):
        axis.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--", label="guessing")
        for k, attack in enumerate(ATTACKS):
            sides = [[row[attack] for row in side_of(rows, side)] for side in SIDES]
            false_positives, true_positives = roc(*sides)
            label = f"{TITLES[attack]}: {auc_between(*map(np.array, sides)):.2f}"
            axis.plot(false_positives, true_positives, color=COLOURS[k], linewidth=2, label=label)
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
