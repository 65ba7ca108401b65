"""Hidden states of given responses in one pass over whole sequences, what is shared among them computed once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.activations import NewGELUActivation
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..local.causal_lm import CausalLM

NAME = "instructgym"

_STATE = threading.local()


@contextmanager
def training_kernels() -> Iterator[None]:
    """Within it, passes over whole sequences use one kernel, with and without gradients: their log-probs are equal."""
    before = getattr(_STATE, "training", False)
    _STATE.training = True
    try:
        yield
    finally:
        _STATE.training = before


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    plain = query.device.type == "cpu" and query.dtype == torch.bfloat16 and not dropout and not set(kwargs) & _OTHERS
    if not (getattr(_STATE, "training", False) and plain):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return _matmul_attention(query, key, value, attention_mask, scaling), None


_OTHERS = frozenset({"softcap", "position_bias", "cache", "s_aux"})
"""Arguments of attention variants that are left to transformers."""


def _matmul_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Causal attention by batched matrix products; heads that share keys are folded into the query rows."""
    batch, heads, new, dim = query.shape
    shared, length = key.shape[1], key.shape[2]
    groups = heads // shared
    rows = query.reshape(batch * shared, groups * new, dim) * (dim**-0.5 if scaling is None else scaling)
    scores = torch.bmm(rows, key.reshape(batch * shared, length, dim).transpose(1, 2))
    scores = scores.view(batch, shared, groups, new, length)
    if mask is None:
        hidden = torch.ones((new, length), dtype=torch.bool, device=query.device).triu(length - new + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask.unsqueeze(2)[..., :length], float("-inf"))
    else:
        scores = scores + mask.unsqueeze(2)[..., :length]
    weights = scores.softmax(dim=-1).view(batch * shared, groups * new, length)
    output = torch.bmm(weights, value.reshape(batch * shared, length, value.shape[-1]))
    return output.view(batch, heads, new, -1).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_training_kernels(model: Any) -> None:
    """Gives a model this attention, if it has transformers' fused one and can change it, and GELU in one operation."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):  # the same function, written out in seven operations
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    if getattr(model.config, "_attn_implementation", None) == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)


SHARED_PREFIX = 8
"""Tokens that prompts must have in common before their prefix is read once for all of them."""
FEWER_TOKENS = 0.85
"""Share of the tokens of a batch below which prompts that come several times in it are read apart, once each."""


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Number of leading tokens that all sequences share."""
    first = np.asarray(sequences[0])
    shared = min(map(len, sequences))
    for sequence in sequences[1:]:
        differs = np.flatnonzero(first[:shared] != np.asarray(sequence)[:shared])
        if len(differs):
            shared = int(differs[0])
    return shared


def response_hidden(
    lm: CausalLM, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], after: bool = False
) -> torch.Tensor:
    """Last hidden states at the positions that predict the response tokens, or at those of the tokens themselves.

    Rows are padded on the right, where causality hides padding from the real positions, so no attention mask is needed.
    A prefix that all prompts share (task description, few-shot header) is read once; gradients flow through it exactly.
    Without one, on a CPU, prompts that several responses answer are read once each.

    Args:
        lm: the model.
        prompts: n int arrays of token ids, none empty.
        responses: n int arrays of token ids, none empty.
        after: False: states before each response token is read, which predict it (policy, value of a state); True:
            after it is read, the last token's included (reward of an action).

    Returns:
        shape (total response tokens, d), rows of one response together and in order; with a graph where gradients
            are on.
    """
    sequences = [np.concatenate([p, r if after else r[:-1]]) for p, r in zip(prompts, responses, strict=True)]
    # Samples of one prompt that agree but for their last token are one sequence: it is read once.
    distinct = {sequence.tobytes(): sequence for sequence in sequences}
    index = {key: k for k, key in enumerate(distinct)}
    owners, unique = [index[sequence.tobytes()] for sequence in sequences], list(distinct.values())
    starts = [len(sequence) for sequence in unique]
    for k, prompt in zip(owners, prompts, strict=True):
        starts[k] = min(starts[k], len(prompt) - 1)
    prefixes = _prefixes(lm, unique, starts)
    states = _read(lm, unique, prefixes)
    rows = [np.full(len(r), k) for k, r in zip(owners, responses, strict=True)]
    columns = [
        len(p) - (not after) - prefixes[k] + np.arange(len(r))
        for k, p, r in zip(owners, prompts, responses, strict=True)
    ]
    return states[torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(columns))]


def _prefixes(lm: CausalLM, sequences: Sequence[np.ndarray], starts: Sequence[int]) -> list[int]:
    """How many leading tokens of each sequence, up to its start, are to be read once for all that share them."""
    count = len(sequences)
    heads = [sequence[:start] for sequence, start in zip(sequences, starts, strict=True)]
    if count == 1 or not lm.plain_attention:
        return [0] * count
    if (shared := common_prefix(heads)) >= SHARED_PREFIX:
        return [shared] * count
    rest = max(len(sequence) - start for sequence, start in zip(sequences, starts, strict=True))
    tokens = len({head.tobytes() for head in heads}) * max(starts) + count * rest
    fewer = tokens <= FEWER_TOKENS * count * max(map(len, sequences))
    return list(starts) if fewer and min(starts) and lm.device.type == "cpu" else [0] * count


def _read(lm: CausalLM, sequences: Sequence[np.ndarray], prefixes: Sequence[int]) -> torch.Tensor:
    """Last hidden states, shape (n, longest rest, d), of what follows the prefixes; rows are right-padded."""
    ids = _padded([sequence[prefix:] for sequence, prefix in zip(sequences, prefixes, strict=True)], lm.device)
    with training_kernels():
        if not any(prefixes):
            return lm.trunk(input_ids=ids, use_cache=False).last_hidden_state
        heads = [sequence[:prefix] for sequence, prefix in zip(sequences, prefixes, strict=True)]
        distinct = {head.tobytes(): head for head in heads}
        index = {key: k for k, key in enumerate(distinct)}
        cache = DynamicCache(config=lm.text_config)
        lm.trunk(input_ids=_padded(list(distinct.values()), lm.device), past_key_values=cache, use_cache=True)
        rows = torch.tensor([index[head.tobytes()] for head in heads], device=lm.device)
        for layer in cache.layers:
            for name in ("keys", "values"):
                one = getattr(layer, name)
                setattr(layer, name, one.expand(len(heads), -1, -1, -1) if len(one) == 1 else one[rows])
        lengths, columns = torch.tensor(prefixes, device=lm.device)[:, None], torch.arange(ids.shape[1])
        longest, mask = max(prefixes), None
        if min(prefixes) < longest:  # the cache of a shorter prompt ends in padding
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


def _padded(rows: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """int64, shape (n, longest): token ids, with zeros behind shorter rows."""
    ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return ids.to(device)
