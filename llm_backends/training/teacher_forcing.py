"""Teacher forcing: hidden states of given responses in one pass over whole sequences, and the kernels of that pass.

:func:`response_hidden` reads what sequences share once. On CPUs attention in bfloat16 uses batched matrix products, as
torch's fused kernel has a slow backward pass. Measured with torch 2.13 on 32 x 9 heads of 64 dimensions, forward and
backward, two threads: fused 59 ms at 40 tokens and 97 ms at 88, batched matrix products 10 ms and 20 ms. In float32 and
without gradients the fused kernel is as fast or faster.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.activations import NewGELUActivation
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..errors import InputError
from ..local.causal_lm import CausalLM
from ..local.verification import (
    PROBE_TOKENS,
    ROUGH_TOLERANCE,
    TOLERANCE,
    config_key,
    difference,
    miniature,
    plain_logits,
    probe_rows,
    probe_subject,
)
from .output_layer import OutputForm, OutputLayer, find_output_form, last_hidden

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


TrainingReading: TypeAlias = Literal["shared", "padded", "single"]
"""A way of reading whole sequences. ``shared``: in batches padded on the right, what they share once; ``padded``: in
such batches, each sequence whole; ``single``: one sequence at a time."""

TRAINING_READINGS: tuple[TrainingReading, ...] = ("shared", "padded", "single")


@dataclass
class TrainingPass:
    """How the hidden states of a model are read, as a comparison with its plain forward pass has proved it."""

    form: OutputForm
    """What the model makes of hidden states to get logits."""
    reading: TrainingReading = "shared"
    """The way of reading sequences."""
    checked: int = PROBE_TOKENS
    """Largest length of a sequence at which the reading has been found exact."""


_FOUND: dict[str, TrainingReading] = {}
"""The exact reading by configuration, so that a process proves it once."""


def training_pass(lm: CausalLM) -> TrainingPass:
    """Returns how the hidden states of a model are read; found out on the first call, without adapters.

    Raises:
        InputError: if the model cannot be trained, as its logits are no known function of its hidden states.
    """
    if lm.training is None:
        lm.training = TrainingPass(find_output_form(lm))
        key = config_key(lm.model)
        if key not in _FOUND:
            subject = probe_subject(lm)
            found = next((reading for reading in TRAINING_READINGS if _exact(subject, reading, PROBE_TOKENS)), None)
            if found is None:
                lm.training = None
                raise InputError(f"{lm.name} cannot be trained: its hidden states do not give its own logits")
            _FOUND[key] = found
        lm.training.reading = _FOUND[key]
        lm.training.checked = PROBE_TOKENS if probe_subject(lm) is lm else 0
    return lm.training


def output_layer(lm: CausalLM) -> OutputLayer:
    """Returns the output layer of a model."""
    return OutputLayer.of(lm, training_pass(lm).form)


def _exact(lm: CausalLM, reading: TrainingReading, length: int) -> bool:
    """Returns whether a way of reading gives the logits of the plain forward pass for ragged sequences."""
    tolerance = TOLERANCE if lm.in_float32 else ROUGH_TOLERANCE
    before, lm.training = lm.training, TrainingPass(find_output_form(lm), reading, sys.maxsize)
    prompts, responses = (list(map(np.array, rows)) for rows in probe_rows(lm, length))
    try:
        # All share a beginning in the first batch; in the second prompts have several responses.
        for rows in (prompts[:3], responses[:3]), (prompts + prompts[:2], responses + responses[1:3]):
            with torch.no_grad():
                logits = output_layer(lm).logits(response_hidden(lm, *rows), 1.0)
            for prompt, response in zip(*rows, strict=True):
                own, logits = logits[: len(response)], logits[len(response) :]
                plain = plain_logits(lm, [*prompt, *response], len(response) + 1)[:-1]
                if difference(own, plain) > tolerance:
                    return False
        return True
    except Exception:  # whatever an architecture raises: this way is not for it
        return False
    finally:
        lm.training = before


def response_hidden(
    lm: CausalLM, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], after_token: bool = False
) -> Tensor:
    """Returns last hidden states at the positions that predict the response tokens, or at those of the tokens.

    Rows are padded on the right, where causality hides padding from the real positions, so no attention mask is needed.
    A prefix that all prompts share (task description, few-shot header) is read once; gradients through it are exact.
    Without a common prefix, on a CPU, each prompt with several responses is read once. For models that this is not
    exact for, see :data:`TrainingReading`.

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
    while True:
        reading = training_pass(lm).reading
        prefixes = _prefixes(lm, unique, starts) if reading == "shared" else [0] * len(unique)
        states = _read(lm, unique, prefixes)
        if _checked(lm, unique, prefixes, states):
            break
    # Pick the states of the response tokens. Columns count from the end of the row's prefix; a token is predicted one
    # column before its own.
    rows = [np.full(len(r), k) for k, r in zip(owners, responses, strict=True)]
    columns = [
        len(p) - (not after_token) - prefixes[k] + np.arange(len(r))
        for k, p, r in zip(owners, prompts, responses, strict=True)
    ]
    return states[torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(columns))]


def _checked(lm: CausalLM, sequences: Sequence[np.ndarray], prefixes: Sequence[int], states: torch.Tensor) -> bool:
    """Checks the states after one sequence, if a batch is longer than all before it.

    Args:
        lm: the model.
        sequences: token ids.
        prefixes: for each sequence the number of leading tokens that were read with other sequences.
        states: hidden states after the prefixes, shape (n, longest rest, d).

    Returns:
        Whether the batch is exact; if not, the model is read in a slower way from now on.
    """
    found, length = lm.training, max(prefixes) + states.shape[1]
    if length <= found.checked or found.reading == "single":
        return True
    if any(m.training and m.p > 0 for m in lm.model.modules() if isinstance(m, torch.nn.Dropout)):
        return True  # two passes differ by what is dropped: a pass without dropout is checked
    if lm.in_float32 and not torch.is_autocast_enabled(lm.device.type):
        # The one with the largest gap between prefix and rest, or the longest; and the shortest.
        lengths = list(map(len, sequences))
        gap = max(range(len(lengths)), key=lambda k: (max(prefixes) - prefixes[k], lengths[k]))
        with torch.no_grad():
            gaps = [
                difference(
                    output_layer(lm).logits(states[k, lengths[k] - prefixes[k] - 1][None], 1.0),
                    plain_logits(lm, sequences[k].tolist(), 1),
                )
                for k in {gap, lengths.index(min(lengths))}
            ]
        exact = max(gaps) <= TOLERANCE
    else:
        exact = _exact(miniature(lm), found.reading, length)
    if exact:
        found.checked = length
        return True
    found.reading = TRAINING_READINGS[TRAINING_READINGS.index(found.reading) + 1]
    warnings.warn(f"{lm.name} is trained in a slower way ({found.reading}): faster ones are not exact", stacklevel=2)
    return False


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
    if count == 1 or not lm.shares_prefixes:
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
    at_head = lm.training.form.at_head
    with training_kernels():
        if lm.training.reading == "single":
            single = [
                last_hidden(lm, at_head, input_ids=_padded([row], lm.device), use_cache=False)[0] for row in sequences
            ]
            return torch.nn.utils.rnn.pad_sequence(single, batch_first=True)
        ids = _padded([sequence[prefix:] for sequence, prefix in zip(sequences, prefixes, strict=True)], lm.device)
        if not any(prefixes):
            return last_hidden(lm, at_head, input_ids=ids, use_cache=False)
        # Read each distinct prefix once, into a cache.
        heads = [sequence[:prefix] for sequence, prefix in zip(sequences, prefixes, strict=True)]
        distinct = {head.tobytes(): head for head in heads}
        index = {key: k for k, key in enumerate(distinct)}
        cache = {lm.cache_argument: DynamicCache(config=lm.text_config)}
        last_hidden(lm, at_head, input_ids=_padded(list(distinct.values()), lm.device), use_cache=True, **cache)
        rows = torch.tensor([index[head.tobytes()] for head in heads], device=lm.device)
        # Give every sequence a row of the cache. A single prefix is expanded, which copies nothing; autograd sums the
        # gradients of both forms over the sequences.
        for layer in cache[lm.cache_argument].layers:
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
        positions = lengths + columns.to(lm.device)
        return last_hidden(
            lm, at_head, input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **cache
        )


def _padded(rows: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Returns token ids as int64, shape (n, longest), in which shorter rows repeat their last token."""
    # Not a padding token, about which transformers warns where there is no mask.
    width = max(map(len, rows))
    padded = [np.pad(row.astype(np.int64), (0, width - len(row)), mode="edge") for row in rows]
    return torch.from_numpy(np.stack(padded)).to(device)
