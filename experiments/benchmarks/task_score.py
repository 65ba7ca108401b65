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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from ...envs.tasks.prompt_search.tasks import PromptTask, load_prompt_task
from ...llm_backends import BackendError
from ...llm_backends.errors import InputError
from ...llm_backends.local.backend import TransformersBackend
from ...llm_backends.local.causal_lm import PrefixCache
from ...rewards.prompt_scoring.scorer import TaskScorer
from ...rewards.prompt_scoring.task_prompt import Demonstration, LabelledExample, TaskPrompt
from .frame import BenchOptions, alternate, publish, scratch_folder, spread, spread_text, torch_threads
from .tiny import model_folder

MEASURE = "likelihoods_per_second"
TOLERANCE = 1e-3
"""Largest allowed difference of log-likelihoods in float32, in nats: the ways sum in different orders."""
LONGEST = 80
"""Maximum number of characters of an example: the context of the tiny model is 512 tokens, which are bytes."""


@dataclass
class BenchTaskScore(BenchOptions):
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

    lowest = {"demonstrations": 0, "seed": 0}

    def check(self) -> None:
        super().check()
        if self.naive_prompts > self.prompts:
            raise InputError(f"--naive-prompts {self.naive_prompts} are more than --prompts {self.prompts}")


def run(options: BenchTaskScore, console: Console | None = None) -> dict[str, Any]:
    """Measures the three ways and returns ``{"ours", "theirs", "sharing_backend", "ratio", ...}``.

    Raises:
        InputError: if an option is out of range, there are too few examples, or the ways give different likelihoods.
        BackendError: if a request fails.
    """
    options.check()
    prompts, examples = draw_task_prompts(options)
    with torch_threads(options.threads), scratch_folder() as scratch:
        folder = model_folder(options.model, scratch)
        backend = TransformersBackend(folder, options.dtype, "auto", "completion")
        # Warm-up on two prompts and two examples.
        alternate(_sides(backend, prompts[:2], examples[:2], 2, options.batch), rounds=1, warm_up=0)
        sides = _sides(backend, prompts, examples, options.naive_prompts, options.batch)
        measured = alternate(sides, options.rounds, warm_up=0)
    seconds = {side: [each for _, each in measurements] for side, measurements in measured.items()}
    largest = max(
        float(np.abs(ours[: options.naive_prompts] - slower).max())
        for side in ("theirs", "sharing_backend")
        for (ours, _), (slower, _) in zip(measured["ours"], measured[side], strict=True)
    )
    if options.dtype == "float32" and largest > TOLERANCE:
        raise InputError(f"the methods differ by {largest:g} nats, more than {TOLERANCE:g}: one of them is wrong")
    figures: dict[str, Any] = {
        side: {MEASURE: 1 / float(np.median(values)), "seconds_each": values} for side, values in seconds.items()
    }
    sharing = f"{MEASURE}_of_the_sharing_backend"
    ratio = spread(MEASURE, seconds["theirs"], seconds["ours"])
    ratio |= spread(sharing, seconds["sharing_backend"], seconds["ours"])
    figures |= {"ratio": ratio, "largest_difference": largest, "settings": options.settings()}
    rates = {side: f"{figures[side][MEASURE]:.1f}" for side in seconds}
    rows = [
        ("", "likelihoods per second", "speed-up of ours (median, min to max)"),
        ("shared prefixes (ours)", rates["ours"], ""),
        ("one full request per likelihood", rates["theirs"], spread_text(MEASURE, ratio)),
        ("Backend.logprobs, which shares prefixes", rates["sharing_backend"], spread_text(sharing, ratio)),
    ]
    title = f"{options.prompts} prompts x {options.examples} examples, {options.model}, {options.dtype}"
    return publish(options, figures, title, rows, console, f"largest difference of a log-prob: {largest:.1e} nats")


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


def _sides(
    backend: TransformersBackend,
    prompts: Sequence[TaskPrompt],
    examples: Sequence[LabelledExample],
    few: int,
    batch: int,
) -> dict[str, Callable[[int], tuple[np.ndarray, float]]]:
    """Returns the three ways: functions that return log-probs in nats and the seconds that each of them took.

    Log-probs have the shape (prompts, examples, labels).

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

    def naive() -> np.ndarray:
        return np.moveaxis(_in_batches(backend, by_label, batch).reshape(labels, *shape[:2]), 0, -1)

    def timed(compute: Callable[[], np.ndarray], capacity: int) -> Callable[[int], tuple[np.ndarray, float]]:
        def measure(_: int) -> tuple[np.ndarray, float]:
            # A new cache: no way may use the prefixes of another.
            stored, lm.prefix_cache = lm.prefix_cache, PrefixCache(capacity)
            begun = time.perf_counter()
            logprobs = compute()
            seconds = time.perf_counter() - begun
            lm.prefix_cache = stored
            return logprobs, seconds / logprobs.size

        return measure

    capacity = lm.prefix_cache.capacity
    return {
        "ours": timed(lambda: TaskScorer(backend).label_logprobs(prompts, examples), capacity),
        "theirs": timed(naive, 0),
        "sharing_backend": timed(lambda: _in_batches(backend, rows, batch).reshape(shape), capacity),
    }


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
