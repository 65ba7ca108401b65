"""Logits of chosen tokens and their logsumexp: the action values and the state value of soft Q-learning."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from .token_kl import OutputLayer
from .token_logprobs import head_dtype, row_chunks


class ChosenLogits(NamedTuple):
    """What an output layer says of chosen tokens; each float32 (float64 of float64), shape (n,)."""

    logprobs: torch.Tensor
    """In nats: the logit less the logsumexp, A(s, a) = Q(s, a) - V(s)."""
    logsumexps: torch.Tensor
    """Of all logits of the row, V(s) = log sum_a exp Q(s, a)."""

    @property
    def logits(self) -> torch.Tensor:
        """Of the chosen tokens, Q(s, a)."""
        return self.logprobs + self.logsumexps


class _FrozenHead(torch.autograd.Function):
    """Both under a frozen output layer.

    The gradient of the logsumexp by the hidden state is scale p W, that of log p(y) is scale (W[y] - p W); the forward
    pass computes both chunk by chunk while it has the probabilities p at hand.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: OutputLayer, ids: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight, dtype = head.weight, torch.promote_types(hidden.dtype, torch.float32)
        logprobs, logsumexps = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(2))
        slopes = hidden.new_empty((2, *hidden.shape)) if ctx.needs_input_grad[0] else None
        for rows in row_chunks(hidden, len(weight)):
            logits = _logits(hidden[rows], head, scale)
            logsumexps[rows] = logits.logsumexp(dim=-1)
            logits -= logsumexps[rows, None]
            logprobs[rows] = logits.gather(1, ids[rows, None]).squeeze(1)
            if slopes is not None:
                mean = logits.exp_().to(weight.dtype) @ weight
                slopes[0, rows] = ((weight[ids[rows]] - mean) * scale).to(slopes.dtype)
                slopes[1, rows] = (mean * scale).to(slopes.dtype)
        ctx.save_for_backward(slopes)
        return logprobs, logsumexps

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * torch.stack(gradients).unsqueeze(2).to(slopes.dtype)).sum(dim=0), None, None, None


def chosen_logits(hidden: torch.Tensor, head: OutputLayer, ids: torch.Tensor, scale: float = 1.0) -> ChosenLogits:
    """Log-probs of chosen tokens and the logsumexp of the logits, without keeping a row of logits per token.

    Args:
        hidden: last hidden states, shape (n, d), which take a gradient.
        head: the output layer; takes a gradient where it is trained.
        ids: int64, shape (n,): the chosen tokens.
        scale: of the logits, 1 / temperature.
    """
    if not head.trained:
        dtype = head_dtype(hidden, head.weight)
        with torch.autocast(hidden.device.type, enabled=False):
            return ChosenLogits(*_FrozenHead.apply(hidden.to(dtype), head.to(dtype), ids, scale))
    chunks = [
        checkpoint(_plain_head, hidden[rows], head, ids[rows], scale, use_reentrant=False)
        for rows in row_chunks(hidden, len(head.weight))
    ]
    return ChosenLogits(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _logits(hidden: torch.Tensor, head: OutputLayer, scale: float) -> torch.Tensor:
    """Of all tokens, shape (n, vocabulary), in float32 at least."""
    logits = torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale


def _plain_head(
    hidden: torch.Tensor, head: OutputLayer, ids: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = _logits(hidden, head, scale)
    logsumexps = logits.logsumexp(dim=-1)
    return logits.gather(1, ids[:, None]).squeeze(1) - logsumexps, logsumexps
