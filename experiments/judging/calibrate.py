"""``instructgym judge calibrate``: measures a judge on pairs with known answers before it is used for rewards.

The judge is asked about every pair in both orders. Generated verdicts are also sampled a few times, to measure how
often the judge agrees with itself. The metrics are in :mod:`instructgym.experiments.judging.measures`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import binned_statistic

from ...llm_backends import Backend, Journaled, request_seed
from ...llm_backends.errors import InputError
from ...rewards.judges.pairwise import Pair, both_orders, compare, pair_question
from ...rewards.judges.verdict import RETRY_TEMPERATURE, Verdict, VerdictMode, judge_verdicts, sigmoid, uses_likelihood
from ..runs.folder import RowWriter, RunFolder, journaled_roles
from ..runs.options import BackendOptions, Required, Scale, input_errors, named, parse_part
from ..runs.progress import Deadline, StepProgress
from ..runs.report import COLOURS, panels
from ..runs.training import Run, run_stage
from .measures import KINDS, RESULTS, Judgement, LabelledPair, PairKind, count, measure, read_labelled_pairs, scored


def plot_calibration(
    shares: Mapping[str, tuple[float, float, float]], probabilities: Sequence[tuple[float, bool]], path: Path
) -> Path:
    """Plots a judge's shares as bars and, if it gives probabilities, a reliability diagram.

    Args:
        shares: maps a name to a share and the lower and upper end of its 95% interval.
        probabilities: for each pair the judge's probability of a label, and whether the pair has that label; empty: no
            reliability diagram.
        path: PNG file to write.

    Returns:
        ``path``.
    """
    figure, axes = panels(2 if probabilities else 1)
    left = axes[0, 0]
    values, low, high = (np.array(column) for column in zip(*shares.values(), strict=True))
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(shares))]
    errors = np.maximum([values - low, high - values], 0)  # rounding may take an end past its share
    left.barh(range(len(shares)), values, xerr=errors, color=colours, capsize=3)
    left.set_yticks(range(len(shares)), list(shares), fontsize=8)
    left.invert_yaxis()
    left.set(title="Shares of pairs (bars: 95% Wilson intervals)", xlabel="share", xlim=(0, 1))
    if probabilities:
        right = axes[0, 1]
        predicted, positive = (np.array(column, dtype=np.float64) for column in zip(*probabilities, strict=True))
        right.plot([0, 1], [0, 1], color="#999999", linewidth=1, label="calibrated")
        # The means of an empty bin are NaN, which is not drawn.
        means = binned_statistic(predicted, [predicted, positive], bins=10, range=(0, 1)).statistic
        sizes = 20 + 200 * np.histogram(predicted, bins=10, range=(0, 1))[0] / len(predicted)
        right.scatter(*means, s=sizes, color=COLOURS[0], label="tenths; size: share of pairs")
        right.set(
            title="Reliability", xlabel="probability by the judge", ylabel="share with this label", ylim=(-0.05, 1.05)
        )
        right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return path


CHUNK = 32
"""Pairs per call of the judge."""
SMOKE_LIMIT = 32
"""Number of pairs at scale smoke."""
ACCURACIES = (
    ("accuracy", "accuracy (ties and invalid verdicts count as wrong)", "judge"),
    ("accuracy_decided", "accuracy on decided pairs", "judge, decided pairs"),
    ("accuracy_by_probability", "accuracy by the mean probability", "judge, by probability"),
)
"""Accuracies of the judge: metric, title in the table and name in the figure."""
FIGURES = (
    ("auc", "AUC of the probability"),
    ("position_bias", "position bias, -1 to 1"),
    ("order_disagreement", "orders disagree"),
    ("self_consistency", "self-consistency of sampled verdicts"),
    ("invalid_rate", "invalid rate"),
)
"""Other metrics, and their titles in the table."""
COUNTS = (
    (RESULTS, "right, wrong, ties, invalid"),
    (("requests", "prompt_tokens", "completion_tokens"), "requests, tokens read, tokens written"),
)
"""Counts that share a row of the table, and its title."""


@dataclass
class JudgeCalibrate(BackendOptions):
    """Measure a judge on labelled pairs: accuracy, position bias, self-consistency, invalid rate."""

    backend: str = "embedded"
    """Backend of the judge: embedded, transformers, openai, scripted, 'module:factory', or JSON
    {"id": ..., "kwargs": {...}}."""
    data: Annotated[str, Required("a JSONL file of labelled pairs")] = ""
    """JSONL file of labelled pairs. Rows: {"prompt", "first", "second", "better": "first" | "second" | "tie"} for the
    pairwise judge, or {"first", "second", "verdict": "Equal" | "Not Equal"} for the equality judge."""
    mode: VerdictMode = "auto"
    """How the judge answers. verdict: generate and parse an answer. likelihood: compare the log-probs of both answers.
    auto: likelihood for backends with few-shot prompts that report log-probs, verdict for all others."""
    repeats: int = 3
    """Verdicts sampled per pair, at temperature 0.7, to measure self-consistency; verdict mode only. 0: none."""
    limit: int = 0
    """Number of pairs to use, from the start of the file. 0: all, or 32 with --scale smoke."""
    scale: Scale = "report"
    """Size of the run if --limit is 0: smoke (32 pairs) or report (all pairs)."""

    def check(self) -> None:
        super().check()
        if self.repeats == 1:
            raise InputError("--repeats must be at least 2, as self-consistency compares verdicts, or 0 for none")


def run(options: JudgeCalibrate, console: Console | None = None) -> dict[str, Any]:
    """Measures a judge, or resumes an unfinished run, and returns the results; empty for a dry run.

    Args:
        options: options of the run.
        console: console to print to; None: a new one.

    Raises:
        InputError: for bad input, before a model is loaded.
    """
    console = console or Console()
    options.check()
    kind, pairs = read_labelled_pairs(options.data)
    pairs = pairs[: options.limit or (SMOKE_LIMIT if options.scale == "smoke" else len(pairs))]
    parts = {"judge": parse_part(options.backend, options.model)}
    with input_errors():
        backend = journaled_roles(parts, None)["judge"]
    if options.mode == "likelihood" and not backend.supports_logprobs:
        raise InputError(f"--mode likelihood needs log-probs, which backend {backend.name!r} does not report")
    likelihood = uses_likelihood(backend, options.mode)
    asked = "by likelihood" if likelihood else f"and {options.repeats} times more each"

    def work(run: Run) -> dict[str, Any]:
        rows = RowWriter(run.folder.file("judgements.jsonl"))
        judgements: list[Judgement] = []
        run.tracker.step_name = "pairs"
        with run.roles(parts) as roles, StepProgress("pairs judged", len(pairs), console) as progress:
            judge = cast(Journaled, roles["judge"])
            limit = Deadline(options.minutes, judge.journal)
            for start in range(0, len(pairs), CHUNK):
                if limit.reached():
                    break
                chunk = pairs[start : start + CHUNK]
                # By the index among all pairs, so that the seeds do not depend on the chunk size.
                seeds = [request_seed(options.seed, "pair", start + i) for i in range(len(chunk))]
                for judgement in ask_judge(judge, kind, chunk, seeds, options):
                    judgements.append(judgement)
                    rows.write(judgement_row(kind, len(judgements), judgement))
                counts = count(judgements)
                run.tracker.write({name: counts[name] for name in RESULTS}, {}, len(judgements))
                progress.update(len(judgements), f"{counts['right']} right")
        metrics = {"kind": kind, "mode": "likelihood" if likelihood else "verdict"} | measure(kind, judgements)
        usage, done = judge.usage, len(judgements) == len(pairs)
        spent = named(usage, "requests", "prompt_tokens", "completion_tokens", "cost")
        spent |= {"replayed_replies": usage.cache_hits, "failed_requests": usage.errors, "seconds": run.seconds}
        results = run.folder.finish(metrics, count(judgements) | spent, "finished" if done else "stopped")
        run.tracker.image("calibration", _figure(kind, judgements, metrics, run.folder))
        run.tracker.summary(metrics)
        console.print(calibration_table(results, backend.name))
        if not done:
            console.print(
                f"stopped at the time limit after {len(judgements)} of {len(pairs)} pairs: the same command goes on"
            )
        return results

    return run_stage(
        options,
        "judge calibrate",
        console,
        work,
        distributed=False,
        plan=f"ask {backend.name} about {len(pairs)} {kind} pairs in both orders, {asked}",
        # With other data the run is not resumed.
        pairs=hashlib.sha256(json.dumps([kind, *map(asdict, pairs)]).encode()).hexdigest()[:16],
    )


def ask_judge(
    backend: Backend, kind: PairKind, pairs: Sequence[LabelledPair], seeds: Sequence[int], options: JudgeCalibrate
) -> list[Judgement]:
    """Asks the judge about labelled pairs in both orders, then samples further verdicts.

    As in the rewards, texts that differ at most in white space are a tie, or equal, without a call.

    Args:
        backend: the judge.
        kind: kind of the pairs.
        pairs: n pairs.
        seeds: n request seeds.
        options: options of the run, with the mode and the number of sampled verdicts.

    Returns:
        n judgements, in order.
    """
    prompt, mode = KINDS[kind].prompt(), options.mode
    repeats = 0 if uses_likelihood(backend, mode) else options.repeats
    asked = [Pair(pair.first, pair.second, pair.prompt, seed) for pair, seed in zip(pairs, seeds, strict=True)]
    if kind == "pairwise":
        judgements = [
            Judgement(pair, comparison.outcome, comparison.verdicts, comparison.probability)
            for pair, comparison in zip(pairs, compare(backend, asked, mode), strict=True)
        ]
    else:
        different = [pair.first.split() != pair.second.split() for pair in pairs]
        verdicts = iter(both_orders(backend, prompt, list(compress(asked, different)), mode))
        judgements = [
            _equality(pair, *next(verdicts)) if differs else Judgement(pair, "Equal")
            for pair, differs in zip(pairs, different, strict=True)
        ]
    # Sample further verdicts on the order as given, each with its own seed, for pairs that the judge was asked about.
    questions = [
        pair_question(prompt, replace(pair, seed=request_seed(pair.seed, "repeat", number)))
        for pair, judgement in zip(asked, judgements, strict=True)
        for number in range(repeats if judgement.verdicts else 0)
    ]
    answers = iter(judge_verdicts(backend, questions, mode, RETRY_TEMPERATURE))
    return [
        replace(judgement, repeats=tuple(next(answers).answer for _ in range(repeats if judgement.verdicts else 0)))
        for judgement in judgements
    ]


def _equality(pair: LabelledPair, in_order: Verdict, swapped: Verdict) -> Judgement:
    """Returns the judgement about whether two texts ask for the same, from the verdicts on both orders."""
    outcome: str | None = None
    if in_order.answer is not None and swapped.answer is not None:
        # The orders have to agree; "Equal" is the negative answer.
        outcome = "tie" if in_order.answer != swapped.answer else "Not Equal" if in_order.answer else "Equal"
    probability = None
    if in_order.log_odds is not None and swapped.log_odds is not None:
        probability = sigmoid((in_order.log_odds + swapped.log_odds) / 2)
    return Judgement(pair, outcome, (in_order, swapped), probability)


def judgement_row(kind: PairKind, number: int, judgement: Judgement) -> dict[str, Any]:
    """Returns a row of ``judgements.jsonl``: the judge's answers about a pair.

    Args:
        kind: kind of the pair.
        number: number of the pair in the data, from 1.
        judgement: the judgement.
    """
    prompt = KINDS[kind].prompt()
    words = {True: prompt.positive, False: prompt.negative, None: None}
    verdicts = judgement.verdicts or ()
    return {
        "pair": number,
        "label": judgement.pair.label,
        "outcome": judgement.outcome,
        "verdicts": [words[verdict.answer] for verdict in verdicts],
        "log_odds": [verdict.log_odds for verdict in verdicts],
        "probability": judgement.probability,
        "repeats": [words[answer] for answer in judgement.repeats],
        "why": next((verdict.why for verdict in verdicts if verdict.answer is None), ""),
    }


def _figure(kind: PairKind, judgements: Sequence[Judgement], metrics: Mapping[str, Any], folder: RunFolder) -> Path:
    """Plots the accuracies and probabilities of a judge into its run folder and returns the path of the figure."""
    accuracies = {name: metrics.get(key) for key, _, name in ACCURACIES} | metrics["baselines"]
    bars = {
        f"{name} ({row['of']})": (row["share"], *row["interval"])
        for name, row in accuracies.items()
        if row is not None and row["share"] is not None
    }
    return plot_calibration(bars, scored(kind, judgements), folder.file("figures", "calibration.png"))


def calibration_table(results: dict[str, Any], name: str) -> Table:
    """Returns the results as a table for the terminal.

    Args:
        results: results of a run.
        name: name of the judge's backend.
    """
    metrics, counts = results["metrics"], results["counts"]

    def accuracy(row: dict[str, Any] | None) -> str:
        if row is None or row["share"] is None:
            return "-"
        low, high = row["interval"]
        return f"{100 * row['share']:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {row['of']}"

    table = Table(title=f"{metrics['kind']} judge, {metrics['mode']} mode: {name}", show_header=False)
    for key, title, _ in ACCURACIES:
        table.add_row(title, accuracy(metrics.get(key)))
    for baseline, row in metrics["baselines"].items():
        table.add_row(f"baseline: {baseline}", accuracy(row))
    for key, title in FIGURES:
        table.add_row(title, "-" if metrics.get(key) is None else f"{metrics[key]:.3f}")
    for keys, title in COUNTS:
        table.add_row(title, ", ".join(str(counts[key]) for key in keys))
    return table
