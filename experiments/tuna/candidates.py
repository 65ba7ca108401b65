"""``instructgym tuna candidates``: draws several different responses to each request from a model or a policy.

This is the first step of both stages of Tuna (Li et al. 2023, arXiv 2310.13385): the probabilistic ranking needs
responses of a teacher, the contextual ranking responses of the model that is trained. The next step is
:mod:`~instructgym.experiments.tuna.rank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from rich.console import Console

from ...agents.policy.checkpoints import policy_from
from ...agents.policy.language_model import PolicyBackend
from ...envs.tasks.instruction.data import InstructionExample, prompt_text, read_instruction_data, request_text
from ...envs.tasks.responses.candidates import DiverseSampling, sample_candidates
from ...llm_backends import Backend, BackendError, ContextLengthError, Prompt
from ...llm_backends.errors import InputError
from ..runs.folder import journaled_roles
from ..runs.options import Count, DType, Required, RunOptions, input_errors, named, parse_part
from ..runs.statistics import known_mean
from ..runs.training import Run, digest, policy_folder, run_stage, weights_digest

CHUNK = 16
"""Requests that are answered together: a chunk is either stored whole or drawn again."""
CANDIDATES = "candidates.jsonl"


@dataclass
class TunaCandidates(RunOptions):
    """Draw several different responses to every request of a data set."""

    data: Annotated[str, Required("a data set of requests (JSONL, JSON or Parquet)")] = ""
    """Data set of requests with reference responses: JSONL, JSON or Parquet with instruction, input and output."""
    backend: str = "embedded"
    """Backend that writes the responses: embedded, transformers, openai, vllm, 'module:factory', or JSON {"id": ...,
    "kwargs": {...}}."""
    policy: str = ""
    """Run folder of a trained policy that writes the responses instead of --backend."""
    layout: Literal["chat", "plain", "alpaca"] = "chat"
    """Prompt format of a request. chat: a user's message; plain: a text to continue; alpaca: the template of Stanford
    Alpaca."""
    n: int = 4
    """Responses per request."""
    temperature: float = 1.0
    """Sampling temperature of the first try."""
    step: float = 0.1
    """Amount that is added to the temperature with every further try."""
    tries: int = 3
    """Maximum number of tries per request. All its responses are drawn again until they differ enough."""
    threshold: float = 0.8
    """Responses to a request differ enough if the ROUGE-L of every two of them is below this value."""
    top_p: float = 1.0
    """Probability mass of nucleus sampling. 1: no nucleus sampling."""
    max_tokens: Count = 128
    """Maximum number of tokens of a response."""
    limit: int = 0
    """Number of requests to use, from the first one of the data set. 0: all."""
    dtype: DType = "auto"
    """Floating-point type in which a --policy computes. auto: bfloat16 if the hardware supports it, else float32."""

    def check(self) -> None:
        super().check()
        if self.policy and self.backend != "embedded":
            raise InputError("--policy and --backend exclude each other: only one of them writes the responses")
        _ = self.sampling

    @property
    def sampling(self) -> DiverseSampling:
        """Sampling settings of the options.

        Raises:
            InputError: if a value is out of range.
        """
        names = ("n", "temperature", "step", "tries", "threshold", "max_tokens", "top_p")
        return DiverseSampling(**named(self, *names))


def run(options: TunaCandidates, console: Console | None = None) -> dict[str, Any]:
    """Draws the candidates, or resumes an unfinished run, and returns the results.

    Writes ``candidates.jsonl`` to the run folder, one row per request.

    Raises:
        InputError: if the input is invalid (before a model is loaded), or if no request got a response.
    """
    console = console or Console()
    options.check()
    start = policy_folder(options.policy, "--policy") if options.policy else None
    examples = read_instruction_data(options.data, "--data").examples[: options.limit or None]
    parts = {"writer": parse_part(options.backend)}
    with input_errors():  # builds the backend once, so that wrong options fail before the run folder is opened
        journaled_roles(parts, None)
    # A resumed run must use the same requests and weights: the options hold only their paths.
    identity: dict[str, Any] = {"requests": digest([example.row() for example in examples])}
    identity |= {"weights": weights_digest(start)} if start is not None else {}

    def work(opened: Run) -> dict[str, Any]:
        # A policy in this process writes the same again; replies of --backend are kept in the journal of the run.
        policy = PolicyBackend(policy_from(start, dtype=options.dtype), weights_digest(start)) if start else None
        with nullcontext({"writer": policy}) if policy else opened.roles(parts) as roles:
            make = partial(_draw, options, roles["writer"], examples)
            drawn = opened.rows(CANDIDATES, len(examples), CHUNK, make, "responses drawn")
        written = [row for row in drawn if row["candidates"]]
        if not written:
            raise InputError(f"no request got a response: {drawn[0]['error'] or 'all of them are blank'}")
        several = sum(len(row["candidates"]) > 1 for row in drawn)
        console.print(f"{several} of {len(drawn)} requests have several different responses", highlight=False)
        return opened.finish(
            {
                "tries": known_mean(row["tries"] for row in written),
                "max_rouge": known_mean(row["max_rouge"] for row in written),
                "finished": known_mean(flag for row in written for flag in row["finished"]),
                "words": known_mean(len(text.split()) for row in written for text in row["candidates"]),
            },
            {
                "requests": len(drawn),
                "candidates": sum(len(row["candidates"]) for row in drawn),
                "with several": several,
                "failed": len(drawn) - len(written),
            },
        )

    plan = f"draw {options.n} responses to each of {len(examples)} requests by {options.policy or options.backend}"
    return run_stage(options, "tuna candidates", console, work, distributed=False, plan=plan, **identity)


def _draw(
    options: TunaCandidates, writer: Backend, examples: Sequence[InstructionExample], first: int
) -> list[dict[str, Any]]:
    """Returns the rows of the chunk from row ``first`` on, with candidates that are neither blank nor repeated.

    Raises:
        BackendError: if every request of the chunk failed, and at least one of them not because of its length.
    """
    chunk = examples[first : first + CHUNK]
    # The layout chat has messages, the others a text.
    prompts: list[Prompt] = [
        [{"role": "user", "content": request_text(example)}]
        if options.layout == "chat"
        else prompt_text(example, options.layout)
        for example in chunk
    ]
    # Seeds depend on the row number in the whole run: any chunk gives the same responses when drawn again.
    results = sample_candidates(writer, prompts, options.sampling, options.seed, range(first, first + len(chunk)))
    # If rows without responses were written, a repetition of the command would not send these requests again.
    errors = [result.errors[-1] for result in results if not result.texts and result.errors]
    outages = [error for error in errors if not isinstance(error, ContextLengthError)]
    if len(errors) == len(results) and outages:
        raise BackendError(f"all of {len(results)} requests failed: {outages[0]}; repeat the command to ask again")
    return [
        example.row()
        | {
            "candidates": [text.strip() for text in result.distinct],
            "finished": [result.finished[number] for number in result.distinct_indices],
            **named(result, "temperature", "tries", "max_rouge"),
            "error": str(result.errors[-1]) if result.errors else "",
        }
        for example, result in zip(chunk, results, strict=True)
    ]
