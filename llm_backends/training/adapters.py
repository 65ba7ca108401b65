"""LoRA adapters on one trunk: policy, value function and reward model share a model's frozen weights."""

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
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from ..errors import InputError
from ..local.causal_lm import CausalLM
from ..local.loading import computes_in_bfloat16
from .teacher_forcing import use_training_kernels


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


@dataclass(frozen=True)
class LoraSettings:
    """Which weights are trained, and how."""

    rank: int = 16
    """Rank of the adapters; 0 trains all weights of the model instead."""
    alpha: float = 32.0
    """Numerator of the adapters' scale."""
    dropout: float = 0.0
    """Dropout on the adapters' input; above 0 the ratio before the first optimiser step is not 1."""
    targets: str = "all-linear"
    """Names of the layers that get an adapter, comma-separated; all-linear for every linear layer but the output."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""

    def config(self) -> LoraConfig:
        """The same for peft. Biases stay frozen: trained ones would stay active in the reference (peft's own note)."""
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


class AdaptedTrunk:
    """A causal language model and the adapters on it, of which one or none is active at a time.

    Get it from :meth:`of`: a model has one trunk, whoever asks. Outside :meth:`active` no adapter acts.

    Args:
        lm: the model, which is changed in place: its weights are frozen, its layers get adapters.
    """

    def __init__(self, lm: CausalLM) -> None:
        self.lm = lm
        self._peft: PeftModel | None = None
        self._whole = ""
        use_training_kernels(lm.model)
        lm.model.requires_grad_(False)

    @classmethod
    def of(cls, model: CausalLM | AdaptedTrunk) -> AdaptedTrunk:
        """The trunk of a model, the one it has already or a new one."""
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
        """Hands all weights to one owner, who trains them.

        Raises:
            InputError: if there are adapters, or another owner.
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
        """Puts an adapter on the trunk; its initial weights come from torch's global generator, and change nothing yet.

        Raises:
            InputError: if the name is taken, or somebody trains all weights of the model.
        """
        if self._whole:
            raise InputError(
                f"all weights of {self.lm.name} are trained by {self._whole}: load the model a second time"
            )
        if name in self.names:
            raise InputError(
                f"{self.lm.name} has an adapter {name!r} already: load the model a second time, or use another name"
            )
        with self.lm.lock, warnings.catch_warnings():
            # Peft asks transformers for something by its old name; there is nothing a user could do about it.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            trained = [(p, p.requires_grad) for p in self.lm.model.parameters()]
            if self._peft is None:
                self._peft = get_peft_model(self.lm.model, lora.config(), adapter_name=name)
            else:
                self._peft.add_adapter(name, lora.config())
            for parameter, flag in trained:  # peft freezes other adapters, whose owners may be in training
                parameter.requires_grad_(flag)
            use_lora_kernel(self.lm.model)
            self._switch(None)

    def parameters(self, *names: str) -> dict[str, torch.nn.Parameter]:
        """The weights of adapters (of the whole model where :meth:`train_whole` was called) by name, made trainable."""
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
        """Makes an adapter's weights untrainable."""
        for parameter in self.parameters(name).values():
            parameter.requires_grad_(False)

    @contextmanager
    def active(self, name: str | None, dropout: bool = False) -> Iterator[CausalLM]:
        """The model under an adapter, or without any (None), for this thread alone; afterwards it has none.

        Args:
            name: of the adapter.
            dropout: whether its dropout acts.
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
        """Switches the adapter layers. Peft's own switches would also set ``requires_grad`` before a backward pass."""
        for layer in self.lm.model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer._disable_adapters = name is None
                layer.lora_dropout.train(dropout)  # type: ignore[attr-defined]
                if name is not None:
                    layer._active_adapter = [name]

    # --- weights -----------------------------------------------------------------------------------------------------

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """A copy of an adapter's weights, by peft's names."""
        return {k: v.clone() for k, v in get_peft_model_state_dict(self._adapted(), adapter_name=name).items()}

    def set_weights(self, name: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Replaces an adapter's weights.

        Raises:
            InputError: if they are of other layers.
        """
        if set(weights) != set(get_peft_model_state_dict(self._adapted(), adapter_name=name)):
            raise InputError(f"these weights are of other layers than those of adapter {name!r} on {self.lm.name}")
        set_peft_model_state_dict(self._adapted(), dict(weights), adapter_name=name)
        self._switch(None)

    def save(self, folder: str | Path, names: Sequence[str]) -> None:
        """Writes adapters in peft's own format, as safetensors, each into ``FOLDER/NAME``."""
        self._adapted().save_pretrained(str(folder), selected_adapters=list(names))

    def load(self, folder: str | Path, name: str) -> None:
        """Reads an adapter's weights from ``FOLDER/NAME``.

        Raises:
            InputError: if they are of other layers.
            OSError: if there is no such file.
            safetensors.SafetensorError: if it is broken.
        """
        path = Path(folder) / name / "adapter_model.safetensors"
        try:
            self.set_weights(name, load_file(path, device=str(self.lm.device)))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def _adapted(self) -> PeftModel:
        if self._peft is None:
            raise InputError(f"{self.lm.name} has no adapters")
        return self._peft


def open_model(
    model: str | CausalLM | AdaptedTrunk, lora: LoraSettings, dtype: str, device: str
) -> tuple[CausalLM, str]:
    """The model to put adapters on, and its name.

    Args:
        model: ``"embedded"``, a local path or hub id, which is loaded anew and not shared with backends; or a live one.
        lora: at rank 0, where all weights are trained, they are loaded in float32.
        dtype: of the weights else.
        device: ``auto`` takes a GPU where there is one.
    """
    if not isinstance(model, str):
        lm = model.lm if isinstance(model, AdaptedTrunk) else model
        return lm, lm.name
    path = model
    if model == "embedded":
        from ..local.loading import embedded_model_path

        path = embedded_model_path()
    return CausalLM.from_pretrained(path, dtype if lora.rank else "float32", device), model


def load_whole(model: Any, folder: str | Path) -> None:
    """Reads all weights of a model from ``model.safetensors`` in a folder.

    Raises:
        InputError: if they are of other layers.
    """
    weights = load_file(Path(folder) / "model.safetensors")
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    here = model.state_dict()
    read = {here[name].data_ptr() for name in weights if name in here}
    if unexpected or any(weight.data_ptr() not in read for weight in here.values()):  # tied weights are saved once
        raise InputError(f"the model in {folder} has other layers than this one")


def training_dtype(dtype: str, device: str) -> str:
    """The dtype that ``auto`` stands for: bfloat16 on hardware that computes in it, else float32."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if computes_in_bfloat16(device) else "float32"


def autocast(lm: CausalLM, dtype: str) -> Any:
    """The context in which a model computes in ``dtype`` while its trained weights stay in float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(lm.device.type, dtype=getattr(torch, dtype))
