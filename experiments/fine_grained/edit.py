"""``instructgym fine-grained edit``: ranks pairs of responses by an annotator and edits the worse ones minimally."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console

from ...agents.policy.language_model import LanguageModelPolicy
from ...envs.tasks.responses.editors import EditBounds, Editor, EditRequest, edit_responses
from ...envs.tokens.episode import PromptExample
from ...llm_backends import Backend, Journal, Journaled, request_seed, resolve
from ...llm_backends.errors import InputError
from ...llm_backends.local.tokenization import Tokenizer
from ...rewards import Reward
from ...rewards.learned.edits import EditedPair, edit_statistics, write_pairs
from ..runs.folder import RunFolder, accounted, chunked_rows
from ..runs.options import input_errors, parse_part, parse_reward
from ..runs.training import Run, tokenizer_of
from .common import PolicyOptions, check_lengths, load_stage_policy

CHUNK = 64


@dataclass
class EditOptions:
    """Options of the annotator and the editor, which the stage and the study share."""

    annotator: str = "vader"
    """Reward that decides which response is better, and whether an edit is an improvement: an id, or a weighted sum
    such as 'vader + 0.5*diversity'."""
    editor: str = "sentiment-swaps"
    """Editor of the worse responses: sentiment-swaps (a rule that swaps words), llm, 'module:factory', or JSON {"id":
    ..., "kwargs": {...}}."""
    backend: str = "embedded"
    """Language model of the editor llm: embedded, transformers, openai, vllm, 'module:factory', or JSON {"id": ...,
    "kwargs": {...}}."""
    max_changed: float = 0.4
    """Largest share of words that a minimal edit may change."""


@dataclass
class FineGrainedEdit(EditOptions, PolicyOptions):
    """Sample responses, rank them by an annotator, and edit the worse ones minimally."""

    limit: int = 1500
    """Maximum number of prompts; two responses are sampled for each. 0: all prompts of this stage's share."""


@dataclass(frozen=True)
class EditParts:
    """The annotator, the editor with its language model, and the bounds of a minimal edit."""

    annotator: Reward
    editor: Editor
    backend: Backend
    bounds: EditBounds

    @classmethod
    def of(cls, options: EditOptions) -> EditParts:
        """Builds the parts that the options describe.

        Raises:
            InputError: if a part is unknown or a value out of range.
        """
        with input_errors():
            backend = resolve("backend", parse_part(options.backend))
            return cls(
                resolve("reward", parse_reward(options.annotator)),
                resolve("editor", parse_part(options.editor), backend=backend),
                backend,
                EditBounds(max_changed=options.max_changed),
            )


def run(options: FineGrainedEdit, console: Console | None = None) -> dict[str, Any]:
    """Generates the pairs, or resumes an unfinished run, and returns the results.

    Writes ``preferences.jsonl`` (the better response as the edit of the worse one) and ``edits.jsonl`` to the run
    folder.

    Raises:
        InputError: if the input is invalid, before a model is loaded.
    """
    console = console or Console()
    options.check()
    folder, model = options.start()
    examples = options.prompts("preferences", model, options.limit)
    check_lengths(options, examples, tokenizer_of(model))
    parts = EditParts.of(options)

    def work(opened: Run) -> dict[str, Any]:
        backend = Journaled(parts.backend, Journal(opened.folder.file("journal.jsonl")))
        # Rebuild the editor on the journal, which keeps the replies of the language model.
        journaled = replace(parts, editor=resolve("editor", parse_part(options.editor), backend=backend))
        policy = load_stage_policy(options, folder)
        with accounted({"editor": backend}, opened.folder.path):
            rows = chunked_rows(
                opened.folder.file("responses.jsonl"),
                len(examples),
                CHUNK,
                lambda start: _chunk(options, policy, examples[start : start + CHUNK], start, journaled),
                "responses ranked and edited",
                console,
            )
        return _finish(opened.folder, rows, policy.tokenizer, opened.seconds)

    plan = f"sample 2 responses to each of {len(examples)} prompts"
    return options.run("fine-grained edit", console, plan, work, distributed=False)


def _chunk(
    options: FineGrainedEdit,
    policy: LanguageModelPolicy,
    examples: Sequence[PromptExample],
    start: int,
    parts: EditParts,
) -> list[dict[str, Any]]:
    """Samples and ranks two responses to each prompt of a chunk, edits the worse one and returns a row per prompt."""
    # The seed depends on the position of the chunk: a resumed run draws the same responses.
    seed = request_seed(options.seed, "pairs", start)
    responses = [options.sample(policy, examples, request_seed(seed, k), parts.annotator) for k in range(2)]
    rows: list[dict[str, Any]] = []
    for example, *pair in zip(examples, *responses, strict=True):
        # A stable sort: of equal rewards, the first sample is `worse`. Such pairs are edited, but are no preferences.
        worse, better = sorted(pair, key=lambda response: response.reward)
        ranked = worse.valid and better.valid
        rows.append(
            {
                "id": example.id,
                "prompt": example.prompt,
                "worse": worse.text,
                "better": better.text,
                "scores": [worse.reward, better.reward] if ranked else None,
                "finished": [sampled.finish_reason != "length" for sampled in (worse, better)],
                "edited": None,
            }
        )
    requests = [
        EditRequest(
            row["prompt"], row["worse"], row["id"], request_seed(seed, "edit", i), row["better"], row["finished"][0]
        )
        for i, row in enumerate(rows)
        if row["scores"] is not None
    ]
    outcome = edit_responses(parts.editor, requests, parts.bounds, parts.annotator)
    edited = {pair.id: pair.edited for pair in outcome.pairs}
    for row in rows:
        row["edited"] = edited.get(row["id"])
    rows[0]["dropped"] = dict(outcome.dropped)  # counts of the whole chunk, stored in its first row
    return rows


def _finish(folder: RunFolder, rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, seconds: float) -> dict[str, Any]:
    """Writes both kinds of pairs and the results; raises an InputError if there is no edit."""
    preferences, edits, dropped = [], [], Counter[str]()
    for row in rows:
        dropped.update({f"edit: {reason}": count for reason, count in row.get("dropped", {}).items()})
        finished = row["finished"]
        if row["edited"] is not None:
            edits.append(EditedPair(row["prompt"], row["worse"], row["edited"], row["id"], finished[0]))
        if row["scores"] is None:
            dropped["no verdict of the annotator"] += 1
        elif row["scores"][0] == row["scores"][1]:
            dropped["preference: equal scores"] += 1
        elif finished[0] != finished[1]:  # else the reward model would learn the token limit
            dropped["preference: only one was finished"] += 1
        else:
            preferences.append(EditedPair(row["prompt"], row["worse"], row["better"], row["id"], finished[0]))
    if not edits:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.most_common())
        raise InputError(f"none of {len(rows)} responses was edited: {reasons}; take another --editor or more prompts")
    write_pairs(folder.file("preferences.jsonl"), preferences)
    write_pairs(folder.file("edits.jsonl"), edits)
    return folder.finish(
        {f"edits/{name}": value for name, value in edit_statistics(edits, tokenizer).items()}
        | {"annotator_mean": float(np.mean([row["scores"] for row in rows if row["scores"] is not None]))},
        {
            "prompts": len(rows),
            "preferences": len(preferences),
            "edits": len(edits),
            "dropped": dict(dropped),
            "seconds": seconds,
        },
    )
