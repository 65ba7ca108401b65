"""``instructgym fine-grained edit``: ranks pairs of responses by an annotator and edits the worse ones minimally."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console

from ...agents.policy.language_model import LanguageModelPolicy
from ...envs.tasks.responses.editors import EditBounds, Editor, EditRequest, edit_responses
from ...envs.tokens.episode import PromptExample
from ...llm_backends import Backend, request_seed, resolve
from ...llm_backends.errors import InputError
from ...rewards import Reward
from ...rewards.learned.edits import EditedPair, edit_statistics, write_pairs
from ..runs.options import input_errors, parse_part, parse_reward
from ..runs.responses import check_prompts
from ..runs.training import Run, run_stage, tokenizer_of
from .common import ENV_ID, PolicyOptions

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
    """The annotator, the editor, and the bounds of a minimal edit."""

    annotator: Reward
    editor: Editor
    bounds: EditBounds

    @classmethod
    def of(cls, options: EditOptions, backend: Backend | None = None) -> EditParts:
        """Builds the parts that the options describe.

        Args:
            options: the options.
            backend: language model of the editor; None: the one that the options describe.

        Raises:
            InputError: if a part is unknown or a value out of range.
        """
        with input_errors():
            backend = resolve("backend", backend or parse_part(options.backend))
            return cls(
                resolve("reward", parse_reward(options.annotator)),
                resolve("editor", parse_part(options.editor), backend=backend),
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
    check_prompts(ENV_ID, examples, tokenizer_of(model), **options.env_options())
    EditParts.of(options)  # wrong parts are found before the folder is opened

    def work(opened: Run) -> dict[str, Any]:
        policy = options.load(folder)
        with opened.roles({"editor": parse_part(options.backend)}) as roles:
            parts = EditParts.of(options, roles["editor"])
            rows = opened.rows(
                "responses.jsonl",
                len(examples),
                CHUNK,
                lambda start: _chunk(options, policy, examples[start : start + CHUNK], start, parts),
                "responses ranked and edited",
            )
        preferences, edits, dropped = _pairs(rows)
        if not edits:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.most_common())
            raise InputError(
                f"none of {len(rows)} responses was edited: {reasons}; take another --editor or more prompts"
            )
        write_pairs(opened.folder.file("preferences.jsonl"), preferences)
        write_pairs(opened.folder.file("edits.jsonl"), edits)
        metrics = {f"edits/{name}": value for name, value in edit_statistics(edits, policy.tokenizer).items()}
        metrics["annotator_mean"] = float(np.mean([row["scores"] for row in rows if row["scores"] is not None]))
        counts = {"prompts": len(rows), "preferences": len(preferences), "edits": len(edits), "dropped": dict(dropped)}
        return opened.finish(metrics, counts)

    plan = f"sample 2 responses to each of {len(examples)} prompts"
    return run_stage(options, "fine-grained edit", console, work, distributed=False, plan=plan)


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
    requests = []
    for i, (example, *pair) in enumerate(zip(examples, *responses, strict=True)):
        # A stable sort: of equal rewards, the first sample is `worse`. Such pairs are edited, but are no preferences.
        worse, better = sorted(pair, key=lambda response: response.reward)
        ranked = worse.valid and better.valid
        finished = [sampled.finish_reason != "length" for sampled in (worse, better)]
        rows.append(
            {
                "id": example.id,
                "prompt": example.prompt,
                "worse": worse.text,
                "better": better.text,
                "scores": [worse.reward, better.reward] if ranked else None,
                "finished": finished,
            }
            | ({"markup": True} if example.markup else {})
        )
        if ranked:
            edit_seed = request_seed(seed, "edit", i)
            requests.append(
                EditRequest(example.prompt, worse.text, example.id, edit_seed, better.text, finished[0], example.markup)
            )
    outcome = edit_responses(parts.editor, requests, parts.bounds, parts.annotator)
    edited = {pair.id: pair.edited for pair in outcome.pairs}
    for row in rows:
        row["edited"] = edited.get(row["id"])
    rows[0]["dropped"] = dict(outcome.dropped)  # counts of the whole chunk, stored in its first row
    return rows


def _pairs(rows: Sequence[dict[str, Any]]) -> tuple[list[EditedPair], list[EditedPair], Counter[str]]:
    """Returns the preferences and the edits of the rows, and the number of those that were dropped by reason."""
    preferences, edits, dropped = [], [], Counter[str]()
    for row in rows:
        dropped.update({f"edit: {reason}": count for reason, count in row.get("dropped", {}).items()})
        finished = row["finished"]
        markup = row.get("markup", False)
        pair = partial(EditedPair, row["prompt"], row["worse"], id=row["id"], finished=finished[0], markup=markup)
        if row["edited"] is not None:
            edits.append(pair(row["edited"]))
        if row["scores"] is None:
            dropped["no verdict of the annotator"] += 1
        elif row["scores"][0] == row["scores"][1]:
            dropped["preference: equal scores"] += 1
        elif finished[0] != finished[1]:  # else the reward model would learn the token limit
            dropped["preference: only one was finished"] += 1
        else:
            preferences.append(pair(row["better"]))
    return preferences, edits, dropped
