"""Log-probs of a few continuations of many prompts that begin alike, each shared beginning read once.

A prompt of a frozen model is a beginning (instruction, demonstrations) that all inputs share, and an input. Keys and
values of a beginning are computed once and copied to the rows of its inputs; an input is read once for all its
continuations; and continuations of one token cost nothing further, as they are read off the last position's logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..base import Prompt
from .causal_lm import GROUP_TOKENS, PREFILL_TOKENS, BatchCache, Prefilled, PrefixCache, token_budget_chunks

if TYPE_CHECKING:
    from .causal_lm import CausalLM

HEAD_TOKENS = 4096
"""Tokens of beginnings, padding included, whose keys and values are held at a time."""

CACHED_SHARE = 8
"""So many positions that are only attended to weigh as much as one that is computed, in a chunk's budget."""

Tokens = Sequence[int]


def encode_all(lm: CausalLM, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of many prompts, too long ones included; strings go to the tokenizer together, which is faster."""
    texts = list(dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str)))
    known = dict(zip(texts, lm.tokenizer(texts)["input_ids"] if texts else [], strict=True))
    return [known[prompt] if isinstance(prompt, str) else lm.encode(prompt, check=False) for prompt in prompts]


def shared_length(prompt: Tokens, head: Tokens) -> int:
    """How many tokens of ``head`` the prompt begins with, short of the whole prompt.

    A tokenizer may merge the last token of the head with what follows it.
    """
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, head, strict=False)))
    return min(same, len(prompt) - 1)


def choice_logprobs(
    lm: CausalLM, prompts: Sequence[Tokens], shared: Sequence[int], choices: Sequence[Sequence[Tokens]]
) -> list[np.ndarray]:
    """Log-probs of each prompt's continuations.

    Args:
        lm: the model; one with other than full attention reads every prompt whole.
        prompts: n lists of token ids, none empty.
        shared: n lengths: the tokens of each prompt that stand at the beginning of others, too; 0 for none.
        choices: for each prompt the token ids of its continuations, none empty.

    Returns:
        n float32 arrays, shape (continuations,), each the sum of the log-probs of its tokens, in nats. Equal calls give
        equal numbers; between calls with other rows they differ by the rounding of the model's dtype.
    """
    heads: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, length) in enumerate(zip(prompts, shared, strict=True)):
        heads.setdefault(tuple(prompt[:length] if lm.plain_attention else ()), []).append(index)
    alone = heads.pop((), []) + [rows.pop() for rows in heads.values() if len(rows) == 1]
    order = sorted((head for head, rows in heads.items() if rows), key=len)
    room = max((len(tokens) for mine in choices for tokens in mine), default=1)
    results: list[np.ndarray] = [np.empty(0, np.float32)] * len(prompts)
    for rows, state in _read(lm, prompts, alone, [heads[head] for head in order], order, room):
        owner = [k for k, i in enumerate(rows) for _ in choices[i]]
        scores = iter(lm.completion_logprobs(state, owner, [tokens for i in rows for tokens in choices[i]]))
        for i in rows:
            sums = [next(scores).sum(dtype=np.float64) for _ in choices[i]]
            results[i] = np.array(sums, np.float32)
    return results


def _read(
    lm: CausalLM,
    prompts: Sequence[Tokens],
    alone: list[int],
    members: list[list[int]],
    heads: list[tuple[int, ...]],
    room: int,
) -> Iterator[tuple[list[int], Prefilled]]:
    """Chunks of rows with the model's state after their prompts."""
    alone = sorted(alone, key=lambda i: len(prompts[i]))
    for chunk in token_budget_chunks([len(prompts[i]) + room for i in alone], PREFILL_TOKENS):
        with lm.lock:
            yield [alone[k] for k in chunk], _prefilled(lm, [prompts[alone[k]] for k in chunk], room)
    budget = GROUP_TOKENS if lm.device.type == "cpu" else PREFILL_TOKENS
    for group in token_budget_chunks([len(head) for head in heads], HEAD_TOKENS):
        with lm.lock:
            state = _prefilled(lm, [heads[k] for k in group], room=0)
            # Rows of equal length together, whatever their beginning: less padding.
            rows = sorted(
                ((len(prompts[i]) - len(heads[k]), at, i) for at, k in enumerate(group) for i in members[k]),
                key=lambda row: row[0],
            )
            past = state.mask.shape[1]
            sizes = [new + (past + room) // CACHED_SHARE for new, _, _ in rows]
            for chunk in token_budget_chunks(sizes, budget):
                picked = [rows[k] for k in chunk]
                tails = [prompts[i][len(prompts[i]) - new :] for new, _, i in picked]
                yield [i for *_, i in picked], _continued(lm, state, [at for _, at, _ in picked], tails, room)


def _prefilled(lm: CausalLM, prompts: Sequence[Tokens], room: int) -> Prefilled:
    """The state after the prompts, without the cache of prefixes: what was asked before must not round the result."""
    stored, lm.prefix_cache = lm.prefix_cache, PrefixCache(0)
    try:
        return lm.prefill(prompts, room)
    finally:
        lm.prefix_cache = stored


@torch.inference_mode()
def _continued(lm: CausalLM, state: Prefilled, owner: list[int], tails: list[Tokens], room: int) -> Prefilled:
    """The state after a tail each, on top of the beginnings' state; every row ends in the same column."""
    new = max(map(len, tails))
    ids = torch.zeros((len(tails), new), dtype=torch.long)
    present = torch.zeros_like(ids)
    for row, tail in enumerate(tails):
        ids[row, new - len(tail) :] = torch.tensor(tail)
        present[row, new - len(tail) :] = 1
    picked = torch.tensor(owner, device=lm.device)
    mask = torch.cat([state.mask[picked], present.to(lm.device)], dim=1)
    assert isinstance(state.cache, BatchCache)
    cache = state.cache.select(picked, mask.shape[1] + room)
    return Prefilled(cache, mask, lm.forward(ids.to(lm.device), mask, cache))
