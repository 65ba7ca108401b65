"""A scripted backend: no language model, for tests and for trying an environment's mechanics in milliseconds."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .base import Backend, BackendError, Completion, Prompt, PromptStyle, Result, Sampling, last_content, request_seed

_WORDS = (
    "briefly carefully using three examples for beginners in plain words with numbers step by step under pressure "
    "without jargon on paper at home in winter before noon as a table from memory for children within limits"
).split()
_SUBJECT = re.compile(r"(?:Instruction|First|Second): *(.*)|<text>\s*(.*?)\s*</text>", re.DOTALL)


@dataclass(eq=False)
class ScriptedBackend(Backend):
    """Deterministic replies from a rule. It says what it is: every stored row that it wrote carries its name.

    Args:
        reply: the rule, ``(prompt) -> text`` or ``(prompt, sampling) -> text``, or a mapping from a piece of the prompt
            to the reply. It may return a :class:`BackendError`. By default the text named in the prompt comes back with
            a few words appended that depend on the prompt and the seed.
        score: ``(prompt, completion) -> float``, the log-prob of a completion, spread evenly over its words; by default
            a number in [-3, 0) that depends on both.
        latency: seconds to sleep per call, to imitate a server.
        prompt_style: form of prompt it asks for.
    """

    reply: Callable[..., str | BackendError] | Mapping[str, str] | None = None
    score: Callable[[str, str], float] | None = None
    latency: float = 0.0
    prompt_style: PromptStyle = "completion"

    name = "scripted (deterministic rule, no language model)"

    def _generate(self, prompts: list[Prompt], samplings: list[Sampling]) -> list[Result]:
        time.sleep(self.latency)
        return [self._complete(last_content(p), s) for p, s in zip(prompts, samplings, strict=True)]

    def _complete(self, prompt: str, sampling: Sampling) -> Result:
        completions: list[Completion] = []
        self.usage.prompt_tokens += len(prompt.split())
        for index in range(sampling.n):
            seed = request_seed(sampling.seed, index) if index else sampling.seed
            text = self._text(prompt, sampling.with_seed(seed))
            if isinstance(text, BackendError):
                return text
            spans = [(at, at + len(stop)) for stop in sampling.stop if (at := text.find(stop)) >= 0]
            cut, end = min(spans, default=(len(text), len(text)))
            words, text, reason = text[:end].split(), text[:cut], "stop"
            if len(words) > sampling.max_tokens:
                words, reason = words[: sampling.max_tokens], "length"
                text = " ".join(words)
            ids = [request_seed(word) % 50_000 for word in words]
            completions.append(Completion(text, ids, [-1.0] * len(ids), reason))  # type: ignore[arg-type]
        return completions

    def _text(self, prompt: str, sampling: Sampling) -> str | BackendError:
        if isinstance(self.reply, Mapping):
            found = [reply for piece, reply in self.reply.items() if piece in prompt]
            return found[0] if found else BackendError(f"the script has no reply for {prompt[-80:]!r}")
        if self.reply is not None:
            takes = len(inspect.signature(self.reply).parameters)
            return self.reply(prompt, sampling) if takes > 1 else self.reply(prompt)
        subjects = [" ".join("".join(groups).split()) for groups in _SUBJECT.findall(prompt.split("\n\n")[-1])]
        subject = subjects[0].split(" New instruction:")[0] if subjects else "Answer"
        generator = np.random.default_rng([sampling.seed % 2**32, request_seed(prompt) % 2**32])
        return f"{subject} {' '.join(generator.choice(_WORDS, size=3, replace=False))}".strip()

    def _logprobs(self, prompts: list[Prompt], completions: list[str]) -> list[np.ndarray | BackendError]:
        time.sleep(self.latency)
        rows: list[np.ndarray | BackendError] = []
        for prompt, completion in zip(map(last_content, prompts), completions, strict=True):
            words = max(len(completion.split()), 1)
            total = -3 * (request_seed(prompt, completion) % 1000 + 1) / 1000
            if self.score is not None:
                total = self.score(prompt, completion)
            rows.append(np.full(words, total / words, dtype=np.float32))
        return rows


class FunctionBackend(ScriptedBackend):
    """A user's function as a backend, ``(prompt) -> text`` or ``(prompt, sampling) -> text``; without log-probs."""

    @property
    def name(self) -> str:  # type: ignore[override]
        """Module and name of the function."""
        return f"function:{getattr(self.reply, '__module__', '?')}.{getattr(self.reply, '__qualname__', '?')}"

    _logprobs = Backend._logprobs
