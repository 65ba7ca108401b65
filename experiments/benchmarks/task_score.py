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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console

from ...envs.tasks.prompt_search.tasks import load_prompt_task
from ...llm_backends import BackendError
from ...llm_backends.errors import InputError
from ...llm_backends.local.backend import TransformersBackend
from ...llm_backends.local.caches import PrefixCache
from ...rewards.prompt_scoring.scorer import TaskScorer
from ...rewards.prompt_scoring.task_prompt import Demonstration, LabelledExample, TaskPrompt
from ..runs.options import Count
from .frame import BenchOptions, alternate, publish, scratch_folder, spread, spread_text, timed, torch_threads
from .tiny import model_folder

MEASURE = "likelihoods_per_second"
SIDES = {
    "ours": "shared prefixes (ours)",
    "theirs": "one full request per likelihood",
    "sharing_backend": "Backend.logprobs, which shares prefixes",
}
"""Titles of the ways, by their key in the results."""
RATIOS = {"theirs": MEASURE, "sharing_backend": f"{MEASURE}_of_the_sharing_backend"}
"""Names of the ratios of ours to the slower ways."""
TOLERANCE = 1e-3
"""Largest allowed difference of log-likelihoods in float32, in nats: the ways sum in different orders."""
LONGEST = 80
"""Maximum number of characters of an example: the context of the tiny model is 512 tokens, which are bytes."""


@dataclass
class BenchTaskScore(BenchOptions):
    """Prompts scored on examples with shared prefixes, against a full request per prompt, example and label."""

    model: str = "tiny"
    """Model that scores: tiny (a GPT-2 of four layers with random weights), embedded, or the path of a model."""
    prompts: Count = 64
    """Number of different prompts: manual instructions with different demonstrations."""
    examples: Count = 64
    """Number of examples on which every prompt is scored."""
    demonstrations: int = 1
    """Number of demonstrations, solved examples, in each prompt."""
    task: str = "rotten-tomatoes"
    """Task with the examples and instructions: rotten-tomatoes (offline), a task of GLUE or SuperGLUE, or a TOML
    file."""
    naive_prompts: Count = 8
    """Number of prompts that the two slower ways score, with the same examples."""
    batch: Count = 32
    """Number of rows in a batch of the two slower ways."""
    rounds: Count = 2
    """Measurements of each way, taken alternately after a smaller warm-up."""
    dtype: str = "float32"
    """Floating-point type of the model: float32, bfloat16, float16 or auto. Only in float32 the likelihoods are checked
    to agree."""
    threads: Count = 1
    """Number of threads of torch."""
    seed: int = 0
    """Seed of examples and demonstrations."""

    def check(self) -> None:
        super().check()
        if self.naive_prompts > self.prompts:
            raise InputError(f"--naive-prompts {self.naive_prompts} are more than --prompts {self.prompts}")


def run(options: BenchTaskScore, console: Console) -> dict[str, Any]:
    """Measures the three ways and returns ``{"ours", "theirs", "sharing_backend", "ratio", ...}``.

    Raises:
        InputError: if an option is out of range, there are too few examples, or the ways give different likelihoods.
        BackendError: if a request fails.
    """
    options.check()
    prompts, examples = draw_task_prompts(options)
    few = options.naive_prompts
    with torch_threads(options.threads), scratch_folder() as scratch:
        backend = TransformersBackend(model_folder(options.model, scratch), options.dtype, "auto", "completion")
        # Warm-up on two prompts and two examples.
        alternate(_sides(backend, prompts[:2], examples[:2], 2, options.batch), rounds=1, warm_up=0)
        measured = alternate(_sides(backend, prompts, examples, few, options.batch), options.rounds, warm_up=0)
    largest = max(
        float(np.abs(ours[:few] - slower).max())
        for side in RATIOS
        for (ours, _), (slower, _) in zip(measured["ours"], measured[side], strict=True)
    )
    if options.dtype == "float32" and largest > TOLERANCE:
        raise InputError(f"the methods differ by {largest:g} nats, more than {TOLERANCE:g}: one of them is wrong")
    figures: dict[str, Any] = {}
    rows = [("", "likelihoods per second", "speed-up of ours (median, min to max)")]
    ratio: dict[str, float] = {}
    for side, title in SIDES.items():
        seconds = [each for _, each in measured[side]]
        figures[side] = {MEASURE: 1 / float(np.median(seconds)), "seconds_each": seconds}
        speed_up = ""
        if side in RATIOS:
            ratio |= spread(RATIOS[side], seconds, figures["ours"]["seconds_each"])
            speed_up = spread_text(RATIOS[side], ratio)
        rows.append((title, f"{figures[side][MEASURE]:.1f}", speed_up))
    figures |= {"ratio": ratio, "largest_difference": largest}
    title = f"{options.prompts} prompts x {options.examples} examples, {options.model}, {options.dtype}"
    return publish(options, figures, title, rows, console, f"largest difference of a log-prob: {largest:.1e} nats")


def draw_task_prompts(options: BenchTaskScore) -> tuple[list[TaskPrompt], list[LabelledExample]]:
    """Returns different prompts of the task and the examples on which they are scored.

    Raises:
        InputError: if there are too few short examples or instructions.
    """
    task = load_prompt_task(options.task, ("train", "validation"), seed=options.seed)
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
    rows = [("".join(p.render(e.text)), f" {word}") for p in prompts[:few] for e in examples for word in p.verbalizers]
    by_example = np.arange(len(rows))
    # In the order of labels no batch of the naive loop has two labels of one example.
    by_label = by_example.reshape(-1, labels).T.ravel()

    def in_batches(order: np.ndarray) -> np.ndarray:
        logprobs = np.empty(len(rows), np.float32)
        for start in range(0, len(order), batch):
            indices = order[start : start + batch]
            for i, row in zip(indices, backend.logprobs(*zip(*(rows[i] for i in indices), strict=True)), strict=True):
                if isinstance(row, BackendError):
                    raise row
                logprobs[i] = float(row.sum())
        return logprobs.reshape(few, len(examples), labels)

    def measure(compute: Callable[[], np.ndarray], capacity: int, _: int) -> tuple[np.ndarray, float]:
        # A new cache: no way may use the prefixes of another.
        stored, lm.prefix_cache = lm.prefix_cache, PrefixCache(capacity)
        logprobs, seconds = timed(compute)
        lm.prefix_cache = stored
        return logprobs, seconds / logprobs.size

    capacity = lm.prefix_cache.capacity
    return {
        "ours": partial(measure, lambda: TaskScorer(backend).label_logprobs(prompts, examples), capacity),
        "theirs": partial(measure, lambda: in_batches(by_label), 0),
        "sharing_backend": partial(measure, lambda: in_batches(by_example), capacity),
    }
