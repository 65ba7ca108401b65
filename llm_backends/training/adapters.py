"""LoRA adapters on one trunk, so that policy, value function and reward model share a model's frozen weights.

:class:`AdaptedTrunk` adds, switches and saves adapters. Their layers run in ``_LoraLinear``, with fewer passes over
activations than in peft.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from ..errors import InputError
from ..local.causal_lm import CausalLM
from .teacher_forcing import use_training_kernels


class _LoraLinear(torch.autograd.Function):
    """Computes x W' + bias + scale (x A') B' for a frozen W.

    Peft adds ``scale * B(A(x))`` to the layer's output in three operations, each over the whole output, and autograd
    sums three gradients of the input. Here the low-rank products are added in place. The mathematics is the same; in
    bfloat16 there is one rounding fewer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = linear(rows, a) * scale  # the scale costs least on the low-rank side
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scale = scale
        # The result is no view of the products, as autograd would not let a model change a view in place.
        output = rows.new_empty((*x.shape[:-1], len(weight)))
        products = output.view(-1, len(weight))
        if bias is None:
            torch.mm(rows, weight.t(), out=products)
        else:
            torch.addmm(bias, rows, weight.t(), out=products)
        products.addmm_(low, b.t())
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, weight, a, b, low = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        # Gradient of the low-rank activations x A'. ``low`` holds the scale already, as B's gradient needs it. W and
        # the bias are frozen: no gradient.
        low_gradient = (gradient @ b) * ctx.scale
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (gradient @ weight).addmm_(low_gradient, a).view(*gradients[0].shape[:-1], -1)
        return x_gradient, None, None, low_gradient.t() @ rows, (low.t() @ gradient).t(), None


def _forward(layer: Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Runs a LoRA layer by :class:`_LoraLinear` if one plain adapter is active, else as peft does."""
    base, active = layer.get_base_layer(), layer.active_adapters
    unsupported = args or kwargs or layer.disable_adapters or layer.merged or layer.lora_variant
    if unsupported or len(active) != 1 or active[0] not in layer.lora_A:
        return type(layer).forward(layer, x, *args, **kwargs)
    a, b, dropout = (part[active[0]] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    if a.bias is not None or b.bias is not None or (dropout.training and not isinstance(dropout, torch.nn.Identity)):
        return type(layer).forward(layer, x)
    # The casts that autocast would make, which a custom function has to make itself.
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight  # Conv1D stores W transposed
    parts = (None if part is None else part.to(dtype) for part in (x, weight, base.bias, a.weight, b.weight))
    return _LoraLinear.apply(*parts, layer.scaling[active[0]])


def use_lora_kernel(model: torch.nn.Module) -> None:
    """Makes the linear LoRA layers of a model with frozen weights run by :class:`_LoraLinear`.

    Layers with active dropout, variants of LoRA and merged weights still run as in peft.
    """
    for layer in model.modules():
        if type(layer) is Linear and type(layer.get_base_layer()) in (torch.nn.Linear, Conv1D):
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]


@dataclass(frozen=True)
class LoraSettings:
    """Settings of the LoRA adapters, or of training all weights."""

    rank: int = 16
    """Rank of the LoRA adapters; 0: train all weights of the model instead."""
    alpha: float = 32.0
    """Numerator of the scale of the LoRA adapters, alpha / rank (see ``rslora``)."""
    dropout: float = 0.0
    """Dropout on the input of the LoRA adapters; above 0 the probability ratio before the first step is not 1."""
    targets: str = "all-linear"
    """Comma-separated names of the layers that get a LoRA adapter; all-linear: every linear layer but the output."""
    rslora: bool = False
    """Whether the scale of the LoRA adapters is alpha / sqrt(rank) instead of alpha / rank."""

    def config(self) -> LoraConfig:
        """Returns these settings as peft's configuration."""
        # Biases stay frozen: as peft notes, trained ones would stay active in the reference, where adapters are off.
        targets = self.targets if self.targets == "all-linear" else self.targets.split(",")
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=targets,
            use_rslora=self.rslora,
            bias="none",
            task_type="CAUSAL_LM",
        )


DEFAULT_LORA = LoraSettings()


STATE_SPACE = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Model types whose kernels read the weights of some layers directly, so that peft refuses adapters on these."""


def _unadaptable(model: Any) -> list[str] | None:
    """Returns the linear layers of a model that take no adapters, by name; None if all do."""
    # Some architectures' own kinds of linear layers (routers, grouped projections) return something else than a product
    # to which an adapter could be added.
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and type(module).__module__.startswith("transformers.models.")
        and not _is_product(module)
    ]
    if getattr(model.config, "model_type", "") in STATE_SPACE:
        names += ["out_proj", "conv1d"]
    return names or None


def _is_product(layer: torch.nn.Linear) -> bool:
    """Returns whether a layer maps a row of its inputs to a row of its outputs."""
    try:
        with torch.no_grad():
            output = layer(layer.weight.new_zeros((1, layer.in_features)))
    except Exception:  # whatever a layer for inputs of another shape raises
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, layer.out_features)


class AdaptedTrunk:
    """A causal language model and its adapters, of which at most one is active at a time.

    Get it from :meth:`of`, as a model must have only one trunk. Outside :meth:`active` no adapter is active.

    Args:
        lm: the model, which is changed in place: its weights are frozen, and its layers get adapters.
    """

    def __init__(self, lm: CausalLM) -> None:
        self.lm = lm
        self._peft: PeftModel | None = None
        self._whole = ""
        use_training_kernels(lm.model)
        lm.model.requires_grad_(False)

    @classmethod
    def of(cls, model: CausalLM | AdaptedTrunk) -> AdaptedTrunk:
        """Returns the trunk of a model, which is created on the first call."""
        if isinstance(model, AdaptedTrunk):
            return model
        with model.lock:
            if model.adapted is None:
                model.adapted = cls(model)
        return model.adapted

    @property
    def names(self) -> list[str]:
        """Names of the adapters, sorted."""
        return [] if self._peft is None else sorted(self._peft.peft_config)

    def train_whole(self, name: str) -> None:
        """Makes all weights of the model trainable, for one owner.

        Args:
            name: name of the owner, for error messages.

        Raises:
            InputError: if the model has adapters or another owner.
        """
        if self.names or self._whole:
            others = ", ".join(self.names) or self._whole
            raise InputError(
                f"{self.lm.name} is shared with {others}, so {name} cannot train all its weights: set a LoRA rank "
                "above 0, or load the model a second time"
            )
        self._whole = name
        self.lm.model.requires_grad_(True)

    def add(self, name: str, lora: LoraSettings) -> None:
        """Adds an adapter, whose initial weights leave the model's outputs as they are.

        Args:
            name: name of the adapter.
            lora: its settings. Initial weights are drawn from torch's global generator.

        Raises:
            InputError: if the name is taken, or all weights of the model have an owner that trains them.
        """
        if self._whole:
            raise InputError(
                f"all weights of {self.lm.name} are trained by {self._whole}: load the model a second time"
            )
        if name in self.names:
            raise InputError(
                f"{self.lm.name} has an adapter {name!r} already: load the model a second time, or use another name"
            )
        self._check_targets(lora)
        # The lock keeps other threads from running the model while its layers are replaced.
        with self.lm.lock, warnings.catch_warnings():
            # Peft uses a deprecated name of transformers, which the user cannot change.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)  # set for Conv1D by peft itself
            trained = [(p, p.requires_grad) for p in self.lm.model.parameters()]
            config = lora.config()
            if lora.targets == "all-linear":
                config.exclude_modules = _unadaptable(self.lm.model)
            try:
                if self._peft is None:
                    self._peft = get_peft_model(self.lm.model, config, adapter_name=name)
                else:
                    self._peft.add_adapter(name, config)
            except ValueError as error:
                reason = " ".join(str(error).split())
                raise InputError(f"{self.lm.name} takes no adapters on targets={lora.targets!r}: {reason}") from error
            # Peft freezes the other adapters, which may be in training.
            for parameter, flag in trained:
                parameter.requires_grad_(flag)
            use_lora_kernel(self.lm.model)
            self._switch(None)

    def _check_targets(self, lora: LoraSettings) -> None:
        """Raises an InputError for adapters on the output layer or the embeddings, as scores would leave them out."""
        if lora.targets == "all-linear":  # which leaves both out
            return
        model, targets = self.lm.model, lora.targets.split(",")
        for part, words in (
            (model.get_output_embeddings(), "output layer"),
            (model.get_input_embeddings(), "embeddings"),
        ):
            name = next((name for name, module in model.named_modules() if module is part), "")
            if any(name == target or name.endswith(f".{target}") for target in targets):
                raise InputError(
                    f"targets={lora.targets!r} puts an adapter on {name}, the {words} of {self.lm.name}: leave it "
                    "out, or train all weights (rank 0)"
                )

    def parameters(self, *names: str) -> dict[str, torch.nn.Parameter]:
        """Makes the weights of adapters trainable and returns them by name.

        Args:
            names: names of the adapters; after :meth:`train_whole` all weights of the model are returned instead.
        """
        marks = [f".{name}." for name in names]
        named = {
            name: parameter
            for name, parameter in self.lm.model.named_parameters()
            if self._whole or any(mark in name for mark in marks)
        }
        for parameter in named.values():
            parameter.requires_grad_(True)
        return named

    def freeze(self, name: str) -> None:
        """Freezes the weights of an adapter."""
        for parameter in self.parameters(name).values():
            parameter.requires_grad_(False)

    @contextmanager
    def active(self, name: str | None, dropout: bool = False) -> Iterator[CausalLM]:
        """Locks the model for this thread and activates an adapter within the block; after it none is active.

        Args:
            name: name of the adapter; None: no adapter.
            dropout: whether the adapter's dropout is on.
        """
        with self.lm.lock:
            if name is None or self._peft is None:
                yield self.lm
                return
            self._switch(name, dropout)
            try:
                yield self.lm
            finally:
                self._switch(None)

    def _switch(self, name: str | None, dropout: bool = False) -> None:
        """Activates an adapter (None: no adapter) in all layers.

        Peft's own switches also set ``requires_grad``, which must not change between a forward and its backward pass.
        """
        for layer in self.lm.model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer._disable_adapters = name is None
                layer.lora_dropout.train(dropout)  # type: ignore[attr-defined]
                if name is not None:
                    layer._active_adapter = [name]

    # --- weights -----------------------------------------------------------------------------------------------------

    def weights(self, name: str) -> dict[str, Tensor]:
        """Returns a copy of an adapter's weights, by their names in peft."""
        return {k: v.clone() for k, v in get_peft_model_state_dict(self._adapted(), adapter_name=name).items()}

    def set_weights(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Replaces an adapter's weights.

        Args:
            name: name of the adapter.
            weights: new weights by their names in peft.

        Raises:
            InputError: if the weights belong to other layers.
        """
        if set(weights) != set(get_peft_model_state_dict(self._adapted(), adapter_name=name)):
            raise InputError(f"these weights are of other layers than those of adapter {name!r} on {self.lm.name}")
        set_peft_model_state_dict(self._adapted(), dict(weights), adapter_name=name)
        self._switch(None)

    def save(self, folder: str | Path, names: Sequence[str]) -> None:
        """Writes each adapter to ``FOLDER/NAME``, in peft's format as safetensors."""
        self._adapted().save_pretrained(str(folder), selected_adapters=list(names))

    def load(self, folder: str | Path, name: str) -> None:
        """Reads an adapter's weights from ``FOLDER/NAME``.

        Raises:
            InputError: if the weights belong to other layers.
            OSError: if there is no such file.
            safetensors.SafetensorError: if the file is broken.
        """
        path = Path(folder) / name / "adapter_model.safetensors"
        try:
            self.set_weights(name, load_file(path, device=str(self.lm.device)))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def _adapted(self) -> PeftModel:
        """Returns the peft model; raises :class:`InputError` if there are no adapters."""
        if self._peft is None:
            raise InputError(f"{self.lm.name} has no adapters")
        return self._peft


def open_model(
    model: str | CausalLM | AdaptedTrunk, lora: LoraSettings, dtype: str, device: str
) -> tuple[CausalLM, str]:
    """Returns the model to put adapters on, and its name.

    Args:
        model: ``"embedded"``, a local path or a hub id: a new copy is loaded, not the one that backends share, as
            training changes it; or a live model.
        lora: settings of the adapters; at rank 0, where all weights are trained, the weights are loaded in float32.
        dtype: dtype of the weights at other ranks.
        device: torch device; ``"auto"``: a GPU if there is one, else the CPU.
    """
    if not isinstance(model, str):
        lm = model.lm if isinstance(model, AdaptedTrunk) else model
        return lm, lm.name
    path = model
    if model == "embedded":
        from ..local.loading import embedded_model_path

        path = embedded_model_path()
    return CausalLM.from_pretrained(path, dtype if lora.rank else "float32", device), model


def load_all_weights(model: Any, folder: str | Path) -> None:
    """Reads all weights of a model from ``model.safetensors`` in a folder.

    Raises:
        InputError: if the weights belong to other layers.
    """
    weights = load_file(Path(folder) / "model.safetensors")
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    state = model.state_dict()
    # Tied weights are saved once, so a weight counts as read if any name of its memory is in the file.
    loaded = {state[name].data_ptr() for name in weights if name in state}
    if unexpected or any(weight.data_ptr() not in loaded for weight in state.values()):
        raise InputError(f"the model in {folder} has other layers than this one")


def autocast(lm: CausalLM, dtype: str) -> Any:
    """Returns a context in which a model computes in ``dtype`` while its trained weights stay in float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(lm.device.type, dtype=getattr(torch, dtype))
