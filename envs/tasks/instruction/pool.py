"""A pool of tasks that grows by bootstrapping: what is shown to a model, what it is asked, which replies enter.

Stage 1 of REFINE-AF (arXiv 2505.06548), which is Self-Instruct (Wang et al., arXiv 2212.10560) with a small model: six
seed tasks and two machine-made ones are shown as a numbered list, the model goes on with the list, and what passes the
filters and a ROUGE-L gate enters the pool. Classification tasks are told from others, for their instances are made in
another order.
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
from ....rewards.quality.instance_format import Instance
from ....rewards.texts.rouge import RougeGate
from .seeds import SeedFileError, read_seed_rows, seed_instruction

MIN_WORDS, MAX_WORDS = 4, 150
BLOCKED_WORDS = [*"image images graph graphs picture pictures file files map maps draw plot".split(), "go to"]
"""What a model of text cannot do; matched as whole words in any case."""
_BLOCKED = re.compile(rf"\b(?:{'|'.join(BLOCKED_WORDS)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """One reason to drop an instruction."""

    name: str
    reason: str
    """Why such instructions are unwanted."""
    drops: Callable[[str], bool]
    """Takes the normalized text."""


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
"""The rules in the order in which they are asked; the first that drops a text names the reason."""


def normalized(text: str) -> str:
    """The text on one line, its first letter upper case."""
    text = one_line(text)
    return text[:1].upper() + text[1:]


def dropped_by(text: str) -> str | None:
    """Name of the first rule of :data:`FILTERS` that drops the normalized text; None if it is kept."""
    return next((rule.name for rule in FILTERS if rule.drops(text)), None)


_NUMBER = re.compile(r"\s*(\d{1,4}) ?[.)](?:\s+|$)")


def parse_numbered(reply: str, first: int = 9, last: int = 15, continues: bool = False) -> list[str]:
    """The items of a numbered list that a model wrote.

    Numbers must count up by one from ``first``; a line with another number ends the list. An item goes on until the
    next number or blank line; whatever stands between a blank line and the next number is no part of the list.

    Args:
        reply: the model's reply.
        first: number of the first item.
        last: items above this number are left out.
        continues: the prompt ends in the first number, so that the reply begins with the first item's text.

    Returns:
        The items in order, each on one line; those with no text are empty.
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
        elif number is not None and items:
            break
        elif not line.strip():
            is_open = False
        elif is_open:
            items[-1].append(line)
    return [one_line(" ".join(item)) for item in items]


DEMONSTRATIONS, MACHINE_DEMONSTRATIONS = 8, 2
LAST_ITEM = 15
"""Number of the last item that a reply may hold: at most seven new instructions."""


@dataclass(frozen=True)
class Task:
    """An instruction with its instances, as in Self-Instruct's ``seed_tasks.jsonl``."""

    instruction: str
    instances: tuple[Instance, ...] = ()
    is_classification: bool | None = None
    """None where nobody has said."""
    id: str = ""
    name: str = ""

    def row(self) -> dict[str, Any]:
        """The task in Self-Instruct's format, JSON-able."""
        return {
            "id": self.id,
            "name": self.name,
            "instruction": self.instruction,
            "instances": [asdict(instance) for instance in self.instances],
            "is_classification": self.is_classification,
        }


@dataclass(frozen=True)
class Considered:
    """What became of one candidate."""

    instruction: str
    """The normalized text."""
    rejected_by: str | None
    """Name of the filter, or ``rouge``; None where the candidate entered the pool."""
    similarity: float = 0.0
    """ROUGE-L F-measure to the nearest task of the pool; 0 where a filter rejected the text before."""
    nearest: str = ""
    """Instruction of that task."""
    id: str = ""
    """Of the new task, where it entered the pool."""


def packaged_tasks() -> Path:
    """The file of the package's own seed tasks, in Self-Instruct's format."""
    return Path(str(files(__package__).joinpath("seed_data", "tasks.jsonl")))


def load_tasks(seeds: str | Path | None = None) -> list[Task]:
    """Tasks from a file.

    Args:
        seeds: Self-Instruct's ``seed_tasks.jsonl``, or any file that
            :func:`~instructgym.envs.tasks.instruction.seeds.load_instructions` reads; None for the package's own seed
            tasks, 64 with one instance each.

    Raises:
        SeedFileError: for a file that cannot be used, naming the row and the field.
    """
    path = packaged_tasks() if seeds is None else Path(seeds)
    return [_task(path, where, row) for where, row in read_seed_rows(path)]


def _task(path: Path, where: str, row: Any) -> Task:
    instruction = seed_instruction(path, where, row)
    instances = row.get("instances")
    if instances is None:  # Alpaca keeps the one instance in the row itself
        instances = [row] if isinstance(row.get("output"), str) else []
    if not isinstance(instances, list):
        raise SeedFileError(f"seed file {path} {where} needs a list 'instances', it has {type(instances).__name__}")
    for instance in instances:
        if not isinstance(instance, dict) or not isinstance(instance.get("output"), str):
            raise SeedFileError(f"seed file {path} {where} has an instance without a text field 'output'")
    label = row.get("is_classification")
    if label is not None and not isinstance(label, bool):
        raise SeedFileError(f"seed file {path} {where} needs true or false as 'is_classification', got {label!r}")
    return Task(
        instruction.text,
        tuple(Instance(str(i.get("input") or ""), i["output"]) for i in instances),
        label,
        instruction.id,
        str(row.get("name") or ""),
    )


def held_out(tasks: Sequence[Task], n: int = 40) -> tuple[list[Task], list[Task]]:
    """Sets tasks aside for evaluation: those n whose instructions have the smallest SHA-1.

    The choice depends on the texts alone, not on their order.

    Returns:
        The tasks that may be demonstrated and the n that must not be, each in the order given.

    Raises:
        ValueError: if fewer than eight would be left to demonstrate.
    """
    if not 0 <= n <= len(tasks) - DEMONSTRATIONS:
        raise ValueError(
            f"cannot hold {n} of {len(tasks)} tasks out: a prompt shows {DEMONSTRATIONS}, so many must be left"
        )
    by_hash = sorted(range(len(tasks)), key=lambda i: hashlib.sha1(tasks[i].instruction.encode()).hexdigest())
    chosen = set(by_hash[:n])
    return (
        [task for i, task in enumerate(tasks) if i not in chosen],
        [task for i, task in enumerate(tasks) if i in chosen],
    )


def evaluation_split(tasks: Sequence[Task], n: int) -> tuple[list[Task], list[Task]]:
    """As :func:`held_out`, but at most a quarter: what all stages of an experiment keep apart.

    Raises:
        ValueError: likewise.
    """
    return held_out(tasks, min(n, len(tasks) // 4))


class InstructionPool:
    """Seed tasks and the machine-made ones that were accepted.

    Args:
        seeds: tasks to start from, at least eight.
        held: tasks that are never demonstrated; nothing similar to them enters the pool either.
        threshold: largest ROUGE-L to any task of the pool, seeds and held ones included.
        path: JSONL file of the machine-made tasks. What it holds is loaded (a torn last line is dropped), and every
            task that enters is appended. None keeps them in memory only.

    Raises:
        ValueError: for fewer than eight seeds, or a threshold outside (0, 1].
        InputError: for a file that holds something other than tasks.
    """

    def __init__(
        self,
        seeds: Sequence[Task],
        held: Sequence[Task] = (),
        threshold: float = 0.7,
        path: str | Path | None = None,
    ) -> None:
        if len(seeds) < DEMONSTRATIONS:
            raise ValueError(f"a prompt shows {DEMONSTRATIONS} tasks, got {len(seeds)} seeds")
        self.seeds, self.held, self.machine = list(seeds), list(held), list[Task]()
        self._known = [*self.seeds, *self.held]
        self.gate = RougeGate(threshold, [task.instruction for task in self._known])
        self.path = None if path is None else Path(path)
        if self.path is not None:
            for number, row in enumerate(read_records(self.path, repair=True), start=1):
                try:
                    self._enter(_task(self.path, f"line {number}", row))
                except SeedFileError as error:
                    raise InputError(f"{error}; the file is the pool's own, choose another") from error

    def demonstrations(self, seed: int) -> list[Task]:
        """Eight tasks in random order: two machine-made ones, or as many as there are, and seeds.

        Args:
            seed: determines the draw, together with what is in the pool.
        """
        generator = np.random.default_rng(seed)
        machine = min(MACHINE_DEMONSTRATIONS, len(self.machine))
        chosen = [self.machine[i] for i in generator.choice(len(self.machine), machine, replace=False)]
        chosen += [self.seeds[i] for i in generator.choice(len(self.seeds), DEMONSTRATIONS - machine, replace=False)]
        return [chosen[i] for i in generator.permutation(len(chosen))]

    def consider(self, text: str) -> Considered:
        """Lets a generated instruction into the pool if it passes the filters and the gate."""
        text = normalized(text)
        if reason := dropped_by(text):
            return Considered(text, reason)
        similarity, index = self.gate.nearest(text)
        nearest = self._known[index].instruction if index >= 0 else ""
        if self.gate.rejects(similarity):
            return Considered(text, "rouge", similarity, nearest)
        task = Task(text, id=f"machine_task_{len(self.machine)}")
        if self.path is not None:
            append_lines(self.path, [task.row()])
        self._enter(task)
        return Considered(text, None, similarity, nearest, task.id)

    def _enter(self, task: Task) -> None:
        self.machine.append(task)
        self._known.append(task)
        self.gate.add(task.instruction)


def instruction_prompt(style: PromptStyle, demonstrations: Sequence[Task]) -> Prompt:
    """The request to go on with a numbered list of tasks, in the form that a backend asks for.

    The few-shot form ends in the number of the first new task: read the reply with
    ``parse_numbered(reply, first=len(demonstrations) + 1, continues=True)``.
    """
    table = load_prompts(__package__, "refine_af")["instructions"]
    first = len(demonstrations) + 1
    # A colon at the end asks a small model for the input, where the next task is wanted.
    items = [f"{n}. {one_line(task.instruction).rstrip(':')}" for n, task in enumerate(demonstrations, start=1)]
    numbers = {"count": len(items), "wanted": LAST_ITEM - len(items), "first": first, "last": LAST_ITEM}
    chat = fill(table["chat"], {"tasks": "\n".join(items)} | {name: str(value) for name, value in numbers.items()})
    return build_prompt(style, chat, "\n".join([table["header"], "", *items, f"{first}."]))


def task_type_prompt() -> VerdictPrompt:
    """The question whether an instruction is a classification task; the positive answer says that it is.

    :func:`~instructgym.rewards.judges.verdict.judge_verdicts` asks it.
    """
    table = load_prompts(__package__, "refine_af")["task_type"]
    return VerdictPrompt.from_file(table, ("Instruction", "Classification"), ("instruction",))
