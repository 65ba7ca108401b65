"""``instructgym judge calibrate``: measures a judge on pairs with known answers before it is used for rewards.

The judge is asked about every pair in both orders. Generated verdicts are also sampled a few times, to measure how
often the judge agrees with itself. The metrics are in :mod:`instructgym.experiments.judging.measures`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...llm_backends import Backend, Journaled, request_seed, resolve
from ...llm_backends.errors import InputError
from ...rewards.judges.pairwise import Pair, both_orders, compare, pair_question, pairwise_prompt
from ...rewards.judges.verdict import (
    RETRY_TEMPERATURE,
    VerdictMode,
    check_mode,
    equality_prompt,
    judge_verdicts,
    sigmoid,
    uses_likelihood,
)
from ..runs.folder import RowWriter, RunFolder, Tracker, replayed
from ..runs.options import BackendOptions, Scale, input_errors, parse_part
from ..runs.progress import Deadline, StepProgress
from ..runs.report import COLOURS, panels
from .measures import LABELS, Judgement, LabelledPair, PairKind, count, measure, read_labelled_pairs


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
        # Ten equal bins; a probability of 1 belongs to the last.
        bins = np.minimum((predicted * 10).astype(int), 9)
        right.plot([0, 1], [0, 1], color="#999999", linewidth=1, label="calibrated")
        filled_bins = [number for number in range(10) if (bins == number).any()]
        means = [(predicted[bins == number].mean(), positive[bins == number].mean()) for number in filled_bins]
        sizes = [20 + 200 * (bins == number).mean() for number in filled_bins]
        right.scatter(*zip(*means, strict=True), s=sizes, color=COLOURS[0], label="tenths; size: share of pairs")
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


@dataclass
class JudgeCalibrate(BackendOptions):
    """Measure a judge on labelled pairs: accuracy, position bias, self-consistency, invalid rate."""

    backend: str = "embedded"
    """Backend of the judge: embedded, transformers, openai, scripted, 'module:factory', or JSON
    {"id": ..., "kwargs": {...}}."""
    data: str = ""
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
        with input_errors():
            check_mode(self.mode)
        if not self.data:
            raise InputError("--data is missing: name a JSONL file of labelled pairs")
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
    with input_errors():
        backend = resolve("backend", parse_part(options.backend, options.model))
    if options.mode == "likelihood" and not backend.supports_logprobs:
        raise InputError(f"--mode likelihood needs log-probs, which backend {backend.name!r} does not report")
    # The hash of the pairs is an option of the run: with other data it is not resumed.
    digest = hashlib.sha256(json.dumps([kind, *map(asdict, pairs)]).encode()).hexdigest()[:16]
    folder = RunFolder(options.run_dir, asdict(options) | {"pairs": digest}, "judge calibrate")
    likelihood = uses_likelihood(backend, options.mode)
    if options.dry_run:
        console.print(
            f"would ask {backend.name} about {len(pairs)} {kind} pairs in both orders, "
            f"{'by likelihood' if likelihood else f'and {options.repeats} times more each'}, in {folder.path}"
        )
        return {}
    if (results := folder.finished(console)) is not None:
        return results
    with replayed(folder, lambda journal: {"judge": Journaled(backend, journal)}, console) as (_, roles):
        return _calibrate(options, folder, kind, pairs, roles["judge"], console)


def _calibrate(
    options: JudgeCalibrate,
    folder: RunFolder,
    kind: PairKind,
    pairs: Sequence[LabelledPair],
    backend: Journaled,
    console: Console,
) -> dict[str, Any]:
    start_time, limit = time.monotonic(), Deadline(options.minutes, backend.journal)
    rows = RowWriter(folder.file("judgements.jsonl"))
    likelihood = uses_likelihood(backend, options.mode)
    judgements: list[Judgement] = []
    with (
        Tracker(folder, options.track, step_name="pairs") as tracker,
        StepProgress("pairs judged", len(pairs), console) as progress,
    ):
        for start in range(0, len(pairs), CHUNK):
            if limit.reached():
                break
            chunk_judgements = ask_judge(
                backend,
                kind,
                pairs[start : start + CHUNK],
                # By the index among all pairs, so that the seeds do not depend on the chunk size.
                [request_seed(options.seed, "pair", start + i) for i in range(len(pairs[start : start + CHUNK]))],
                options.mode,
                0 if likelihood else options.repeats,
            )
            for number, judgement in enumerate(chunk_judgements, start=start + 1):
                rows.write(judgement_row(kind, number, judgement))
            judgements += chunk_judgements
            counts = count(judgements)
            tracker.write({name: counts[name] for name in ("right", "wrong", "ties", "invalid")}, {}, len(judgements))
            progress.update(len(judgements), f"{counts['right']} right")
        done = len(judgements) == len(pairs)
        usage = backend.usage
        results = folder.finish(
            metrics={"kind": kind, "mode": "likelihood" if likelihood else "verdict"} | measure(kind, judgements),
            counts=count(judgements)
            | {
                "requests": usage.requests,
                "replayed_replies": usage.cache_hits,
                "failed_requests": usage.errors,
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "cost": usage.cost,
                "seconds": round(time.monotonic() - start_time, 1),
            },
            status="finished" if done else "stopped",
        )
        tracker.image("calibration", _figure(kind, judgements, results["metrics"], folder))
        tracker.summary(results["metrics"])
    console.print(calibration_table(results, backend.name))
    if not done:
        console.print(
            f"stopped at the time limit after {len(judgements)} of {len(pairs)} pairs: the same command goes on"
        )
    return results


def ask_judge(
    backend: Backend,
    kind: PairKind,
    pairs: Sequence[LabelledPair],
    seeds: Sequence[int],
    mode: VerdictMode = "auto",
    repeats: int = 0,
) -> list[Judgement]:
    """Asks the judge about labelled pairs in both orders, then samples further verdicts.

    Args:
        backend: the judge.
        kind: kind of the pairs.
        pairs: n pairs.
        seeds: n request seeds.
        mode: see :data:`~instructgym.rewards.judges.verdict.VerdictMode`.
        repeats: sampled verdicts per pair; 0: none.

    Returns:
        n judgements, in order.
    """
    unlabelled_pairs = [
        Pair(pair.first, pair.second, pair.prompt, seed) for pair, seed in zip(pairs, seeds, strict=True)
    ]
    judgements = _compare_equal(backend, pairs, unlabelled_pairs, mode) if kind == "equality" else []
    if kind == "pairwise":
        for pair, comparison in zip(pairs, compare(backend, unlabelled_pairs, mode), strict=True):
            judgements.append(Judgement(pair, comparison.outcome, comparison.verdicts, comparison.probability))
    # Sample further verdicts on the order as given, each with its own seed, for pairs that the judge was asked about.
    prompt = equality_prompt() if kind == "equality" else pairwise_prompt()
    repeated_questions = [
        pair_question(prompt, Pair(pair.first, pair.second, pair.prompt, request_seed(pair.seed, "repeat", number)))
        for pair, judgement in zip(unlabelled_pairs, judgements, strict=True)
        for number in range(repeats if judgement.verdicts else 0)
    ]
    answers = iter(judge_verdicts(backend, repeated_questions, mode, RETRY_TEMPERATURE))
    return [
        Judgement(j.pair, j.outcome, j.verdicts, j.probability, tuple(next(answers).answer for _ in range(repeats)))
        if j.verdicts
        else j
        for j in judgements
    ]


def _compare_equal(
    backend: Backend, pairs: Sequence[LabelledPair], pairs_to_ask: Sequence[Pair], mode: VerdictMode
) -> list[Judgement]:
    """Asks in both orders whether two texts ask for the same.

    As in the reward, texts that differ at most in white space are equal without a call.
    """
    same = [pair.first.split() == pair.second.split() for pair in pairs_to_ask]
    verdicts = iter(
        both_orders(backend, equality_prompt(), [p for p, s in zip(pairs_to_ask, same, strict=True) if not s], mode)
    )
    judgements = []
    for pair, is_same in zip(pairs, same, strict=True):
        if is_same:
            judgements.append(Judgement(pair, "Equal"))
            continue
        in_order, swapped = next(verdicts)
        # The orders have to agree; "Equal" is the second label, the negative answer of the prompt.
        outcome: str | None = None
        if in_order.answer is not None and swapped.answer is not None:
            outcome = "tie" if in_order.answer != swapped.answer else LABELS["equality"][0 if in_order.answer else 1]
        probability = None
        if in_order.log_odds is not None and swapped.log_odds is not None:
            probability = sigmoid((in_order.log_odds + swapped.log_odds) / 2)
        judgements.append(Judgement(pair, outcome, (in_order, swapped), probability))
    return judgements


def judgement_row(kind: PairKind, number: int, judgement: Judgement) -> dict[str, Any]:
    """Returns a row of ``judgements.jsonl``: the judge's answers about a pair.

    Args:
        kind: kind of the pair.
        number: number of the pair in the data, from 1.
        judgement: the judgement.
    """
    prompt = equality_prompt() if kind == "equality" else pairwise_prompt()
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


def _figure(kind: PairKind, judgements: Sequence[Judgement], metrics: dict[str, Any], folder: RunFolder) -> Any:
    shares = {
        "judge": metrics["accuracy"],
        "judge, decided pairs": metrics["accuracy_decided"],
        "judge, by probability": metrics.get("accuracy_by_probability"),
    } | metrics["baselines"]
    bars = {
        f"{name} ({row['of']})": (row["share"], *row["interval"])
        for name, row in shares.items()
        if row is not None and row["share"] is not None
    }
    probabilities = [
        (j.probability, j.pair.label == LABELS[kind][0])
        for j in judgements
        if j.probability is not None and j.pair.label != "tie"
    ]
    return plot_calibration(bars, probabilities, folder.file("figures", "calibration.png"))


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

    def share(key: str) -> str:
        value = metrics.get(key)
        return "-" if value is None else f"{value:.3f}"

    table = Table(title=f"{metrics['kind']} judge, {metrics['mode']} mode: {name}", show_header=False)
    table.add_row("accuracy (ties and invalid verdicts count as wrong)", accuracy(metrics["accuracy"]))
    table.add_row("accuracy on decided pairs", accuracy(metrics["accuracy_decided"]))
    table.add_row("accuracy by the mean probability", accuracy(metrics.get("accuracy_by_probability")))
    for baseline, row in metrics["baselines"].items():
        table.add_row(f"baseline: {baseline}", accuracy(row))
    table.add_row("AUC of the probability", share("auc"))
    table.add_row("position bias, -1 to 1", share("position_bias"))
    table.add_row("orders disagree", share("order_disagreement"))
    table.add_row("self-consistency of sampled verdicts", share("self_consistency"))
    table.add_row("invalid rate", share("invalid_rate"))
    table.add_row(
        "right, wrong, ties, invalid", ", ".join(str(counts[k]) for k in ("right", "wrong", "ties", "invalid"))
    )
    table.add_row(
        "requests, tokens read, tokens written",
        ", ".join(str(counts[k]) for k in ("requests", "prompt_tokens", "completion_tokens")),
    )
    return table
