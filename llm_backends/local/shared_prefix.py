"""Log-probs of a few continuations of many prompts that begin alike, reading each shared beginning (head) once.

A prompt of a frozen model is a head (instruction, demonstrations) that all inputs share, and an input. Keys and values
of a head are computed once and copied to the rows of its inputs. An input is read once for all its continuations, and
continuations of one token need no further pass, as the logits of the last position score them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..base import BackendError, Prompt
from .caches import BatchCache, PrefixCache, extreme_rows
from .causal_lm import GROUP_TOKENS, PREFILL_TOKENS, Prefilled, token_budget_chunks, until_exact
from .tokenization import encode_texts

if TYPE_CHECKING:
    from .causal_lm import CausalLM

HEAD_TOKENS = 4096
"""Largest number of head tokens, padding included, whose keys and values are in memory at once."""

CACHED_SHARE = 8
"""Number of cached positions, which are only attended to, that count as one computed position in a chunk's budget."""

Tokens = Sequence[int]


def encode_all(lm: CausalLM, prompts: Sequence[Prompt]) -> list[list[int] | BackendError]:
    """Returns the token ids of prompts, even of too long ones, or the error of a chat that its template refuses.

    Strings are tokenised in one call, which is faster.
    """
    texts = list(dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str)))
    known = dict(zip(texts, encode_texts(lm.tokenizer, texts), strict=True))

    def encode(prompt: Prompt) -> list[int] | BackendError:
        try:
            return known[prompt] if isinstance(prompt, str) else lm.encode(prompt, check=False)
        except BackendError as error:
            return error

    return [encode(prompt) for prompt in prompts]


def shared_length(prompt: Tokens, head: Tokens) -> int:
    """Returns the number of leading tokens that the prompt shares with ``head``, fewer than the prompt has.

    It may be less than the head's length, as a tokenizer may merge the last token of the head with the text after it.
    """
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, head, strict=False)))
    return min(same, len(prompt) - 1)


@until_exact
def choice_logprobs(
    lm: CausalLM, prompts: Sequence[Tokens], shared_lengths: Sequence[int], choices: Sequence[Sequence[Tokens]]
) -> list[np.ndarray]:
    """Returns the log-probs of each prompt's continuations.

    Args:
        lm: the model; if it has other than full attention, every prompt is read whole.
        prompts: n lists of token ids, none empty.
        shared_lengths: for each prompt the number of leading tokens that it shares with others; 0 for none.
        choices: for each prompt the token ids of its continuations, none empty.

    Returns:
        n float32 arrays, shape (continuations,), each the sum of the log-probs of a continuation's tokens, in nats.
        Equal calls give equal numbers; in calls with other rows they differ by the rounding of the model's dtype.
    """
    # Group the prompts by head. A head of one prompt is not shared: that prompt is read whole.
    heads: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, length) in enumerate(zip(prompts, shared_lengths, strict=True)):
        heads.setdefault(tuple(prompt[:length] if lm.shares_prefixes else ()), []).append(index)
    unshared = heads.pop((), []) + [rows.pop() for rows in heads.values() if len(rows) == 1]
    order = sorted((head for head, rows in heads.items() if rows), key=len)
    free_positions = max((len(tokens) for continuations in choices for tokens in continuations), default=1)
    results: list[np.ndarray] = [np.empty(0, np.float32)] * len(prompts)
    # Score all continuations of each chunk of prompts.
    for rows, state in _read(lm, prompts, unshared, [heads[head] for head in order], order, free_positions):
        owner = [k for k, i in enumerate(rows) for _ in choices[i]]
        tails = [tokens for i in rows for tokens in choices[i]]
        scores = iter(lm.completion_logprobs(state, owner, tails, [prompts[i] for i in rows]))
        for i in rows:
            sums = [next(scores).sum(dtype=np.float64) for _ in choices[i]]
            results[i] = np.array(sums, np.float32)
    return results


def _read(
    lm: CausalLM,
    prompts: Sequence[Tokens],
    unshared: list[int],
    members: list[list[int]],
    heads: list[tuple[int, ...]],
    free_positions: int,
) -> Iterator[tuple[list[int], Prefilled]]:
    """Yields chunks of prompts with the model's state after them.

    Args:
        lm: the model.
        prompts: token ids of all prompts.
        unshared: indices of the prompts without a shared head.
        members: for each head the indices of its prompts.
        heads: token ids of the heads.
        free_positions: number of positions to keep free for continuations.

    Yields:
        Indices into ``prompts`` and the state, whose rows are in that order.
    """
    unshared = sorted(unshared, key=lambda i: len(prompts[i]))
    for chunk in token_budget_chunks([len(prompts[i]) + free_positions for i in unshared], PREFILL_TOKENS):
        with lm.lock:
            yield [unshared[k] for k in chunk], _prefilled(lm, [prompts[unshared[k]] for k in chunk], free_positions)
    budget = GROUP_TOKENS if lm.device.type == "cpu" else PREFILL_TOKENS
    for group in token_budget_chunks([len(head) for head in heads], HEAD_TOKENS):
        with lm.lock:
            state = _prefilled(lm, [heads[k] for k in group], free_positions=0)
            # Rows of similar length together, whatever their head: less padding.
            rows = sorted(
                (
                    (len(prompts[i]) - len(heads[k]), head_row, i)
                    for head_row, k in enumerate(group)
                    for i in members[k]
                ),
                key=lambda row: row[0],
            )
            past = state.mask.shape[1]
            sizes = [new + (past + free_positions) // CACHED_SHARE for new, _, _ in rows]
            for chunk in token_budget_chunks(sizes, budget):
                chunk_rows = [rows[k] for k in chunk]
                tails = [prompts[i][len(prompts[i]) - new :] for new, _, i in chunk_rows]
                read = _continued(lm, state, [head_row for _, head_row, _ in chunk_rows], tails, free_positions)
                if read.mask.shape[1] > lm.checked:
                    extremes = [(prompts[chunk_rows[row][2]], read.logits[row]) for row in extreme_rows(read.mask)]
                    lm.check(read.mask.shape[1], extremes)
                yield [i for *_, i in chunk_rows], read


def _prefilled(lm: CausalLM, prompts: Sequence[Tokens], free_positions: int) -> Prefilled:
    """Returns the state after the prompts, read without the prefix cache.

    Reading a prefix from the cache changes rounding, so that results would depend on earlier calls.
    """
    stored, lm.prefix_cache = lm.prefix_cache, PrefixCache(0)
    try:
        return lm.prefill(prompts, free_positions)
    finally:
        lm.prefix_cache = stored


@torch.inference_mode()
def _continued(lm: CausalLM, state: Prefilled, owner: list[int], tails: list[Tokens], free_positions: int) -> Prefilled:
    """Returns the state after the rest of some prompts, read on top of their heads.

    Args:
        lm: the model.
        state: state of the heads.
        owner: for each tail the row of its head in ``state``.
        tails: token ids of the prompts after their heads.
        free_positions: number of positions to keep free for continuations.
    """
    # Tails are padded on the left, between head and tail, so that every row ends in the same column. The mask hides the
    # gap.
    new = max(map(len, tails))
    ids = torch.zeros((len(tails), new), dtype=torch.long)
    real = torch.zeros_like(ids)
    for row, tail in enumerate(tails):
        ids[row, new - len(tail) :] = torch.tensor(tail)
        real[row, new - len(tail) :] = 1
    owner_rows = torch.tensor(owner, device=lm.device)
    mask = torch.cat([state.mask[owner_rows], real.to(lm.device)], dim=1)
    # With any other attention all prompts were read whole, see choice_logprobs.
    assert isinstance(state.cache, BatchCache)
    cache = state.cache.select(owner_rows, mask.shape[1] + free_positions)
    return Prefilled(cache, mask, lm.forward(ids.to(lm.device), mask, cache))
