"""``instructgym evaluate``: zero-shot responses of fine-tuned models to held-out tasks, by ROUGE-L.

The evaluation of Self-Instruct and Super-NaturalInstructions: a task's score is the mean of its instances' ROUGE-L, a
model's the mean over tasks. REFINE-AF reports the share of tasks on which one model beats another.
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
from ..runs.folder import chunked_rows, read_json, write_json
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
    OutOfTimeError,
    TokenTraining,
    TrainingOptions,
    digest,
    policy_folder,
    stage,
    tokenizer_of,
    weights_digest,
)
from .finetune import TRAIN


def tables(
    metrics: Mapping[str, Mapping[str, float]], pairs: Mapping[str, PairedComparison], counts: Mapping[str, Any]
) -> list[Table]:
    """The results for the terminal.

    Args:
        metrics: by arm: ``rouge_l`` with its interval, ``exact_match``, ``tokens`` and ``finished``.
        pairs: by name the comparisons.
        counts: of tasks and instances.
    """
    arms = Table(title=f"{counts['tasks']} tasks, {counts['instances']} instances (macro averages, percent)")
    for column in ("arm", "ROUGE-L", "95% interval", "exact match", "finished", "tokens"):
        arms.add_column(column, justify="left" if column == "arm" else "right")
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
        compared.add_column(column, justify="left" if column == "comparison" else "right")
    for name, pair in pairs.items():
        shares = (f"{100 * share:.0f}%" for share in pair.shares.values())
        ends = f"{100 * pair.low:+.1f} to {100 * pair.high:+.1f}"
        compared.add_row(name, *shares, f"{100 * pair.difference:+.1f}", ends)
    return [arms, compared]


def plot_rouge(metrics: Mapping[str, Mapping[str, float]], pairs: Mapping[str, PairedComparison], path: Path) -> Path:
    """Macro ROUGE-L of the arms, and its differences with the shares of tasks won, as bars with 95% intervals.

    Args:
        metrics: as of :func:`tables`.
        pairs: likewise.
        path: the PNG.
    """
    figure, axes = panels(2 if pairs else 1)
    rows = list(metrics.values())
    means, low, high = (np.array([row[key] for row in rows]) for key in ("rouge_l", "rouge_l_low", "rouge_l_high"))
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(rows))]
    errors = np.maximum([means - low, high - means], 0)
    axes[0, 0].bar(range(len(rows)), means, yerr=errors, color=colours, capsize=4)
    axes[0, 0].set_xticks(range(len(rows)), list(metrics))
    axes[0, 0].set(title="ROUGE-L, mean over tasks", ylabel="F-measure")
    if pairs:
        right, found = axes[0, 1], list(pairs.values())
        gaps, low, high = (np.array([getattr(p, key) for p in found]) for key in ("difference", "low", "high"))
        right.barh(
            range(len(found)),
            gaps,
            xerr=np.maximum([gaps - low, high - gaps], 0),
            color=COLOURS[6],
            alpha=0.6,
            capsize=4,
        )
        labels = [
            f"{name}\nwon {100 * p.shares['won']:.0f}%, tied {100 * p.shares['tied']:.0f}%" for name, p in pairs.items()
        ]
        right.set_yticks(range(len(found)), labels, fontsize=8)
        right.axvline(0, color="#555555", linewidth=1)
        right.invert_yaxis()
        right.set(title="Difference in ROUGE-L", xlabel="F-measure, mean over tasks")
    figure.suptitle("bars: 95% bootstrap interval over tasks", fontsize=9)
    figure.savefig(path, dpi=130)
    return path


BASE = "base"


@dataclass(frozen=True)
class Arm:
    """One of the models that are compared."""

    name: str
    model: str
    """Its base model."""
    run: str = ""
    """Run folder of what was fine-tuned; empty for the base model as it is."""
    layout: DataLayout | None = None
    """In which it was trained, where the run says so."""


def find_arms(policy: str, model: str = "") -> list[Arm]:
    """The base model, then the policies in the order in which they are named.

    Args:
        policy: run folders separated by commas, each with a name if wanted: ``ours=runs/a,runs/b``.
        model: the base model; by default that of the first policy, or embedded.

    Raises:
        InputError: for a run folder without a policy, and a name that is unusable or comes twice.
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
    config = read_json(Path(folder) / "config.json") or {}
    layout = (config.get("options") or {}).get("layout")
    return layout if layout in DATA_LAYOUTS else None


def common_layout(arms: Sequence[Arm], asked: str = "auto") -> DataLayout:
    """The one layout in which all arms are asked: that of their training, ``chat`` where no run says, or the one asked.

    Raises:
        InputError: if they were trained in different ones and none is asked for.
    """
    if asked != "auto":
        return asked  # type: ignore[return-value]
    trained = {arm.layout: arm.name for arm in arms if arm.layout is not None}
    if len(trained) > 1:
        which = ", ".join(f"{name} in {layout}" for layout, name in trained.items())
        raise InputError(f"the policies were trained in different layouts ({which}): choose one with --layout")
    return next(iter(trained), "chat")


def seen_in_training(arm: Arm, requests: Sequence[InstructionExample]) -> int | None:
    """How many of the requests are among those that the arm was fine-tuned on; None where its run does not say."""
    path = Path(arm.run) / TRAIN
    if not arm.run or not path.exists():
        return None
    trained = {request_text(InstructionExample(r["instruction"], r["input"], r["output"])) for r in read_records(path)}
    return sum(request_text(one) in trained for one in requests)


CHUNK = 32
ENV_ID = "instructgym/GenerateResponse-v0"
PREDICTIONS = "predictions.jsonl"


@dataclass
class Evaluate(TrainingOptions):
    """Answer held-out tasks with a base model and what was fine-tuned from it, and compare the answers' ROUGE-L."""

    policy: str = ""
    """Run folders of fine-tuned models, separated by commas, each with a name if wanted: ours=runs/a,random=runs/b.
    The base model is always an arm as well, called base."""
    tasks: str = ""
    """A task of Super-NaturalInstructions or a folder of them, JSONL in the user-oriented format, or seed tasks in
    Self-Instruct's format. By default the package's own seed tasks."""
    task_names: str = ""
    """File with one task name a line: take those alone, Super-NaturalInstructions' test tasks for instance."""
    held_out: int = HELD_OUT
    """Of seed tasks, take those that bootstrapping keeps out: so many, a quarter of all at most. 0: take all."""
    max_instances: int = 10
    """Instances of a task, the first of each; 0 for all."""
    model: str = ""
    """The base model. By default that of the first policy, or embedded."""
    layout: Literal["auto", "chat", "plain", "alpaca"] = "auto"
    """How requests are written, by all arms alike. auto: as the policies were trained, chat without any."""
    max_tokens: int = 96
    """Tokens of a response at most."""
    context_length: int = 1024
    """Tokens of request and response at most; instances that are longer for any arm are dropped and counted."""

    def check(self) -> None:
        super().check()
        check_counts(self, "max_tokens", "context_length")


@dataclass(frozen=True)
class HeldOutRequest:
    """One instance of a task."""

    id: str
    task: str
    request: InstructionExample
    references: tuple[str, ...]


def run(options: Evaluate, console: Console | None = None) -> dict[str, Any]:
    """Answers and scores, and returns macro averages, comparisons of all pairs of arms, and counts.

    Writes ``responses/ARM.jsonl`` (chunk by chunk; what stands there is never generated again), ``predictions.jsonl``
    (a row per instance with every arm's response and scores), ``tasks.json`` (score by arm and task) and
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
    kept = _fitting(questions, arms, layout, options)
    if not kept:
        raise InputError(f"no instance fits --context-length {options.context_length} beside --max-tokens")
    seen = {arm.name: seen_in_training(arm, [question.request for question in kept]) for arm in arms if arm.run}
    for name, count in seen.items():
        if count:
            console.print(f"warning: {name} was trained on {count} of the {len(kept)} requests", style="yellow")
    if options.dry_run:
        console.print(f"would answer {len(kept)} instances by {', '.join(arm.name for arm in arms)}")
        return {}
    weights = digest([weights_digest(policy_folder(arm.run, "--policy")) for arm in arms if arm.run])
    with stage(options, "evaluate", console, distributed=False, weights=weights) as opened:
        if isinstance(opened, dict):
            return opened
        try:
            answered = {arm.name: _answers(opened, arm, layout, kept, options, console) for arm in arms}
        except OutOfTimeError:
            return opened.stopped()
        rows = _scored(kept, answered)
        write_lines(opened.folder.file(PREDICTIONS), rows)
        names = [row["task"] for row in rows]
        scores = {arm.name: task_scores(names, [row["arms"][arm.name]["rouge_l"] for row in rows]) for arm in arms}
        write_json(opened.folder.file("tasks.json"), scores)
        metrics = {
            arm.name: _macro(scores[arm.name], names, [row["arms"][arm.name] for row in rows], options.seed)
            for arm in arms
        }
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
                "instances": len(kept),
                "dropped": {
                    "too long": len(questions) - len(kept),
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


def _questions(tasks: Sequence[EvaluationTask], limit: int | None) -> list[HeldOutRequest]:
    return [
        HeldOutRequest(f"{task.name}/{number}", task.name, InstructionExample(task.instruction, given, refs[0]), refs)
        for task in tasks
        for number, (given, refs) in enumerate(task.instances[:limit])
    ]


def _fitting(
    questions: Sequence[HeldOutRequest], arms: Sequence[Arm], layout: DataLayout, options: Evaluate
) -> list[HeldOutRequest]:
    """The questions whose prompts leave room for a response, by every arm's tokenizer."""
    fits = np.ones(len(questions), dtype=bool)
    for model in dict.fromkeys(arm.model for arm in arms):
        tokenizer = tokenizer_of(model)
        if tokenizer.context_length < options.context_length:
            raise InputError(f"{model} reads {tokenizer.context_length} tokens: set --context-length to that or less")
        prompts = tokenizer.encode_batch([prompt_text(one.request, layout, tokenizer) for one in questions])
        fits &= [len(ids) + options.max_tokens <= options.context_length for ids in prompts]
    return [question for question, fit in zip(questions, fits, strict=True) if fit]


def _answers(
    opened: TokenTraining,
    arm: Arm,
    layout: DataLayout,
    questions: Sequence[HeldOutRequest],
    options: Evaluate,
    console: Console,
) -> list[dict[str, Any]]:
    """An arm's responses, one row per question. Its model is loaded if some are missing, and let go on return.

    Raises:
        InputError: if the responses that stand in the run folder are to other questions.
        OutOfTimeError: between chunks.
    """
    path = opened.folder.path / "responses" / f"{arm.name}.jsonl"
    for row, question in zip(read_records(path), questions, strict=False):
        if row.get("id") != question.id or row.get("request") != question.request.row():
            raise InputError(f"{path} answers other tasks: they have changed since, choose another --run-dir")
    loaded: list[LanguageModelPolicy] = []

    def rows(start: int) -> list[dict[str, Any]]:
        opened.check_time()
        if not loaded:
            loaded.append(_policy(arm, options))
        chunk = questions[start : start + CHUNK]
        tokenizer = loaded[0].tokenizer
        examples = [PromptExample(one.id, prompt_text(one.request, layout, tokenizer)) for one in chunk]
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
                "id": one.id,
                "task": one.task,
                "request": one.request.row(),
                "response": response.text.strip(),
                "finish_reason": response.finish_reason,
                "tokens": len(response.token_ids),
            }
            for one, response in zip(chunk, responses, strict=True)
        ]

    try:
        return chunked_rows(path, len(questions), CHUNK, rows, f"responses of {arm.name}", console)
    finally:
        if loaded:  # the next arm's model must not find this one in memory
            loaded.clear()
            gc.collect()
            torch.cuda.empty_cache()


def _policy(arm: Arm, options: Evaluate) -> LanguageModelPolicy:
    if arm.run:
        return policy_from(policy_folder(arm.run, "--policy"), dtype=options.dtype)
    # A new adapter changes nothing, and the base model computes as the others do.
    return LanguageModelPolicy(arm.model, value="none", reference="none", dtype=options.dtype)


def _no_reward(samples: Sequence[Sample]) -> list[Score]:
    return [Score(0.0) for _ in samples]


def _scored(
    questions: Sequence[HeldOutRequest], answered: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """One row per question with all arms' responses and their scores."""
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
