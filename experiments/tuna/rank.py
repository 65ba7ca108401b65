"""``instructgym tuna rank``: candidates in, ranked lists out, by likelihood, by a judge or by the references.

Tuna's probabilistic ranking takes a teacher's length-normalised log-likelihood, its contextual ranking a judge (Li et
al. 2023, arXiv 2310.13385).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import kendalltau

from ...agents.preferences.lists import FINISHED
from ...envs.tasks.instruction.data import OPENINGS, DataLayout, InstructionExample, prompt_text, request_text
from ...envs.tasks.responses.candidates import RankedList, write_ranked_lists
from ...llm_backends import Backend, BackendError, Journal, request_seed
from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ...rewards import CandidateScores, ProbabilisticRanker, Ranker, rouge_l
from ..runs.folder import accounted, chunked_rows, journaled_roles, read_json
from ..runs.options import build_judge, input_errors, parse_part
from ..runs.training import OutOfTimeError, Stage, digest, stage
from .candidates import CANDIDATES

CHUNK = 16
RANKINGS = "rankings.jsonl"
RANKED = "ranked.jsonl"


@dataclass
class TunaRank(Stage):
    """Rank the candidates of every request."""

    candidates: str = ""
    """Run folder of 'tuna candidates'."""
    ranker: str = "probabilistic"
    """probabilistic (the teacher's log-likelihood), contextual (a judge orders them all), pairwise (a judge compares
    two), ground-truth (ROUGE-L to the reference), or JSON {"id": ..., "kwargs": {...}}."""
    backend: str = "embedded"
    """The teacher or judge, as of 'tuna candidates'. A teacher is asked as the writer of the candidates was."""

    def check(self) -> None:
        super().check()
        if not self.candidates:
            raise InputError("--candidates is missing: name the run folder of 'tuna candidates'")

    def build(self, backend: Backend, layout: DataLayout = "chat") -> Ranker:
        """The ranker on a backend.

        Args:
            backend: the teacher or judge.
            layout: in which the candidates were asked for.

        Raises:
            InputError: if there is none of that id, its arguments are wrong, or the backend cannot be one.
        """
        return build_judge("ranker", self.ranker, "--ranker", backend, form="chat" if layout == "chat" else "raw")


def run(options: TunaRank, console: Console | None = None) -> dict[str, Any]:
    """Ranks, or goes on, and returns the results.

    The run folder gets ``rankings.jsonl``, what the ranker said of every request, and ``ranked.jsonl``, the lists with
    a ranking of two candidates or more.

    Raises:
        InputError: for bad input, before a model is loaded; and if there is no ranking at all.
    """
    console = console or Console()
    options.check()
    rows, layout = read_candidates(options.candidates)
    usable = [row for row in rows if len(row["candidates"]) > 1]
    if not usable:
        raise InputError(f"--candidates {options.candidates}: no request has two different candidates to rank")
    parts = {"ranker": parse_part(options.backend)}
    with input_errors():
        options.build(journaled_roles(parts, None)["ranker"], layout)
    if options.dry_run:
        console.print(f"would rank the candidates of {len(usable)} of {len(rows)} requests by {options.ranker}")
        return {}
    with stage(options, "tuna rank", console, distributed=False, candidates_digest=digest(usable)) as opened:
        if isinstance(opened, dict):
            return opened
        roles = journaled_roles(parts, Journal(opened.folder.file("journal.jsonl")))
        with accounted(roles, opened.folder.path):
            ranker = options.build(roles["ranker"], layout)

            def ranked(first: int) -> list[dict[str, Any]]:
                opened.check_time()
                asked, failed = roles["ranker"].usage.requests, roles["ranker"].usage.errors
                made = _ranked(ranker, usable[first : first + CHUNK], options.seed, layout)
                asked, failed = roles["ranker"].usage.requests - asked, roles["ranker"].usage.errors - failed
                if asked == failed > 0:  # rows that are written are not asked for again
                    raise BackendError(f"all {asked} requests failed: {made[0]['feedback']}; repeat the command")
                return made

            path = opened.folder.file(RANKINGS)
            try:
                found = chunked_rows(path, len(usable), CHUNK, ranked, "requests ranked", console)
            except OutOfTimeError:
                return opened.stopped({"requests": len(read_records(path))})
        lists = [_list(row, one) for row, one in zip(usable, found, strict=True) if one["valid"]]
        if not lists:
            raise InputError(f"the ranker ranked nothing; of the first request it says: {found[0]['feedback']}")
        tied = sum(len(set(one.scores)) == 1 for one in lists)
        if tied == len(lists):
            raise InputError(f"{options.ranker} ties all candidates of all {tied} lists: nothing could be learned")
        write_ranked_lists(opened.folder.file(RANKED), lists)
        metrics = agreement(lists)
        results = opened.folder.finish(
            metrics,
            {
                "requests": len(rows),
                "too few candidates": len(rows) - len(usable),
                "without a ranking": len(usable) - len(lists),
                "lists": len(lists),
                "candidates": sum(len(one.candidates) for one in lists),
                "all tied": tied,
                "calls": sum(one["calls"] for one in found),
                "seconds": opened.seconds,
            },
        )
        opened.tracker.summary(results)
        shown = (f"{name} {value:.3f}" for name, value in metrics.items() if value is not None)
        console.print(f"{len(lists)} of {len(rows)} requests ranked:", *shown, highlight=False)
        return results


def read_candidates(folder: str) -> tuple[list[dict[str, Any]], DataLayout]:
    """The rows of a finished run of 'tuna candidates', and the layout in which it asked.

    Raises:
        InputError: if there are none.
    """
    rows = read_records(Path(folder) / CANDIDATES)
    results, config = read_json(Path(folder) / "results.json"), read_json(Path(folder) / "config.json")
    if not rows or (results or {}).get("status") != "finished":
        raise InputError(f"--candidates {folder} holds no candidates: has 'tuna candidates' finished there?")
    return rows, ((config or {}).get("options") or {}).get("layout", "chat")


def _ranked(ranker: Ranker, rows: Sequence[Mapping[str, Any]], seed: int, layout: DataLayout) -> list[dict[str, Any]]:
    """What the ranker says of each row; rows without a ranking are asked about once more."""
    said: dict[int, CandidateScores] = {}
    calls = [0] * len(rows)
    for attempt in range(2):
        missing = [i for i in range(len(rows)) if i not in said or not said[i].valid]
        found = ranker.rank(
            [_prompt(ranker, _example(rows[i]), layout) for i in missing],
            [rows[i]["candidates"] for i in missing],
            [rows[i]["output"] or None for i in missing],
            [request_seed(seed, "rank", rows[i]["id"], attempt) for i in missing],
            attempt,
        )
        said |= dict(zip(missing, found, strict=True))
        for i in missing:
            calls[i] += said[i].calls
    return [_said(row, said[i], calls[i]) for i, row in enumerate(rows)]


def _example(row: Mapping[str, Any]) -> InstructionExample:
    return InstructionExample(row["instruction"], row["input"], row["output"], row["id"])


def _prompt(ranker: Ranker, example: InstructionExample, layout: DataLayout) -> str:
    """The request, or the text that a teacher's candidates continued."""
    if layout == "chat" or not isinstance(ranker, ProbabilisticRanker):
        return request_text(example)
    opening = OPENINGS[layout]
    return prompt_text(example, layout) + (opening if opening != " " else "")  # a raw prompt gets its blank anyway


def _said(row: Mapping[str, Any], found: CandidateScores, calls: int) -> dict[str, Any]:
    return {
        "id": row["id"],
        "valid": found.valid,
        "scores": [float(score) for score in found.scores],
        "added": list(found.added),
        "added_scores": [float(score) for score in found.added_scores],
        "calls": calls,
        "feedback": found.feedback,
    }


def _list(row: Mapping[str, Any], said: Mapping[str, Any]) -> RankedList:
    added = [text.strip() for text in said["added"]]
    return RankedList(
        row["id"],
        request_text(_example(row)),
        (*row["candidates"], *added),
        (*said["scores"], *said["added_scores"]),
        row["output"] or None,
        {
            "instruction": row["instruction"],
            "input": row["input"],
            FINISHED: [*row["finished"], *[True] * len(added)],
        },
    )


def agreement(lists: Sequence[RankedList]) -> dict[str, float | None]:
    """How a ranking goes with the references, for want of people: means over the lists that have one.

    Returns:
        ``kendall_tau``: tau-b, in [-1, 1], between scores and ROUGE-L to the reference; ``rouge_l_best``: ROUGE-L of
            the candidate ranked first; ``rouge_l_mean``: of all candidates. None without a reference.
    """
    taus, best, mean = [], [], []
    for one in lists:
        if one.reference is None:
            continue
        overlaps = [rouge_l(text, one.reference) for text in one.candidates]
        tau = kendalltau(one.scores, overlaps).statistic
        if np.isfinite(tau):
            taus.append(float(tau))
        best.append(overlaps[int(np.argmax(one.scores))])
        mean.append(float(np.mean(overlaps)))
    return {
        "kendall_tau": float(np.mean(taus)) if taus else None,
        "rouge_l_best": float(np.mean(best)) if best else None,
        "rouge_l_mean": float(np.mean(mean)) if mean else None,
    }
