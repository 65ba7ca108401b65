"""Prompts whose response is one instance of an instruction: an input, or none, and the output for it.

The prompt ends with the name of the first field (its *opening*), so that a model only has to continue. For
classification tasks the label comes first, as in REFINE-AF (Roy et al., arXiv 2505.06548) and Self-Instruct (arXiv
2212.10560).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ....llm_backends import Tokenizer
from ....llm_backends.errors import InputError, check_known
from ....llm_backends.prompting import fill, load_prompts, one_line
from ....rewards.quality.instance_format import FIELDS, Instance, Order, parse_instance_or_reason
from ...tokens.episode import PromptExample
from ..responses.openings import check_layout
from .instances import order_for
from .pool import Task, load_tasks
from .seeds import SPLITS, in_split, limited, read_seed_rows

Layout = Literal["plain", "chat"]
"""``plain``: a few solved tasks and one to continue; ``chat``: a request in the tokenizer's chat template, followed by
the opening of its answer."""

OWN = "instructions"
"""Name of the package's own seed tasks as data."""
STOPS = ("\n\n", "\nTask:", "\nExample", "\nClass label:")
"""Stop strings of an instance: a blank line, or the beginning of another instance."""


def instance_prompts(
    data: str | Path = OWN,
    split: str | None = "train",
    limit: int | None = None,
    layout: Layout = "plain",
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> list[PromptExample]:
    """Builds one prompt per instruction, each for one instance.

    Args:
        data: ``"instructions"``, the package's own, or a file with ``instruction`` and optionally
            ``is_classification`` (true: the label comes first) and ``id``: the ``instructions.jsonl`` of ``refine-af
            bootstrap``, or any file that :func:`~instructgym.envs.tasks.instruction.pool.load_tasks` reads.
        split: ``"train"``, ``"validation"`` or ``"test"``, 80 / 10 / 10 % by a hash of the instruction, for the
            package's instructions and for a file; None: all.
        limit: number of instructions to draw at random; those of a smaller limit are a subset of those of a larger
            one. None: all, in file order.
        layout: ``"plain"`` or ``"chat"``.
        seed: seed of that draw.
        tokenizer: the tokenizer whose chat template the layout ``"chat"`` uses; None for the layout ``"plain"``.

    Returns:
        One example per instruction. ``metadata`` has ``task`` (``instructions`` or the file's name), ``instruction``,
        ``order`` (``input_first`` or ``output_first``) and ``opening``, the field that the prompt ends with.

    Raises:
        InputError: if the split or layout is unknown, the limit is below 1, the split has no rows, the file cannot be
            used, an id or an instruction occurs twice, or the tokenizer has no chat template.
    """
    check_layout(layout, tokenizer)
    if split is not None:
        check_known("split", split, SPLITS)
    name, tasks = _tasks(data)
    selected = [task for task in tasks if split is None or in_split(task.instruction, split)]
    if not selected:
        raise InputError(f"none of the {len(tasks)} instructions of {data} falls into the split {split!r}: add some")
    selected = limited(selected, limit, seed)
    return [_example(task, name, tokenizer if layout == "chat" else None) for task in selected]


def read_response(response: str, metadata: Mapping[str, Any]) -> Instance | str:
    """Parses the response to a prompt of :func:`instance_prompts`.

    Args:
        response: the text of the response.
        metadata: the metadata of its example, and the ``finish_reason`` of the episode.

    Returns:
        The instance, or the name of the defect: ``cut`` if the response ended at the token limit, else one of
        :func:`~instructgym.rewards.quality.instance_format.parse_instance_or_reason`.
    """
    if metadata["finish_reason"] == "length":
        return "cut"
    return parse_instance_or_reason(metadata["opening"] + response, metadata["order"], metadata["instruction"])


def _tasks(data: str | Path) -> tuple[str, list[Task]]:
    """Returns the name of the data and its tasks, with distinct ids and instructions."""
    if data == OWN:
        return OWN, load_tasks()
    path = Path(data)
    if not path.suffix and not path.exists():
        raise InputError(f"unknown data {str(data)!r}: use {OWN!r} or a file of instructions")
    tasks = load_tasks(path)
    # Without a known type of task, the order of the fields is unknown.
    untyped = {str(row["instruction"]).strip() for _, row in read_seed_rows(path) if row.get("task_type_error")}
    tasks = [task for task in tasks if task.instruction.strip() not in untyped]
    for field, values in (("id", [t.id for t in tasks]), ("instruction", [t.instruction for t in tasks])):
        value, times = Counter(values).most_common(1)[0]
        if times > 1:
            raise InputError(f"{path} has the {field} {value[:60]!r} {times} times: delete all rows but one")
    return path.stem, tasks


def _example(task: Task, name: str, tokenizer: Tokenizer | None) -> PromptExample:
    order = order_for(bool(task.is_classification))
    opening = _line(FIELDS[order][0], "").rstrip()
    if tokenizer is None:
        prompt = few_shot_prompt(task.instruction, order)
    else:
        request = fill(_table(order)["chat"], {"instruction": task.instruction}).strip()
        prompt = tokenizer.chat_text([{"role": "user", "content": request}]) + opening
    metadata = {"task": name, "instruction": task.instruction, "order": order, "opening": opening}
    return PromptExample(f"{name}/{task.id}", prompt, metadata=metadata, markup=tokenizer is not None)


def few_shot_prompt(instruction: str, order: Order) -> str:
    """Returns the completion form: solved tasks, and the instruction, which ends with the name of its first field."""
    table = _table(order)
    shots = [[f"Task: {shot['instruction']}", *_fields(shot, order)] for shot in table["tasks"]]
    query = [f"Task: {one_line(instruction)}", _line(FIELDS[order][0], "").rstrip()]
    return "\n\n".join([table["header"], *("\n".join(lines) for lines in [*shots, query])])


def _fields(shot: Mapping[str, str], order: Order) -> Sequence[str]:
    # A class label is the output of its row.
    return [_line(name, shot["input" if name == "input" else "output"]) for name in FIELDS[order]]


def _line(name: str, value: str) -> str:
    return f"{name.capitalize()}: {value}"


def _table(order: Order) -> Mapping[str, Any]:
    table: Mapping[str, Any] = load_prompts(__package__, "refine_af")["instance"][order]
    return table
