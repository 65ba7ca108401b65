"""A pool of tasks that grows by bootstrapping: its prompts, the parser of replies, the filters, and the pool itself.

This is stage 1 of REFINE-AF (arXiv 2505.06548), i.e. Self-Instruct (Wang et al., arXiv 2212.10560) with a small model:
six seed tasks and two machine-made ones are shown as a numbered list, the model continues the list, and the items that
pass the filters and a ROUGE-L gate enter the pool. A further prompt asks which tasks are classification tasks, because
their instances are generated in another order (:mod:`~instructgym.envs.tasks.instruction.instances`, read next).
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ....llm_backends.base import Prompt, PromptStyle
from ....llm_backends.errors import InputError
from ....llm_backends.prompting import build_prompt, fill, load_prompts, one_line
from ....llm_backends.records import append_lines, read_records
from ....rewards.judges.verdict import VerdictPrompt
from ....rewards.quality.instance_format import Instance, without_placeholder
from ....rewards.texts.rouge import RougeGate
from .seeds import SeedFileError, read_seed_rows, seed_instruction

MIN_WORDS, MAX_WORDS = 4, 150
BLOCKED_WORDS = [*"image images graph graphs picture pictures file files map maps draw plot".split(), "go to"]
"""Words of tasks that a text-only model cannot do; matched as whole words in any letter case."""
_BLOCKED = re.compile(rf"\b(?:{'|'.join(BLOCKED_WORDS)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """One reason to drop an instruction."""

    name: str
    reason: str
    """Why such instructions are unwanted."""
    drops: Callable[[str], bool]
    """Returns whether the rule drops a text, as :func:`normalized` returns it."""


FILTERS: tuple[Rule, ...] = (
    Rule("empty", "nothing was written", lambda text: not text),
    Rule("punctuation_first", "a fragment of a list or of markup", lambda text: text[0] in string.punctuation),
    Rule("non_ascii_first", "not in English, or a decoration", lambda text: not text[0].isascii()),
    Rule("too_short", f"fewer than {MIN_WORDS} words are no task", lambda text: len(text.split()) < MIN_WORDS),
    Rule(
        "too_long", f"more than {MAX_WORDS} words hold an input or answer", lambda text: len(text.split()) > MAX_WORDS
    ),
    Rule("blocked_word", "needs more than text", lambda text: _BLOCKED.search(text) is not None),
    Rule(
        "write_program",
        "models put this before instructions that they know; whether it asks for code is unclear",
        lambda text: text.casefold().startswith("write a program"),
    ),
)
"""The rules in the order in which they are applied; the name of the first that drops a text is the reason."""


def normalized(text: str) -> str:
    """Returns the text on one line, with its first letter in upper case."""
    text = one_line(text)
    return text[:1].upper() + text[1:]


def dropped_by(text: str) -> str | None:
    """Returns the name of the first rule of :data:`FILTERS` that drops the normalized text; None if none does."""
    return next((rule.name for rule in FILTERS if rule.drops(text)), None)


_NUMBER = re.compile(r"\s*(\d{1,4}) ?[.)](?:\s+|$)")


def parse_numbered(reply: str, first: int = 9, last: int = 15, continues: bool = False) -> list[str]:
    """Parses a numbered list that a model wrote.

    Numbers must count up by one from ``first``; a line with another number ends the list. An item ends at the next
    number or at a blank line; text between a blank line and the next number is ignored.

    Args:
        reply: the model's reply.
        first: number of the first item.
        last: number of the last item to return.
        continues: whether the prompt ends with the first number, so that the reply begins with the first item's text.

    Returns:
        The items in order, each on one line; an item without text is an empty string.
    """
    items: list[list[str]] = []
    is_open = False
    lines = (f"{first}. {reply.lstrip(' ')}" if continues else reply).splitlines()
    for line in lines:
        number = _NUMBER.match(line)
        if number is not None and int(number[1]) == first + len(items):
            if int(number[1]) > last:
                break
            items.append([line[number.end() :]])
            is_open = True
        elif number is not None and items:  # before the first item, other numbers are part of a preamble
            break
        elif not line.strip():
            is_open = False
        elif is_open:
            items[-1].append(line)
    return [one_line(" ".join(item)) for item in items]


DEMONSTRATIONS, MACHINE_DEMONSTRATIONS = 8, 2
"""Tasks that a prompt shows, and how many of them are machine-made at most."""
LAST_ITEM = 15
"""Number of the last item that a reply may hold: at most seven new instructions."""


@dataclass(frozen=True)
class Task:
    """An instruction with its instances, as in Self-Instruct's ``seed_tasks.jsonl``."""

    instruction: str
    instances: tuple[Instance, ...] = ()
    is_classification: bool | None = None
    """None if unknown."""
    id: str = ""
    name: str = ""

    def row(self) -> dict[str, Any]:
        """Returns the task as a JSON-able row in Self-Instruct's format."""
        return {
            "id": self.id,
            "name": self.name,
            "instruction": self.instruction,
            "instances": [asdict(instance) for instance in self.instances],
            "is_classification": self.is_classification,
        }


@dataclass(frozen=True)
class Decision:
    """The decision on one candidate."""

    instruction: str
    """The normalized text."""
    rejected_by: str | None
    """Name of the filter that rejected the candidate, or ``rouge``; None if it entered the pool."""
    similarity: float = 0.0
    """ROUGE-L F-measure to the nearest task of the pool; 0 if a filter rejected the candidate before the gate."""
    nearest: str = ""
    """Instruction of the nearest task."""
    id: str = ""
    """Id of the new task; empty if the candidate was rejected."""


def packaged_tasks() -> Path:
    """Returns the path of the package's own seed tasks, in Self-Instruct's format."""
    return Path(str(files(__package__).joinpath("seed_data", "tasks.jsonl")))


def load_tasks(seeds: str | Path | None = None) -> list[Task]:
    """Loads tasks from a file.

    Args:
        seeds: Self-Instruct's ``seed_tasks.jsonl``, or any file that
            :func:`~instructgym.envs.tasks.instruction.seeds.load_instructions` reads; None for the package's own seed
            tasks, 64 with one instance each.

    Raises:
        SeedFileError: if the file cannot be used; the message names the row and the field.
    """
    path = packaged_tasks() if seeds is None else Path(seeds)
    return [_task(where, row) for where, row in read_seed_rows(path)]


def _task(where: str, row: dict[str, Any]) -> Task:
    """Checks one row of a seed file and returns its task."""
    instruction = seed_instruction(where, row)
    instances = row.get("instances")
    if instances is None:  # in Alpaca's format the row itself is the one instance
        instances = [row] if isinstance(row.get("output"), str) else []
    if not isinstance(instances, list):
        raise SeedFileError(f"{where} needs a list 'instances', it has {type(instances).__name__}")
    for instance in instances:
        if not isinstance(instance, dict) or not isinstance(instance.get("output"), str):
            raise SeedFileError(f"{where} has an instance without a text field 'output'")
    label = row.get("is_classification")
    if label is not None and not isinstance(label, bool):
        raise SeedFileError(f"{where} needs true or false as 'is_classification', got {label!r}")
    return Task(
        instruction.text,
        tuple(Instance(without_placeholder(str(i.get("input") or "")), i["output"]) for i in instances),
        label,
        instruction.id,
        str(row.get("name") or ""),
    )


def held_out(tasks: Sequence[Task], n: int = 40) -> tuple[list[Task], list[Task]]:
    """Sets aside the n tasks for evaluation whose instructions have the smallest SHA-1.

    The selection depends on the texts alone, not on their order.

    Args:
        tasks: all tasks.
        n: number of tasks to set aside.

    Returns:
        The tasks that may be demonstrated and the n that must not be, both in the order of ``tasks``.

    Raises:
        ValueError: if n is negative, or fewer than eight tasks would be left to demonstrate.
    """
    if not 0 <= n <= len(tasks) - DEMONSTRATIONS:
        raise ValueError(
            f"cannot hold {n} of {len(tasks)} tasks out: a prompt shows {DEMONSTRATIONS}, so many must be left"
        )
    by_hash = sorted(range(len(tasks)), key=lambda i: hashlib.sha1(tasks[i].instruction.encode()).hexdigest())
    selected = set(by_hash[:n])
    return (
        [task for i, task in enumerate(tasks) if i not in selected],
        [task for i, task in enumerate(tasks) if i in selected],
    )


def evaluation_split(tasks: Sequence[Task], n: int) -> tuple[list[Task], list[Task]]:
    """Splits tasks with :func:`held_out`, setting a quarter of them aside at most.

    All stages of an experiment use this split, so that no stage demonstrates a task that another evaluates on.

    Args:
        tasks: all tasks.
        n: number of tasks to set aside.

    Raises:
        ValueError: if n is negative, or fewer than eight tasks would be left to demonstrate.
    """
    return held_out(tasks, min(n, len(tasks) // 4))


class InstructionPool:
    """Seed tasks and the machine-made tasks that were accepted.

    Args:
        seeds: tasks to start from, at least eight.
        held_out: tasks that are never demonstrated; tasks similar to them are rejected as well.
        threshold: largest ROUGE-L F-measure that a new task may have to any task of the pool, seeds and held-out tasks
            included.
        path: JSONL file of the machine-made tasks. Its tasks are loaded (a torn last line is dropped), and every task
            that enters the pool is appended. None: keep them in memory only.

    Raises:
        ValueError: if there are fewer than eight seeds, or the threshold is outside (0, 1].
        InputError: if the file holds something other than tasks.
    """

    def __init__(
        self,
        seeds: Sequence[Task],
        held_out: Sequence[Task] = (),
        threshold: float = 0.7,
        path: str | Path | None = None,
    ) -> None:
        if len(seeds) < DEMONSTRATIONS:
            raise ValueError(f"a prompt shows {DEMONSTRATIONS} tasks, got {len(seeds)} seeds")
        self.seeds, self.held_out, self.machine = list(seeds), list(held_out), list[Task]()
        self._known = [*self.seeds, *self.held_out]
        self.gate = RougeGate(threshold, [task.instruction for task in self._known])
        self.path = None if path is None else Path(path)
        if self.path is not None:
            for number, row in enumerate(read_records(self.path, repair=True), start=1):
                try:
                    self._enter(_task(f"{self.path} line {number}", row))
                except SeedFileError as error:
                    raise InputError(f"{error}; the file is the pool's own, choose another") from error

    def demonstrations(self, seed: int) -> list[Task]:
        """Draws eight tasks in random order: two machine-made ones, or fewer if there are fewer, and seeds.

        Args:
            seed: seed of the draw, which also depends on the tasks in the pool.
        """
        generator = np.random.default_rng(seed)
        machine_count = min(MACHINE_DEMONSTRATIONS, len(self.machine))
        drawn = [self.machine[i] for i in generator.choice(len(self.machine), machine_count, replace=False)]
        drawn += [
            self.seeds[i] for i in generator.choice(len(self.seeds), DEMONSTRATIONS - machine_count, replace=False)
        ]
        return [drawn[i] for i in generator.permutation(len(drawn))]

    def try_add(self, text: str) -> Decision:
        """Adds a generated instruction to the pool if it passes the filters and the ROUGE-L gate."""
        text = normalized(text)
        if reason := dropped_by(text):
            return Decision(text, reason)
        similarity, index = self.gate.nearest(text)
        nearest = self._known[index].instruction if index >= 0 else ""
        if self.gate.rejects(similarity):
            return Decision(text, "rouge", similarity, nearest)
        task = Task(text, id=f"machine_task_{len(self.machine)}")
        # On disk first: if the write fails, the pool in memory does not hold a task that the file lacks.
        if self.path is not None:
            append_lines(self.path, [task.row()])
        self._enter(task)
        return Decision(text, None, similarity, nearest, task.id)

    def _enter(self, task: Task) -> None:
        self.machine.append(task)
        self._known.append(task)
        self.gate.add(task.instruction)


def instruction_prompt(style: PromptStyle, demonstrations: Sequence[Task]) -> Prompt:
    """Returns the prompt that asks to continue a numbered list of tasks, in the form that a backend needs.

    The few-shot form ends with the number of the first new task: parse the reply with
    ``parse_numbered(reply, first=len(demonstrations) + 1, continues=True)``.

    Args:
        style: the form: a chat message, or a text to complete.
        demonstrations: the tasks of the list, in order.
    """
    table = load_prompts(__package__, "refine_af")["instructions"]
    first = len(demonstrations) + 1
    # After a colon at the end, a small model writes the task's input instead of the next task.
    items = [f"{n}. {one_line(task.instruction).rstrip(':')}" for n, task in enumerate(demonstrations, start=1)]
    numbers = {"count": len(items), "wanted": LAST_ITEM - len(items), "first": first, "last": LAST_ITEM}
    chat = fill(table["chat"], {"tasks": "\n".join(items)} | {name: str(value) for name, value in numbers.items()})
    return build_prompt(style, chat, "\n".join([table["header"], "", *items, f"{first}."]))


def task_type_prompt() -> VerdictPrompt:
    """Returns the judge's prompt whether an instruction is a classification task; the positive answer means that it is.

    It is for :func:`~instructgym.rewards.judges.verdict.judge_verdicts`.
    """
    table = load_prompts(__package__, "refine_af")["task_type"]
    return VerdictPrompt.from_file(table, ("Instruction", "Classification"), ("instruction",))
