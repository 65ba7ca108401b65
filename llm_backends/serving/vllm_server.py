"""A vLLM server: log-probs of given texts, structured outputs, and LoRA adapters that come and go at run time."""

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
    """Sampling parameters for prompts of token ids, beyond those that every backend knows."""

    allowed: tuple[int, ...] = ()
    """The only tokens that may be written; empty for all."""
    eos: tuple[int, ...] | None = None
    """Tokens that end the completion and belong to it; None for the model's own."""


class VLLMServerBackend(OpenAIBackend):
    """A model on a vLLM server.

    Beside what every OpenAI-compatible server does it scores given texts (``prompt_logprobs``), holds replies to
    choices (``structured_outputs``), takes :class:`TokenSampling`, and loads and drops LoRA adapters.

    Log-probs of written tokens are the model's own at temperature 1, unless the server was started with
    ``--logprobs-mode processed_logprobs``, where they are those of the distribution that was sampled from.

    Args:
        model: the name of the model, or of a loaded adapter, on the server.
        base_url: ``http(s)://host:port/v1``.
        prompt_style: as of :class:`OpenAIBackend`; ``completion`` takes token ids as well.
        logprobs: ask for the log-probs of completions.
        token_ids: ask for their token ids.
        structured: as of :class:`OpenAIBackend`.
        **options: the further arguments of :class:`OpenAIBackend`.
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
        """As of any server, and that vLLM's own defaults are overridden."""
        return f"vllm-{super().name}"

    # --- adapters ----------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Loads a LoRA adapter, which is then a model of that name.

        Args:
            name: a new one: replies to an old name may come from a prefix cache that the old weights filled.
            folder: of peft's files; the server reads it itself, so it must see the same file system.

        Raises:
            InputError: where the server refuses, for example as its rank is above ``--max-lora-rank``.
        """
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(Path(folder).absolute())})

    def unload_adapter(self, name: str) -> None:
        """Drops an adapter; one attempt, since nothing waits for it."""
        job = self._job_for("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        self._ask(replace(job, attempts=1, timeout=10.0))

    def models(self) -> list[dict[str, Any]]:
        """What the server says of its models: ``id``, ``max_model_len``, for an adapter its ``parent``."""
        return list(self._ask(self._job_for("GET", "/v1/models", None, "data")))

    def _post(self, path: str, body: dict[str, Any]) -> None:
        try:
            self._ask(self._job_for("POST", path, body))
        except (BackendError, InputError) as error:
            if "already been loaded" in str(error):  # by an attempt whose answer was lost
                return
            raise InputError(
                f"{error}; adapters need a server started with --enable-lora, "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, and --max-lora-rank at least their rank"
            ) from None

    def _ask(self, job: Job) -> Any:
        [(_, result)] = self.sender.each([job])
        if isinstance(result, BackendError):
            raise result
        return result

    def _job_for(self, method: str, path: str, body: dict[str, Any] | None, field: str = "") -> Job:
        """A request outside OpenAI's API; its result is a field of the JSON reply, or the whole text."""

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
        """Token ids of prompts by the server's own tokenizer and chat template.

        Args:
            prompts: token ids come back as they are.
            special: whether strings get the tokenizer's special tokens.
        """
        results: list[Any] = [None] * len(prompts)
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
        for number, result in self.sender.each(jobs) if jobs else ():
            results[places[number]] = result
        return results

    def _logprobs(self, prompts: list[Prompt], completions: list[str]) -> list[np.ndarray | BackendError]:
        asked: list[Prompt] = [
            [{"role": "user", "content": prompt}] if self.prompt_style == "chat" and isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        # Judges ask for few words after many prompts, each of them several times.
        words, kinds = list(dict.fromkeys(completions)), {json.dumps(p, default=_plain): p for p in asked}
        texts = dict(zip(words, self.tokenize(words, special=False), strict=True))
        heads = dict(zip(kinds, self.tokenize(list(kinds.values())), strict=True))
        results: list[Any] = []
        jobs, places = [], []
        for index, prompt in enumerate(asked):
            ids, tail = heads[json.dumps(prompt, default=_plain)], texts[completions[index]]
            failed = next((one for one in (ids, tail) if isinstance(one, BackendError)), None)
            results.append(failed)
            if failed is None:
                jobs.append(self._scoring(ids, tail))  # type: ignore[arg-type]
                places.append(index)
        for number, result in self.sender.each(jobs) if jobs else ():
            results[places[number]] = result
        return results

    def completion_ids(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = []
        for ids in self.tokenize(list(texts), special=False):
            if isinstance(ids, BackendError):
                raise ids
            found.append(ids)
        return found

    def score(self, prompt: list[int], completion: list[int]) -> np.ndarray:
        """Log-probs of the tokens of a completion, float32, in nats at temperature 1.

        Raises:
            BackendError: if the server does not give them.
        """
        return self._ask(self._scoring(prompt, completion))

    def _scoring(self, prompt: list[int], completion: list[int]) -> Job:
        ids = prompt + completion

        async def send(client: Any) -> Any:
            extra = {"prompt_logprobs": 0}
            return await client.completions.create(
                model=self.model, prompt=ids, max_tokens=1, temperature=0.0, extra_body=extra
            )

        def parse(reply: Any) -> np.ndarray:
            rows = reply.choices[0].prompt_logprobs
            if len(rows) != len(ids):
                raise MalformedReplyError(f"{self._server} gave log-probs of {len(rows)} tokens, not of {len(ids)}")
            values = [rows[at][str(ids[at])]["logprob"] for at in range(len(prompt), len(ids))]
            return np.array(values, dtype=np.float32)

        return Job(send, parse, self._spending(len(ids), 1), self._used)

    # --- completions of token ids ------------------------------------------------------------------------------------

    def _request(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        request = super()._request(prompt, sampling)
        body: dict[str, Any] = {"top_k": sampling.top_k or -1}
        if isinstance(sampling, TokenSampling):
            if sampling.allowed:
                body["allowed_token_ids"] = list(sampling.allowed)
            if sampling.eos is not None:
                body |= {"ignore_eos": True, "stop_token_ids": list(sampling.eos)}
        # What vLLM would otherwise take from the model's generation_config.json; extra_body may say otherwise.
        defaults = {"min_p": 0.0, "repetition_penalty": 1.0}
        request["extra_body"] = defaults | request.get("extra_body", {}) | body
        return request


def _plain(value: Any) -> Any:
    """A message or a NumPy integer for JSON."""
    return dict(value) if isinstance(value, Mapping) else int(value)
