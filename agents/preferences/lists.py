"""Ranked lists of texts as tokens, and how far a policy agrees with their ranking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau

from ...envs.tasks.instruction.data import OPENINGS, DataLayout, InstructionExample, prompt_text
from ...envs.tasks.responses.candidates import RankedList
from ...llm_backends.errors import InputError
from ...llm_backends.local.causal_lm import token_budget_chunks
from ...llm_backends.local.tokenization import Tokenizer
from ..policy.language_model import LanguageModelPolicy
from .trainer import TokenizedRankedList

FINISHED = "finished"
"""Metadata of a ranked list: for each candidate, whether its writer ended it; all, where it is missing."""


def request_of(one: RankedList) -> InstructionExample:
    """What a list's candidates answer; its metadata may tell ``instruction`` and ``input`` apart."""
    instruction = str(one.metadata.get("instruction") or one.prompt)
    return InstructionExample(instruction, str(one.metadata.get("input") or ""), one.reference or "", one.id)


def tokenize_lists(
    lists: Sequence[RankedList], layout: DataLayout, tokenizer: Tokenizer, context_length: int
) -> tuple[list[TokenizedRankedList], dict[str, int]]:
    """Token ids of prompts, candidates and references.

    What its writer ended has an end-of-sequence token, as has a reference; a candidate that a limit cut off has none.

    Args:
        lists: ranked texts.
        layout: how a request is written.
        tokenizer: of the model to train.
        context_length: tokens of prompt and response at most.

    Returns:
        The lists of which two candidates or more fit, in order; a reference that does not fit is None. And how many
            ``candidates``, ``references`` and whole ``lists`` were left out for their length.

    Raises:
        InputError: if the tokenizer has no end-of-sequence token or, for the layout ``chat``, no chat template, and for
            metadata that do not fit the candidates.
    """
    if not tokenizer.eos_ids:
        raise InputError(f"the tokenizer of {tokenizer.name} has no EOS token, by which responses could end")
    end, opening = [min(tokenizer.eos_ids)], OPENINGS[layout]
    prompts = tokenizer.encode_batch([prompt_text(request_of(one), layout, tokenizer) for one in lists])
    dropped: Counter[str] = Counter(candidates=0, references=0, lists=0)
    kept = []
    for one, prompt in zip(lists, prompts, strict=True):
        room = context_length - len(prompt)
        responses = [
            tokenizer.encode_continuation(opening + text) + end * finished
            for text, finished in zip(one.candidates, finished_flags(one), strict=True)
        ]
        fitting = [k for k, response in enumerate(responses) if 0 < len(response) <= room]
        reference = None if one.reference is None else tokenizer.encode_continuation(opening + one.reference) + end
        if reference is not None and len(reference) > room:
            reference = None
            dropped["references"] += 1
        dropped["candidates"] += len(responses) - len(fitting)
        if len(fitting) < 2:
            dropped["lists"] += 1
            continue
        scores = [one.scores[k] for k in fitting]
        kept.append(TokenizedRankedList(prompt, [responses[k] for k in fitting], scores=scores, reference=reference))
    return kept, dict(dropped)


def finished_flags(one: RankedList) -> list[bool]:
    """Whether each candidate's writer ended it, by the list's metadata; yes, where they do not say.

    Raises:
        InputError: if they say something else, or for another number of candidates.
    """
    value: Any = one.metadata.get(FINISHED)
    if value is None:
        return [True] * len(one.candidates)
    if not isinstance(value, list | tuple) or len(value) != len(one.candidates) or not {*value} <= {True, False}:
        raise InputError(
            f"ranked list {one.id!r}: metadata {FINISHED!r} must be true or false for each of its "
            f"{len(one.candidates)} candidates"
        )
    return [bool(flag) for flag in value]


@torch.no_grad()
def rank_agreement(
    policy: LanguageModelPolicy, lists: Sequence[TokenizedRankedList], ratios: bool = False, token_budget: int = 4096
) -> float | None:
    """Mean Kendall tau-b, in [-1, 1], between a policy's order of candidates and their ranking.

    Args:
        policy: ranks by log-probs per token.
        lists: at least two candidates each; those whose candidates all tie are left out.
        ratios: rank by log-ratios of whole candidates to the reference policy instead.
        token_budget: tokens that are read at once.

    Returns:
        The mean over lists; None where there is none to compare.
    """
    rows = [(one.prompt, np.asarray(candidate, np.int32)) for one in lists for candidate in one.candidates]
    values: list[float] = []
    for chunk in token_budget_chunks([len(prompt) + len(response) for prompt, response in rows], token_budget):
        prompts = [np.asarray(rows[k][0], np.int32) for k in chunk]
        responses = [rows[k][1] for k in chunk]
        allowed = [None] * len(responses)
        logprobs = policy.score(prompts, responses, allowed, values=False).logprobs
        if ratios:
            logprobs = logprobs - policy.reference_logprobs(prompts, responses, allowed)
        parts = logprobs.split([len(response) for response in responses])
        values += [float(part.sum() if ratios else part.mean()) for part in parts]
    found, place = [], 0
    for one in lists:
        mine = values[place : place + len(one.candidates)]
        place += len(one.candidates)
        tau = kendalltau(mine, -one.order()).statistic
        if np.isfinite(tau):
            found.append(float(tau))
    return float(np.mean(found)) if found else None
