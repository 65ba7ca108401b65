"""``instructgym refine-af bootstrap``: a language model grows a pool of seed tasks, then answers the new ones.

Stages 1 and 3 of REFINE-AF, with the model as it is. A run is resumed by replaying it from its journal.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...envs.tasks.instruction.instances import instance_prompt
from ...envs.tasks.instruction.pool import (
    DEMONSTRATIONS,
    InstructionPool,
    Task,
    evaluation_split,
    instruction_prompt,
    load_tasks,
)
from ...envs.tasks.instruction.seeds import Instruction
from ...llm_backends import Backend, Journal, resolve
from ...llm_backends.errors import InputError
from ..evolve.common import identity
from ..runs.folder import RowWriter, RunFolder
from ..runs.metrics import distinct_n, mean_pairwise_distance
from ..runs.options import RunOptions, check_counts, input_errors, parse_part
from ..runs.progress import StepProgress
from ..runs.resumption import TimeLimit, journaled_roles, replayed
from ..runs.tracking import Tracker
from .instruction_bootstrap import Bootstrapper, BootstrapSettings, Rows

TARGET = {"smoke": 10, "report": 400}
INSTRUCTION_TOKENS = {"smoke": 192, "report": 1024}
INSTANCE_TOKENS = {"smoke": 96, "report": 350}
CHUNK = 16
"""Instructions whose instances are asked for together."""


@dataclass
class RefineAFBootstrap(RunOptions):
    """Grow a pool of instructions from seed tasks, and write instances of the new ones."""

    backend: str = "embedded"
    """Who writes instructions, tells classification tasks from others and writes instances: embedded, transformers,
    openai, scripted, 'module:factory', or JSON {"id": ..., "kwargs": {...}}, which may hold a budget."""
    instance_backend: str = ""
    """Who writes instances, written like --backend; by default the same. Stage 3 of REFINE-AF takes the tuned model."""
    seeds: str = ""
    """Seed tasks: Self-Instruct's seed_tasks.jsonl, or JSONL, JSON or plain text with instructions. By default the
    package's own."""
    held_out: int = 40
    """Seeds kept for evaluation: never demonstrated, and nothing like them is accepted. At most a quarter of all."""
    target: int = 0
    """New instructions to accept. 0: by --scale, 10 or 400."""
    batch: int = 5
    """Requests for instructions sent together."""
    patience: int = 10
    """Go on to the instances after so many batches in a row of which no instruction was accepted."""
    rouge_threshold: float = 0.7
    """Drop an instruction whose ROUGE-L to a seed or an accepted one is above this."""
    temperature: float = 0.7
    """Of instructions. Instances are decoded greedily."""
    top_p: float = 0.9
    """Nucleus of instructions. Self-Instruct: 0.5 with a presence penalty, without which small models repeat items."""
    instruction_tokens: int = 0
    """Longest list of new instructions, in tokens. 0: by --scale, 192 or 1024."""
    instance_tokens: int = 0
    """Longest list of instances, in tokens. 0: by --scale, 96 or 350."""
    keep_cut: bool = False
    """Keep the finished items of a list that was cut by length. Self-Instruct drops the whole list."""
    instances: bool = True
    """Ask for instances of the new instructions. 'refine-af generate' writes them with a policy instead."""

    def check(self) -> None:
        super().check()
        check_counts(self, "batch", "patience")
        if not 0 < self.rouge_threshold <= 1:
            raise InputError(f"--rouge-threshold must be in (0, 1], got {self.rouge_threshold}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must be in (0, 1], got {self.top_p}")

    @property
    def settings(self) -> BootstrapSettings:
        """The options that concern the requests."""
        return BootstrapSettings(
            self.seed,
            self.batch,
            self.temperature,
            self.top_p,
            self.instruction_tokens or INSTRUCTION_TOKENS[self.scale],
            self.instance_tokens or INSTANCE_TOKENS[self.scale],
            self.keep_cut,
        )

    def roles(self, journal: Journal | None) -> dict[str, Backend]:
        """The language models of the run."""
        part = parse_part(self.backend, self.model)
        other = parse_part(self.instance_backend) if self.instance_backend else part
        return journaled_roles({"instructions": part, "instances": other}, journal)


def run(options: RefineAFBootstrap, console: Console | None = None) -> dict[str, Any]:
    """Bootstraps, or goes on, and returns the results.

    Raises:
        InputError: for bad input, before a model is loaded.
    """
    console = console or Console()
    options.check()
    tasks = load_tasks(options.seeds or None)
    with input_errors():
        shown, held = evaluation_split(tasks, options.held_out)
        probe = options.roles(None)
    texts = [Instruction(task.instruction, id=task.id) for task in tasks]
    folder = RunFolder(options.run_dir, identity(options, texts), "refine-af bootstrap")
    _check_context(options, probe, shown)
    target = options.target or TARGET[options.scale]
    if options.dry_run:
        console.print(
            f"would ask {probe['instructions'].name} for {target} new instructions from {len(shown)} seeds "
            f"({len(held)} held out), and {probe['instances'].name} for their instances, in {folder.path}"
        )
        return {}
    if (results := folder.finished(console)) is not None:
        return results
    pool = InstructionPool(shown, held, options.rouge_threshold)
    with replayed(folder, options.roles, console) as (journal, roles):
        bootstrapper = Bootstrapper(pool, roles["instructions"], roles["instances"], options.settings)
        return _bootstrap(options, folder, bootstrapper, target, journal, console)


def _check_context(options: RefineAFBootstrap, roles: dict[str, Backend], seeds: Sequence[Task]) -> None:
    """Refuses seeds of which eight may not fit a request."""
    longest = sorted(seeds, key=lambda task: len(task.instruction), reverse=True)[:DEMONSTRATIONS]
    settings, where = options.settings, options.seeds or "the package's seeds"
    writer = roles["instructions"]
    error = writer.context_error(instruction_prompt(writer.prompt_style, longest), settings.instruction_tokens)
    if error is not None:
        raise InputError(
            f"the {DEMONSTRATIONS} longest seeds of {where} do not fit one request: {error}; shorten them, or lower "
            "--instruction-tokens"
        )
    if not options.instances:
        return
    answerer = roles["instances"]
    for order in ("input_first", "output_first"):
        prompt = instance_prompt(answerer.prompt_style, longest[0].instruction, order)
        error = answerer.context_error(prompt, settings.instance_tokens)
        if error is not None:
            raise InputError(f"requests for instances are too long: {error}; lower --instance-tokens")


class _Record:
    """Files and counters of a run.

    Args:
        folder: the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.writers = {name: RowWriter(folder.file(f"{name}.jsonl")) for name in ("instructions", "instances")}
        self.rejected = RowWriter(folder.file("rejected.jsonl"))
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in self.writers}
        self.reasons: dict[str, Counter[str]] = {name: Counter() for name in self.writers}

    def add(self, kind: str, rows: Rows) -> None:
        """Writes what one batch gave."""
        for row in rows.accepted:
            self.writers[kind].write(row)
        for row in rows.rejected:
            self.rejected.write(row)
        self.rows[kind] += rows.accepted
        self.reasons[kind].update(row["rejected_by"] for row in rows.rejected)

    def counters(self) -> dict[str, int]:
        """For ``metrics.jsonl``."""
        return {name: len(rows) for name, rows in self.rows.items()} | {
            f"rejected/{kind}/{reason}": count
            for kind, reasons in self.reasons.items()
            for reason, count in sorted(reasons.items())
        }


def _bootstrap(
    options: RefineAFBootstrap,
    folder: RunFolder,
    bootstrapper: Bootstrapper,
    target: int,
    journal: Journal,
    console: Console,
) -> dict[str, Any]:
    begun, limit = time.monotonic(), TimeLimit(options.minutes, journal)
    replies = len(journal)
    record = _Record(folder)
    instructions = record.rows["instructions"]
    batches = barren = done = 0
    stopped = False
    with Tracker(folder, options.track, step_name="batches") as tracker:
        with StepProgress("instructions", target, console) as progress:
            while len(instructions) < target and barren < options.patience:
                if stopped := limit.reached():
                    break
                rows = bootstrapper.instructions(batches, target)
                record.add("instructions", rows)
                batches, barren = batches + 1, 0 if rows.accepted else barren + 1
                tracker.write(record.counters(), {}, step=batches)
                progress.update(len(instructions), f"{sum(record.reasons['instructions'].values())} dropped")
        answered = len(instructions) if options.instances else 0
        with StepProgress("instructions with instances", answered, console) as progress:
            while not stopped and done < answered:
                if stopped := limit.reached():
                    break
                chunk = instructions[done : done + CHUNK]
                record.add("instances", bootstrapper.instances(chunk))
                done, batches = done + len(chunk), batches + 1
                tracker.write(record.counters(), {}, step=batches)
                progress.update(done, f"{len(record.rows['instances'])} instances")
        results = folder.finish(
            metrics=_metrics(record),
            counts={
                "target": target,
                "instructions": len(instructions),
                "instances": len(record.rows["instances"]),
                "rejected_by": {kind: dict(reasons) for kind, reasons in record.reasons.items()},
                "batches": batches,
                "replayed_replies": replies,
                "seconds": round(time.monotonic() - begun, 1),
            },
            status="stopped" if stopped else "finished",
        )
        tracker.summary(results["metrics"])
    console.print(_results_table(results, folder))
    if stopped:
        console.print("stopped at the time limit: the same command goes on")
    elif len(instructions) < target:
        console.print(
            f"{options.patience} batches in a row gave nothing new: {len(instructions)} of {target} instructions; "
            "raise --temperature or --patience, or take another model, in another --run-dir"
        )
    return results


def _metrics(record: _Record) -> dict[str, Any]:
    """What the new tasks are worth; shares are None where there is nothing to share."""
    tasks, instances = record.rows["instructions"], record.rows["instances"]
    texts = [task["instruction"] for task in tasks]
    seen = len(tasks) + sum(n for r, n in record.reasons["instructions"].items() if r not in NO_CANDIDATE)
    answered = {row["task_id"] for row in instances}
    return {
        "acceptance_rate": len(tasks) / seen if seen else None,
        "mean_similarity": float(np.mean([task["similarity"] for task in tasks])) if tasks else None,
        "embedding_distance": mean_pairwise_distance(texts, resolve("embedder", "minilm")),
        "distinct_2": distinct_n(texts, 2),
        "mean_words": float(np.mean([len(text.split()) for text in texts])) if texts else None,
        "classification_share": sum(t["is_classification"] is True for t in tasks) / len(tasks) if tasks else None,
        "instances_per_instruction": len(instances) / len(tasks) if instances else None,
        "with_instances": len(answered) / len(tasks) if instances else None,
        "with_input": sum(bool(row["input"]) for row in instances) / len(instances) if instances else None,
    }


NO_CANDIDATE = frozenset({"backend_failed", "no_items", "cut"})
"""Reasons that concern a whole reply, not one instruction."""


def _results_table(results: dict[str, Any], folder: RunFolder) -> Table:
    counts, metrics = results["counts"], results["metrics"]
    table = Table(title=str(folder.path), show_header=False)
    table.add_row("new instructions", f"{counts['instructions']} of {counts['target']}")
    table.add_row("instances", str(counts["instances"]))
    for kind, reasons in counts["rejected_by"].items():
        table.add_row(f"dropped from {kind}", ", ".join(f"{n} {r}" for r, n in sorted(reasons.items())) or "none")
    for name, value in metrics.items():
        table.add_row(name.replace("_", " "), "-" if value is None else f"{value:.2f}")
    return table
