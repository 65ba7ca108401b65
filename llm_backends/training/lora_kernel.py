"""The forward and backward pass of a LoRA layer with fewer passes over its activations than peft's own.

Peft adds ``scale * B(A(x))`` to the layer's output in three operations, each over the whole output, and autograd sums
three gradients of the input. Here the low-rank products are added in place. The mathematics is the same; in bfloat16
one rounding fewer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D


class _LoraLinear(torch.autograd.Function):
    """x W' + bias + (x A') B' of a frozen W; ``scale`` is part of B's product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = linear(rows, a) * scale
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scale = scale
        return linear(rows, weight, bias).addmm_(low, b.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        rows, weight, a, b, low = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        behind = (gradient @ b) * ctx.scale
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (gradient @ weight).addmm_(behind, a).view(*gradients[0].shape[:-1], -1)
        return x_gradient, None, None, behind.t() @ rows, (low.t() @ gradient).t(), None


def _forward(layer: Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    base, active = layer.get_base_layer(), layer.active_adapters
    others = args or kwargs or layer.disable_adapters or layer.merged or layer.lora_variant
    if others or len(active) != 1 or active[0] not in layer.lora_A:
        return type(layer).forward(layer, x, *args, **kwargs)
    a, b, dropout = (part[active[0]] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    if a.bias is not None or b.bias is not None or (dropout.training and not isinstance(dropout, torch.nn.Identity)):
        return type(layer).forward(layer, x)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    parts = (None if part is None else part.to(dtype) for part in (x, weight, base.bias, a.weight, b.weight))
    return _LoraLinear.apply(*parts, layer.scaling[active[0]])


def use_lora_kernel(model: torch.nn.Module) -> None:
    """Gives every linear LoRA layer of a model with frozen weights this pass; dropout and variants stay peft's."""
    for layer in model.modules():
        if type(layer) is Linear and type(layer.get_base_layer()) in (torch.nn.Linear, Conv1D):
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
