"""``instructgym refine-af bootstrap``: a language model adds instructions to a pool of seed tasks and writes instances.

Stages 1 and 3 of REFINE-AF (Roy et al., arXiv 2505.06548), with a model that is not trained for them. A run is resumed
by replaying it from its journal. :mod:`~instructgym.envs.tasks.instruction.pool` holds the prompts, the filters and the
pool.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from annotated_types import Gt, Le
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
from ..runs.folder import RowWriter, RunFolder, Tracker, journaled_roles, replayed
from ..runs.options import BackendOptions, Count, input_errors, parse_part
from ..runs.progress import Deadline, OutOfTimeError, StepProgress
from ..runs.statistics import distinct_n, known_mean, mean_pairwise_distance

SIZES = {
    "smoke": {"target": 10, "instruction_tokens": 192, "instance_tokens": 96},
    "report": {"target": 400, "instruction_tokens": 1024, "instance_tokens": 350},
}
"""Options that are 0, by ``--scale``."""
CHUNK = 16
"""Instructions whose instances are requested together."""
KINDS = ("instructions", "instances")
"""What a run makes, in this order; also the names of the files."""
NO_CANDIDATE = frozenset({"backend_failed", "no_items", "cut"})
"""Reasons for dropping a whole reply, not one instruction."""
Share = Annotated[float, Gt(0), Le(1)]


@dataclass
class RefineAFBootstrap(BackendOptions):
    """Grow a pool of instructions from seed tasks, and write instances of the new ones."""

    backend: str = "embedded"
    """Model that writes instructions, decides which are classification tasks, and writes instances: embedded,
    transformers, openai, scripted, 'module:factory', or JSON {"id": ..., "kwargs": {...}}, which may hold a budget."""
    instance_backend: str = ""
    """Model that writes instances, written like --backend. By default that of --backend; stage 3 of REFINE-AF uses the
    trained model."""
    seeds: str = ""
    """File of seed tasks: Self-Instruct's seed_tasks.jsonl, or JSONL, JSON or plain text with instructions. By default
    the package's own."""
    held_out: int = 40
    """Seed tasks held out for evaluation, at most a quarter of all. They are never shown in prompts, and instructions
    similar to them are dropped."""
    target: int = 0
    """New instructions to accept. 0: by --scale, 10 or 400."""
    batch: Count = 5
    """Requests for instructions sent together."""
    patience: Count = 10
    """Stop asking for instructions, and go on to the instances, after so many batches in a row without an accepted
    one."""
    rouge_threshold: Share = 0.7
    """Drop an instruction if its ROUGE-L to a seed or to an accepted instruction is above this."""
    temperature: float = 0.7
    """Sampling temperature of instructions. Instances are decoded greedily."""
    top_p: Share = 0.9
    """Nucleus (top-p) of the sampling of instructions. Self-Instruct uses 0.5 with a presence penalty; without that
    penalty small models repeat items."""
    instruction_tokens: int = 0
    """Maximum length of a list of new instructions, in tokens. 0: by --scale, 192 or 1024."""
    instance_tokens: int = 0
    """Maximum length of a list of instances, in tokens. 0: by --scale, 96 or 350."""
    keep_cut: bool = False
    """Keep the finished items of a list that was cut off at the token limit. Self-Instruct drops the whole list."""
    instances: bool = True
    """Write instances of the new instructions too. Without it, 'refine-af generate' can write them with a policy."""

    @property
    def sized(self) -> RefineAFBootstrap:
        """These options, with the counts of the scale in place of 0."""
        sizes: dict[str, Any] = {name: getattr(self, name) or size for name, size in SIZES[self.scale].items()}
        return replace(self, **sizes)

    def roles(self, journal: Journal | None) -> dict[str, Backend]:
        """Builds the language models of the run, by role; without a journal their replies are not stored."""
        part = parse_part(self.backend, self.model)
        instance_part = parse_part(self.instance_backend) if self.instance_backend else part
        return journaled_roles({"instructions": part, "instances": instance_part}, journal)


@dataclass
class BatchResult:
    """The JSON-able rows that one batch of requests gave."""

    accepted: list[dict[str, Any]] = field(default_factory=list)
    """Rows of instructions or instances."""
    rejected: list[dict[str, Any]] = field(default_factory=list)
    """Rows of what was dropped, each with the reason as ``rejected_by``."""


class Bootstrapper:
    """Generates instructions and instances; every request depends only on its number, the seed and the pool.

    Args:
        pool: the pool of tasks; accepted instructions are added to it.
        writer: the language model that writes instructions and classifies them as classification tasks or others.
        answerer: the language model that writes instances.
        options: options of sampling and limits.
    """

    def __init__(self, pool: InstructionPool, writer: Backend, answerer: Backend, options: RefineAFBootstrap) -> None:
        self.pool, self.writer, self.answerer, self.options = pool, writer, answerer, options.sized

    def instructions(self, batch: int, target: int) -> BatchResult:
        """Requests one batch of instructions and adds those that pass the filters to the pool.

        Args:
            batch: number of the batch.
            target: number of machine-made tasks in the pool at which to stop.

        Returns:
            Rows of the accepted instructions, with their type, and of the rejected ones.
        """
        # All prompts are built before a reply enters the pool, so the requests can be sent together.
        options, style = self.options, self.writer.prompt_style
        seed, size = options.seed, options.batch
        shown = [self.pool.demonstrations(request_seed(seed, "demonstrations", batch, i)) for i in range(size)]
        prompts = [instruction_prompt(style, tasks) for tasks in shown]
        # A list ends before the item behind the last; one that a completion model continues also ends at a blank line.
        stop = (f"\n{LAST_ITEM + 1}.", *(("\n\n",) if style == "completion" else ()))
        sampling = Sampling(options.instruction_tokens, options.temperature, options.top_p, stop=stop)
        samplings = [sampling.with_seed(request_seed(seed, "instructions", batch, i)) for i in range(size)]
        rows = BatchResult()
        for request, result in enumerate(self.writer.generate(prompts, samplings)):
            origin = {"batch": batch, "request": request}
            items, reason, details = self._items(result)
            if reason:
                rows.rejected.append({"stage": "instruction", "rejected_by": reason} | origin | details)
            for item in items:
                if len(self.pool.machine) >= target:
                    break
                candidate = self.pool.try_add(item)
                nearest = {"similarity": round(candidate.similarity, 6), "nearest": candidate.nearest}
                if candidate.rejected_by:
                    rejection = {"stage": "instruction", "rejected_by": candidate.rejected_by}
                    rows.rejected.append(rejection | {"instruction": candidate.instruction} | origin | nearest)
                else:
                    rows.accepted.append(Task(candidate.instruction, id=candidate.id).row() | origin | nearest)
        self._classify(rows)
        return rows

    def _items(self, result: Result) -> tuple[list[str], str, dict[str, str]]:
        """Returns the items of a reply, and the reason why the reply, or a part of it, is dropped, with details."""
        if isinstance(result, BackendError):
            return [], "backend_failed", {"error": str(result)}
        text = result[0].text
        items = parse_numbered(text, DEMONSTRATIONS + 1, LAST_ITEM, self.writer.prompt_style == "completion")
        if not items:
            return [], "no_items", {"text": text}
        if result[0].finish_reason != "length":
            return items, "", {}
        # The last item of a list that was cut off is unfinished.
        return items[:-1] if self.options.keep_cut else [], "cut", {"text": text}

    def _classify(self, rows: BatchResult) -> None:
        """Sets ``is_classification`` in the rows of accepted instructions; None, with the error, without a verdict."""
        prompt, seed = task_type_prompt(), self.options.seed
        questions = [
            Question(prompt, {"instruction": row["instruction"]}, request_seed(seed, "task type", row["id"]))
            for row in rows.accepted
        ]
        for row, verdict in zip(rows.accepted, judge_verdicts(self.writer, questions), strict=True):
            row["is_classification"] = verdict.answer
            if verdict.answer is None:
                row["task_type_error"] = verdict.why

    def instances(self, tasks: Sequence[Mapping[str, Any]]) -> BatchResult:
        """Requests instances of tasks, parses the replies and drops instances that break the rules.

        Args:
            tasks: rows of ``instructions.jsonl``; those of unknown type are rejected.

        Returns:
            Rows of the accepted and of the rejected instances.
        """
        rows = BatchResult()
        style = self.answerer.prompt_style
        typed = [task for task in tasks if task["is_classification"] is not None]
        orders = {task["id"]: order_for(task["is_classification"]) for task in typed}
        prompts = [instance_prompt(style, task["instruction"], orders[task["id"]]) for task in typed]
        # Greedy decoding, as in Self-Instruct.
        sampling = Sampling(self.options.instance_tokens, temperature=0.0, stop=STOPS)
        samplings = [sampling.with_seed(request_seed(self.options.seed, "instances", name)) for name in orders]
        replies = dict(zip(orders, self.answerer.generate(prompts, samplings), strict=True))
        for task in tasks:
            rejection = {"stage": "instance", "task_id": task["id"], "instruction": task["instruction"]}
            if task["id"] not in replies:
                rows.rejected.append(rejection | {"rejected_by": "no_task_type", "error": task["task_type_error"]})
                continue
            reply = replies[task["id"]]
            if isinstance(reply, BackendError):
                rows.rejected.append(rejection | {"rejected_by": "backend_failed", "error": str(reply)})
                continue
            pieces = parse_instances(reply[0].text, orders[task["id"]], style == "completion")
            if not pieces:
                rows.rejected.append(rejection | {"rejected_by": "no_instances", "text": reply[0].text})
            cleaned = clean(pieces, reply[0].finish_reason == "length", instruction=task["instruction"])
            for piece, reason in cleaned.dropped:
                content = asdict(piece) if isinstance(piece, Instance) else {"text": piece}
                rows.rejected.append(rejection | {"rejected_by": reason} | content)
            told = {"task_id": task["id"], "is_classification": task["is_classification"]}
            rows.accepted += [{"instruction": task["instruction"]} | asdict(kept) | told for kept in cleaned.kept]
        return rows


def run(options: RefineAFBootstrap, console: Console | None = None) -> dict[str, Any]:
    """Bootstraps instructions and instances, or resumes it, and returns the results.

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
    if options.dry_run:
        console.print(
            f"would ask {probe['instructions'].name} for {options.sized.target} new instructions from {len(shown)} "
            f"seeds ({len(held)} held out), and {probe['instances'].name} for their instances, in {folder.path}"
        )
        return {}
    if (results := folder.finished(console)) is not None:
        return results
    pool = InstructionPool(shown, held, options.rouge_threshold)
    with replayed(folder, options.roles, console) as (journal, roles):
        bootstrapper = Bootstrapper(pool, roles["instructions"], roles["instances"], options)
        return _bootstrap(options.sized, folder, bootstrapper, journal, console)


def _check_context(options: RefineAFBootstrap, roles: dict[str, Backend], seeds: Sequence[Task]) -> None:
    """Checks that the longest requests fit the context of the models; raises an InputError if they do not."""
    # Length in characters approximates length in tokens: the eight longest seeds make the longest prompt of seeds.
    longest = sorted(seeds, key=lambda task: len(task.instruction), reverse=True)[:DEMONSTRATIONS]
    sized, style = options.sized, roles["instances"].prompt_style
    requests = [
        ("instructions", instruction_prompt(roles["instructions"].prompt_style, longest), sized.instruction_tokens),
        *(
            ("instances", instance_prompt(style, longest[0].instruction, order_for(label)), sized.instance_tokens)
            for label in (False, True)
            if options.instances
        ),
    ]
    for role, prompt, tokens in requests:
        if (error := roles[role].context_error(prompt, tokens)) is not None:
            raise InputError(
                f"a request for {role} with the longest seeds of {options.seeds or 'the package'} does not fit: "
                f"{error}; shorten the seeds, or lower --{role.removesuffix('s')}-tokens"
            )


class _Record:
    """The output files and counters of a run.

    Args:
        folder: folder of the run.
        tracker: writer of the counters after every batch.
    """

    def __init__(self, folder: RunFolder, tracker: Tracker) -> None:
        self._tracker = tracker
        self._writers = {name: RowWriter(folder.file(f"{name}.jsonl")) for name in (*KINDS, "rejected")}
        self.rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        self.reasons: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        self.batches = 0

    def add(self, kind: str, batch: BatchResult) -> None:
        """Writes and counts the rows of one batch, of one of :data:`KINDS`."""
        for name, rows in ((kind, batch.accepted), ("rejected", batch.rejected)):
            for row in rows:
                self._writers[name].write(row)
        self.rows[kind] += batch.accepted
        self.reasons[kind].update(row["rejected_by"] for row in batch.rejected)
        self.batches += 1
        counters = {name: len(rows) for name, rows in self.rows.items()} | {
            f"rejected/{name}/{reason}": count
            for name, reasons in self.reasons.items()
            for reason, count in reasons.items()
        }
        self._tracker.write(counters, {}, step=self.batches)


def _bootstrap(
    options: RefineAFBootstrap, folder: RunFolder, bootstrapper: Bootstrapper, journal: Journal, console: Console
) -> dict[str, Any]:
    """Runs both stages as far as the time limit allows, and returns the results."""
    begun, limit = time.monotonic(), Deadline(options.minutes, journal)
    replies = len(journal)  # those of earlier starts, which are replayed
    barren, status = 0, "stopped"
    with Tracker(folder, options.track, step_name="batches") as tracker:
        record = _Record(folder, tracker)
        instructions, instances = (record.rows[kind] for kind in KINDS)  # the lists themselves: they grow
        with suppress(OutOfTimeError):
            # Stage 1: instructions, until the target is reached or ``patience`` batches in a row gave none.
            with StepProgress("instructions", options.target, console) as progress:
                while len(instructions) < options.target and barren < options.patience:
                    limit.check()
                    batch = bootstrapper.instructions(record.batches, options.target)
                    record.add("instructions", batch)
                    barren = 0 if batch.accepted else barren + 1
                    progress.update(len(instructions), f"{record.reasons['instructions'].total()} dropped")
            # Stage 3: instances of the accepted instructions.
            answered = len(instructions) if options.instances else 0
            with StepProgress("instructions with instances", answered, console) as progress:
                for start in range(0, answered, CHUNK):
                    limit.check()
                    chunk = instructions[start : start + CHUNK]
                    record.add("instances", bootstrapper.instances(chunk))
                    progress.update(start + len(chunk), f"{len(instances)} instances")
            status = "finished"
        results = folder.finish(
            metrics=_metrics(record),
            counts={
                "target": options.target,
                "instructions": len(instructions),
                "instances": len(instances),
                "rejected_by": {kind: dict(reasons) for kind, reasons in record.reasons.items()},
                "batches": record.batches,
                "replayed_replies": replies,
                "seconds": round(time.monotonic() - begun, 1),
            },
            status=status,
        )
        tracker.summary(results["metrics"])
    console.print(_results_table(results, folder))
    if status == "stopped":
        console.print("stopped at the time limit: the same command goes on")
    elif len(instructions) < options.target:
        console.print(
            f"{options.patience} batches in a row gave nothing new: {len(instructions)} of {options.target} "
            "instructions; raise --temperature or --patience, or take another model, in another --run-dir"
        )
    return results


def _metrics(record: _Record) -> dict[str, Any]:
    """Returns rates, diversity and lengths of the new tasks; None where there is nothing to average."""
    tasks, instances = (record.rows[kind] for kind in KINDS)
    texts = [task["instruction"] for task in tasks]
    # The acceptance rate counts single instructions, not replies that failed as a whole.
    seen = len(tasks) + sum(n for r, n in record.reasons["instructions"].items() if r not in NO_CANDIDATE)
    answered = {row["task_id"] for row in instances}
    return {
        "acceptance_rate": len(tasks) / seen if seen else None,
        "mean_similarity": known_mean(task["similarity"] for task in tasks),
        "embedding_distance": mean_pairwise_distance(texts, resolve("embedder", "minilm")),
        "distinct_2": distinct_n(texts, 2),
        "mean_words": known_mean(len(text.split()) for text in texts),
        "classification_share": sum(t["is_classification"] is True for t in tasks) / len(tasks) if tasks else None,
        "instances_per_instruction": len(instances) / len(tasks) if instances else None,
        "with_instances": len(answered) / len(tasks) if instances else None,
        "with_input": sum(bool(row["input"]) for row in instances) / len(instances) if instances else None,
    }


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
