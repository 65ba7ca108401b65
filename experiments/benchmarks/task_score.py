"""``instructgym bench task-score``: compares scoring with shared prefixes with one full request per likelihood.

Each round computes the same likelihoods in three ways, with the same model in this process:

* ours: :class:`~instructgym.rewards.prompt_scoring.scorer.TaskScorer` with an empty cache;
* the naive loop: a row of ``Backend.logprobs`` per prompt, example and label, in batches, without sharing. The rows are
  in the order of labels, so that no batch holds a prompt twice, and the prefix cache of the model is off;
* the same rows with the sharing of ``Backend.logprobs`` itself: the labels of an example are next to each other, which
  processes their prompt once, and the prefix cache is on.

The last two score only the first prompts: their time per likelihood does not depend on the number of prompts.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...envs.tasks.prompt_search.tasks import PromptTask, load_prompt_task
from ...llm_backends import BackendError
from ...llm_backends.errors import InputError
from ...llm_backends.local.backend import TransformersBackend
from ...llm_backends.local.causal_lm import PrefixCache
from ...rewards.prompt_scoring.scorer import TaskScorer
from ...rewards.prompt_scoring.task_prompt import Demonstration, LabelledExample, TaskPrompt
from ..runs.folder import write_json
from ..runs.options import check_counts, check_output
from .tiny import model_folder

MEASURE = "likelihoods_per_second"
TOLERANCE = 1e-3
"""Largest allowed difference of log-likelihoods in float32, in nats: the ways sum in different orders."""
LONGEST = 80
"""Maximum number of characters of an example: the context of the tiny model is 512 tokens, which are bytes."""


@dataclass
class BenchTaskScore:
    """Prompts scored on examples with shared prefixes, against a full request per prompt, example and label."""

    model: str = "tiny"
    """Model that scores: tiny (a GPT-2 of four layers with random weights), embedded, or the path of a model."""
    prompts: int = 64
    """Number of different prompts: manual instructions with different demonstrations."""
    examples: int = 64
    """Number of examples on which every prompt is scored."""
    demonstrations: int = 1
    """Number of demonstrations, solved examples, in each prompt."""
    task: str = "rotten-tomatoes"
    """Task with the examples and instructions: rotten-tomatoes (offline), a task of GLUE or SuperGLUE, or a TOML
    file."""
    naive_prompts: int = 8
    """Number of prompts that the two slower ways score, with the same examples."""
    batch: int = 32
    """Number of rows in a batch of the two slower ways."""
    rounds: int = 2
    """Measurements of each way, taken alternately after a smaller warm-up."""
    dtype: str = "float32"
    """Floating-point type of the model: float32, bfloat16, float16 or auto. Only in float32 the likelihoods are checked
    to agree."""
    threads: int = 1
    """Number of threads of torch."""
    seed: int = 0
    """Seed of examples and demonstrations."""
    json: str = ""
    """JSON file for the results. Empty: do not write one."""


def run(options: BenchTaskScore, console: Console | None = None) -> dict[str, Any]:
    """Measures the three ways and returns ``{"ours", "theirs", "sharing_backend", "ratio", ...}``.

    Raises:
        InputError: if an option is out of range, there are too few examples, or the ways give different likelihoods.
        BackendError: if a request fails.
    """
    import torch

    console = console or Console()
    check_counts(options, "prompts", "examples", "naive_prompts", "batch", "rounds", "threads")
    if options.naive_prompts > options.prompts:
        raise InputError(f"--naive-prompts {options.naive_prompts} are more than --prompts {options.prompts}")
    if options.demonstrations < 0:
        raise InputError(f"--demonstrations must be at least 0, got {options.demonstrations}")
    if options.json:
        check_output(Path(options.json))
    prompts, examples = draw_task_prompts(options)
    threads = torch.get_num_threads()
    seconds: dict[str, list[float]] = {"ours": [], "theirs": [], "sharing_backend": []}
    largest = 0.0
    torch.set_num_threads(options.threads)
    try:
        with tempfile.TemporaryDirectory(prefix="instructgym-bench-") as scratch:
            folder = model_folder(options.model, Path(scratch))
            backend = TransformersBackend(folder, options.dtype, "auto", "completion")
            # Warm-up on two prompts and two examples.
            _measure(backend, prompts[:2], examples[:2], 2, options.batch)
            for _ in range(options.rounds):
                logprobs, durations = _measure(backend, prompts, examples, options.naive_prompts, options.batch)
                for way, value in durations.items():
                    seconds[way].append(value / logprobs[way].size)
                our_logprobs = logprobs["ours"][: options.naive_prompts]
                largest = max(
                    largest,
                    *(float(np.abs(our_logprobs - logprobs[way]).max()) for way in ("theirs", "sharing_backend")),
                )
    finally:
        torch.set_num_threads(threads)
    if options.dtype == "float32" and largest > TOLERANCE:
        raise InputError(f"the methods differ by {largest:g} nats, more than {TOLERANCE:g}: one of them is wrong")
    figures: dict[str, Any] = {
        way: {MEASURE: 1 / float(np.median(values)), "seconds_each": values} for way, values in seconds.items()
    }
    ratios = np.array(seconds["theirs"]) / np.array(seconds["ours"])
    sharing = np.array(seconds["sharing_backend"]) / np.array(seconds["ours"])
    figures["ratio"] = _spread(MEASURE, ratios) | _spread(f"{MEASURE}_of_the_sharing_backend", sharing)
    figures["largest_difference"] = largest
    figures["settings"] = {key: value for key, value in vars(options).items() if key != "json"}
    _print(options, figures, console)
    if options.json:
        write_json(Path(options.json), figures)
    return figures


def draw_task_prompts(options: BenchTaskScore) -> tuple[list[TaskPrompt], list[LabelledExample]]:
    """Returns different prompts of the task and the examples on which they are scored.

    Raises:
        InputError: if there are too few short examples or instructions.
    """
    task: PromptTask = load_prompt_task(options.task, ("train", "validation"), seed=options.seed)
    examples = [example for example in task.validation if len(example.text) <= LONGEST]
    shown = [example for example in task.train if len(example.text) <= LONGEST]
    random.Random(options.seed).shuffle(examples)
    random.Random(options.seed).shuffle(shown)
    instructions = task.instructions
    if len(examples) < options.examples or len(shown) < options.prompts * options.demonstrations:
        raise InputError(f"{task.name} has too few examples of {LONGEST} characters at most: ask for fewer")
    if not options.demonstrations and len(instructions) < options.prompts:
        raise InputError(f"{task.name} has {len(instructions)} instructions: use --demonstrations for more prompts")
    # Each prompt has demonstrations of its own, so that no two prompts are equal.
    prompts = []
    for number in range(options.prompts):
        solved_examples = shown[number * options.demonstrations : (number + 1) * options.demonstrations]
        solved = [Demonstration(example.text, example.label) for example in solved_examples]
        prompts.append(task.prompt(instructions[number % len(instructions)], solved))
    return prompts, examples[: options.examples]


def _measure(
    backend: TransformersBackend,
    prompts: Sequence[TaskPrompt],
    examples: Sequence[LabelledExample],
    few: int,
    batch: int,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Returns log-probs in nats, shape (prompts, examples, labels), and seconds by way.

    Args:
        backend: model that computes the log-probs.
        prompts: prompts to score.
        examples: examples on which they are scored.
        few: number of prompts for the two slower ways.
        batch: rows in a batch of the two slower ways.
    """
    lm, labels = backend.lm, len(prompts[0].verbalizers)
    shape = (few, len(examples), labels)
    rows = [("".join(p.render(e.text)), f" {word}") for p in prompts[:few] for e in examples for word in p.verbalizers]
    # The same rows in the order of labels: no batch of the naive loop has two labels of one example.
    by_label = [rows[i] for label in range(labels) for i in range(label, len(rows), labels)]
    capacity = lm.prefix_cache.capacity
    logprobs: dict[str, np.ndarray] = {}
    durations: dict[str, float] = {}
    try:
        for way in ("ours", "theirs", "sharing_backend"):
            # A new cache: no way may use the prefixes of another, and the naive loop has none.
            lm.prefix_cache = PrefixCache(0 if way == "theirs" else capacity)
            begun = time.perf_counter()
            if way == "ours":
                logprobs[way] = TaskScorer(backend).label_logprobs(prompts, examples)
            elif way == "theirs":
                values = _in_batches(backend, by_label, batch)
                logprobs[way] = np.moveaxis(values.reshape(labels, *shape[:2]), 0, -1)
            else:
                logprobs[way] = _in_batches(backend, rows, batch).reshape(shape)
            durations[way] = time.perf_counter() - begun
    finally:
        lm.prefix_cache = PrefixCache(capacity)
    return logprobs, durations


def _in_batches(backend: TransformersBackend, rows: Sequence[tuple[str, str]], batch: int) -> np.ndarray:
    """Returns the log-prob of each row of prompt and continuation, float32, shape (rows,), in nats."""
    sums = []
    for start in range(0, len(rows), batch):
        prompts, words = zip(*rows[start : start + batch], strict=True)
        for row in backend.logprobs(prompts, words):
            if isinstance(row, BackendError):
                raise row
            sums.append(float(row.sum()))
    return np.array(sums, np.float32)


def _spread(name: str, ratios: np.ndarray) -> dict[str, float]:
    """Returns median, minimum and maximum of ratios."""
    return {name: float(np.median(ratios)), f"{name}_min": float(ratios.min()), f"{name}_max": float(ratios.max())}


def _print(options: BenchTaskScore, figures: dict[str, Any], console: Console) -> None:
    """Prints the results as a table."""
    table = Table(title=f"{options.prompts} prompts x {options.examples} examples, {options.model}, {options.dtype}")
    for title in ("", "likelihoods per second", "speed-up of ours (median, min to max)"):
        table.add_column(title, overflow="fold")
    table.add_row("shared prefixes (ours)", f"{figures['ours'][MEASURE]:.1f}", "")
    for title, way, name in (
        ("one full request per likelihood", "theirs", MEASURE),
        ("Backend.logprobs, which shares prefixes", "sharing_backend", f"{MEASURE}_of_the_sharing_backend"),
    ):
        ratio = figures["ratio"]
        spread = f"{ratio[name]:.2f} ({ratio[f'{name}_min']:.2f} to {ratio[f'{name}_max']:.2f})"
        table.add_row(title, f"{figures[way][MEASURE]:.1f}", spread)
    console.print(table)
    console.print(f"largest difference of a log-prob: {figures['largest_difference']:.1e} nats")
