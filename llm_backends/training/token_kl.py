"""Log-probs of chosen tokens by a model and a reference, and the KL divergence between all that the two predict."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from ..local.causal_lm import CausalLM
from .token_logprobs import head_dtype, row_chunks


class OutputLayer(NamedTuple):
    """A linear map from last hidden states to logits."""

    weight: torch.Tensor
    """Shape (vocabulary, d)."""
    bias: torch.Tensor | None = None
    """Shape (vocabulary,)."""

    @classmethod
    def of(cls, lm: CausalLM) -> OutputLayer:
        """A model's own, without what pads it beyond the tokenizer: the sampler leaves that out as well."""
        vocabulary, bias = len(lm.tokenizer), getattr(lm.head, "bias", None)
        return cls(lm.head.weight[:vocabulary], None if bias is None else bias[:vocabulary])

    @property
    def trained(self) -> bool:
        """Whether it takes a gradient."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def to(self, dtype: torch.dtype) -> OutputLayer:
        """The same in another dtype."""
        return OutputLayer(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def logprobs(self, hidden: torch.Tensor, scale: float) -> torch.Tensor:
        """Of all tokens, shape (n, vocabulary), in float32 at least."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return (logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale).log_softmax(dim=-1)


class ComparedTokens(NamedTuple):
    """What a model and a reference say of the same tokens; each float32 (float64 of float64), shape (n,), in nats."""

    logprobs: torch.Tensor
    """Of the chosen tokens."""
    reference_logprobs: torch.Tensor
    """Likewise by the reference; without a gradient."""
    kls: torch.Tensor
    """KL(reference || model) over the whole vocabulary, where the token is chosen."""


class _FrozenHeads(torch.autograd.Function):
    """The comparison under a frozen output layer.

    With p the model's probabilities and q the reference's, the gradient of log p(y) by the hidden state is
    scale (W[y] - p W), that of KL(q || p) scale (p - q) W; the forward pass computes both chunk by chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: OutputLayer,
        reference_hidden: torch.Tensor,
        reference_head: OutputLayer,
        ids: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        weight, dtype = head.weight, torch.promote_types(hidden.dtype, torch.float32)
        chosen, chosen_reference, kls = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(3))
        slopes = hidden.new_empty((2, *hidden.shape)) if ctx.needs_input_grad[0] else None
        for rows in row_chunks(hidden, 2 * len(weight)):
            columns = ids[rows, None]
            logprobs = head.logprobs(hidden[rows], scale)
            references = reference_head.logprobs(reference_hidden[rows], scale)
            chosen[rows] = logprobs.gather(1, columns).squeeze(1)
            chosen_reference[rows] = references.gather(1, columns).squeeze(1).to(dtype)
            targets = references.exp()
            kls[rows] = (targets * references.sub_(logprobs)).sum(dim=-1).to(dtype)
            if slopes is not None:
                probabilities = logprobs.exp_()
                mean = probabilities.to(weight.dtype) @ weight
                slopes[0, rows] = ((weight[ids[rows]] - mean) * scale).to(slopes.dtype)
                # A difference of two products would lose in bfloat16 what is left of it while p is close to q.
                slopes[1, rows] = (probabilities.sub_(targets).to(weight.dtype) @ weight * scale).to(slopes.dtype)
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(chosen_reference)
        return chosen, chosen_reference, kls

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        both = torch.stack([gradients[0], gradients[2]]).unsqueeze(2).to(slopes.dtype)
        return (slopes * both).sum(dim=0), None, None, None, None, None


def compared_tokens(
    hidden: torch.Tensor,
    head: OutputLayer,
    reference_hidden: torch.Tensor,
    reference_head: OutputLayer,
    ids: torch.Tensor,
    scale: float = 1.0,
) -> ComparedTokens:
    """Compares the predictions of a model with those of a reference, without keeping a row of logits per token.

    Args:
        hidden: last hidden states of the model, shape (n, d), which take a gradient.
        head: the model's output layer; takes a gradient where it is trained.
        reference_hidden: shape (n, any), of the reference, at the same tokens.
        reference_head: the reference's output layer, over the same vocabulary; neither takes a gradient.
        ids: int64, shape (n,): the chosen tokens.
        scale: of both models' logits, 1 / temperature.
    """
    if not head.trained:
        dtype = head_dtype(hidden, head.weight)
        reference_head = reference_head.to(head_dtype(reference_hidden, reference_head.weight))
        with torch.autocast(hidden.device.type, enabled=False):
            return ComparedTokens(
                *_FrozenHeads.apply(hidden.to(dtype), head.to(dtype), reference_hidden, reference_head, ids, scale)
            )
    chunks = [
        checkpoint(
            _plain_heads,
            hidden[rows],
            head,
            reference_hidden[rows],
            reference_head,
            ids[rows],
            scale,
            use_reentrant=False,
        )
        for rows in row_chunks(hidden, 2 * len(head.weight))
    ]
    return ComparedTokens(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _plain_heads(
    hidden: torch.Tensor,
    head: OutputLayer,
    reference_hidden: torch.Tensor,
    reference_head: OutputLayer,
    ids: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logprobs = head.logprobs(hidden, scale)
    with torch.no_grad():
        references = reference_head.logprobs(reference_hidden, scale)
        targets = references.exp()
    chosen = ids[:, None]
    kls = (targets * (references - logprobs)).sum(dim=-1)
    return logprobs.gather(1, chosen).squeeze(1), references.gather(1, chosen).squeeze(1), kls
