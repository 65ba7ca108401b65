"""``instructgym tuna evaluate``: evaluates policies on held-out tasks, by ROUGE-L and by a judge.

The judge compares the response of each policy with that of one reference policy, in both orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ...envs.tasks.instruction.data import InstructionExample, request_text
from ...llm_backends import request_seed
from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ...rewards import Reward, Sample, score_with_retries
from ..runs.folder import journaled_roles
from ..runs.options import build_judge, input_errors, named, parse_part
from ..runs.progress import Deadline, OutOfTimeError
from ..runs.report import percent, with_ends
from ..runs.statistics import known_mean, macro_interval, task_scores
from ..runs.training import Run, digest, run_stage
from ..teaching.evaluate import BASE, PREDICTIONS, Evaluate, find_arms
from ..teaching.evaluate import run as evaluate

CHUNK = 8
"""Instances that are judged in one call and stored together."""
JUDGED = "judged.jsonl"
JUDGE = '{"id": "pairwise-judge", "kwargs": {"graded": true}}'


@dataclass
class TunaEvaluate(Evaluate):
    """Answer held-out tasks with several policies; compare ROUGE-L, and have a judge compare them with one of them."""

    judge: str = JUDGE
    """Judge that compares a response with that of the reference policy: pairwise-judge, which compares in both orders,
    or scored-comparison, as an id or JSON. With "graded": true, a judge with known log-probs returns the probability
    that a response is better, from the mean of the log-odds of both orders, instead of win, tie or loss."""
    backend: str = "embedded"
    """Language model of the judge: embedded, transformers, openai, vllm, 'module:factory', or JSON {"id": ...,
    "kwargs": {...}}."""
    against: str = BASE
    """Name of the reference policy: the judge compares every other policy with it."""

    def check(self) -> None:
        super().check()
        names = [arm.name for arm in find_arms(self.policy, self.model)]
        if self.against not in names:
            raise InputError(f"--against {self.against} is none of the policies: use one of {', '.join(names)}")

    def build(self, backend: Any) -> Reward:
        """Builds the judge on a backend.

        Raises:
            InputError: if no judge has that id, or its arguments are wrong.
        """
        return build_judge("reward", self.judge, "--judge", backend)


def run(options: TunaEvaluate, console: Console | None = None) -> dict[str, Any]:
    """Generates the responses, scores and judges them, and returns win rates together with the metrics of 'evaluate'.

    Writes two run folders below the run folder: ``rouge``, that of the command 'evaluate', and ``judged``, whose
    ``judged.jsonl`` holds the outcome of every policy on each instance: 1 for a win, 0 for a loss.

    Raises:
        InputError: if the input is invalid, before a model is loaded.
    """
    console = console or Console()
    options.check()
    parts = {"judge": parse_part(options.backend)}
    with input_errors():  # wrong options fail here, before the policies generate their responses
        options.build(journaled_roles(parts, None)["judge"])
    root = Path(options.run_dir)
    shared = named(options, *(field.name for field in fields(Evaluate)))
    deadline = Deadline(options.minutes)
    try:
        rouge_results = deadline.run(evaluate, Evaluate(**shared | {"run_dir": str(root / "rouge")}), console)
        judge_options = replace(options, run_dir=str(root / "judged"), minutes=deadline.left)
    except OutOfTimeError:
        return {"status": "stopped"}
    if options.dry_run:
        return rouge_results
    # The judged run belongs to these responses: their digest is part of its identity.
    rows = read_records(root / "rouge" / PREDICTIONS)

    def work(opened: Run) -> dict[str, Any]:
        with opened.roles(parts) as roles:
            make = partial(_judge_rows, options, options.build(roles["judge"]), rows)
            judged = opened.rows(JUDGED, len(rows), CHUNK, make, "instances judged")
        names = [name for name in rows[0]["arms"] if name != options.against]
        metrics = {name: bootstrap_win_rate(judged, name, options.seed) for name in names}
        for name, figures in metrics.items():
            if figures["win_rate"] is None:
                console.print(f"{name}: the judge gave no verdict", highlight=False)
            else:
                rate, same = percent(*with_ends(figures, "win_rate"), ".0f"), f"{100 * figures['same']:.0f}"
                said = f"{name} against {options.against}: win rate {rate} percent, the same response on {same}%"
                console.print(said, highlight=False)
        return opened.finish(
            {"against": options.against, "win_rates": metrics, "arms": rouge_results["metrics"]["arms"]},
            {"instances": len(rows)},
        )

    return run_stage(judge_options, "tuna evaluate", console, work, distributed=False, predictions=digest(rows))


def _judge_rows(
    options: TunaEvaluate, judge: Reward, instances: Sequence[Mapping[str, Any]], first: int
) -> list[dict[str, Any]]:
    """Returns, for a chunk of instances, the judge's outcome for every policy; None if the judge gave no verdict."""
    rows = instances[first : first + CHUNK]
    outcomes: list[dict[str, Any]] = [
        {"id": row["id"], "task": row["task"], "wins": {}, "agreed": {}, "same": {}} for row in rows
    ]
    # One flat batch over instances and policies.
    asked = []
    for row, outcome in zip(rows, outcomes, strict=True):
        request = request_text(InstructionExample(row["instruction"], row["input"], ""))
        reference = row["arms"][options.against]["response"]
        for name, answer in row["arms"].items():
            if name != options.against:
                seed = request_seed(options.seed, "judge", row["id"], name)
                sample = Sample(answer["response"], request, reference, episode_id=row["id"], seed=seed)
                asked.append((outcome, name, sample))
    scores = score_with_retries(judge, [sample for _, _, sample in asked])
    for (outcome, name, sample), score in zip(asked, scores, strict=True):
        # Equal responses are a tie in any order: there is no agreement to measure.
        differs = sample.response.split() != str(sample.reference).split()
        outcome["wins"][name] = score.value if score.valid else None
        outcome["agreed"][name] = score.terms.get("agreement") if score.valid and differs else None
        outcome["same"][name] = not differs
    return outcomes


def bootstrap_win_rate(rows: Sequence[Mapping[str, Any]], name: str, seed: int = 0) -> dict[str, Any]:
    """Returns the mean outcome of a policy and its 95% bootstrap interval over tasks.

    As with ROUGE-L, outcomes are averaged within a task first, then over tasks.

    Args:
        rows: rows of ``judged.jsonl``.
        name: name of the policy.
        seed: seed of the bootstrap.

    Returns:
        ``win_rate``, ``win_rate_low`` and ``win_rate_high``, None if no instance has a verdict; ``agreement``: share of
            the instances with two different responses on which both orders preferred the same response, None if there
            are none; ``same``: share of instances on which both responses are the same, which is a tie; ``judged``:
            share of instances with a verdict.
    """
    known = [row for row in rows if row["wins"][name] is not None]
    mean = low = high = None
    if known:
        by_task = task_scores([row["task"] for row in known], [row["wins"][name] for row in known])
        mean, low, high = macro_interval(by_task, seed)
    return {
        "win_rate": mean,
        "win_rate_low": low,
        "win_rate_high": high,
        "agreement": known_mean(row["agreed"][name] for row in known),
        "same": known_mean(row["same"][name] for row in rows),
        "judged": len(known) / len(rows),
    }
