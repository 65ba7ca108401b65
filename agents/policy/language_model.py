"""The language-model policy: one trunk; policy, reference and value function are adapters and heads on it."""

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
from ...llm_backends.local.loading import embedded_model_path, quiet_loading
from ...llm_backends.local.sampling import Choices, generate
from ...llm_backends.local.tokenization import LoadedTokenizer, Tokenizer
from ...llm_backends.training.adapters import (
    DEFAULT_LORA,
    AdaptedTrunk,
    LoraSettings,
    autocast,
    load_all_weights,
    open_model,
    training_dtype,
)
from ...llm_backends.training.output_layer import (
    ComparedTokens,
    OutputLayer,
    allowed_logprobs,
    compared_tokens,
    token_logprobs,
)
from ...llm_backends.training.teacher_forcing import response_hidden

__all__ = ["POLICY", "SETTINGS", "VALUE", "LanguageModelPolicy", "LoraSettings", "TokenScores", "ValueFunction"]

POLICY, VALUE = "policy", "value"
SETTINGS, HEAD = "policy.json", "value_head.safetensors"

ValueFunction = Literal["shared", "own_adapter", "none"]


@dataclass
class TokenScores:
    """What the policy says of given responses; tokens of all responses in one flat array."""

    logprobs: torch.Tensor
    """float32, shape (tokens,), in nats, at the policy's temperature and under its constraints."""
    entropies: torch.Tensor
    """float32, shape (tokens,), in nats."""
    values: torch.Tensor | None
    """float32, shape (tokens,): V of the state in which the token was chosen."""


class LanguageModelPolicy:
    """A causal language model that acts, token by token.

    Args:
        model: ``"embedded"``, a local path or hub id, a live :class:`CausalLM` (which is then changed in place), or a
            trunk that has adapters of others already, a reward model's for instance.
        lora: what is trained.
        value: ``shared``: a linear head on the policy's hidden states; ``own_adapter``: on those of an adapter of its
            own; ``none``.
        reference: ``base``: the model without adapters; ``none``. :meth:`freeze_reference` makes another one.
        temperature: of the policy's distribution; log-probs and ratios are those at this temperature.
        dtype: ``float32``; ``bfloat16``: frozen weights in bfloat16 and autocast, trained weights in float32; ``auto``:
            bfloat16 on hardware that computes in it.
        device: ``auto`` takes a GPU where there is one.
        seed: of the adapters' initial weights.

    Raises:
        InputError: if the model cannot be loaded, has no tokenizer, computes its logits in an unknown way, or has a
            policy already.
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
        dtype = training_dtype(dtype, device)
        self.lora, self.value, self.reference, self.temperature, self.dtype = lora, value, reference, temperature, dtype
        self.lm, self.model_name = open_model(model, lora, dtype, device)
        self._check_logits()
        self.trunk = AdaptedTrunk.of(self.lm)
        self._reference_lm: CausalLM | None = None
        self._frozen: set[str] = set()
        with quiet_loading():
            torch.manual_seed(seed)
            if lora.rank:
                for name in self._own_adapters():
                    self.trunk.add(name, lora)
            else:
                self.trunk.train_whole(POLICY)
                if reference == "base":
                    self._reference_lm = frozen_copy(self.lm)
            self.value_head = torch.nn.Linear(self.lm.head.weight.shape[1], 1, device=self.lm.device)
            torch.nn.init.zeros_(self.value_head.weight)
            torch.nn.init.zeros_(self.value_head.bias)

    def _own_adapters(self) -> list[str]:
        return [POLICY, VALUE] if self.value == "own_adapter" else [POLICY]

    def _check_logits(self) -> None:
        """Refuses a model whose logits are not a scaled linear map of its last hidden states."""
        ids = torch.tensor([[0, 1]], device=self.lm.device)
        with torch.no_grad():
            logits = self.lm.model(input_ids=ids, use_cache=False).logits.float()
            hidden = self.lm.trunk(input_ids=ids, use_cache=False).last_hidden_state
            mine = self.lm.head(hidden).float() * self.lm.logit_scale
        if not torch.allclose(logits, mine, atol=1e-3, rtol=1e-3):
            raise InputError(f"{self.lm.name} changes its logits after the output layer (soft capping?): not supported")

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, for the env that it acts in."""
        return LoadedTokenizer(self.lm.tokenizer, self.model_name, self.lm.context_length)

    # --- what is trained ---------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained weights by name, those of the value head included."""
        named = self.trunk.parameters(*self._own_adapters())
        if self.value != "none":
            named |= {f"value_head.{name}": p for name, p in self.value_head.named_parameters()}
        return named

    def clear_prefix_cache(self) -> None:
        """Forgets cached prompt prefixes; to be called after the weights have changed."""
        self.lm.prefix_cache.clear()

    # --- acting ------------------------------------------------------------------------------------------------------

    @contextmanager
    def adapter(self, name: str | None, dropout: bool = False) -> Iterator[CausalLM]:
        """The trunk under an adapter, or without any (None), for this thread alone; afterwards it has none."""
        with self.trunk.active(name, dropout) as lm:
            yield self._reference_lm if name != POLICY and self._reference_lm is not None else lm

    def generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        sampling: Sampling | Sequence[Sampling],
        choices: Sequence[Choices | None] | None = None,
        eos: frozenset[int] | None = None,
    ) -> list[list[Completion]]:
        """Continues prompts of token ids.

        Args:
            prompts: n sequences of token ids.
            sampling: one set of parameters for all, or one each. Its temperature is what it says, not the policy's.
            choices: constraints, one (or None) per prompt.
            eos: tokens that end a completion; by default the model's own.

        Returns:
            n lists of completions, as of :func:`~instructgym.llm_backends.local.sampling.generate`, with log-probs at
                the temperature of sampling.
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
        """Log-probs, entropies and values of responses, in one pass; with a graph where gradients are on.

        Args:
            prompts: n int arrays.
            responses: n int arrays, none empty.
            allowed: for each response the allowed tokens at each position, or None.
            values: False leaves the values out.
            entropy_gradient: whether entropies are differentiable.
        """
        training = torch.is_grad_enabled()
        with self.adapter(POLICY, training) as lm, autocast(self.lm, self.dtype):
            hidden = response_hidden(lm, prompts, responses)
            logprobs, entropies = self._head(lm, hidden, responses, allowed, entropy_gradient)
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
        """float32, shape (tokens,): log-probs by the reference policy."""
        with self.reference_model() as lm:
            return self._head(lm, response_hidden(lm, prompts, responses), responses, allowed, False)[0]

    @torch.no_grad()
    def reference_hidden(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> torch.Tensor:
        """Shape (tokens, d): the reference policy's last hidden states that predict the response tokens."""
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
        """Log-probs of responses by the policy and by the reference, and KL(reference || policy) at each token.

        Distributions are those over the whole vocabulary at the policy's temperature; without constraints.

        Args:
            prompts: n int arrays.
            responses: n int arrays, none empty.
            reference_hidden: what :meth:`reference_hidden` gave for them; by default it is computed.

        Returns:
            float32, each of shape (tokens,), in nats; with a graph of the policy's part where gradients are on.

        Raises:
            InputError: for a policy without a reference policy.
        """
        if reference_hidden is None:
            reference_hidden = self.reference_hidden(prompts, responses)
        with self.reference_model() as lm:
            reference_head = OutputLayer.of(lm)
        with self.adapter(POLICY, torch.is_grad_enabled()) as lm, autocast(self.lm, self.dtype):
            hidden = response_hidden(lm, prompts, responses)
            scale = lm.logit_scale / self.temperature
            head, ids = OutputLayer.of(lm), _ids(responses, hidden.device)
            return compared_tokens(hidden, head, reference_hidden, reference_head, ids, scale)

    @contextmanager
    def reference_model(self) -> Iterator[CausalLM]:
        """The reference policy's model, for this thread alone, in the arithmetic of the policy."""
        with self.adapter(self.reference.partition(":")[2] or None) as lm, autocast(self.lm, self.dtype):
            yield lm

    def _head(
        self,
        lm: CausalLM,
        hidden: torch.Tensor,
        responses: Sequence[np.ndarray],
        allowed: Sequence[Sequence[np.ndarray] | None],
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, scale = _ids(responses, hidden.device), lm.logit_scale / self.temperature
        head = OutputLayer.of(lm)
        free = [tokens is None for tokens in allowed]
        if all(free):
            return token_logprobs(hidden, head, ids, scale, entropy_gradient)
        if not any(free):
            sets = [a for tokens in allowed for a in tokens]  # type: ignore[union-attr]
            return allowed_logprobs(hidden, head, ids, sets, scale)
        mask = torch.from_numpy(np.repeat(free, [len(r) for r in responses])).to(hidden.device)
        sets = [a for tokens in allowed if tokens is not None for a in tokens]
        one = token_logprobs(hidden[mask], head, ids[mask], scale, entropy_gradient)
        two = allowed_logprobs(hidden[~mask], head, ids[~mask], sets, scale)
        order = torch.cat([mask.nonzero().squeeze(1), (~mask).nonzero().squeeze(1)]).argsort()
        return torch.cat([one[0], two[0]])[order], torch.cat([one[1], two[1]])[order]

    def _values(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.value_head(hidden.float()).squeeze(-1)

    # --- reference, saving, loading ----------------------------------------------------------------------------------

    def freeze_reference(self, name: str = "sft") -> None:
        """Makes the policy as it is now the reference, as PPO after SFT needs it.

        Args:
            name: of the frozen adapter.

        Raises:
            InputError: for the name of the policy's own adapter or the value function's.
        """
        if name in (POLICY, VALUE):
            raise InputError(f"a reference cannot be called {name!r}")
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
        """Names of the frozen adapters."""
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
        """Writes adapters in peft's own format (one folder each), or the whole model, the value head and settings."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not self.lora.rank:
            self.lm.model.save_pretrained(folder / POLICY)
            if (frozen := self.reference.partition(":")[2]) and self._reference_lm is not None:
                self._reference_lm.model.save_pretrained(folder / frozen)
        else:
            self.trunk.save(folder, [*self._own_adapters(), *self.frozen_adapters()])
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
        """Reads what :meth:`save` wrote into this policy, which must be built alike.

        Raises:
            InputError: if files are missing or do not fit.
        """
        folder = Path(folder)
        try:
            settings = json.loads((folder / SETTINGS).read_text("utf-8"))
            for key, mine in (("lora", asdict(self.lora)), ("value", self.value)):
                if settings[key] != mine:
                    raise InputError(
                        f"the policy in {folder} was built with {key}={settings[key]}, this one with {mine}"
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
                for name in [*self._own_adapters(), *([frozen] if frozen else [])]:
                    self.trunk.load(folder, name)
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot read a policy from {folder}: {' '.join(str(error).split())}") from error
        self.reference = settings["reference"]
        self.clear_prefix_cache()


def frozen_copy(lm: CausalLM) -> CausalLM:
    """A model of its own with the same weights, none of which is trained."""
    twin = copy.deepcopy(lm.model).requires_grad_(False)
    return CausalLM(twin, lm.tokenizer, name=f"{lm.name} (reference)")


def _ids(responses: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(responses).astype(np.int64)).to(device)


class PolicyBackend(TransformersBackend):
    """Generates and scores with a policy's weights, as they are when it is asked.

    Prompts are texts, messages for the chat template, or token ids; log-probs are at temperature 1, whatever the
    policy's.

    Args:
        policy: the policy, whose model it uses in place.
        name: of the weights: stored replies of two policies must not be mixed up.
    """

    def __init__(self, policy: LanguageModelPolicy, name: str) -> None:
        super().__init__(policy.model_name, str(policy.dtype), prompt_style="chat")
        self.policy, self._name = policy, name

    @property
    def name(self) -> str:  # type: ignore[override]
        """Model and weights."""
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
        """The policy's adapter in place, without cached prefixes of other weights before and behind it."""
        stack = ExitStack()
        stack.enter_context(self.policy.adapter(POLICY))
        stack.enter_context(autocast(self.policy.lm, self.policy.dtype))
        self.policy.clear_prefix_cache()
        stack.callback(self.policy.clear_prefix_cache)
        return stack
