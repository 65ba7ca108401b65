"""``instructgym refine-af bootstrap``: a language model grows a pool of seed tasks, then answers the new ones.

Stages 1 and 3 of REFINE-AF, with the model as it is. A run is resumed by replaying it from its journal.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...envs.tasks.instruction.instances import STOPS, clean, instance_prompt, order_for, parse_instances
from ...envs.tasks.instruction.pool import (
    DEMONSTRATIONS,
    LAST_ITEM,
    InstructionPool,
    Task,
    evaluation_split,
    instruction_prompt,
    load_tasks,
    parse_numbered,
    task_type_prompt,
)
from ...envs.tasks.instruction.seeds import Instruction
from ...llm_backends import Backend, BackendError, Journal, Sampling, request_seed, resolve
from ...llm_backends.base import Result
from ...llm_backends.errors import InputError
from ...rewards.judges.verdict import Question, judge_verdicts
from ...rewards.quality.instance_format import Instance
from ..evolve.train import identity
from ..runs.folder import RowWriter, RunFolder, TimeLimit, Tracker, journaled_roles, replayed
from ..runs.options import RunOptions, check_counts, input_errors, parse_part
from ..runs.progress import StepProgress
from ..runs.statistics import distinct_n, mean_pairwise_distance


@dataclass(frozen=True)
class BootstrapSettings:
    """How tasks are made."""

    seed: int = 0
    batch: int = 5
    """Requests for instructions that are sent together, all from the pool as it was before."""
    temperature: float = 0.7
    """Of instructions; instances are decoded greedily."""
    top_p: float = 0.9
    instruction_tokens: int = 1024
    instance_tokens: int = 350
    keep_cut: bool = False
    """Keep the finished items of a list that was cut by length."""


@dataclass
class Rows:
    """What one batch gave, JSON-able."""

    accepted: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)


class Bootstrapper:
    """Makes instructions and instances; every request and draw depends on its number and on what is in the pool.

    Args:
        pool: the pool that grows.
        writer: who writes instructions and says whether they are classification tasks.
        answerer: who writes instances.
        settings: sampling.
    """

    def __init__(
        self,
        pool: InstructionPool,
        writer: Backend,
        answerer: Backend,
        settings: BootstrapSettings = BootstrapSettings(),
    ) -> None:
        self.pool, self.writer, self.answerer, self.settings = pool, writer, answerer, settings

    def instructions(self, batch: int, target: int) -> Rows:
        """Asks for one batch of instructions and lets into the pool what passes.

        Args:
            batch: number of the batch.
            target: machine-made tasks in the pool at which to stop.
        """
        seed, size = self.settings.seed, self.settings.batch
        shown = [self.pool.demonstrations(request_seed(seed, "demonstrations", batch, i)) for i in range(size)]
        prompts = [instruction_prompt(self.writer.prompt_style, tasks) for tasks in shown]
        sampling = instruction_sampling(self.writer, self.settings)
        samplings = [sampling.with_seed(request_seed(seed, "instructions", batch, i)) for i in range(size)]
        rows = Rows()
        for request, result in enumerate(self.writer.generate(prompts, samplings)):
            origin = {"batch": batch, "request": request}
            items, defect = self._items(result)
            rows.rejected += [
                {"stage": "instruction", "rejected_by": reason, **origin, **how} for reason, how in defect
            ]
            for item in items:
                if len(self.pool.machine) >= target:
                    break
                found = self.pool.consider(item)
                nearest = {"similarity": round(found.similarity, 6), "nearest": found.nearest}
                if found.rejected_by:
                    why = {"stage": "instruction", "rejected_by": found.rejected_by}
                    rows.rejected.append(why | {"instruction": found.instruction} | origin | nearest)
                else:
                    rows.accepted.append(Task(found.instruction, id=found.id).row() | origin | nearest)
        self._classify(rows)
        return rows

    def _items(self, result: Result) -> tuple[list[str], list[tuple[str, dict[str, Any]]]]:
        """The items of one reply, and what is wrong with it."""
        if isinstance(result, BackendError):
            return [], [("backend_failed", {"error": str(result)})]
        text, cut = result[0].text, result[0].finish_reason == "length"
        continues = self.writer.prompt_style == "completion"
        items = parse_numbered(text, DEMONSTRATIONS + 1, LAST_ITEM, continues)
        if not items:
            return [], [("no_items", {"text": text})]
        if not cut:
            return items, []
        return (items[:-1] if self.settings.keep_cut else []), [("cut", {"text": text})]

    def _classify(self, rows: Rows) -> None:
        """Fills in which of the accepted instructions are classification tasks."""
        prompt, seed = task_type_prompt(), self.settings.seed
        questions = [
            Question(prompt, {"instruction": row["instruction"]}, request_seed(seed, "task type", row["id"]))
            for row in rows.accepted
        ]
        for row, verdict in zip(rows.accepted, judge_verdicts(self.writer, questions), strict=True):
            row["is_classification"] = verdict.answer
            if verdict.answer is None:
                row["task_type_error"] = verdict.why

    def instances(self, tasks: Sequence[Mapping[str, Any]]) -> Rows:
        """Asks for the instances of tasks.

        Args:
            tasks: rows of ``instructions.jsonl``; those of unknown type are rejected.
        """
        rows = Rows()
        known = [task for task in tasks if task["is_classification"] is not None]
        orders = [order_for(task["is_classification"]) for task in known]
        style = self.answerer.prompt_style
        prompts = [
            instance_prompt(style, task["instruction"], order) for task, order in zip(known, orders, strict=True)
        ]
        sampling = instance_sampling(self.settings)
        samplings = [sampling.with_seed(request_seed(self.settings.seed, "instances", task["id"])) for task in known]
        replies = dict(zip((task["id"] for task in known), self.answerer.generate(prompts, samplings), strict=True))
        for task in tasks:
            origin = {"task_id": task["id"], "instruction": task["instruction"]}
            why = {"stage": "instance"} | origin
            if task["id"] not in replies:
                rows.rejected.append(why | {"rejected_by": "no_task_type", "error": task["task_type_error"]})
                continue
            reply = replies[task["id"]]
            if isinstance(reply, BackendError):
                rows.rejected.append(why | {"rejected_by": "backend_failed", "error": str(reply)})
                continue
            order = order_for(task["is_classification"])
            pieces = parse_instances(reply[0].text, order, style == "completion")
            if not pieces:
                rows.rejected.append(why | {"rejected_by": "no_instances", "text": reply[0].text})
            cleaned = clean(pieces, reply[0].finish_reason == "length", instruction=task["instruction"])
            for piece, reason in cleaned.dropped:
                what = asdict(piece) if isinstance(piece, Instance) else {"text": piece}
                rows.rejected.append(why | {"rejected_by": reason} | what)
            rows.accepted += [
                {"instruction": task["instruction"], "input": i.input, "output": i.output, "task_id": task["id"]}
                | {"is_classification": task["is_classification"]}
                for i in cleaned.kept
            ]
        return rows


def instruction_sampling(writer: Backend, settings: BootstrapSettings) -> Sampling:
    """How instructions are sampled. A few-shot list ends at a blank line; every list ends before item 16."""
    stop = (f"\n{LAST_ITEM + 1}.", *(("\n\n",) if writer.prompt_style == "completion" else ()))
    return Sampling(settings.instruction_tokens, settings.temperature, settings.top_p, stop=stop)


def instance_sampling(settings: BootstrapSettings) -> Sampling:
    """How instances are decoded: greedily, as in Self-Instruct."""
    return replace(Sampling(settings.instance_tokens, temperature=0.0), stop=STOPS)


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
