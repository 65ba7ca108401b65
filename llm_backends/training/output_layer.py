"""The output layer in training: log-probs and statistics of chosen tokens, without storing a row of logits per token.

Logits are computed for as many rows at once as :data:`CHUNK_LOGITS` allows, and dropped. If the output layer is frozen
(LoRA), the forward pass also computes the gradients by the hidden states, as it has the probabilities at hand: nothing
is computed twice. If it is trained, the backward pass computes the logits a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from ..local.causal_lm import CausalLM
from ..local.verification import ROUGH_TOLERANCE, TOLERANCE, difference, plain_logits, probe_rows

CHUNK_LOGITS = 8_388_608
"""Largest number of logits (rows x vocabulary) in memory at once."""


@dataclass(frozen=True)
class OutputForm:
    """What a model makes of its hidden states to get logits, besides the weights of its output layer."""

    at_head: bool = False
    """Whether the states are what the output layer gets, as those that the trunk returns are changed before it."""
    scale: float = 1.0
    """Constant that the model multiplies its logits by."""
    cap: float = 0.0
    """Bound c of soft-capped logits, c tanh(x / c); 0: they are not capped."""


def last_hidden(lm: CausalLM, at_head: bool, **arguments: Any) -> torch.Tensor:
    """Runs a model without its output layer and returns the states that the layer would get, shape (batch, new, d).

    Args:
        lm: the model.
        at_head: False: the states that the trunk returns; True: those that reach the output layer.
        **arguments: arguments of the forward pass.
    """
    if not at_head:
        return lm.trunk(**arguments).last_hidden_state
    states: list[torch.Tensor] = []

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        states.append(hidden)
        return hidden[..., :1]  # instead of logits, which would fill the memory

    lm.head.forward = keep
    try:
        lm.model(**arguments)
    finally:
        del lm.head.forward
    return states[0]


def find_output_form(lm: CausalLM) -> OutputForm:
    """Returns the form that gives the model's own logits.

    Raises:
        InputError: if none does.
    """
    ids = probe_rows(lm, 16)[0][0]
    rows = torch.tensor([ids], device=lm.device)
    logits = plain_logits(lm, ids, len(ids))
    numbers = [
        float(v) for v in vars(lm.text_config).values() if isinstance(v, int | float) and not isinstance(v, bool)
    ]
    # Soft caps are above the logits; one that is far above them changes nothing.
    caps = [0.0, *sorted({v for v in numbers if float(logits.abs().max()) <= v <= 100.0})]
    tolerance = TOLERANCE if lm.in_float32 else ROUGH_TOLERANCE
    for at_head in (False, True) if lm.head is not None else ():
        try:
            with torch.no_grad():
                hidden = last_hidden(lm, at_head, input_ids=rows, use_cache=False)
                raw = lm.head(hidden)[0, :, : lm.vocabulary].float()
        except Exception:  # of an architecture whose trunk is not the model without its head
            continue
        for cap in caps:
            target = cap * torch.atanh((logits / cap).clamp(-1 + 1e-6, 1 - 1e-6)) if cap else logits
            fitted = float((raw * target).sum() / (raw * raw).sum())
            # The constant is a number of the configuration, or its inverse.
            exact = [1.0, *numbers, *(1 / v for v in numbers if v)]
            scale = min(exact, key=lambda v: abs(v - fitted))
            made = _capped(raw * scale, cap)
            if difference(made, logits) <= tolerance:
                return OutputForm(at_head, scale, cap)
    raise InputError(f"{lm.name} changes its logits after the output layer in an unknown way: it cannot be trained")


def _capped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    return cap * torch.tanh(logits / cap) if cap else logits


class OutputLayer(NamedTuple):
    """A map from last hidden states to logits: linear, scaled, and capped where the model caps its logits."""

    weight: Tensor
    """Shape (vocabulary, d)."""
    bias: Tensor | None = None
    """Shape (vocabulary,)."""
    form: OutputForm = OutputForm()
    """What follows the linear map."""

    @classmethod
    def of(cls, lm: CausalLM, form: OutputForm) -> OutputLayer:
        """Returns a model's output layer without the padding beyond the tokenizer, as the sampler leaves it out too."""
        bias = getattr(lm.head, "bias", None)
        return cls(lm.head.weight[: lm.vocabulary], None if bias is None else bias[: lm.vocabulary], form)

    @property
    def trained(self) -> bool:
        """Whether the layer takes a gradient."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def to(self, dtype: torch.dtype) -> OutputLayer:
        """Returns the same layer in another dtype."""
        return self._replace(weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    def product_dtype(self, hidden: Tensor) -> torch.dtype:
        """Returns the dtype of the product with hidden states, as autocast does not act in a custom function."""
        device = hidden.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype

    def logits(self, hidden: Tensor, scale: float) -> Tensor:
        """Returns the logits of all tokens, shape (n, vocabulary), times ``scale``, in float32 at least."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not self.form.cap:
            return logits * (self.form.scale * scale)
        return _capped(logits * self.form.scale, self.form.cap) * scale

    def slopes(self, logits: torch.Tensor, scale: float) -> torch.Tensor:
        """Returns the derivatives of capped logits, as :meth:`logits` gives them, by weight times hidden state."""
        return (1 - (logits / (self.form.cap * scale)) ** 2) * (self.form.scale * scale)

    def logprobs(self, hidden: Tensor, scale: float, fused: bool) -> tuple[Tensor, Tensor]:
        """Returns log-probs of all tokens, shape (n, vocabulary), and logsumexps, shape (n,), in float32 at least.

        Args:
            hidden: last hidden states, shape (n, d).
            scale: factor that the logits are multiplied by.
            fused: whether log_softmax computes the log-probs, which differs from logits minus logsumexps in the last
                bits. Which of both a statistic is computed by is fixed, as trainings must repeat bit for bit.
        """
        logits = self.logits(hidden, scale)
        logsumexps = logits.logsumexp(dim=-1)
        if fused:
            return logits.log_softmax(dim=-1), logsumexps
        return logits - logsumexps[:, None] if logits.requires_grad else logits.sub_(logsumexps[:, None]), logsumexps


class _Statistic(Protocol):
    """A number computed from each row of log-probs, besides the log-prob of the chosen token."""

    differentiable: bool
    """Whether the number takes part in the gradient."""
    fused: bool
    """How :meth:`OutputLayer.logprobs` computes the log-probs."""
    logits_per_token: int
    """Rows of logits in memory per token: the model's and, where there is one, the reference's."""

    def values(self, logprobs: Tensor, probabilities: Tensor, logsumexps: Tensor, rows: Tensor) -> Tensor:
        """Returns the number of each row, shape (rows,); differentiable if gradients are enabled."""

    def logit_gradients(self, logprobs: Tensor, probabilities: Tensor, values: Tensor) -> Tensor:
        """Returns derivatives of the numbers by the logits, shape (rows, vocabulary); may overwrite ``logprobs``."""


class _Entropy:
    """Entropy H = -sum p log p; its derivative by the logits is -p (log p + H)."""

    logits_per_token = 1

    def __init__(self, differentiable: bool, trained_head: bool) -> None:
        self.differentiable, self.fused = differentiable, trained_head

    def values(self, logprobs: Tensor, probabilities: Tensor, logsumexps: Tensor, rows: Tensor) -> Tensor:
        if self.fused:
            return -(probabilities * logprobs).sum(dim=-1)
        return -torch.einsum("nv,nv->n", probabilities, logprobs)

    def logit_gradients(self, logprobs: Tensor, probabilities: Tensor, values: Tensor) -> Tensor:
        return -(probabilities * logprobs.add_(values[:, None]))


class _LogSumExp:
    """The logsumexp of the logits; its derivative by the logits is p."""

    differentiable = True
    fused = False
    logits_per_token = 1

    def values(self, logprobs: Tensor, probabilities: Tensor, logsumexps: Tensor, rows: Tensor) -> Tensor:
        return logsumexps

    def logit_gradients(self, logprobs: Tensor, probabilities: Tensor, values: Tensor) -> Tensor:
        return probabilities


class _Divergence:
    """KL(q || p) with q the probabilities of a reference; its derivative by the logits is p - q.

    Args:
        hidden: the reference's last hidden states, shape (n, any).
        head: the reference's output layer, over the same vocabulary.
        ids: int64, shape (n,): the chosen tokens.
        scale: factor that the reference's logits are multiplied by.
    """

    differentiable = True
    fused = True
    logits_per_token = 2

    def __init__(self, hidden: Tensor, head: OutputLayer, ids: Tensor, scale: float) -> None:
        self.hidden, self.head, self.ids, self.scale = hidden, head, ids, scale
        self.reference_logprobs = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        """Log-probs of the chosen tokens by the reference, filled in as the rows are read."""

    def values(self, logprobs: Tensor, probabilities: Tensor, logsumexps: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            references, _ = self.head.logprobs(self.hidden[rows], self.scale, self.fused)
            self.reference_logprobs[rows] = (
                references.gather(1, self.ids[rows, None]).squeeze(1).to(self.reference_logprobs.dtype)
            )
            self._targets = references.exp()
        return (self._targets * (references - logprobs)).sum(dim=-1)

    def logit_gradients(self, logprobs: Tensor, probabilities: Tensor, values: Tensor) -> Tensor:
        # Subtract before multiplying by W: while p is close to q, the difference of two products in bfloat16 would be
        # rounding noise.
        return probabilities - self._targets


class _FrozenHead(torch.autograd.Function):
    """Computes log-probs of chosen tokens and a statistic of their rows under a frozen output layer.

    With W the weight, the gradient of log p(y) by the hidden state is scale (W[y] - p W); that of a statistic with
    derivatives s by the logits is scale s W.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: OutputLayer, ids: Tensor, scale: float, statistic: _Statistic
    ) -> tuple[Tensor, Tensor]:
        weight, dtype = head.weight, torch.promote_types(hidden.dtype, torch.float32)
        chosen_logprobs, values = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(2))
        needs_gradient = ctx.needs_input_grad[0]
        # Gradients by the hidden states of the log-prob (0) and the statistic (1), which backward scales and adds.
        hidden_gradients = hidden.new_empty((1 + statistic.differentiable, *hidden.shape)) if needs_gradient else None
        for rows in _row_chunks(hidden, statistic.logits_per_token * len(weight)):
            logprobs, logsumexps = head.logprobs(hidden[rows], scale, statistic.fused)
            probabilities = logprobs.exp()
            chosen_logprobs[rows] = logprobs.gather(1, ids[rows, None]).squeeze(1)
            values[rows] = statistic.values(logprobs, probabilities, logsumexps, rows).to(dtype)
            if hidden_gradients is None:
                continue
            if head.form.cap:
                # The slope of the cap differs from logit to logit.
                slopes = head.slopes(logprobs + logsumexps[:, None], scale)
                chosen = torch.nn.functional.one_hot(ids[rows], len(weight)).to(logprobs.dtype)
                products = [((chosen - probabilities) * slopes).to(weight.dtype) @ weight]
                if statistic.differentiable:
                    by_logits = statistic.logit_gradients(logprobs, probabilities, values[rows])
                    products.append((by_logits * slopes).to(weight.dtype) @ weight)
                hidden_gradients[:, rows] = torch.stack(products).to(hidden_gradients.dtype)
                continue
            slope = head.form.scale * scale
            # p W, the mean weight under the model's distribution.
            mean = probabilities.to(weight.dtype) @ weight
            hidden_gradients[0, rows] = ((weight[ids[rows]] - mean) * slope).to(hidden_gradients.dtype)
            if statistic.differentiable:
                by_logits = statistic.logit_gradients(logprobs, probabilities, values[rows])
                # The derivatives of the logsumexp are the probabilities, whose product with W is known already.
                product = mean if by_logits is probabilities else by_logits.to(weight.dtype) @ weight
                hidden_gradients[1, rows] = (product * slope).to(hidden_gradients.dtype)
        ctx.save_for_backward(hidden_gradients)
        if not statistic.differentiable:
            ctx.mark_non_differentiable(values)
        return chosen_logprobs, values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (hidden_gradients,) = ctx.saved_tensors
        total = hidden_gradients[0] * gradients[0].unsqueeze(1).to(hidden_gradients.dtype)
        if len(hidden_gradients) > 1:
            total = total + hidden_gradients[1] * gradients[1].unsqueeze(1).to(hidden_gradients.dtype)
        return total, None, None, None, None


def _chosen_logprobs(
    hidden: Tensor, head: OutputLayer, ids: Tensor, scale: float, statistic: _Statistic
) -> tuple[Tensor, Tensor]:
    """Returns log-probs of the chosen tokens and a statistic of their rows, each of shape (n,), in float32 at least."""
    if not head.trained:
        dtype = head.product_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return _FrozenHead.apply(hidden.to(dtype), head.to(dtype), ids, scale, statistic)

    def plain(hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, logsumexps = head.logprobs(hidden, scale, statistic.fused)
        with torch.autocast(hidden.device.type, enabled=False):  # autocast would sum in bfloat16
            values = statistic.values(logprobs, logprobs.exp(), logsumexps, rows)
        chosen_logprobs = logprobs.gather(1, ids[rows, None]).squeeze(1)
        return chosen_logprobs, values if statistic.differentiable else values.detach()

    # Checkpointing drops the logits of each chunk and computes them again in the backward pass.
    size = statistic.logits_per_token * len(head.weight)
    chunks = [checkpoint(plain, hidden[rows], rows, use_reentrant=False) for rows in _row_chunks(hidden, size)]
    chosen_logprobs, values = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return chosen_logprobs, values


def _row_chunks(hidden: Tensor, logits: int) -> Iterator[Tensor]:
    """Yields row numbers, int64, as many at once as :data:`CHUNK_LOGITS` allows with ``logits`` logits per row."""
    return iter(torch.arange(len(hidden), device=hidden.device).split(max(CHUNK_LOGITS // logits, 1)))


def token_logprobs(
    hidden: Tensor, head: OutputLayer, ids: Tensor, scale: float = 1.0, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns log-probs of chosen tokens and entropies of their distributions.

    Args:
        hidden: last hidden states, shape (n, d).
        head: the output layer, which takes a gradient if it is trained.
        ids: int64, shape (n,): the chosen tokens.
        scale: factor that the logits are multiplied by, 1 / temperature.
        entropy_gradient: whether the entropies are differentiable.

    Returns:
        Log-probs and entropies in nats, each of shape (n,), float32 (float64 for float64 input).
    """
    return _chosen_logprobs(hidden, head, ids, scale, _Entropy(entropy_gradient, head.trained))


class ChosenLogits(NamedTuple):
    """Log-probs of chosen tokens and logsumexps, each float32 (float64 for float64 input), shape (n,).

    In soft Q-learning the logit is the action value Q(s, a) and the logsumexp the state value V(s).
    """

    logprobs: Tensor
    """Log-probs in nats: logit minus logsumexp, A(s, a) = Q(s, a) - V(s)."""
    logsumexps: Tensor
    """Logsumexps over all logits of the row, V(s) = log sum_a exp Q(s, a)."""

    @property
    def logits(self) -> Tensor:
        """Logits of the chosen tokens, Q(s, a)."""
        return self.logprobs + self.logsumexps


def chosen_logits(hidden: Tensor, head: OutputLayer, ids: Tensor, scale: float = 1.0) -> ChosenLogits:
    """Returns log-probs of chosen tokens and the logsumexps of the logits.

    Args:
        hidden: last hidden states, shape (n, d).
        head: the output layer, which takes a gradient if it is trained.
        ids: int64, shape (n,): the chosen tokens.
        scale: factor that the logits are multiplied by, 1 / temperature.
    """
    return ChosenLogits(*_chosen_logprobs(hidden, head, ids, scale, _LogSumExp()))


class ComparedTokens(NamedTuple):
    """Log-probs of a model and a reference, each float32 (float64 for float64 input), shape (n,), in nats."""

    logprobs: Tensor
    """Log-probs of the chosen tokens by the model."""
    reference_logprobs: Tensor
    """Log-probs of the chosen tokens by the reference, without a gradient."""
    kls: Tensor
    """KL(reference || model) over the whole vocabulary at the position of the token."""


def compared_tokens(
    hidden: Tensor,
    head: OutputLayer,
    reference_hidden: Tensor,
    reference_head: OutputLayer,
    ids: Tensor,
    scale: float = 1.0,
) -> ComparedTokens:
    """Compares the predictions of a model with those of a reference.

    Args:
        hidden: last hidden states of the model, shape (n, d), which take a gradient.
        head: the model's output layer, which takes a gradient if it is trained.
        reference_hidden: last hidden states of the reference at the same tokens, shape (n, any).
        reference_head: the reference's output layer, over the same vocabulary; neither takes a gradient.
        ids: int64, shape (n,): the chosen tokens.
        scale: factor that the logits of both are multiplied by, 1 / temperature.
    """
    reference_head = reference_head.to(reference_head.product_dtype(reference_hidden))
    divergence = _Divergence(reference_hidden.detach(), reference_head, ids, scale)
    logprobs, kls = _chosen_logprobs(hidden, head, ids, scale, divergence)
    # A copy, as the backward pass of a trained head computes the rows again and overwrites ``reference_logprobs``.
    return ComparedTokens(logprobs, divergence.reference_logprobs.clone(), kls)


def allowed_logprobs(
    hidden: Tensor, head: OutputLayer, ids: Tensor, allowed: Sequence[np.ndarray], scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Returns log-probs and entropies under constrained decoding: probabilities are those among the allowed tokens.

    Args:
        hidden: last hidden states, shape (n, d).
        head: the output layer.
        ids: int64, shape (n,): the chosen tokens.
        allowed: n int64 arrays, the allowed tokens at each position; each holds its chosen token.
        scale: factor that the logits are multiplied by, 1 / temperature.

    Returns:
        Log-probs and entropies in nats, each float32 of shape (n,), both differentiable.

    Raises:
        ValueError: if a chosen token is not allowed.
    """
    # Table of the allowed tokens, padded on the right; ``real`` masks the padding, whose id 0 may be a chosen token.
    width = max(map(len, allowed))
    table = torch.zeros((len(allowed), width), dtype=torch.long)
    real = torch.zeros((len(allowed), width), dtype=torch.bool)
    for row, tokens in enumerate(allowed):
        table[row, : len(tokens)] = torch.as_tensor(tokens)
        real[row, : len(tokens)] = True
    table, real = table.to(hidden.device), real.to(hidden.device)
    is_chosen = (table == ids[:, None]) & real
    if not bool(is_chosen.any(dim=1).all()):
        raise ValueError("a chosen token is not among the allowed ones of its position")
    with torch.autocast(hidden.device.type, enabled=False):  # few tokens: float32 costs nothing
        logits = torch.einsum("nd,nkd->nk", hidden.float(), head.weight[table].float())
        if head.bias is not None:
            logits = logits + head.bias[table].float()
        logits = _capped(logits * head.form.scale, head.form.cap)
        logprobs = (logits * scale).masked_fill(~real, float("-inf")).log_softmax(dim=-1)
        # 0 instead of -inf at the padding, as 0 times -inf is NaN.
        entropies = -(logprobs.exp() * logprobs.masked_fill(~real, 0.0)).sum(dim=-1)
        return logprobs.gather(1, is_chosen.int().argmax(dim=1, keepdim=True)).squeeze(1), entropies
