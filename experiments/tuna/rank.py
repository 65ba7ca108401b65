"""``instructgym tuna rank``: ranks candidates by a teacher's likelihood, by a judge or by reference responses.

Tuna (Li et al. 2023, arXiv 2310.13385) has two rankings: the probabilistic one orders candidates by the
length-normalised log-likelihood of a teacher, the contextual one by a judge. The next step is
:mod:`~instructgym.experiments.tuna.train`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.console import Console

from ...agents.preferences.lists import FINISHED
from ...envs.tasks.instruction.data import OPENINGS, DataLayout, InstructionExample, prompt_text, request_text
from ...envs.tasks.responses.candidates import RankedList, write_ranked_lists
from ...llm_backends import Backend, BackendError, request_seed
from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ...rewards import CandidateScores, ProbabilisticRanker, Ranker, rouge_l
from ...rewards.rank_statistics import mean_kendall_tau
from ..runs.folder import journaled_roles
from ..runs.options import Required, RunOptions, build_judge, input_errors, parse_part
from ..runs.report import finished_run
from ..runs.statistics import known_mean
from ..runs.training import Run, digest, run_stage
from .candidates import CANDIDATES

CHUNK = 16
RANKINGS = "rankings.jsonl"
RANKED = "ranked.jsonl"


@dataclass
class TunaRank(RunOptions):
    """Rank the candidates of every request."""

    candidates: Annotated[str, Required("the run folder of 'tuna candidates'")] = ""
    """Run folder of 'tuna candidates'."""
    ranker: str = "probabilistic"
    """How candidates are ranked: probabilistic (log-likelihood under the teacher), contextual (a judge orders all
    candidates at once), pairwise (a judge compares two at a time), ground-truth (ROUGE-L to the reference response), or
    JSON {"id": ..., "kwargs": {...}}."""
    backend: str = "embedded"
    """Language model of the teacher or judge: embedded, transformers, openai, vllm, 'module:factory', or JSON {"id":
    ..., "kwargs": {...}}. A teacher gets the prompts in the --layout of 'tuna candidates'."""

    def build(self, backend: Backend, layout: DataLayout = "chat") -> Ranker:
        """Builds the ranker on a backend.

        Args:
            backend: language model of the teacher or judge.
            layout: prompt format in which the candidates were drawn.

        Raises:
            InputError: if no ranker has that id, its arguments are wrong, or the backend lacks what the ranker needs.
        """
        return build_judge("ranker", self.ranker, "--ranker", backend, form="chat" if layout == "chat" else "raw")


def run(options: TunaRank, console: Console | None = None) -> dict[str, Any]:
    """Ranks the candidates, or resumes an unfinished run, and returns the results.

    Writes ``rankings.jsonl``, the output of the ranker for every request, and ``ranked.jsonl``, the lists of two or
    more candidates with a valid ranking.

    Raises:
        InputError: if the input is invalid (before a model is loaded), if no request has a valid ranking, or if all
            candidates of all lists tie.
    """
    console = console or Console()
    options.check()
    rows, layout = read_candidates(options.candidates)
    usable = [row for row in rows if len(row["candidates"]) > 1]
    if not usable:
        raise InputError(f"--candidates {options.candidates}: no request has two different candidates to rank")
    parts = {"ranker": parse_part(options.backend)}
    with input_errors():  # builds the ranker once, so that wrong options fail before the run folder is opened
        options.build(journaled_roles(parts, None)["ranker"], layout)

    def work(opened: Run) -> dict[str, Any]:
        with opened.roles(parts) as roles:
            ranker = options.build(roles["ranker"], layout)

            def ranked(first: int) -> list[dict[str, Any]]:
                # Usage counts over the whole run: the differences are the requests of this chunk.
                requests, failed = roles["ranker"].usage.requests, roles["ranker"].usage.errors
                chunk_rankings = _rank_rows(ranker, usable[first : first + CHUNK], options.seed, layout)
                requests, failed = roles["ranker"].usage.requests - requests, roles["ranker"].usage.errors - failed
                if requests == failed > 0:  # a row that is written would not be ranked again
                    raise BackendError(
                        f"all {requests} requests failed: {chunk_rankings[0]['feedback']}; repeat the command"
                    )
                return chunk_rankings

            rankings = opened.rows(RANKINGS, len(usable), CHUNK, ranked, "requests ranked")
        lists = [_ranked_list(row, item) for row, item in zip(usable, rankings, strict=True) if item["valid"]]
        if not lists:
            raise InputError(f"no request got a valid ranking; feedback on the first: {rankings[0]['feedback']}")
        tied = sum(len(set(item.scores)) == 1 for item in lists)
        if tied == len(lists):
            raise InputError(f"{options.ranker} ties all candidates of all {tied} lists: nothing could be learned")
        write_ranked_lists(opened.folder.file(RANKED), lists)
        metrics = agreement(lists)
        console.print(f"{len(lists)} of {len(rows)} requests ranked", highlight=False)
        opened.show(metrics)
        return opened.finish(
            metrics,
            {
                "requests": len(rows),
                "too few candidates": len(rows) - len(usable),
                "without a ranking": len(usable) - len(lists),
                "lists": len(lists),
                "candidates": sum(len(item.candidates) for item in lists),
                "all tied": tied,
                "calls": sum(item["calls"] for item in rankings),
            },
        )

    plan, stored = f"rank candidates of {len(usable)} requests by {options.ranker}", digest(usable)
    return run_stage(options, "tuna rank", console, work, distributed=False, plan=plan, candidates_digest=stored)


def read_candidates(folder: str) -> tuple[list[dict[str, Any]], DataLayout]:
    """Returns the rows of a finished run of 'tuna candidates' and the layout of its prompts.

    Raises:
        InputError: if the folder holds no rows, or the run has not finished.
    """
    rows = read_records(Path(folder) / CANDIDATES)
    run = finished_run(Path(folder))
    if not rows or run is None:
        raise InputError(f"--candidates {folder} holds no candidates: has 'tuna candidates' finished there?")
    return rows, run.options["layout"]


def _rank_rows(
    ranker: Ranker, rows: Sequence[Mapping[str, Any]], seed: int, layout: DataLayout
) -> list[dict[str, Any]]:
    """Returns the row of ``rankings.jsonl`` of each request; those without a valid ranking are ranked a second time."""
    results: dict[int, CandidateScores] = {}
    calls = [0] * len(rows)
    for attempt in range(2):
        missing = [i for i in range(len(rows)) if i not in results or not results[i].valid]
        ranked = ranker.rank(
            [_prompt(ranker, _example(rows[i]), layout) for i in missing],
            [rows[i]["candidates"] for i in missing],
            [rows[i]["output"] or None for i in missing],
            [request_seed(seed, "rank", rows[i]["id"], attempt) for i in missing],
            attempt,
        )
        for i, result in zip(missing, ranked, strict=True):
            results[i], calls[i] = result, calls[i] + result.calls
    return [
        {
            "id": row["id"],
            "valid": results[i].valid,
            "scores": results[i].scores.tolist(),
            "added": list(results[i].added),
            "added_scores": results[i].added_scores.tolist(),
            "calls": calls[i],
            "feedback": results[i].feedback,
        }
        for i, row in enumerate(rows)
    ]


def _example(row: Mapping[str, Any]) -> InstructionExample:
    return InstructionExample(row["instruction"], row["input"], row["output"], row["id"])


def _prompt(ranker: Ranker, example: InstructionExample, layout: DataLayout) -> str:
    """Returns the request or, for a teacher outside the layout ``chat``, the text that the candidates continue."""
    if layout == "chat" or not isinstance(ranker, ProbabilisticRanker):
        return request_text(example)
    # The ranker puts the blank before each candidate itself.
    return prompt_text(example, layout) + OPENINGS[layout].strip(" ")


def _ranked_list(row: Mapping[str, Any], ranking: Mapping[str, Any]) -> RankedList:
    """Returns the ranked list of a row of candidates and its ranking, with the candidates that the ranker added."""
    added = [text.strip() for text in ranking["added"]]
    finished = [*row["finished"], *[True] * len(added)]
    return RankedList(
        row["id"],
        request_text(_example(row)),
        (*row["candidates"], *added),
        (*ranking["scores"], *ranking["added_scores"]),
        row["output"] or None,
        {"instruction": row["instruction"], "input": row["input"], FINISHED: finished},
    )


def agreement(lists: Sequence[RankedList]) -> dict[str, float | None]:
    """Returns the agreement of rankings with reference responses, as means over the lists that have a reference.

    The references take the place of human rankings.

    Returns:
        ``kendall_tau``: Kendall's tau-b, in [-1, 1], between scores and ROUGE-L to the reference; ``rouge_l_best``:
            ROUGE-L of the candidate that is ranked first; ``rouge_l_mean``: mean ROUGE-L of all candidates. A value is
            None if no list has a reference.
    """
    compared = [
        (ranked.scores, [rouge_l(text, ranked.reference) for text in ranked.candidates])
        for ranked in lists
        if ranked.reference is not None
    ]
    return {
        "kendall_tau": mean_kendall_tau(compared),
        "rouge_l_best": known_mean(overlaps[int(np.argmax(scores))] for scores, overlaps in compared),
        "rouge_l_mean": known_mean(float(np.mean(overlaps)) for _, overlaps in compared),
    }
