"""``instructgym fine-grained evaluate``: responses to held-out prompts, judged against those of a reference policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from ..agents.checkpoints import read_state
from ..agents.language_model import SETTINGS, LanguageModelPolicy
from ..envs.tasks.responses import response_prompts
from ..llm_backends import request_seed, resolve
from ..llm_backends.errors import InputError
from ..llm_backends.records import append_lines, read_records
from ..rewards import Reward, Sample, Score, score_with_retries
from .fine_grained import ENV_ID, StageOptions, load_policy, policy_folder, stage, tokenizer_of
from .metrics import distinct_n
from .options import input_errors, parse_part, parse_reward
from .responses import Response, respond
from .run_folder import read_json

CHUNK = 32
RESPONSES = "responses.jsonl"


@dataclass
class FineGrainedEvaluate(StageOptions):
    """Have a policy answer held-out prompts and judge its responses, alone and against a reference."""

    policy: str = ""
    """Run folder of the policy."""
    against: str = ""
    """Run folder of the reference policy's evaluation; empty: this policy is the reference of others."""
    arm: str = ""
    """Name in reports."""
    judge: str = '{"id": "scored-comparison", "kwargs": {"scorer": "reviews"}}'
    """Who compares a response with the reference's, in both orders: scored-comparison by a scoring reward, or
    pairwise-judge with a backend."""
    measures: str = "reviews,vader"
    """Rewards whose means over the responses are reported, separated by commas."""
    split: Literal["validation", "test"] = "test"
    """validation: for tuning; test: once."""
    limit: int = 400
    """Prompts at most; 0 for all."""


def run(options: FineGrainedEvaluate, console: Console | None = None) -> dict[str, Any]:
    """Writes ``responses.jsonl`` and returns win rate, measures, KL and lengths.

    Raises:
        InputError: for bad input, before a model is loaded, and for a reference that answered other prompts.
    """
    console = console or Console()
    options.check()
    folder = policy_folder(options.policy, "--policy")
    tokenizer = tokenizer_of(read_state(folder / SETTINGS)["model"])
    examples = response_prompts(
        options.data, options.split, options.limit or None, options.layout, options.data_seed, tokenizer
    )
    with input_errors():
        measures = {name: resolve("reward", parse_reward(name)) for name in _names(options.measures)}
        judge = resolve("reward", parse_part(options.judge)) if options.against else None
    reference = _reference(options.against, [example.id for example in examples]) if options.against else None
    if options.dry_run:
        console.print(f"would answer {len(examples)} prompts, in {options.run_dir}")
        return {}
    with stage(options, "evaluate", console) as opened:
        if isinstance(opened, dict):
            return opened
        policy = load_policy(options, folder)
        responses = respond(
            policy, ENV_ID, examples, options.temperature, options.seed, reward=_no_reward, **options.env_options()
        )
        samples = [
            Sample(
                response=response.text.strip(),
                prompt=example.prompt,
                reference=None if reference is None else reference[example.id].strip(),
                token_ids=response.token_ids,
                episode_id=example.id,
                seed=request_seed(options.seed, "judge", i),
            )
            for i, (example, response) in enumerate(zip(examples, responses, strict=True))
        ]
        columns = {name: _scored(measure, samples) for name, measure in measures.items()}
        wins = _scored(judge, samples) if judge is not None else None
        rows = [
            {
                "id": sample.episode_id,
                "prompt": sample.prompt,
                "response": responses[i].text,
                "finish_reason": responses[i].finish_reason,
                **{name: column[i] for name, column in columns.items()},
                **({"win": wins[i]} if wins is not None else {}),
            }
            for i, sample in enumerate(samples)
        ]
        opened.folder.file(RESPONSES).unlink(missing_ok=True)
        append_lines(opened.folder.file(RESPONSES), rows)
        metrics = {f"mean/{name}": _mean(column) for name, column in columns.items()}
        if wins is not None:
            metrics |= win_rate(wins) | {"kl": _kl(policy, responses)}
        metrics |= {
            "tokens": float(np.mean([len(response.token_ids) for response in responses])),
            "finished": float(np.mean([response.finish_reason != "length" for response in responses])),
            "distinct_2": distinct_n([response.text for response in responses]),
        }
        results = opened.folder.finish(metrics, {"prompts": len(examples), "seconds": opened.seconds})
        opened.tracker.summary(results)
        opened.tracker.table("responses", rows[:50])
        console.print("  ".join(f"{name} {value:.3f}" for name, value in metrics.items()), highlight=False)
        return results


def win_rate(wins: Sequence[float | None]) -> dict[str, float]:
    """Mean of 1 (won), 1/2 (tie) and 0, with its 95% interval over prompts by the normal approximation."""
    known = np.array([win for win in wins if win is not None])
    if not len(known):
        raise InputError("the judge gave no verdict on any response")
    half = 1.96 * known.std(ddof=1) / np.sqrt(len(known)) if len(known) > 1 else float("nan")
    return {
        "win_rate": float(known.mean()),
        "win_rate_half_width": float(half),
        "ties": float((known == 0.5).mean()),
        "judged": float(len(known) / len(wins)),
    }


def _no_reward(samples: Sequence[Sample]) -> list[Score]:
    return [Score(0.0) for _ in samples]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _scored(reward: Reward, samples: Sequence[Sample]) -> list[float | None]:
    scores = score_with_retries(reward, samples)
    return [score.value if score.valid else None for score in scores]


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def _reference(folder: str, ids: Sequence[str]) -> dict[str, str]:
    """The reference's responses by prompt."""
    config = read_json(Path(folder) / "config.json")
    if config is None or config.get("command") != "fine-grained evaluate":
        raise InputError(f"--against {folder} is no run of 'fine-grained evaluate'")
    responses = {row["id"]: row["response"] for row in read_records(Path(folder) / RESPONSES)}
    missing = [prompt for prompt in ids if prompt not in responses]
    if missing:
        raise InputError(
            f"--against {folder} has no response to {missing[0]} and {len(missing) - 1} more prompts: evaluate it with "
            "the same --data, --split and --limit"
        )
    return responses


@torch.no_grad()
def _kl(policy: LanguageModelPolicy, responses: Sequence[Response]) -> float:
    """KL(policy || reference) per response, in nats, estimated from responses that the policy drew."""
    total = 0.0
    for start in range(0, len(responses), CHUNK):
        chunk = responses[start : start + CHUNK]
        arguments = [r.prompt_ids for r in chunk], [r.token_ids for r in chunk], [None] * len(chunk)
        ours = policy.score(*arguments, values=False).logprobs
        total += float((ours - policy.reference_logprobs(*arguments)).sum())
    return total / len(responses)
