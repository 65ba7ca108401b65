"""Log-probs of chosen tokens from hidden states, without keeping a row of logits per token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

CHUNK_LOGITS = 8_388_608
"""Logits (rows x vocabulary) in memory at once."""


def row_chunks(hidden: torch.Tensor, logits: int) -> Iterator[torch.Tensor]:
    """Row numbers of hidden states, int64, as many at once as :data:`CHUNK_LOGITS` allows.

    Args:
        hidden: shape (n, d).
        logits: that each row makes.
    """
    return iter(torch.arange(len(hidden), device=hidden.device).split(max(CHUNK_LOGITS // logits, 1)))


def head_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype of an output layer's product in a custom function, which autocast would leave alone."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class _FrozenHead(torch.autograd.Function):
    """Log-probs and entropies under a frozen output layer.

    The gradient of log p(y) by the hidden state is W[y] - p W, which the forward pass computes chunk by chunk while it
    has the probabilities at hand: neither logits nor probabilities are stored, and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor,
        scale: float,
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropies = torch.empty_like(logprobs)
        needs_gradient = ctx.needs_input_grad[0]
        slopes = torch.empty_like(hidden) if needs_gradient else None
        entropy_slopes = torch.empty_like(hidden) if needs_gradient and entropy_gradient else None
        for rows in row_chunks(hidden, len(weight)):
            chunk = hidden[rows]
            logits = torch.nn.functional.linear(chunk, weight, bias).float() * scale
            logits -= logits.logsumexp(dim=-1, keepdim=True)
            logprobs[rows] = logits.gather(1, ids[rows, None]).squeeze(1)
            probabilities = logits.exp()
            entropies[rows] = -torch.einsum("nv,nv->n", probabilities, logits)
            if slopes is not None:
                mean = probabilities.to(weight.dtype) @ weight
                slopes[rows] = ((weight[ids[rows]] - mean) * scale).to(slopes.dtype)
            if entropy_slopes is not None:
                logits += entropies[rows, None]
                entropy_slopes[rows] = (-(probabilities * logits).to(weight.dtype) @ weight * scale).to(hidden.dtype)
        ctx.slopes, ctx.entropy_slopes = slopes, entropy_slopes
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        by_logprob, by_entropy = gradients
        gradient = ctx.slopes * by_logprob.unsqueeze(1).to(ctx.slopes.dtype)
        if ctx.entropy_slopes is not None:
            gradient = gradient + ctx.entropy_slopes * by_entropy.unsqueeze(1).to(gradient.dtype)
        return gradient, None, None, None, None, None


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    scale: float = 1.0,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of chosen tokens and entropies of their distributions.

    Args:
        hidden: last hidden states, shape (n, d).
        weight: the output layer, shape (vocabulary, d).
        bias: shape (vocabulary,), or None.
        ids: int64, shape (n,): the chosen tokens.
        scale: of the logits, 1 / temperature.
        entropy_gradient: whether the entropies are differentiable.

    Returns:
        float32 log-probs and entropies in nats, each of shape (n,).
    """
    if not weight.requires_grad and (bias is None or not bias.requires_grad):
        dtype = head_dtype(hidden, weight)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return _FrozenHead.apply(hidden.to(dtype), weight.to(dtype), bias, ids, scale, entropy_gradient)
    logprobs, entropies = [], []
    for rows in row_chunks(hidden, len(weight)):
        both = torch.utils.checkpoint.checkpoint(
            _plain_head, hidden[rows], weight, bias, ids[rows], scale, use_reentrant=False
        )
        logprobs.append(both[0])
        entropies.append(both[1] if entropy_gradient else both[1].detach())
    return torch.cat(logprobs), torch.cat(entropies)


def _plain_head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias).float() * scale).log_softmax(dim=-1)
    return logits.gather(1, ids[:, None]).squeeze(1), -(logits.exp() * logits).sum(dim=-1)


def allowed_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    allowed: Sequence[np.ndarray],
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Likewise under constrained decoding: probabilities are those among the allowed tokens only.

    Args:
        hidden: as in :func:`token_logprobs`.
        weight: likewise.
        bias: likewise.
        ids: likewise.
        allowed: n int64 arrays, the allowed tokens at each position; each holds its chosen token.
        scale: likewise.

    Raises:
        ValueError: if a chosen token is not allowed.
    """
    width = max(map(len, allowed))
    table = torch.zeros((len(allowed), width), dtype=torch.long)
    real = torch.zeros((len(allowed), width), dtype=torch.bool)
    for row, tokens in enumerate(allowed):
        table[row, : len(tokens)] = torch.as_tensor(tokens)
        real[row, : len(tokens)] = True
    table, real = table.to(hidden.device), real.to(hidden.device)
    chosen = (table == ids[:, None]) & real
    if not bool(chosen.any(dim=1).all()):
        raise ValueError("a chosen token is not among the allowed ones of its position")
    with torch.autocast(hidden.device.type, enabled=False):  # few tokens: float32 costs nothing
        logits = torch.einsum("nd,nkd->nk", hidden.float(), weight[table].float())
        if bias is not None:
            logits = logits + bias[table].float()
        logprobs = (logits * scale).masked_fill(~real, float("-inf")).log_softmax(dim=-1)
        entropies = -(logprobs.exp() * logprobs.masked_fill(~real, 0.0)).sum(dim=-1)
        return logprobs.gather(1, chosen.int().argmax(dim=1, keepdim=True)).squeeze(1), entropies
