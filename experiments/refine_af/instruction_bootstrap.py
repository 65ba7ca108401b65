"""Bootstrapping tasks from seeds with a language model: batches of new instructions, then their instances.

Stages 1 and 3 of REFINE-AF (arXiv 2505.06548), whose mechanics are those of Self-Instruct (arXiv 2212.10560).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...envs.tasks.instruction.instances import STOPS, Instance, clean, instance_prompt, order_for, parse_instances
from ...envs.tasks.instruction.pool import (
    DEMONSTRATIONS,
    LAST_ITEM,
    InstructionPool,
    Task,
    instruction_prompt,
    parse_numbered,
    task_type_prompt,
)
from ...llm_backends import Backend, BackendError, Sampling, request_seed
from ...llm_backends.base import Result
from ...rewards.judges.verdict import Question, judge_verdicts


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
