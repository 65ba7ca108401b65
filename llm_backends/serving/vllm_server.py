"""Backend for a vLLM server: log-probs of given texts, structured outputs, LoRA adapters loaded at run time.

:mod:`~instructgym.llm_backends.serving.vllm_launch` starts such a server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..base import BackendError, Message, Prompt, PromptStyle, Sampling
from ..errors import InputError
from .budget import Spending
from .openai_backend import OpenAIBackend, Structured
from .sending import Job, MalformedReplyError


@dataclass(frozen=True)
class TokenSampling(Sampling):
    """Sampling parameters for prompts of token ids, in addition to those that every backend takes."""

    allowed: tuple[int, ...] = ()
    """Token ids that may be generated; empty: all."""
    eos: tuple[int, ...] | None = None
    """Token ids that end the completion and are part of it; None: the model's own."""


class VLLMServerBackend(OpenAIBackend):
    """A backend that sends requests to a model on a vLLM server.

    In addition to what every OpenAI-compatible server does, it scores given texts (``prompt_logprobs``), constrains
    replies to choices (``structured_outputs``), takes :class:`TokenSampling`, and loads and unloads LoRA adapters.

    Log-probs of generated tokens are the model's own at temperature 1, unless the server was started with
    ``--logprobs-mode processed_logprobs``: then they are those of the distribution that was sampled from.

    Args:
        model: name of the model, or of a loaded adapter, on the server.
        base_url: ``http(s)://host:port/v1``.
        prompt_style: ``chat`` or ``completion``, see :class:`OpenAIBackend`; ``completion`` also takes token ids.
        logprobs: whether to request the log-probs of completions.
        token_ids: whether to request the token ids of completions.
        structured: how the server is asked for one of a few texts, see :class:`OpenAIBackend`.
        **options: further arguments of :class:`OpenAIBackend`.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        prompt_style: PromptStyle = "chat",
        logprobs: bool = True,
        token_ids: bool = True,
        structured: Structured = "vllm",
        **options: Any,
    ) -> None:
        super().__init__(
            model, base_url, prompt_style, logprobs=logprobs, token_ids=token_ids, structured=structured, **options
        )
        self.root = self.url.rstrip("/").removesuffix("/v1")

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the OpenAI backend behind ``vllm-``, as :meth:`_request` overrides vLLM's own defaults."""
        return f"vllm-{super().name}"

    # --- adapters ----------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Loads a LoRA adapter; requests can then use its name as the model.

        Args:
            name: name of the adapter, not used before: replies for a name that was used may come from a prefix cache
                filled by the old weights.
            folder: folder with the adapter in peft's format; the server itself reads it, so it must see the same file
                system.

        Raises:
            InputError: if the server refuses, for example because the rank is above ``--max-lora-rank``.
        """
        body = {"lora_name": name, "lora_path": str(Path(folder).absolute())}
        try:
            self._ask(self._job_for("POST", "/v1/load_lora_adapter", body))
        except (BackendError, InputError) as error:
            # The name is new, so an earlier attempt has loaded the adapter and its answer was lost.
            if "already been loaded" not in str(error):
                raise InputError(
                    f"{error}; adapters need a server started with --enable-lora, "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, and --max-lora-rank at least their rank"
                ) from None

    def unload_adapter(self, name: str) -> None:
        """Unloads an adapter; makes only one attempt, as nothing depends on the outcome.

        Raises:
            BackendError: if the attempt fails.
            InputError: if the server has no such address or refuses the key.
        """
        job = self._job_for("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        self._ask(replace(job, attempts=1, timeout=10.0))

    def models(self) -> list[dict[str, Any]]:
        """Returns the server's list of models: ``id``, ``max_model_len``, and for an adapter its ``parent``."""
        return list(self._ask(self._job_for("GET", "/v1/models", None, "data")))

    def _ask(self, job: Job) -> Any:
        [(_, result)] = self.sender.run([job])
        if isinstance(result, BackendError):
            raise result
        return result

    def _job_for(self, method: str, path: str, body: dict[str, Any] | None, field: str = "") -> Job:
        """Returns a request outside OpenAI's API.

        Args:
            method: ``GET`` or ``POST``.
            path: path behind the server's root.
            body: fields of the JSON body; None: no body.
            field: field of the JSON reply that is the result; empty: the whole text of the reply.
        """

        async def send(client: Any) -> Any:
            import httpx

            call = client.get if method == "GET" else client.post
            extra = {} if body is None else {"body": body}
            return await call(f"{self.root}{path}", cast_to=httpx.Response, **extra)

        def parse(reply: Any) -> Any:
            return reply.json()[field] if field else reply.text

        return Job(send, parse, Spending(1), lambda reply: Spending(1))

    # --- log-probs of given texts ------------------------------------------------------------------------------------

    def tokenize(self, prompts: Sequence[Prompt], special: bool = True) -> list[list[int] | BackendError]:
        """Returns the token ids of each prompt by the server's own tokenizer and chat template.

        Args:
            prompts: n prompts; those of token ids are returned unchanged.
            special: whether strings get the tokenizer's special tokens.

        Returns:
            n lists of token ids, or an error in place of one.
        """
        results: list[Any] = [None] * len(prompts)
        # jobs[i] belongs to the prompt with index places[i].
        jobs, places = [], []
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                body: dict[str, Any] = {"model": self.model, "prompt": prompt, "add_special_tokens": special}
            elif prompt and not isinstance(prompt[0], int | np.integer):
                messages: Sequence[Message] = prompt  # type: ignore[assignment]
                body = {"model": self.model, "messages": [dict(message) for message in messages]}
                if "chat_template_kwargs" in self.extra_body:
                    body["chat_template_kwargs"] = self.extra_body["chat_template_kwargs"]
            else:
                results[index] = [int(token) for token in prompt]  # type: ignore[arg-type]
                continue
            jobs.append(self._job_for("POST", "/tokenize", body, "tokens"))
            places.append(index)
        for number, result in self.sender.run(jobs) if jobs else ():
            results[places[number]] = result
        return results

    def _logprobs(self, prompts: list[Prompt], completions: list[str]) -> list[np.ndarray | BackendError]:
        chat_prompts: list[Prompt] = [
            [{"role": "user", "content": prompt}] if self.prompt_style == "chat" and isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        # Judges score a few words after many prompts, each prompt several times: tokenise every distinct text once.
        words, unique = list(dict.fromkeys(completions)), {json.dumps(p, default=_plain): p for p in chat_prompts}
        tails = dict(zip(words, self.tokenize(words, special=False), strict=True))
        heads = dict(zip(unique, self.tokenize(list(unique.values())), strict=True))
        jobs: list[Job | BackendError] = []
        for prompt, completion in zip(chat_prompts, completions, strict=True):
            ids, tail = heads[json.dumps(prompt, default=_plain)], tails[completion]
            error = next((tokens for tokens in (ids, tail) if isinstance(tokens, BackendError)), None)
            jobs.append(error or self._scoring(ids, tail))  # type: ignore[arg-type]
        results = dict(self.sender.run(jobs))
        return [results[index] for index in range(len(jobs))]

    def completion_ids(self, texts: Sequence[str]) -> list[list[int]]:
        rows: list[list[int]] = []
        for ids in self.tokenize(list(texts), special=False):
            if isinstance(ids, BackendError):
                raise ids
            rows.append(ids)
        return rows

    def score(self, prompt: list[int], completion: list[int]) -> np.ndarray:
        """Returns the log-probs of a completion's tokens after a prompt.

        Args:
            prompt: token ids.
            completion: token ids.

        Returns:
            float32, shape (tokens of the completion,), in nats at temperature 1.

        Raises:
            BackendError: if the server does not report them.
        """
        return self._ask(self._scoring(prompt, completion))

    def _scoring(self, prompt: list[int], completion: list[int]) -> Job:
        """Returns the request whose result is the log-probs of a completion's tokens."""
        ids = prompt + completion

        async def send(client: Any) -> Any:
            # The text to score is sent as the prompt; the one token that is generated is not used.
            extra = {"prompt_logprobs": 0}
            return await client.completions.create(
                model=self.model, prompt=ids, max_tokens=1, temperature=0.0, extra_body=extra
            )

        def parse(reply: Any) -> np.ndarray:
            rows = reply.choices[0].prompt_logprobs
            if len(rows) != len(ids):
                raise MalformedReplyError(f"{self._server} gave log-probs of {len(rows)} tokens, not of {len(ids)}")
            values = [rows[i][str(ids[i])]["logprob"] for i in range(len(prompt), len(ids))]
            return np.array(values, dtype=np.float32)

        return Job(send, parse, self._spending(len(ids), 1), self._usage_of)

    # --- completions of token ids ------------------------------------------------------------------------------------

    def _request(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        request = super()._request(prompt, sampling)
        body: dict[str, Any] = {"top_k": sampling.top_k or -1}
        if isinstance(sampling, TokenSampling):
            if sampling.allowed:
                body["allowed_token_ids"] = list(sampling.allowed)
            # ignore_eos turns off the model's own end tokens.
            if sampling.eos is not None:
                body |= {"ignore_eos": True, "stop_token_ids": list(sampling.eos)}
        # vLLM would otherwise take these from the model's generation_config.json; extra_body may still override them.
        defaults = {"min_p": 0.0, "repetition_penalty": 1.0}
        request["extra_body"] = defaults | request.get("extra_body", {}) | body
        return request


def _plain(value: Any) -> Any:
    """Returns a message or a NumPy integer as a type that JSON can encode."""
    return dict(value) if isinstance(value, Mapping) else int(value)
