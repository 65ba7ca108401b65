"""``instructgym evaluate``: scores zero-shot responses of fine-tuned models to held-out tasks by ROUGE-L.

This is the evaluation of Self-Instruct and Super-NaturalInstructions: the score of a task is the mean ROUGE-L of its
instances, the score of a model the mean over tasks. REFINE-AF reports the share of tasks on which one model has a
higher score than another.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ...agents.policy.checkpoints import policy_from, read_state
from ...agents.policy.language_model import SETTINGS, LanguageModelPolicy
from ...envs.tasks.instruction.data import DATA_LAYOUTS, DataLayout, InstructionExample, prompt_text, request_text
from ...envs.tasks.instruction.evaluation import HELD_OUT, EvaluationTask, load_evaluation_tasks
from ...envs.tokens.episode import PromptExample
from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records, write_lines
from ...rewards import Sample, Score
from ..runs.folder import read_json, write_json
from ..runs.options import check_counts
from ..runs.report import COLOURS, panels
from ..runs.responses import respond
from ..runs.statistics import (
    PairedComparison,
    compare_paired,
    macro_interval,
    normalized_match,
    stemmed_rouge_l,
    task_scores,
)
from ..runs.training import (
    Run,
    TrainingOptions,
    digest,
    policy_folder,
    run_stage,
    tokenizer_of,
    weights_digest,
)
from .finetune import TRAIN


def tables(
    metrics: Mapping[str, Mapping[str, float]], pairs: Mapping[str, PairedComparison], counts: Mapping[str, Any]
) -> list[Table]:
    """Returns the results as tables for the terminal.

    Args:
        metrics: by arm: ``rouge_l`` with its interval, ``exact_match``, ``tokens`` and ``finished``.
        pairs: comparisons of two arms, by name.
        counts: ``tasks`` and ``instances``.
    """
    arms = Table(title=f"{counts['tasks']} tasks, {counts['instances']} instances (macro averages, percent)")
    for column in ("arm", "ROUGE-L", "95% interval", "exact match", "finished", "tokens"):
        arms.add_column(column, justify="left" if column == "arm" else "right", overflow="fold")
    for name, row in metrics.items():
        arms.add_row(
            name,
            f"{100 * row['rouge_l']:.1f}",
            f"{100 * row['rouge_l_low']:.1f} to {100 * row['rouge_l_high']:.1f}",
            f"{100 * row['exact_match']:.1f}",
            f"{100 * row['finished']:.0f}",
            f"{row['tokens']:.0f}",
        )
    if not pairs:
        return [arms]
    compared = Table(title="task by task, ROUGE-L (shares of tasks and points)")
    for column in ("comparison", "won", "tied", "lost", "difference", "95% interval"):
        compared.add_column(column, justify="left" if column == "comparison" else "right", overflow="fold")
    for name, pair in pairs.items():
        shares = (f"{100 * share:.0f}%" for share in pair.shares.values())
        ends = f"{100 * pair.low:+.1f} to {100 * pair.high:+.1f}"
        compared.add_row(name, *shares, f"{100 * pair.difference:+.1f}", ends)
    return [arms, compared]


def plot_rouge(metrics: Mapping[str, Mapping[str, float]], pairs: Mapping[str, PairedComparison], path: Path) -> Path:
    """Plots ROUGE-L of the arms and its pairwise differences as bars with 95% intervals, and returns the path.

    Args:
        metrics: by arm: ``rouge_l`` (the mean over tasks), ``rouge_l_low`` and ``rouge_l_high``.
        pairs: comparisons of two arms, by name; without any, the plot of differences is left out.
        path: PNG file to write.
    """
    figure, axes = panels(2 if pairs else 1)
    rows = list(metrics.values())
    means, low, high = (np.array([row[key] for row in rows]) for key in ("rouge_l", "rouge_l_low", "rouge_l_high"))
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(rows))]
    # Matplotlib refuses negative error bars, and a bootstrap interval need not contain the mean.
    errors = np.maximum([means - low, high - means], 0)
    axes[0, 0].bar(range(len(rows)), means, yerr=errors, color=colours, capsize=4)
    axes[0, 0].set_xticks(range(len(rows)), list(metrics))
    axes[0, 0].set(title="ROUGE-L, mean over tasks", ylabel="F-measure")
    if pairs:
        right, comparisons = axes[0, 1], list(pairs.values())
        gaps, low, high = (np.array([getattr(p, key) for p in comparisons]) for key in ("difference", "low", "high"))
        right.barh(
            range(len(comparisons)),
            gaps,
            xerr=np.maximum([gaps - low, high - gaps], 0),
            color=COLOURS[6],
            alpha=0.6,
            capsize=4,
        )
        labels = [
            f"{name}\nwon {100 * p.shares['won']:.0f}%, tied {100 * p.shares['tied']:.0f}%" for name, p in pairs.items()
        ]
        right.set_yticks(range(len(comparisons)), labels, fontsize=8)
        right.axvline(0, color="#555555", linewidth=1)
        right.invert_yaxis()
        right.set(title="Difference in ROUGE-L", xlabel="F-measure, mean over tasks")
    figure.suptitle("bars: 95% bootstrap interval over tasks", fontsize=9)
    figure.savefig(path, dpi=130)
    return path


BASE = "base"
"""The arm of the base model."""


@dataclass(frozen=True)
class Arm:
    """One of the models that are compared."""

    name: str
    model: str
    """Its base model."""
    run: str = ""
    """Run folder of the fine-tuning; empty for the base model itself."""
    layout: DataLayout | None = None
    """Layout of the requests in its training; None if the run does not record it."""


def find_arms(policy: str, model: str = "") -> list[Arm]:
    """Returns the arm of the base model, then those of the policies in the order in which they are named.

    Args:
        policy: run folders separated by commas, each with an optional name: ``ours=runs/a,runs/b``.
        model: the base model; empty for that of the first policy, or embedded without policies.

    Raises:
        InputError: for a run folder without a policy, and for a name that is unusable or used twice.
    """
    arms: list[Arm] = []
    for piece in filter(None, (text.strip() for text in policy.split(","))):
        named = re.fullmatch(r"([\w.-]+)=(.+)", piece)
        folder = named[2] if named else piece
        name = named[1] if named else Path(folder).resolve().name
        if not re.fullmatch(r"[\w.-]+", name):
            raise InputError(f"--policy {piece}: {name!r} cannot name an arm, write NAME={folder}")
        if name == BASE or name in {arm.name for arm in arms}:
            raise InputError(f"--policy has two arms called {name!r} (base is the base model): write NAME={folder}")
        settings = read_state(policy_folder(folder, "--policy") / SETTINGS)
        arms.append(Arm(name, settings["model"], folder, _trained_layout(folder)))
    return [Arm(BASE, model or (arms[0].model if arms else "embedded")), *arms]


def _trained_layout(folder: str) -> DataLayout | None:
    """Returns the layout that a run's ``config.json`` records; None if it records none of :data:`DATA_LAYOUTS`."""
    config = read_json(Path(folder) / "config.json") or {}
    layout = (config.get("options") or {}).get("layout")
    return layout if layout in DATA_LAYOUTS else None


def common_layout(arms: Sequence[Arm], layout: str = "auto") -> DataLayout:
    """Returns the layout in which all arms get the requests.

    Args:
        arms: the models.
        layout: a layout, which is returned as it is, or ``auto``: the layout of the arms' training, ``chat`` if no run
            records one.

    Raises:
        InputError: for ``auto``, if the arms were trained in different layouts.
    """
    if layout != "auto":
        return layout  # type: ignore[return-value]
    trained_layouts = {arm.layout: arm.name for arm in arms if arm.layout is not None}
    if len(trained_layouts) > 1:
        choices = ", ".join(f"{name} in {trained}" for trained, name in trained_layouts.items())
        raise InputError(f"the policies were trained in different layouts ({choices}): choose one with --layout")
    return next(iter(trained_layouts), "chat")


def seen_in_training(arm: Arm, requests: Sequence[InstructionExample]) -> int | None:
    """Returns how many of the requests the arm was fine-tuned on; None if its run has no file of training rows."""
    path = Path(arm.run) / TRAIN
    if not arm.run or not path.exists():
        return None
    trained = {request_text(InstructionExample(r["instruction"], r["input"], r["output"])) for r in read_records(path)}
    return sum(request_text(request) in trained for request in requests)


CHUNK = 32
"""Responses generated together and appended to their file at once."""
ENV_ID = "instructgym/GenerateResponse-v0"
PREDICTIONS = "predictions.jsonl"
"""File of all responses and scores in the run folder."""


@dataclass
class Evaluate(TrainingOptions):
    """Answer held-out tasks with a base model and what was fine-tuned from it, and compare the answers' ROUGE-L."""

    policy: str = ""
    """Run folders of fine-tuned models, separated by commas, each with an optional name: ours=runs/a,random=runs/b. The
    base model is always compared too, under the name base."""
    tasks: str = ""
    """Evaluation tasks: a task of Super-NaturalInstructions or a folder of them, JSONL in the user-oriented format, or
    seed tasks in Self-Instruct's format. By default the package's own seed tasks."""
    task_names: str = ""
    """File with one task name a line: evaluate on these tasks only, e.g. on the test tasks of
    Super-NaturalInstructions."""
    held_out: int = HELD_OUT
    """If the tasks are seed tasks, number of tasks to evaluate on: those that bootstrapping holds out, at most a
    quarter of all. 0: all seed tasks."""
    max_instances: int = 10
    """Instances per task, taken from its beginning. 0: all."""
    model: str = ""
    """The base model: embedded, or a local path or hub id. By default that of the first policy, or embedded."""
    layout: Literal["auto", "chat", "plain", "alpaca"] = "auto"
    """How requests are written, for all models alike: in the model's chat template, as a text to continue, or as
    Stanford Alpaca did. auto: as in the training of the policies, chat without policies."""
    max_tokens: int = 96
    """Maximum tokens of a response."""
    context_length: int = 1024
    """Maximum tokens of request and response together; instances that are too long for any model are dropped and
    counted."""

    def check(self) -> None:
        super().check()
        check_counts(self, "max_tokens", "context_length")


@dataclass(frozen=True)
class HeldOutRequest:
    """One instance of a task, as the models are asked."""

    id: str
    """Name of the task and number of the instance."""
    task: str
    """Name of the task."""
    request: InstructionExample
    """Instruction, input, and the first reference as output."""
    references: tuple[str, ...]
    """Reference outputs, at least one."""


def run(options: Evaluate, console: Console | None = None) -> dict[str, Any]:
    """Generates and scores the responses of all arms; returns macro averages, comparisons of all pairs, and counts.

    Writes ``responses/ARM.jsonl`` (chunk by chunk; stored chunks are not generated again), ``predictions.jsonl`` (a row
    per instance with every arm's response and scores), ``tasks.json`` (score by arm and task) and
    ``figures/rouge.png``.

    Raises:
        InputError: for bad input, before a model is loaded.
    """
    console = console or Console()
    options.check()
    arms = find_arms(options.policy, options.model)
    layout = common_layout(arms, options.layout)
    tasks = load_evaluation_tasks(options.tasks or None, options.held_out, options.task_names or None)
    questions = _questions(tasks, options.max_instances or None)
    requests = _fitting(questions, arms, layout, options)
    if not requests:
        raise InputError(f"no instance fits --context-length {options.context_length} beside --max-tokens")
    seen = {arm.name: seen_in_training(arm, [question.request for question in requests]) for arm in arms if arm.run}
    for name, count in seen.items():
        if count:
            console.print(f"warning: {name} was trained on {count} of the {len(requests)} requests", style="yellow")
    if options.dry_run:
        console.print(f"would answer {len(requests)} instances by {', '.join(arm.name for arm in arms)}")
        return {}
    # A run is resumed only with the same weights: stored responses belong to them.
    weights = digest([weights_digest(policy_folder(arm.run, "--policy")) for arm in arms if arm.run])

    def work(opened: Run) -> dict[str, Any]:
        answered = {arm.name: _answers(opened, arm, layout, requests, options) for arm in arms}
        rows = _score(requests, answered)
        write_lines(opened.folder.file(PREDICTIONS), rows)
        names = [row["task"] for row in rows]
        scores = {arm.name: task_scores(names, [row["arms"][arm.name]["rouge_l"] for row in rows]) for arm in arms}
        write_json(opened.folder.file("tasks.json"), scores)
        metrics = {
            arm.name: _macro(scores[arm.name], names, [row["arms"][arm.name] for row in rows], options.seed)
            for arm in arms
        }
        # Compare every arm with all arms before it, the base model first.
        pairs = {
            f"{second.name} vs {first.name}": compare_paired(scores[second.name], scores[first.name], options.seed)
            for i, first in enumerate(arms)
            for second in arms[i + 1 :]
        }
        plot_rouge(metrics, pairs, opened.folder.file("figures", "rouge.png"))
        results = opened.folder.finish(
            {"arms": metrics, "comparisons": {name: asdict(pair) | pair.shares for name, pair in pairs.items()}},
            {
                "tasks": len(set(names)),
                "instances": len(requests),
                "dropped": {
                    "too long": len(questions) - len(requests),
                    "tasks without an instance left": len(tasks) - len(set(names)),
                },
                "seen in training": seen,
                "layout": layout,
                "seconds": opened.seconds,
            },
        )
        opened.tracker.summary({name: figures["rouge_l"] for name, figures in metrics.items()})
        for table in tables(metrics, pairs, results["counts"]):
            console.print(table)
        return results

    return run_stage(options, "evaluate", console, work, distributed=False, weights=weights)


def _questions(tasks: Sequence[EvaluationTask], limit: int | None) -> list[HeldOutRequest]:
    return [
        HeldOutRequest(f"{task.name}/{number}", task.name, InstructionExample(task.instruction, text, refs[0]), refs)
        for task in tasks
        for number, (text, refs) in enumerate(task.instances[:limit])
    ]


def _fitting(
    questions: Sequence[HeldOutRequest], arms: Sequence[Arm], layout: DataLayout, options: Evaluate
) -> list[HeldOutRequest]:
    """Returns the questions whose prompts leave room for a response with every arm's tokenizer."""
    fits = np.ones(len(questions), dtype=bool)
    # Arms with one base model share its tokenizer.
    for model in dict.fromkeys(arm.model for arm in arms):
        tokenizer = tokenizer_of(model)
        if tokenizer.context_length < options.context_length:
            raise InputError(f"{model} reads {tokenizer.context_length} tokens: set --context-length to that or less")
        prompts = tokenizer.encode_batch([prompt_text(item.request, layout, tokenizer) for item in questions])
        fits &= [len(ids) + options.max_tokens <= options.context_length for ids in prompts]
    return [question for question, fit in zip(questions, fits, strict=True) if fit]


def _answers(
    opened: Run,
    arm: Arm,
    layout: DataLayout,
    questions: Sequence[HeldOutRequest],
    options: Evaluate,
) -> list[dict[str, Any]]:
    """Returns an arm's responses, one row per question; its model is loaded only if some are missing, then freed.

    Raises:
        InputError: if the responses that the run folder holds are to other questions.
        OutOfTimeError: between chunks, if the time budget is spent.
    """
    name = f"responses/{arm.name}.jsonl"
    path = opened.folder.path / name
    for row, question in zip(read_records(path), questions, strict=False):
        if row.get("id") != question.id or row.get("request") != question.request.row():
            raise InputError(f"{path} answers other tasks: they have changed since, choose another --run-dir")
    # A list, so that clearing it drops the only reference to the model.
    loaded: list[LanguageModelPolicy] = []

    def rows(start: int) -> list[dict[str, Any]]:
        if not loaded:
            loaded.append(_policy(arm, options))
        chunk = questions[start : start + CHUNK]
        tokenizer = loaded[0].tokenizer
        examples = [PromptExample(item.id, prompt_text(item.request, layout, tokenizer)) for item in chunk]
        responses = respond(
            loaded[0],
            ENV_ID,
            examples,
            temperature=0.0,
            reward=_no_reward,
            max_tokens=options.max_tokens,
            context_length=options.context_length,
        )
        return [
            {
                "id": item.id,
                "task": item.task,
                "request": item.request.row(),
                "response": response.text.strip(),
                "finish_reason": response.finish_reason,
                "tokens": len(response.token_ids),
            }
            for item, response in zip(chunk, responses, strict=True)
        ]

    try:
        return opened.rows(name, len(questions), CHUNK, rows, f"responses of {arm.name}")
    finally:
        if loaded:  # free the memory before the next arm's model is loaded
            loaded.clear()
            gc.collect()
            torch.cuda.empty_cache()


def _policy(arm: Arm, options: Evaluate) -> LanguageModelPolicy:
    """Loads an arm's policy; the base model gets an untrained adapter."""
    if arm.run:
        return policy_from(policy_folder(arm.run, "--policy"), dtype=options.dtype)
    # An untrained adapter does not change the outputs, and the base model computes in the same way as the other arms.
    return LanguageModelPolicy(arm.model, value="none", reference="none", dtype=options.dtype)


def _no_reward(samples: Sequence[Sample]) -> list[Score]:
    """Gives every sample reward 0: the env must have a reward, and responses are scored later."""
    return [Score(0.0) for _ in samples]


def _score(
    questions: Sequence[HeldOutRequest], answered: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Returns one row per question with all arms' responses and their scores."""
    return [
        {
            "id": question.id,
            "task": question.task,
            "instruction": question.request.instruction,
            "input": question.request.input,
            "references": list(question.references),
            "arms": {
                name: {
                    "response": rows[i]["response"],
                    "rouge_l": stemmed_rouge_l(rows[i]["response"], question.references),
                    "exact_match": normalized_match(rows[i]["response"], question.references),
                    "finished": rows[i]["finish_reason"] != "length",
                    "tokens": rows[i]["tokens"],
                }
                for name, rows in answered.items()
            },
        }
        for i, question in enumerate(questions)
    ]


def _macro(
    scores: Mapping[str, float], names: Sequence[str], rows: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, float]:
    """Returns an arm's macro averages over tasks; ``tokens`` and ``finished`` are means over instances.

    Args:
        scores: ROUGE-L by task.
        names: name of the task of each row.
        rows: the arm's response and scores to each question.
        seed: seed of the bootstrap.
    """
    mean, low, high = macro_interval(scores, seed)
    exact = task_scores(names, [row["exact_match"] for row in rows])
    return {
        "rouge_l": mean,
        "rouge_l_low": low,
        "rouge_l_high": high,
        "exact_match": float(np.mean(list(exact.values()))),
        "tokens": float(np.mean([row["tokens"] for row in rows])),
        "finished": float(np.mean([row["finished"] for row in rows])),
    }
