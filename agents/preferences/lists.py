"""Tokenization of ranked lists of texts, and the agreement of a policy with their ranking.

Lists of texts are :class:`~instructgym.envs.tasks.responses.candidates.RankedList`; the trainers take lists of tokens,
:class:`~instructgym.agents.preferences.trainer.TokenizedRankedList`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...envs.tasks.instruction.data import OPENINGS, DataLayout, InstructionExample, prompt_text
from ...envs.tasks.responses.candidates import RankedList
from ...llm_backends.errors import InputError
from ...llm_backends.local.causal_lm import token_budget_chunks
from ...llm_backends.local.tokenization import Tokenizer
from ...rewards.rank_statistics import mean_kendall_tau
from ..policy.language_model import LanguageModelPolicy
from .trainer import TokenizedRankedList

FINISHED = "finished"
"""Metadata key of a ranked list: one bool per candidate, False if a length limit cut it off; if missing, all True."""


def request_of(ranked: RankedList) -> InstructionExample:
    """Returns the request that a list's candidates answer, as an instruction with the reference response as its output.

    The metadata keys ``instruction`` and ``input``, if they are there, replace the list's prompt.
    """
    instruction = str(ranked.metadata.get("instruction") or ranked.prompt)
    return InstructionExample(instruction, str(ranked.metadata.get("input") or ""), ranked.reference or "", ranked.id)


def tokenize_lists(
    lists: Sequence[RankedList], layout: DataLayout, tokenizer: Tokenizer, context_length: int
) -> tuple[list[TokenizedRankedList], dict[str, int]]:
    """Computes the token ids of prompts, candidates and references.

    A finished candidate and a reference end with an end-of-sequence token; a candidate that a limit cut off does not.

    Args:
        lists: ranked lists of texts.
        layout: layout in which a request is written as a prompt.
        tokenizer: tokenizer of the model to train.
        context_length: largest number of tokens of prompt and response together.

    Returns:
        The lists with at least two candidates that fit into the context length, in order, where a reference that does
            not fit is None; and the numbers of ``candidates``, ``references`` and whole ``lists`` that were dropped
            because of their length.

    Raises:
        InputError: if the tokenizer has no end-of-sequence token or, for the layout ``chat``, no chat template; if
            metadata do not match the candidates.
    """
    if not tokenizer.eos_ids:
        raise InputError(f"the tokenizer of {tokenizer.name} has no EOS token, by which responses could end")
    chat, opening = layout == "chat", OPENINGS[layout]
    end = tokenizer.closing(chat)
    prompts = tokenizer.encode_batch([prompt_text(request_of(ranked), layout, tokenizer) for ranked in lists], chat)
    dropped: Counter[str] = Counter(candidates=0, references=0, lists=0)
    tokenized = []
    for ranked, prompt in zip(lists, prompts, strict=True):
        room = context_length - len(prompt)
        responses = [
            tokenizer.encode_continuation(opening + text) + end * finished
            for text, finished in zip(ranked.candidates, finished_flags(ranked), strict=True)
        ]
        # An empty candidate has no token to learn from.
        fitting = [k for k, response in enumerate(responses) if 0 < len(response) <= room]
        reference = (
            None if ranked.reference is None else tokenizer.encode_continuation(opening + ranked.reference) + end
        )
        if reference is not None and len(reference) > room:
            reference = None
            dropped["references"] += 1
        dropped["candidates"] += len(responses) - len(fitting)
        # A single candidate cannot be ranked.
        if len(fitting) < 2:
            dropped["lists"] += 1
            continue
        scores = [ranked.scores[k] for k in fitting]
        tokenized.append(
            TokenizedRankedList(prompt, [responses[k] for k in fitting], scores=scores, reference=reference)
        )
    return tokenized, dict(dropped)


def finished_flags(ranked: RankedList) -> list[bool]:
    """Returns for each candidate whether it is finished: the list's metadata ``finished``, or all True without it.

    Raises:
        InputError: if the metadata value is not one bool per candidate.
    """
    value: Any = ranked.metadata.get(FINISHED)
    if value is None:
        return [True] * len(ranked.candidates)
    if not isinstance(value, list | tuple) or len(value) != len(ranked.candidates) or not {*value} <= {True, False}:
        raise InputError(
            f"ranked list {ranked.id!r}: metadata {FINISHED!r} must be true or false for each of its "
            f"{len(ranked.candidates)} candidates"
        )
    return [bool(flag) for flag in value]


@torch.no_grad()
def rank_agreement(
    policy: LanguageModelPolicy, lists: Sequence[TokenizedRankedList], ratios: bool = False, token_budget: int = 4096
) -> float | None:
    """Computes the mean Kendall tau-b, in [-1, 1], between a policy's order of candidates and their ranking.

    Args:
        policy: the policy, which ranks candidates by their mean log-prob per token.
        lists: lists of at least two candidates each; lists whose candidates all tie are not counted.
        ratios: True: rank by log-ratios of whole candidates to the reference policy instead.
        token_budget: largest number of tokens of a micro-batch, padding included.

    Returns:
        The mean over lists; None if there is no list to compare.
    """
    # Micro-batches may cut across lists; the values are put back into lists below.
    rows = [(ranked.prompt, np.asarray(candidate, np.int32)) for ranked in lists for candidate in ranked.candidates]
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
    pairs, start = [], 0
    for ranked in lists:
        policy_values = values[start : start + len(ranked.candidates)]
        start += len(ranked.candidates)
        # The order counts better candidates, so its negative rises with quality as log-probs do.
        pairs.append((policy_values, -ranked.order()))
    return mean_kendall_tau(pairs)
