"""``instructgym fine-grained evaluate``: scores responses to held-out prompts and compares two policies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from ...agents.policy.language_model import LanguageModelPolicy
from ...envs.tasks.responses.openings import response_prompts
from ...envs.tokens.episode import PromptExample
from ...llm_backends import request_seed, resolve
from ...llm_backends.errors import InputError
from ...llm_backends.records import read_records
from ...rewards import Sample, Score, score_with_retries
from ..runs.folder import read_json
from ..runs.options import input_errors, parse_part, parse_reward
from ..runs.responses import Response, check_prompts
from ..runs.statistics import distinct_n, known_mean, wilson
from ..runs.training import Run, policy_folder, run_stage, tokenizer_of
from .common import ENV_ID, PolicyOptions

CHUNK = 64
RESPONSES = "responses.jsonl"

RESERVED_COLUMNS = ("id", "prompt", "response", "finish_reason", "tokens", "win", "kl")
"""Columns of the rows of responses that no measure may be named after."""


@dataclass
class FineGrainedEvaluate(PolicyOptions):
    """Have a policy answer held-out prompts and judge its responses, alone and against a reference."""

    policy: str = ""
    """Run folder of the policy to evaluate."""
    against: str = ""
    """Run folder of the evaluation of the reference policy. Empty: compare with no policy, as for the reference
    itself."""
    arm: str = ""
    """Name of this arm in reports; runs of one name are its seeds. Empty: the name of the run folder."""
    judge: str = '{"id": "scored-comparison", "kwargs": {"scorer": "reviews"}}'
    """Judge that compares a response with that of the reference policy, as an id or JSON: scored-comparison (by the
    scores of a reward) or pairwise-judge (by a language model, in both orders)."""
    measures: str = "reviews,vader"
    """Ids of the rewards whose means over the responses are reported, separated by commas."""
    split: Literal["validation", "test"] = "test"
    """Split of the held-out prompts. validation: for tuning; test: for the final evaluation."""
    limit: int = 400
    """Maximum number of prompts. 0: all."""

    def check(self) -> None:
        super().check()
        for name in self.measure_names:
            if name in RESERVED_COLUMNS or not re.fullmatch(r"[\w.:-]+", name):
                raise InputError(f"--measures are ids of rewards, separated by commas, got {name!r}")

    @property
    def measure_names(self) -> list[str]:
        """The names of the measures."""
        return [name.strip() for name in self.measures.split(",") if name.strip()]


def run(options: FineGrainedEvaluate, console: Console | None = None) -> dict[str, Any]:
    """Writes ``responses.jsonl`` and returns win rate, measures, KL divergence and lengths.

    Raises:
        InputError: if the input is invalid (before a model is loaded), or the reference policy was evaluated on other
            prompts.
    """
    console = console or Console()
    options.check()
    folder, model = options.start()
    tokenizer = tokenizer_of(model)
    examples = response_prompts(
        options.data, options.split, options.limit or None, options.layout, options.data_seed, tokenizer
    )
    check_prompts(ENV_ID, examples, tokenizer, **options.env_options())
    with input_errors():
        rewards = {name: resolve("reward", parse_reward(name)) for name in options.measure_names}
        if options.against:
            rewards["win"] = resolve("reward", parse_part(options.judge))
    reference, same_start = _reference(options, examples) if options.against else ({}, False)

    def work(opened: Run) -> dict[str, Any]:
        policy = options.load(folder)

        def chunk(start: int) -> list[dict[str, Any]]:
            prompts = examples[start : start + CHUNK]
            # The seed depends on the position of the chunk: a resumed run draws the same responses.
            seed = request_seed(options.seed, "responses", start)
            # The environment needs a reward; the evaluation does not use it.
            responses = options.sample(policy, prompts, seed, lambda samples: [Score(0.0) for _ in samples])
            answers: list[dict[str, Any]] = []
            samples = []
            for i, (example, response) in enumerate(zip(prompts, responses, strict=True)):
                answers.append(
                    {
                        "id": example.id,
                        "prompt": example.prompt,
                        "response": response.text,
                        "finish_reason": response.finish_reason,
                        "tokens": len(response.token_ids),
                    }
                )
                samples.append(
                    Sample(
                        response=response.text.strip(),
                        prompt=example.prompt,
                        reference=reference.get(example.id),
                        token_ids=response.token_ids,
                        episode_id=example.id,
                        seed=request_seed(seed, "judge", i),
                    )
                )
            for name, reward in rewards.items():
                for row, score in zip(answers, score_with_retries(reward, samples), strict=True):
                    row[name] = score.value if score.valid else None
            if same_start:
                for row, kl in zip(answers, _kl(policy, responses), strict=True):
                    row["kl"] = kl
            return answers

        rows = opened.rows(RESPONSES, len(examples), CHUNK, chunk, "responses judged")
        means = {name: known_mean(row.get(name) for row in rows) for name in (*options.measure_names, "kl", "tokens")}
        metrics = {f"mean/{name}": means[name] for name in options.measure_names}
        metrics |= wilson_win_rate([row["win"] for row in rows]) if options.against else {}
        metrics |= {"kl": means["kl"]} if same_start else {}
        metrics |= {
            "tokens": means["tokens"],
            "finished": float(np.mean([row["finish_reason"] != "length" for row in rows])),
            "distinct_2": distinct_n([row["response"] for row in rows]),
        }
        opened.show(metrics)
        opened.tracker.table("responses", rows[:50])
        return opened.finish(metrics, {"prompts": len(examples)})

    plan = f"answer {len(examples)} prompts"
    return run_stage(options, "fine-grained evaluate", console, work, distributed=False, plan=plan)


def wilson_win_rate(wins: Sequence[float | None]) -> dict[str, float | None]:
    """Returns the win rate with its 95% interval, the share of ties and the share of judged prompts.

    The win rate is the mean of 1 (win), 1/2 (tie) and 0 (loss) over the prompts with a verdict. ``win_rate_low`` and
    ``win_rate_high`` are Wilson's interval over prompts, computed as if there were no ties, which makes it too wide
    rather than too narrow.

    Args:
        wins: outcome of each prompt; None if the judge gave no verdict.

    Raises:
        InputError: if no prompt has a verdict.
    """
    # Outcomes may be fractions: Wilson's interval gets their sum as the number of wins.
    known = np.array([win for win in wins if win is not None])
    if not len(known):
        raise InputError("the judge gave no verdict on any response")
    low, high = wilson(float(known.sum()), len(known))
    return {
        "win_rate": float(known.mean()),
        "win_rate_low": low,
        "win_rate_high": high,
        "ties": float((known == 0.5).mean()),
        "judged": float(len(known) / len(wins)),
    }


def _reference(options: FineGrainedEvaluate, examples: Sequence[PromptExample]) -> tuple[dict[str, str], bool]:
    """Returns the reference policy's responses by prompt id, and whether the evaluated policy was trained from it.

    The checkpoint of a policy that was holds a copy of the reference policy, which the KL divergence needs.

    Raises:
        InputError: if the responses cannot be compared.
    """
    folder = Path(options.against)
    config = read_json(folder / "config.json")
    if config is None or config.get("command") != "fine-grained evaluate":
        raise InputError(f"--against {folder} is no run of 'fine-grained evaluate'")
    # Responses are comparable only if they were sampled in the same way.
    for name in ("temperature", "max_tokens", "layout", "data_seed", "split"):
        value, reference_value = getattr(options, name), config["options"].get(name)
        if value != reference_value:
            option = name.replace("_", "-")
            raise InputError(f"--against {folder} was evaluated with --{option} {reference_value}, not {value}")
    rows = {row["id"]: row for row in read_records(folder / RESPONSES)}
    # Ids alone are not enough: other data may have equal ids.
    missing = [e.id for e in examples if e.id not in rows or rows[e.id]["prompt"] != e.prompt]
    if missing:
        raise InputError(
            f"--against {folder} has no response to {missing[0]} and {len(missing) - 1} more prompts: "
            "evaluate it with the same --data and --limit"
        )
    trained = read_json(Path(options.policy) / "config.json") or {}
    same_start = False
    if trained.get("command") in ("fine-grained ppo", "fine-grained figa"):
        start, reference = (policy_folder(run["options"]["policy"], "--policy") for run in (trained, config))
        same_start = start.resolve() == reference.resolve()
    return {name: row["response"].strip() for name, row in rows.items()}, same_start


@torch.no_grad()
def _kl(policy: LanguageModelPolicy, responses: Sequence[Response]) -> list[float]:
    """Returns an estimate of KL(policy || reference) per response, in nats: the difference of its two log-probs."""
    arguments = [r.prompt_ids for r in responses], [r.token_ids for r in responses], [None] * len(responses)
    logprobs = policy.score(*arguments, values=False).logprobs
    gaps = (logprobs - policy.reference_logprobs(*arguments)).split([len(r.token_ids) for r in responses])
    return [float(gap.sum()) for gap in gaps]
