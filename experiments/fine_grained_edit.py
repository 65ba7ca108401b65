"""``instructgym fine-grained edit``: pairs of responses ranked by an annotator, and minimal edits of the worse ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from ..agents.callbacks import StepProgress
from ..agents.checkpoints import read_state
from ..agents.language_model import SETTINGS, LanguageModelPolicy
from ..envs.tasks.editing import EditBounds, Editor, EditRequest, edit_responses
from ..envs.tasks.prompt_examples import PromptExample
from ..llm_backends import Journal, Journaled, request_seed, resolve
from ..llm_backends.errors import InputError
from ..llm_backends.records import append_lines, read_records
from ..llm_backends.tokenization import Tokenizer
from ..rewards import Reward
from ..rewards.edits import EditedPair, edit_statistics, write_pairs
from .fine_grained import ENV_ID, StageOptions, load_policy, policy_folder, stage
from .options import input_errors, parse_part, parse_reward
from .responses import respond
from .resumption import accounted
from .run_folder import RunFolder

CHUNK = 64


@dataclass
class FineGrainedEdit(StageOptions):
    """Sample responses, rank them by an annotator, and edit the worse ones minimally."""

    policy: str = ""
    """Run folder of the policy whose responses are edited: that of 'fine-grained sft'."""
    limit: int = 1500
    """Prompts at most; 0 for all of this stage's share. Two responses are sampled for each."""
    annotator: str = "vader"
    """Who says which response is better, and whether an edit is an improvement: a reward, as of 'evolve train'."""
    editor: str = "sentiment-swaps"
    """Who edits: sentiment-swaps (a rule that swaps words), llm, 'module:factory', or JSON {"id": ..., "kwargs":
    {...}}."""
    backend: str = "embedded"
    """The LLM of the editor llm, written likewise."""
    max_changed: float = 0.4
    """Share of words that a minimal edit may change."""


def run(options: FineGrainedEdit, console: Console | None = None) -> dict[str, Any]:
    """Makes the pairs (or goes on making them) and returns the counts.

    The run folder gets ``preferences.jsonl`` (the better response as the edit of the worse one) and ``edits.jsonl``.

    Raises:
        InputError: for bad input, before a model is loaded.
    """
    console = console or Console()
    options.check()
    folder = policy_folder(options.policy, "--policy")
    examples = options.prompts("preferences", read_state(folder / SETTINGS)["model"], options.limit)
    bounds = EditBounds(max_changed=options.max_changed)
    with input_errors():
        annotator = resolve("reward", parse_reward(options.annotator))
    if options.dry_run:
        console.print(f"would sample 2 responses to each of {len(examples)} prompts, in {options.run_dir}")
        return {}
    with stage(options, "edit", console) as opened:
        if isinstance(opened, dict):
            return opened
        journal = Journal(opened.folder.file("journal.jsonl"))
        with input_errors():
            backend = Journaled(resolve("backend", parse_part(options.backend)), journal)
            editor = resolve("editor", parse_part(options.editor), backend=backend)
        policy = load_policy(options, folder)
        with accounted({"editor": backend}, opened.folder.path):
            rows = _rows(options, opened.folder, policy, examples, annotator, editor, bounds, console)
        return _finish(opened.folder, rows, policy.tokenizer, opened.seconds)


def _rows(
    options: FineGrainedEdit,
    folder: RunFolder,
    policy: LanguageModelPolicy,
    examples: Sequence[PromptExample],
    annotator: Reward,
    editor: Editor,
    bounds: EditBounds,
    console: Console,
) -> list[dict[str, Any]]:
    """A row per prompt; those of finished chunks are read, not made again."""
    path = folder.file("responses.jsonl")
    rows = read_records(path, repair=True)
    done = len(rows) // CHUNK * CHUNK if len(rows) < len(examples) else len(rows)
    if done < len(rows):  # a chunk is appended at once, but its end may have been cut off
        path.write_text("")
        append_lines(path, rows[:done])
        rows = rows[:done]
    with StepProgress("responses ranked and edited", len(examples), console) as progress:
        for start in range(done, len(examples), CHUNK):
            made = _chunk(options, policy, examples[start : start + CHUNK], start, annotator, editor, bounds)
            append_lines(path, made)
            rows += made
            progress.update(len(rows), f"{sum(row['edited'] is not None for row in rows)} edits")
    return rows


def _chunk(
    options: FineGrainedEdit,
    policy: LanguageModelPolicy,
    examples: Sequence[PromptExample],
    start: int,
    annotator: Reward,
    editor: Editor,
    bounds: EditBounds,
) -> list[dict[str, Any]]:
    seed = request_seed(options.seed, "pairs", start)
    drawn = [
        respond(
            policy,
            ENV_ID,
            examples,
            options.temperature,
            request_seed(seed, k),
            reward=annotator,
            **options.env_options(),
        )
        for k in range(2)
    ]
    rows: list[dict[str, Any]] = []
    for example, *pair in zip(examples, *drawn, strict=True):
        worse, better = sorted(pair, key=lambda response: response.reward)
        rows.append(
            {
                "id": example.id,
                "prompt": example.prompt,
                "worse": worse.text,
                "better": better.text,
                "scores": [worse.reward, better.reward],
                "finished": [one.finish_reason != "length" for one in (worse, better)],
                "edited": None,
            }
        )
    requests = [
        EditRequest(
            row["prompt"], row["worse"], row["id"], request_seed(seed, "edit", i), row["better"], row["finished"][0]
        )
        for i, row in enumerate(rows)
    ]
    outcome = edit_responses(editor, requests, bounds, annotator)
    edited = {pair.id: pair.edited for pair in outcome.pairs}
    for row in rows:
        row["edited"] = edited.get(row["id"])
    rows[0]["dropped"] = dict(outcome.dropped)  # of the chunk
    return rows


def _finish(folder: RunFolder, rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, seconds: float) -> dict[str, Any]:
    """Writes both kinds of pairs and the results."""
    preferences, edits, dropped = [], [], Counter[str]()
    for row in rows:
        dropped.update({f"edit: {reason}": count for reason, count in row.get("dropped", {}).items()})
        finished = row["finished"]
        if row["edited"] is not None:
            edits.append(EditedPair(row["prompt"], row["worse"], row["edited"], row["id"], finished[0]))
        if row["scores"][0] == row["scores"][1]:
            dropped["preference: equal scores"] += 1
        elif finished[0] != finished[1]:  # else the reward model would learn of the token limit
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
        | {"annotator_mean": float(np.mean([row["scores"] for row in rows]))},
        {
            "prompts": len(rows),
            "preferences": len(preferences),
            "edits": len(edits),
            "dropped": dict(dropped),
            "seconds": seconds,
        },
    )
