"""Backends without a language model: a script, for tests and quick trials of an environment, and a user's function."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .base import (
    Backend,
    BackendError,
    Completion,
    Prompt,
    PromptStyle,
    Result,
    Sampling,
    last_message_text,
    request_seed,
)
from .errors import InputError

_WORDS = (
    "briefly carefully using three examples for beginners in plain words with numbers step by step under pressure "
    "without jargon on paper at home in winter before noon as a table from memory for children within limits"
).split()
_SUBJECT = re.compile(r"(?:Instruction|First|Second): *(.*)|<text>\s*(.*?)\s*</text>", re.DOTALL)


@dataclass(eq=False)
class ScriptedBackend(Backend):
    """A backend whose replies follow a deterministic rule. Stored replies carry its name, which states that.

    Args:
        reply: the rule, ``(prompt) -> text`` or ``(prompt, sampling) -> text``, or a mapping from a substring of the
            prompt to the reply. It may return a :class:`BackendError`. None: the text that the prompt names, with three
            words appended that depend on prompt and seed.
        score: ``(prompt, completion) -> float``, the log-prob of a completion in nats, spread evenly over its words;
            None: a number in [-3, 0) that depends on both.
        latency: seconds to sleep per call, to imitate a server.
        prompt_style: form of prompt that the backend needs.
    """

    reply: Callable[..., str | BackendError] | Mapping[str, str] | None = None
    score: Callable[[str, str], float] | None = None
    latency: float = 0.0
    prompt_style: PromptStyle = "completion"

    name = "scripted (deterministic rule, no language model)"

    def _generate(self, prompts: list[Prompt], samplings: list[Sampling]) -> list[Result]:
        time.sleep(self.latency)
        return [self._complete(last_message_text(p), s) for p, s in zip(prompts, samplings, strict=True)]

    def _complete(self, prompt: str, sampling: Sampling) -> Result:
        completions: list[Completion] = []
        self.usage.prompt_tokens += len(prompt.split())
        for index in range(sampling.n):
            # As in the decode loop: the first completion draws from the request's seed, the others from derived ones.
            seed = request_seed(sampling.seed, index) if index else sampling.seed
            text = self._text(prompt, sampling.with_seed(seed))
            if isinstance(text, BackendError):
                return text
            if not isinstance(text, str):
                name = getattr(self.reply, "__qualname__", None) or repr(self.reply)
                raise InputError(
                    f"the backend function {name} returned {text!r:.80} for the prompt {prompt[-80:]!r}: it must "
                    "return a text, or a BackendError"
                )
            spans = [(at, at + len(stop)) for stop in sampling.stop if (at := text.find(stop)) >= 0]
            # ``text`` is cut before the stop string, but its tokens count, as in Completion.
            cut, end = min(spans, default=(len(text), len(text)))
            words, text, reason = text[:end].split(), text[:cut], "stop"
            if len(words) > sampling.max_tokens:
                words, reason = words[: sampling.max_tokens], "length"
                text = " ".join(words)
            # Each word is a token, its id a hash.
            ids = [request_seed(word) % 50_000 for word in words]
            completions.append(Completion(text, ids, [-1.0] * len(ids), reason))  # type: ignore[arg-type]
        return completions

    def _text(self, prompt: str, sampling: Sampling) -> str | BackendError:
        if isinstance(self.reply, Mapping):
            matches = [reply for piece, reply in self.reply.items() if piece in prompt]
            return matches[0] if matches else BackendError(f"the script has no reply for {prompt[-80:]!r}")
        if self.reply is not None:
            arity = len(inspect.signature(self.reply).parameters)
            return self.reply(prompt, sampling) if arity > 1 else self.reply(prompt)
        # The last paragraph holds the query; those before it are the demonstrations of a few-shot prompt.
        subjects = [" ".join("".join(groups).split()) for groups in _SUBJECT.findall(prompt.split("\n\n")[-1])]
        subject = subjects[0].split(" New instruction:")[0] if subjects else "Answer"
        generator = np.random.default_rng([sampling.seed % 2**32, request_seed(prompt) % 2**32])
        return f"{subject} {' '.join(generator.choice(_WORDS, size=3, replace=False))}".strip()

    def _logprobs(self, prompts: list[Prompt], completions: list[str]) -> list[np.ndarray | BackendError]:
        time.sleep(self.latency)
        rows: list[np.ndarray | BackendError] = []
        for prompt, completion in zip(map(last_message_text, prompts), completions, strict=True):
            words = max(len(completion.split()), 1)
            total = -3 * (request_seed(prompt, completion) % 1000 + 1) / 1000
            if self.score is not None:
                total = self.score(prompt, completion)
            rows.append(np.full(words, total / words, dtype=np.float32))
        return rows


class FunctionBackend(ScriptedBackend):
    """A backend of a user's function, ``(prompt) -> text`` or ``(prompt, sampling) -> text``, without log-probs."""

    @property
    def name(self) -> str:  # type: ignore[override]
        """Module and name of the function."""
        return f"function:{getattr(self.reply, '__module__', '?')}.{getattr(self.reply, '__qualname__', '?')}"

    # A function has no log-probs: ``supports_logprobs`` is False for the base class's own method.
    _logprobs = Backend._logprobs
