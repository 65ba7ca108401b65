"""``instructgym tuna candidates``: several different responses to each request, by a language model or a policy.

The first step of both of Tuna's stages (Li et al. 2023, arXiv 2310.13385): a teacher's responses for the probabilistic
ranking, the model's own for the contextual one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from ...agents.policy.checkpoints import policy_from
from ...agents.policy.language_model import PolicyBackend
from ...envs.tasks.instruction.data import InstructionExample, prompt_text, read_instruction_data, request_text
from ...envs.tasks.responses.candidates import Candidates, DiverseSampling, sample_candidates
from ...llm_backends import Backend, BackendError, ContextLengthError, Journal, Prompt
from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ..runs.folder import RunFolder, accounted, chunked_rows, journaled_roles
from ..runs.options import check_counts, input_errors, parse_part
from ..runs.training import OutOfTimeError, Stage, digest, policy_folder, stage, weights_digest

CHUNK = 16
"""Requests that are answered together: a chunk is kept whole or made again."""
CANDIDATES = "candidates.jsonl"


@dataclass
class TunaCandidates(Stage):
    """Draw several different responses to every request of a data set."""

    data: str = ""
    """Requests with their references: JSONL, JSON or Parquet with instruction, input and output."""
    backend: str = "embedded"
    """Who responds: embedded, transformers, openai, vllm, 'module:factory', or JSON {"id": ..., "kwargs": {...}}."""
    policy: str = ""
    """Run folder of a trained policy that responds in place of --backend."""
    layout: Literal["chat", "plain", "alpaca"] = "chat"
    """How a request is written: as a user's message, as a text to continue, or as Stanford Alpaca did."""
    n: int = 4
    """Responses per request."""
    temperature: float = 1.0
    """Of the first try."""
    step: float = 0.1
    """By how much the temperature rises from try to try."""
    tries: int = 3
    """At most; all responses to a request are drawn again until they differ enough."""
    threshold: float = 0.8
    """They do when the ROUGE-L of every two of them is below this."""
    top_p: float = 1.0
    """Nucleus; 1 is none."""
    max_tokens: int = 128
    """Tokens of a response at most."""
    limit: int = 0
    """Take only the first so many requests. 0: all."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of a --policy; auto: bfloat16 where the hardware computes in it."""

    def check(self) -> None:
        super().check()
        check_counts(self, "max_tokens")
        if not self.data:
            raise InputError("--data is missing: name a data set of requests (JSONL, JSON or Parquet)")
        if self.policy and self.backend != "embedded":
            raise InputError("--policy and --backend exclude each other: one of them responds")
        _ = self.sampling

    @property
    def sampling(self) -> DiverseSampling:
        """How responses are drawn.

        Raises:
            InputError: for a value out of range.
        """
        return DiverseSampling(
            self.n, self.temperature, self.step, self.tries, self.threshold, self.max_tokens, self.top_p
        )


def run(options: TunaCandidates, console: Console | None = None) -> dict[str, Any]:
    """Draws, or goes on, and returns the results. The run folder gets ``candidates.jsonl``, one row per request.

    Raises:
        InputError: for bad input, before a model is loaded; and if no request got a response.
    """
    console = console or Console()
    options.check()
    start = policy_folder(options.policy, "--policy") if options.policy else None
    examples = read_instruction_data(options.data, "--data").examples[: options.limit or None]
    with input_errors():
        journaled_roles({"writer": parse_part(options.backend)}, None)
    if options.dry_run:
        who = options.policy or options.backend
        console.print(f"would draw {options.n} responses to each of {len(examples)} requests by {who}")
        return {}
    identity = {"requests": digest([example.row() for example in examples])}
    identity |= {"weights": weights_digest(start)} if start is not None else {}
    with stage(options, "tuna candidates", console, distributed=False, **identity) as opened:
        if isinstance(opened, dict):
            return opened
        with _writer(options, start, opened.folder) as writer:

            def rows(first: int) -> list[dict[str, Any]]:
                opened.check_time()
                chunk = examples[first : first + CHUNK]
                prompts = [_prompt(example, options.layout) for example in chunk]
                numbers = range(first, first + len(chunk))
                drawn = sample_candidates(writer, prompts, options.sampling, options.seed, numbers)
                _refuse_outage(drawn)
                return [_row(example, one) for example, one in zip(chunk, drawn, strict=True)]

            path = opened.folder.file(CANDIDATES)
            try:
                found = chunked_rows(path, len(examples), CHUNK, rows, "responses drawn", console)
            except OutOfTimeError:
                return opened.stopped({"requests": len(read_records(path))})
        results = _finish(opened.folder, found, opened.seconds, console)
        opened.tracker.summary(results)
        return results


def _refuse_outage(drawn: Sequence[Candidates]) -> None:
    """Stops before a chunk of nothing but failures is written, which could not be mended by a repetition.

    Raises:
        BackendError: if every request of a chunk failed, other than by its length.
    """
    errors = [one.errors[-1] for one in drawn if not one.texts and one.errors]
    outages = [error for error in errors if not isinstance(error, ContextLengthError)]
    if len(errors) == len(drawn) and outages:
        raise BackendError(f"all of {len(drawn)} requests failed: {outages[0]}; repeat the command to ask again")


def _finish(folder: RunFolder, rows: Sequence[Mapping[str, Any]], seconds: float, console: Console) -> dict[str, Any]:
    written = [row for row in rows if row["candidates"]]
    if not written:
        raise InputError(f"no request got a response: {rows[0]['error'] or 'all of them are blank'}")
    several = sum(len(row["candidates"]) > 1 for row in rows)
    metrics = {
        "tries": float(np.mean([row["tries"] for row in written])),
        "max_rouge": float(np.mean([row["max_rouge"] for row in written])),
        "finished": float(np.mean([flag for row in written for flag in row["finished"]])),
        "words": float(np.mean([len(text.split()) for row in written for text in row["candidates"]])),
    }
    counts = {
        "requests": len(rows),
        "candidates": sum(len(row["candidates"]) for row in rows),
        "with several": several,
        "failed": len(rows) - len(written),
        "seconds": seconds,
    }
    console.print(f"{several} of {len(rows)} requests have several different responses", highlight=False)
    return folder.finish(metrics, counts)


@contextmanager
def _writer(options: TunaCandidates, start: Path | None, folder: RunFolder) -> Iterator[Backend]:
    """Who responds. A backend's replies are kept in the journal: none is paid for twice."""
    if start is not None:
        yield PolicyBackend(policy_from(start, dtype=options.dtype), weights_digest(start))
        return
    roles = journaled_roles({"writer": parse_part(options.backend)}, Journal(folder.file("journal.jsonl")))
    with accounted(roles, folder.path):
        yield roles["writer"]


def _prompt(example: InstructionExample, layout: Any) -> Prompt:
    if layout == "chat":
        return [{"role": "user", "content": request_text(example)}]
    return prompt_text(example, layout)


def _row(example: InstructionExample, drawn: Candidates) -> dict[str, Any]:
    return example.row() | {
        "candidates": [text.strip() for text in drawn.distinct],
        "finished": [drawn.finished[number] for number in drawn.chosen],
        "temperature": drawn.temperature,
        "tries": drawn.tries,
        "max_rouge": drawn.max_rouge,
        "error": str(drawn.errors[-1]) if drawn.errors else "",
    }
