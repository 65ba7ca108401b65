"""``instructgym evaluate``: scores zero-shot responses of fine-tuned models to held-out tasks by ROUGE-L.

This is the evaluation of Self-Instruct and Super-NaturalInstructions: the score of a task is the mean ROUGE-L of its
instances, the score of a model the mean over tasks. REFINE-AF reports the share of tasks on which one model has a
higher score than another.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from ...agents.policy.checkpoints import policy_from, read_state
from ...agents.policy.language_model import SETTINGS, LanguageModelPolicy
from ...envs.tasks.instruction.data import DATA_LAYOUTS, DataLayout, InstructionExample, prompt_text, request_text
from ...envs.tasks.instruction.evaluation import HELD_OUT, load_evaluation_tasks
from ...envs.tokens.episode import PromptExample
from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records, write_lines
from ...rewards import Sample, Score
from ..runs.folder import read_json, write_json
from ..runs.options import Count, named
from ..runs.report import COLOURS, panels, percent, rich_table
from ..runs.responses import respond
from ..runs.statistics import (
    PairedComparison,
    compare_paired,
    macro_interval,
    normalized_match,
    stemmed_rouge_l,
    task_scores,
)
from ..runs.training import Run, TrainingOptions, digest, policy_folder, run_stage, tokenizer_of, weights_digest
from .finetune import TRAIN

BASE = "base"
"""The arm of the base model."""
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
    max_tokens: Count = 96
    """Maximum tokens of a response."""
    context_length: Count = 1024
    """Maximum tokens of request and response together; instances that are too long for any model are dropped and
    counted."""


@dataclass(frozen=True)
class Arm:
    """One of the models that are compared."""

    name: str
    model: str
    """Its base model."""
    run: Path | None = None
    """Run folder of the fine-tuning; None for the base model itself, which has no policy and no training."""
    policy: Path | None = None
    """Folder of its policy."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Options of its training, as far as the run folder records them."""


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
        match = re.fullmatch(r"([\w.-]+)=(.+)", piece)
        name, run = match.groups() if match else (Path(piece).resolve().name, piece)
        if not re.fullmatch(r"[\w.-]+", name):
            raise InputError(f"--policy {piece}: {name!r} cannot name an arm, write NAME={run}")
        if name == BASE or name in {arm.name for arm in arms}:
            raise InputError(f"--policy has two arms called {name!r} (base is the base model): write NAME={run}")
        folder = policy_folder(run, "--policy")
        training = (read_json(Path(run) / "config.json") or {}).get("options") or {}
        arms.append(Arm(name, read_state(folder / SETTINGS)["model"], Path(run), folder, training))
    return [Arm(BASE, model or (arms[0].model if arms else "embedded")), *arms]


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
    trained = {arm.training["layout"]: arm.name for arm in arms if arm.training.get("layout") in DATA_LAYOUTS}
    if len(trained) > 1:
        choices = ", ".join(f"{name} in {layout}" for layout, name in trained.items())
        raise InputError(f"the policies were trained in different layouts ({choices}): choose one with --layout")
    return next(iter(trained), "chat")


def seen_in_training(run: Path, requests: Sequence[InstructionExample]) -> int | None:
    """Returns how many of the requests a model was fine-tuned on; None if its run has no file of training rows."""
    if not (run / TRAIN).exists():
        return None
    trained = {
        request_text(InstructionExample(row["instruction"], row["input"], row["output"]))
        for row in read_records(run / TRAIN)
    }
    return sum(request_text(request) in trained for request in requests)


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
    questions = [
        HeldOutRequest(f"{task.name}/{number}", task.name, InstructionExample(task.instruction, text, refs[0]), refs)
        for task in tasks
        for number, (text, refs) in enumerate(task.instances[: options.max_instances or None])
    ]
    requests = _fitting(questions, arms, layout, options)
    if not requests:
        raise InputError(f"no instance fits --context-length {options.context_length} beside --max-tokens")
    seen = {arm.name: seen_in_training(arm.run, [item.request for item in requests]) for arm in arms if arm.run}
    for name, count in seen.items():
        if count:
            console.print(f"warning: {name} was trained on {count} of the {len(requests)} requests", style="yellow")

    def work(opened: Run) -> dict[str, Any]:
        rows = _score(requests, {arm.name: _answers(opened, arm, layout, requests, options) for arm in arms})
        write_lines(opened.folder.file(PREDICTIONS), rows)
        names = [row["task"] for row in rows]
        scores = {arm.name: task_scores(names, [row["arms"][arm.name]["rouge_l"] for row in rows]) for arm in arms}
        write_json(opened.folder.file("tasks.json"), scores)
        metrics = {
            name: _macro(by_task, names, [row["arms"][name] for row in rows], options.seed)
            for name, by_task in scores.items()
        }
        # Compare every arm with all arms before it, the base model first.
        pairs = {
            f"{second} vs {first}": compare_paired(scores[second], scores[first], options.seed)
            for first, second in combinations(scores, 2)
        }
        plot_rouge(metrics, pairs, opened.folder.file("figures", "rouge.png"))
        num_tasks = len(set(names))
        table = rich_table(_metric_rows(metrics))
        table.title = f"{num_tasks} tasks, {len(requests)} instances (macro averages, percent)"
        console.print(table)
        if pairs:
            table = rich_table(comparison_rows(pairs, "comparison"))
            table.title = "task by task, ROUGE-L (shares of tasks and points)"
            console.print(table)
        dropped = {
            "too long": len(questions) - len(requests),
            "tasks without an instance left": len(tasks) - num_tasks,
        }
        return opened.finish(
            {"arms": metrics, "comparisons": {name: asdict(pair) | pair.shares for name, pair in pairs.items()}},
            {"tasks": num_tasks, "instances": len(requests), "dropped": dropped}
            | {"seen in training": seen, "layout": layout},
        )

    # A run is resumed only with the same weights: stored responses belong to them.
    weights = digest([weights_digest(arm.policy) for arm in arms if arm.policy])
    plan = f"answer {len(requests)} instances by {', '.join(arm.name for arm in arms)}"
    return run_stage(options, "evaluate", console, work, distributed=False, plan=plan, weights=weights)


def _fitting(
    questions: Sequence[HeldOutRequest], arms: Sequence[Arm], layout: DataLayout, options: Evaluate
) -> list[HeldOutRequest]:
    """Returns the questions whose prompts leave room for a response with every arm's tokenizer."""
    fits = np.ones(len(questions), dtype=bool)
    # Arms with one base model share its tokenizer.
    for model in dict.fromkeys(arm.model for arm in arms):
        tokenizer = tokenizer_of(model, options.context_length)
        texts = [prompt_text(item.request, layout, tokenizer) for item in questions]
        prompts = tokenizer.encode_batch(texts, layout == "chat")
        fits &= [len(ids) + options.max_tokens <= options.context_length for ids in prompts]
    return [question for question, fit in zip(questions, fits, strict=True) if fit]


def _answers(
    opened: Run, arm: Arm, layout: DataLayout, questions: Sequence[HeldOutRequest], options: Evaluate
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
        if not loaded and arm.policy:
            loaded.append(policy_from(arm.policy, dtype=options.dtype))
        elif not loaded:
            # An untrained adapter does not change the outputs, and the base model computes as the other arms do.
            loaded.append(LanguageModelPolicy(arm.model, value="none", reference="none", dtype=options.dtype))
        chunk = questions[start : start + CHUNK]
        tokenizer = loaded[0].tokenizer
        examples = [
            PromptExample(item.id, prompt_text(item.request, layout, tokenizer), markup=layout == "chat")
            for item in chunk
        ]
        lengths = named(options, "max_tokens", "context_length")
        responses = respond(loaded[0], ENV_ID, examples, temperature=0.0, reward=no_reward, **lengths)
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


def no_reward(samples: Sequence[Sample]) -> list[Score]:
    """Gives every sample reward 0, for an env that must have a reward where none is wanted."""
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


def _metric_rows(metrics: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Returns the table of the arms, whose metrics are those of :func:`_macro`."""
    return [
        ["arm", "ROUGE-L (95%)", "exact match", "finished", "tokens"],
        *(
            [
                name,
                percent(row["rouge_l"], row["rouge_l_low"], row["rouge_l_high"]),
                f"{100 * row['exact_match']:.1f}",
                f"{100 * row['finished']:.0f}",
                f"{row['tokens']:.0f}",
            ]
            for name, row in metrics.items()
        ),
    ]


def comparison_rows(pairs: Mapping[str, PairedComparison], title: str) -> list[list[str]]:
    """Returns the table of comparisons of two models, by their names; ``title`` is that of the first column."""
    return [
        [title, "won", "tied", "lost", "difference (95%)"],
        *(
            [
                name,
                *(f"{100 * share:.0f}%" for share in pair.shares.values()),
                percent(pair.difference, pair.low, pair.high, "+.1f"),
            ]
            for name, pair in pairs.items()
        ),
    ]


def plot_rouge(metrics: Mapping[str, Mapping[str, float]], pairs: Mapping[str, PairedComparison], path: Path) -> Path:
    """Plots ROUGE-L of the arms and its pairwise differences as bars with 95% intervals, and returns the path.

    Args:
        metrics: by arm: ``rouge_l`` (the mean over tasks), ``rouge_l_low`` and ``rouge_l_high``.
        pairs: comparisons of two arms, by name; without any, the plot of differences is left out.
        path: PNG file to write.
    """
    figure, axes = panels(2 if pairs else 1)
    left, right = axes[0, 0], axes[0, -1]

    def errors(values: Sequence[tuple[float, float, float]]) -> np.ndarray:
        """Returns the lengths of the error bars of values with the ends of their intervals; shape (2, values)."""
        middle, low, high = np.array(values).T
        # Matplotlib refuses negative error bars, and a bootstrap interval need not contain the mean.
        return np.maximum([middle - low, high - middle], 0)

    means = [(row["rouge_l"], row["rouge_l_low"], row["rouge_l_high"]) for row in metrics.values()]
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(means))]
    left.bar(range(len(means)), [mean for mean, *_ in means], yerr=errors(means), color=colours, capsize=4)
    left.set_xticks(range(len(means)), list(metrics))
    left.set(title="ROUGE-L, mean over tasks", ylabel="F-measure")
    if pairs:
        gaps = [(pair.difference, pair.low, pair.high) for pair in pairs.values()]
        places, style = range(len(gaps)), {"color": COLOURS[6], "alpha": 0.6, "capsize": 4}
        right.barh(places, [gap for gap, *_ in gaps], xerr=errors(gaps), **style)
        labels = [
            f"{name}\nwon {100 * pair.shares['won']:.0f}%, tied {100 * pair.shares['tied']:.0f}%"
            for name, pair in pairs.items()
        ]
        right.set_yticks(places, labels, fontsize=8)
        right.axvline(0, color="#555555", linewidth=1)
        right.invert_yaxis()
        right.set(title="Difference in ROUGE-L", xlabel="F-measure, mean over tasks")
    figure.suptitle("bars: 95% bootstrap interval over tasks", fontsize=9)
    figure.savefig(path, dpi=130)
    return path
