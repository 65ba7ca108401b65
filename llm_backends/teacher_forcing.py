"""Hidden states of given responses in one pass over whole sequences, what is shared among them computed once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from .causal_lm import CausalLM
from .training_kernels import training_kernels

SHARED_PREFIX = 8
"""Tokens that prompts must have in common before their prefix is read once for all of them."""


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
    shared = common_prefix([p[:-1] for p in prompts]) if len(unique) > 1 and lm.plain_attention else 0
    prefix = shared if shared >= SHARED_PREFIX else 0
    states = _read(lm, unique, prefix)
    rows = [np.full(len(r), k) for k, r in zip(owners, responses, strict=True)]
    columns = [len(p) - (not after) + np.arange(len(r)) for p, r in zip(prompts, responses, strict=True)]
    return states[torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(columns) - prefix)]


def _read(lm: CausalLM, sequences: Sequence[np.ndarray], prefix: int) -> torch.Tensor:
    """Last hidden states, shape (n, longest - prefix, d), of what follows a common prefix; rows are right-padded."""
    width = max(map(len, sequences)) - prefix
    ids = torch.zeros((len(sequences), width), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence) - prefix] = torch.from_numpy(sequence[prefix:].astype(np.int64))
    ids = ids.to(lm.device)
    with training_kernels():
        if not prefix:
            return lm.trunk(input_ids=ids, use_cache=False).last_hidden_state
        header = torch.from_numpy(sequences[0][:prefix].astype(np.int64)).to(lm.device)
        cache = DynamicCache(config=lm.text_config)
        lm.trunk(input_ids=header[None], past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.keys = layer.keys.expand(len(sequences), -1, -1, -1)  # type: ignore[union-attr]
            layer.values = layer.values.expand(len(sequences), -1, -1, -1)  # type: ignore[union-attr]
        positions = torch.arange(prefix, prefix + width, device=lm.device)[None]
        output = lm.trunk(input_ids=ids, past_key_values=cache, position_ids=positions, use_cache=True)
        return output.last_hidden_state
