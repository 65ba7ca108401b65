"""Teacher forcing: hidden states of given responses in one pass over whole sequences, and the kernels of that pass.

:func:`response_hidden` reads what sequences share once. On CPUs attention in bfloat16 uses batched matrix products, as
torch's fused kernel has a slow backward pass. Measured with torch 2.13 on 32 x 9 heads of 64 dimensions, forward and
backward, two threads: fused 59 ms at 40 tokens and 97 ms at 88, batched matrix products 10 ms and 20 ms. In float32 and
without gradients the fused kernel is as fast or faster.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.activations import NewGELUActivation
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..local.causal_lm import CausalLM

ATTENTION_NAME = "instructgym"
"""Name of the attention in the registries of transformers."""

# Per thread: the kernels of other threads do not change while this one trains.
_STATE = threading.local()


@contextmanager
def training_kernels() -> Iterator[None]:
    """Makes passes over whole sequences use one kernel within the block, for this thread.

    Log-probs that are computed with gradients are then equal to those without, so that the probability ratio is 1
    before the first optimiser step.
    """
    before = getattr(_STATE, "training", False)
    _STATE.training = True
    try:
        yield
    finally:
        _STATE.training = before


def training_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention as transformers' attention interface asks, shape (batch, new, heads, dim)."""
    # Where the fused kernel's backward pass is slow, and only for plain attention within training_kernels.
    plain = query.device.type == "cpu" and query.dtype == torch.bfloat16 and not dropout and not set(kwargs) & _OTHERS
    if not (getattr(_STATE, "training", False) and plain):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return matmul_attention(query, key, value, attention_mask, scaling), None


_OTHERS = frozenset({"softcap", "position_bias", "cache", "s_aux"})
"""Keyword arguments of attention variants, which are left to transformers."""


def matmul_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Computes causal attention by batched matrix products.

    Args:
        query: shape (batch, heads, new, dim).
        key: shape (batch, shared heads, length, dim), with length >= new.
        value: shape (batch, shared heads, length, dim).
        mask: bool (True: attend) or a float to add to the scores, shape (batch, 1, new, at least length); None: causal.
        scaling: factor of the scores; None: 1 / sqrt(dim).

    Returns:
        Shape (batch, new, heads, dim).
    """
    batch, heads, new, dim = query.shape
    shared, length = key.shape[1], key.shape[2]
    groups = heads // shared
    # Query heads that share keys become further query rows: one product per shared head, without copies of the keys.
    rows = query.reshape(batch * shared, groups * new, dim) * (dim**-0.5 if scaling is None else scaling)
    scores = torch.bmm(rows, key.reshape(batch * shared, length, dim).transpose(1, 2))
    scores = scores.view(batch, shared, groups, new, length)
    if mask is None:
        # The new tokens are the last ones of the sequence, so the diagonal is shifted by the length of the cache.
        hidden = torch.ones((new, length), dtype=torch.bool, device=query.device).triu(length - new + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask.unsqueeze(2)[..., :length], float("-inf"))
    else:
        scores = scores + mask.unsqueeze(2)[..., :length]
    weights = scores.softmax(dim=-1).view(batch * shared, groups * new, length)
    output = torch.bmm(weights, value.reshape(batch * shared, length, value.shape[-1]))
    return output.view(batch, heads, new, -1).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION_NAME, training_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def use_training_kernels(model: Any) -> None:
    """Prepares a model, in place, for :func:`training_kernels`, and makes its GELU one operation.

    The attention is replaced only if it is transformers' fused one and the model allows it. Outside the block it calls
    the fused one.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):  # the same function, written out in seven operations
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    if getattr(model.config, "_attn_implementation", None) == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(ATTENTION_NAME)


SHARED_PREFIX = 8
"""Smallest number of leading tokens that all sequences of a batch must share to read their common prefix once."""
FEWER_TOKENS = 0.85
"""Prompts that occur several times in a batch are read once each if that leaves at most this share of its tokens."""


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Returns the number of leading tokens that all sequences share."""
    first = np.asarray(sequences[0])
    shared = min(map(len, sequences))
    for sequence in sequences[1:]:
        differs = np.flatnonzero(first[:shared] != np.asarray(sequence)[:shared])
        if len(differs):
            shared = int(differs[0])
    return shared


def response_hidden(
    lm: CausalLM, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], after_token: bool = False
) -> Tensor:
    """Returns last hidden states at the positions that predict the response tokens, or at those of the tokens.

    Rows are padded on the right, where causality hides padding from the real positions, so no attention mask is needed.
    A prefix that all prompts share (task description, few-shot header) is read once; gradients through it are exact.
    Without a common prefix, on a CPU, each prompt with several responses is read once.

    Args:
        lm: the model.
        prompts: n int arrays of token ids, none empty.
        responses: n int arrays of token ids, none empty.
        after_token: False: states before each response token is read, which predict it (policy, value of a state);
            True: states after it is read, that of the last token included (reward of an action).

    Returns:
        Shape (total response tokens, d), the rows of a response together and in order; part of the autograd graph if
        gradients are enabled.
    """
    # Without ``after_token`` the last token of a response predicts nothing that is scored, so it is not read.
    sequences = [np.concatenate([p, r if after_token else r[:-1]]) for p, r in zip(prompts, responses, strict=True)]
    # Samples of a prompt that differ only in their last token are then one sequence, which is read once.
    distinct = {sequence.tobytes(): sequence for sequence in sequences}
    index = {key: k for k, key in enumerate(distinct)}
    owners, unique = [index[sequence.tobytes()] for sequence in sequences], list(distinct.values())
    # A prefix ends before the last prompt token: that one predicts the first response token, so its state is needed.
    starts = [len(sequence) for sequence in unique]
    for k, prompt in zip(owners, prompts, strict=True):
        starts[k] = min(starts[k], len(prompt) - 1)
    prefixes = _prefixes(lm, unique, starts)
    states = _read(lm, unique, prefixes)
    # Pick the states of the response tokens. Columns count from the end of the row's prefix; a token is predicted one
    # column before its own.
    rows = [np.full(len(r), k) for k, r in zip(owners, responses, strict=True)]
    columns = [
        len(p) - (not after_token) - prefixes[k] + np.arange(len(r))
        for k, p, r in zip(owners, prompts, responses, strict=True)
    ]
    return states[torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(columns))]


def _prefixes(lm: CausalLM, sequences: Sequence[np.ndarray], starts: Sequence[int]) -> list[int]:
    """Returns the number of leading tokens of each sequence to read once for all sequences that share them.

    Args:
        lm: the model.
        sequences: token ids of distinct sequences.
        starts: for each sequence the largest length of its prefix.

    Returns:
        For each sequence the length of its prefix; 0 to read it whole.
    """
    count = len(sequences)
    heads = [sequence[:start] for sequence, start in zip(sequences, starts, strict=True)]
    if count == 1 or not lm.plain_attention:
        return [0] * count
    if (shared := common_prefix(heads)) >= SHARED_PREFIX:
        return [shared] * count
    # Tokens, padding included, if each distinct prompt is read once, against those of reading every sequence whole.
    rest = max(len(sequence) - start for sequence, start in zip(sequences, starts, strict=True))
    tokens = len({head.tobytes() for head in heads}) * max(starts) + count * rest
    fewer = tokens <= FEWER_TOKENS * count * max(map(len, sequences))
    return list(starts) if fewer and min(starts) and lm.device.type == "cpu" else [0] * count


def _read(lm: CausalLM, sequences: Sequence[np.ndarray], prefixes: Sequence[int]) -> Tensor:
    """Returns the last hidden states after the prefixes, shape (n, longest rest, d); rows are right-padded."""
    ids = _padded([sequence[prefix:] for sequence, prefix in zip(sequences, prefixes, strict=True)], lm.device)
    with training_kernels():
        if not any(prefixes):
            return lm.trunk(input_ids=ids, use_cache=False).last_hidden_state
        # Read each distinct prefix once, into a cache.
        heads = [sequence[:prefix] for sequence, prefix in zip(sequences, prefixes, strict=True)]
        distinct = {head.tobytes(): head for head in heads}
        index = {key: k for k, key in enumerate(distinct)}
        cache = DynamicCache(config=lm.text_config)
        lm.trunk(input_ids=_padded(list(distinct.values()), lm.device), past_key_values=cache, use_cache=True)
        rows = torch.tensor([index[head.tobytes()] for head in heads], device=lm.device)
        # Give every sequence a row of the cache. A single prefix is expanded, which copies nothing; autograd sums the
        # gradients of both forms over the sequences.
        for layer in cache.layers:
            for name in ("keys", "values"):
                states = getattr(layer, name)
                setattr(layer, name, states.expand(len(heads), -1, -1, -1) if len(states) == 1 else states[rows])
        lengths, columns = torch.tensor(prefixes, device=lm.device)[:, None], torch.arange(ids.shape[1])
        longest, mask = max(prefixes), None
        # The cache of a shorter prefix ends in padding before the rest: mask it. Positions go on from the prefix's own
        # length.
        if min(prefixes) < longest:
            real = torch.arange(longest, device=lm.device)[None] < lengths
            mask = torch.cat([real, real.new_ones(ids.shape)], dim=1).long()
        else:
            lengths = lengths[:1]
        output = lm.trunk(
            input_ids=ids,
            past_key_values=cache,
            attention_mask=mask,
            position_ids=lengths + columns.to(lm.device),
            use_cache=True,
        )
        return output.last_hidden_state


def _padded(rows: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Returns token ids as int64, shape (n, longest), with zeros after the end of shorter rows."""
    ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return ids.to(device)
