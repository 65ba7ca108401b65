"""The language-model policy: one trunk, on which policy, reference and value function are adapters and heads.

:class:`LanguageModelPolicy` generates responses (:meth:`~LanguageModelPolicy.generate`) and scores them for training
(:meth:`~LanguageModelPolicy.score`). :class:`PolicyBackend` makes a policy a backend.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...llm_backends import BackendError, Completion, Prompt, Sampling
from ...llm_backends.base import Result
from ...llm_backends.errors import InputError
from ...llm_backends.local.backend import TransformersBackend
from ...llm_backends.local.causal_lm import CausalLM
from ...llm_backends.local.loading import embedded_model_path, quiet_loading, resolved_dtype
from ...llm_backends.local.sampling import Choices, generate
from ...llm_backends.local.tokenization import LoadedTokenizer, Tokenizer
from ...llm_backends.training.adapters import (
    DEFAULT_LORA,
    AdaptedTrunk,
    LoraSettings,
    autocast,
    load_all_weights,
    open_model,
)
from ...llm_backends.training.output_layer import (
    ComparedTokens,
    allowed_logprobs,
    compared_tokens,
    token_logprobs,
)
from ...llm_backends.training.teacher_forcing import output_layer, response_hidden, training_pass

__all__ = [
    "POLICY",
    "SETTINGS",
    "VALUE",
    "LanguageModelPolicy",
    "LoraSettings",
    "PolicyBackend",
    "TokenScores",
    "ValueFunction",
]

POLICY, VALUE = "policy", "value"
SETTINGS, HEAD = "policy.json", "value_head.safetensors"

ValueFunction = Literal["shared", "own_adapter", "none"]


@dataclass
class TokenScores:
    """Scores of responses by the policy, flat over the tokens of all responses, one response after the other."""

    logprobs: torch.Tensor
    """Log-probs of the tokens at the policy's temperature and under its constraints, in nats; float32, shape
    (tokens,)."""
    entropies: torch.Tensor
    """Entropies of the distributions that the tokens were chosen from, in nats; float32, shape (tokens,)."""
    values: torch.Tensor | None
    """V of the states in which the tokens were chosen, float32, shape (tokens,); None without a value function, or if
    values were not asked for."""


class LanguageModelPolicy:
    """A causal language model that acts, token by token.

    Args:
        model: ``"embedded"``, a local path or hub id, a live
            :class:`~instructgym.llm_backends.local.causal_lm.CausalLM` (which is then changed in place), or a trunk
            that may already have other adapters, for example those of a reward model.
        lora: settings of the adapters; at rank 0 all weights of the model are trained.
        value: the value function. ``shared``: a linear head on the policy's hidden states; ``own_adapter``: a linear
            head on the hidden states of a second adapter; ``none``: there is none.
        reference: the reference policy. ``base``: the model as it was loaded; ``none``: there is none.
            :meth:`freeze_reference` replaces it.
        temperature: temperature of the policy's distribution; log-probs and ratios are those at this temperature.
        dtype: ``float32``; ``bfloat16``: frozen weights in bfloat16 and autocast, trained weights in float32; ``auto``:
            bfloat16 if the hardware computes in it, else float32.
        device: torch device; ``auto``: a GPU if there is one, else the CPU.
        seed: seed of the adapters' initial weights.

    Raises:
        InputError: if an argument is out of range, or if the model cannot be loaded, has no tokenizer, has a policy
            already, or has logits that are no known function of its hidden states.
    """

    def __init__(
        self,
        model: str | CausalLM | AdaptedTrunk = "embedded",
        lora: LoraSettings = DEFAULT_LORA,
        value: ValueFunction = "shared",
        reference: Literal["base", "none"] = "base",
        temperature: float = 1.0,
        dtype: str = "auto",
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        if value not in ("shared", "own_adapter", "none") or reference not in ("base", "none"):
            raise InputError(
                f"value must be shared, own_adapter or none and reference base or none, got {value!r}, {reference!r}"
            )
        if value == "own_adapter" and not lora.rank:
            raise InputError("value='own_adapter' needs adapters: set a LoRA rank")
        if temperature <= 0:
            raise InputError(f"temperature must be above 0, got {temperature}")
        dtype = resolved_dtype(dtype, device)
        self.lora, self.value, self.reference, self.temperature, self.dtype = lora, value, reference, temperature, dtype
        self.lm, self.model_name = open_model(model, lora, dtype, device)
        training_pass(self.lm)  # refuses a model that cannot be trained, before it is changed
        self.trunk = AdaptedTrunk.of(self.lm)
        self._reference_lm: CausalLM | None = None
        self._frozen: set[str] = set()
        with quiet_loading():
            torch.manual_seed(seed)
            if lora.rank:
                for name in self._trained_adapters():
                    self.trunk.add(name, lora)
            else:
                self.trunk.train_whole(POLICY)
                # Without adapters the base model changes in training, so the reference needs weights of its own.
                if reference == "base":
                    self._reference_lm = frozen_copy(self.lm)
            # V is 0 for every state at first: advantages start as sums of rewards, without the noise of a random
            # head, and the value loss sends no gradient into the trunk before the head has learned something.
            self.value_head = torch.nn.Linear(self.lm.head.weight.shape[1], 1, device=self.lm.device)
            torch.nn.init.zeros_(self.value_head.weight)
            torch.nn.init.zeros_(self.value_head.bias)

    def _trained_adapters(self) -> list[str]:
        """Returns the names of the trained adapters: the policy's, and the value function's if it has one."""
        return [POLICY, VALUE] if self.value == "own_adapter" else [POLICY]

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, which the env that the policy acts in must have as well."""
        return LoadedTokenizer(self.lm.tokenizer, self.model_name, self.lm.context_length, self.lm.eos_token_ids)

    # --- what is trained ---------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Returns the trained weights by name, including those of the value head."""
        named = self.trunk.parameters(*self._trained_adapters())
        if self.value != "none":
            named |= {f"value_head.{name}": p for name, p in self.value_head.named_parameters()}
        return named

    def clear_prefix_cache(self) -> None:
        """Empties the cache of prompt prefixes; must be called after the weights have changed."""
        self.lm.prefix_cache.clear()

    # --- acting ------------------------------------------------------------------------------------------------------

    @contextmanager
    def adapter(self, name: str | None, dropout: bool = False) -> Iterator[CausalLM]:
        """Locks the model for this thread and activates an adapter within the block; after it none is active.

        Args:
            name: name of the adapter; None: no adapter, which is the base model.
            dropout: whether the adapter's dropout is on.
        """
        with self.trunk.active(name, dropout) as lm:
            # Without adapters (rank 0) any name but POLICY stands for the frozen copy that is the reference.
            yield self._reference_lm if name != POLICY and self._reference_lm is not None else lm

    def generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        sampling: Sampling | Sequence[Sampling],
        choices: Sequence[Choices | None] | None = None,
        eos: frozenset[int] | None = None,
    ) -> list[list[Completion]]:
        """Samples completions of prompts of token ids.

        Args:
            prompts: n sequences of token ids.
            sampling: sampling parameters, the same for all prompts or one set per prompt; their temperature is used,
                not the policy's.
            choices: allowed responses of each prompt, or None for free generation; None: free generation for all.
            eos: ids of the tokens that end a completion; None: the model's own.

        Returns:
            n lists of completions, as :func:`~instructgym.llm_backends.local.sampling.generate` returns them, with
            log-probs at the temperature of sampling.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        with self.adapter(POLICY) as lm, autocast(self.lm, self.dtype):
            self.clear_prefix_cache()  # prefixes of another adapter, or of the bare model
            completions = generate(
                lm, [[int(t) for t in p] for p in prompts], samplings, choices, eos, tempered_logprobs=True
            )
            self.clear_prefix_cache()
        return completions

    # --- scoring -----------------------------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[np.ndarray],
        responses: Sequence[np.ndarray],
        allowed: Sequence[Sequence[np.ndarray] | None],
        values: bool = True,
        entropy_gradient: bool = False,
    ) -> TokenScores:
        """Returns log-probs, entropies and values of responses, in one pass by teacher forcing.

        They are part of the autograd graph, and dropout is on, if gradients are enabled.

        Args:
            prompts: n int arrays of token ids.
            responses: n int arrays of token ids, none empty.
            allowed: for each response the allowed tokens at each position, or None if any token was allowed.
            values: whether to compute values, if the policy has a value function.
            entropy_gradient: whether entropies are differentiable.
        """
        # 1. One pass over prompts and responses: the hidden states that predict the response tokens, then the output
        # layer, restricted to the allowed tokens as in sampling.
        training = torch.is_grad_enabled()
        with self.adapter(POLICY, training) as lm, autocast(self.lm, self.dtype):
            hidden = response_hidden(lm, prompts, responses)
            logprobs, entropies = self._token_scores(lm, hidden, responses, allowed, entropy_gradient)
        # 2. Values, by the head on the same hidden states, or on those of a second pass with the value adapter.
        estimates = None
        if values and self.value == "shared":
            estimates = self._values(hidden)
        elif values and self.value == "own_adapter":
            with self.adapter(VALUE, training) as lm, autocast(self.lm, self.dtype):
                hidden = response_hidden(lm, prompts, responses)
            estimates = self._values(hidden)
        return TokenScores(logprobs, entropies, estimates)

    @torch.no_grad()
    def reference_logprobs(
        self,
        prompts: Sequence[np.ndarray],
        responses: Sequence[np.ndarray],
        allowed: Sequence[Sequence[np.ndarray] | None],
    ) -> torch.Tensor:
        """Returns log-probs of responses by the reference policy, in nats; float32, shape (tokens,).

        Takes the arguments of :meth:`score`. The log-probs are at the policy's temperature and under the same
        constraints, so that the KL divergence compares the distributions that tokens are sampled from.
        """
        with self.reference_model() as lm:
            return self._token_scores(lm, response_hidden(lm, prompts, responses), responses, allowed, False)[0]

    @torch.no_grad()
    def reference_hidden(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> torch.Tensor:
        """Returns the reference policy's last hidden states that predict the response tokens, shape (tokens, d).

        Raises:
            InputError: for a policy without a reference policy.
        """
        if self.reference == "none":
            raise InputError("this policy has no reference policy to compare with")
        with self.reference_model() as lm:
            return response_hidden(lm, prompts, responses)

    def compare(
        self,
        prompts: Sequence[np.ndarray],
        responses: Sequence[np.ndarray],
        reference_hidden: torch.Tensor | None = None,
    ) -> ComparedTokens:
        """Returns log-probs of responses by policy and reference policy, and KL(reference || policy) at each token.

        The distributions are over the whole vocabulary, at the policy's temperature and without constraints.

        Args:
            prompts: n int arrays of token ids.
            responses: n int arrays of token ids, none empty.
            reference_hidden: hidden states that :meth:`reference_hidden` returned for the same prompts and responses;
                None: they are computed.

        Returns:
            Log-probs and divergences in nats, each float32 of shape (tokens,); the policy's part is in the autograd
            graph if gradients are enabled.

        Raises:
            InputError: for a policy without a reference policy.
        """
        if reference_hidden is None:
            reference_hidden = self.reference_hidden(prompts, responses)
        with self.reference_model() as lm:
            reference_head = output_layer(lm)
        with self.adapter(POLICY, torch.is_grad_enabled()) as lm, autocast(self.lm, self.dtype):
            hidden = response_hidden(lm, prompts, responses)
            scale = 1 / self.temperature
            head, ids = output_layer(lm), _ids(responses, hidden.device)
            return compared_tokens(hidden, head, reference_hidden, reference_head, ids, scale)

    @contextmanager
    def reference_model(self) -> Iterator[CausalLM]:
        """Locks the model for this thread and yields the reference policy's model, in the arithmetic of the policy."""
        # "adapter:NAME" is a frozen adapter; "base" and "copy:NAME" need none.
        with self.adapter(self.reference.partition(":")[2] or None) as lm, autocast(self.lm, self.dtype):
            yield lm

    def _token_scores(
        self,
        lm: CausalLM,
        hidden: torch.Tensor,
        responses: Sequence[np.ndarray],
        allowed: Sequence[Sequence[np.ndarray] | None],
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns log-probs and entropies of the response tokens from their hidden states, each of shape (tokens,)."""
        ids, scale = _ids(responses, hidden.device), 1 / self.temperature
        head = output_layer(lm)
        free = [tokens is None for tokens in allowed]
        if all(free):
            return token_logprobs(hidden, head, ids, scale, entropy_gradient)
        if not any(free):
            sets = [a for tokens in allowed for a in tokens]  # type: ignore[union-attr]
            return allowed_logprobs(hidden, head, ids, sets, scale)
        # Free and constrained responses in one batch: score each kind by itself, then restore the order of the tokens.
        mask = torch.from_numpy(np.repeat(free, [len(r) for r in responses])).to(hidden.device)
        sets = [a for tokens in allowed if tokens is not None for a in tokens]
        free_scores = token_logprobs(hidden[mask], head, ids[mask], scale, entropy_gradient)
        constrained_scores = allowed_logprobs(hidden[~mask], head, ids[~mask], sets, scale)
        order = torch.cat([mask.nonzero().squeeze(1), (~mask).nonzero().squeeze(1)]).argsort()
        return (
            torch.cat([free_scores[0], constrained_scores[0]])[order],
            torch.cat([free_scores[1], constrained_scores[1]])[order],
        )

    def _values(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.value_head(hidden.float()).squeeze(-1)

    # --- reference, saving, loading ----------------------------------------------------------------------------------

    def freeze_reference(self, name: str = "sft") -> None:
        """Makes the policy in its current state the reference policy, as PPO after SFT needs it.

        Args:
            name: name of the frozen adapter, which is also its folder in :meth:`save`.

        Raises:
            InputError: if the name is that of the policy's or the value function's adapter.
        """
        if name in (POLICY, VALUE):
            raise InputError(f"a reference cannot be called {name!r}")
        # Without adapters all weights change in training: the reference is a copy of the whole model.
        if not self.lora.rank:
            self._reference_lm, self.reference = frozen_copy(self.lm), f"copy:{name}"  # type: ignore[assignment]
            return
        self._add_frozen(name)
        self.trunk.set_weights(name, self.trunk.weights(POLICY))
        self.reference = f"adapter:{name}"  # type: ignore[assignment]

    def _add_frozen(self, name: str) -> None:
        if name not in self._frozen:
            self.trunk.add(name, self.lora)
            self.trunk.freeze(name)
            self._frozen.add(name)

    def frozen_adapters(self) -> list[str]:
        """Returns the names of the frozen adapters, sorted."""
        return sorted(self._frozen)

    def export_adapter(self, folder: str | Path) -> None:
        """Writes the policy's adapter in peft's format into ``FOLDER/policy``, for servers that load such adapters.

        Raises:
            InputError: for a policy without adapters.
        """
        if not self.lora.rank:
            raise InputError("this policy has no adapter: all weights of the model are trained")
        self.trunk.save(folder, [POLICY])

    def save(self, folder: str | Path) -> None:
        """Writes the adapters in peft's format, one folder each, or the whole model; then value head and settings.

        A reference that :meth:`freeze_reference` made is written as well.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not self.lora.rank:
            self.lm.model.save_pretrained(folder / POLICY)
            if (frozen := self.reference.partition(":")[2]) and self._reference_lm is not None:
                self._reference_lm.model.save_pretrained(folder / frozen)
        else:
            self.trunk.save(folder, [*self._trained_adapters(), *self.frozen_adapters()])
        save_file({k: v.detach().cpu().contiguous() for k, v in self.value_head.state_dict().items()}, folder / HEAD)
        settings = {
            "model": self.model_name,
            "lora": asdict(self.lora),
            "value": self.value,
            "reference": self.reference,
            "temperature": self.temperature,
        }
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")

    def load(self, folder: str | Path) -> None:
        """Restores what :meth:`save` wrote; this policy must be built with the same ``lora`` and ``value``.

        Raises:
            InputError: if files are missing or do not fit.
        """
        folder = Path(folder)
        try:
            settings = json.loads((folder / SETTINGS).read_text("utf-8"))
            for key, expected in (("lora", asdict(self.lora)), ("value", self.value)):
                if settings[key] != expected:
                    raise InputError(
                        f"the policy in {folder} was built with {key}={settings[key]}, this one with {expected}"
                    )
            self.value_head.load_state_dict(load_file(folder / HEAD, device=str(self.lm.device)))
            frozen = settings["reference"].partition(":")[2]
            if not self.lora.rank:
                load_all_weights(self.lm.model, folder / POLICY)
                if frozen:
                    self._reference_lm = frozen_copy(self.lm)
                    load_all_weights(self._reference_lm.model, folder / frozen)
            else:
                if frozen:
                    self._add_frozen(frozen)
                for name in [*self._trained_adapters(), *([frozen] if frozen else [])]:
                    self.trunk.load(folder, name)
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot read a policy from {folder}: {' '.join(str(error).split())}") from error
        self.reference = settings["reference"]
        self.clear_prefix_cache()


def frozen_copy(lm: CausalLM) -> CausalLM:
    """Returns a copy of a model whose weights are frozen."""
    twin = copy.deepcopy(lm.model).requires_grad_(False)
    copied = CausalLM(twin, lm.tokenizer, name=f"{lm.name} (reference)", reading=lm.reading)
    copied.training = copy.copy(lm.training)
    return copied


def _ids(responses: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """Returns the tokens of all responses as one tensor, int64, shape (tokens,)."""
    return torch.from_numpy(np.concatenate(responses).astype(np.int64)).to(device)


class PolicyBackend(TransformersBackend):
    """A backend that generates and scores with a policy's current weights.

    Prompts are texts, messages for the chat template, or token ids; log-probs are at temperature 1, whatever the
    policy's temperature.

    Args:
        policy: the policy, whose model is used in place.
        name: name of the weights, which keeps stored replies of different policies apart.
    """

    def __init__(self, policy: LanguageModelPolicy, name: str) -> None:
        super().__init__(policy.model_name, str(policy.dtype), prompt_style="chat")
        self.policy, self._name = policy, name

    @property
    def name(self) -> str:  # type: ignore[override]
        """Model and weights, e.g. ``policy:MODEL:NAME``."""
        return f"policy:{self.model}:{self._name}"

    @property
    def lm(self) -> CausalLM:
        return self.policy.lm

    def _path(self) -> str:
        return embedded_model_path() if self.model == "embedded" else self.model

    def _generate(self, prompts: list[Prompt], samplings: list[Sampling]) -> list[Result]:
        with self._acting():
            return super()._generate(prompts, samplings)

    def _logprobs(self, prompts: list[Prompt], completions: list[str]) -> list[np.ndarray | BackendError]:
        with self._acting():
            return super()._logprobs(prompts, completions)

    def _choice_logprobs(
        self, prompts: list[Prompt], choices: list[list[str]], heads: list[Prompt]
    ) -> list[np.ndarray | BackendError]:
        with self._acting():
            return super()._choice_logprobs(prompts, choices, heads)

    def _acting(self) -> AbstractContextManager[object]:
        """Returns a context in which the policy's adapter is active.

        The prefix cache is emptied before and after, as it does not know whose weights its prefixes are from.
        """
        stack = ExitStack()
        stack.enter_context(self.policy.adapter(POLICY))
        stack.enter_context(autocast(self.policy.lm, self.policy.dtype))
        self.policy.clear_prefix_cache()
        stack.callback(self.policy.clear_prefix_cache)
        return stack
