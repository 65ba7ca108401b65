"""One episode of the token MDP: which tokens end it, and the text it has come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...llm_backends import Tokenizer
from ...llm_backends.local.sampling import Choices
from ...llm_backends.local.tokenization import stopped_text
from .examples import PromptExample


@dataclass(frozen=True)
class GenerationSpec:
    """What a generator has to know so that its responses end where the env ends them."""

    tokenizer: str
    """The tokenizer's name: models whose tokenizer has this name count alike."""
    vocabulary: int
    """Number of token ids, the size of the action space."""
    eos_ids: frozenset[int]
    """Tokens that end a response."""
    stop: tuple[str, ...]
    """Texts that end a response."""
    max_tokens: int
    """Tokens of a response at most."""
    context_length: int
    """Tokens of prompt and response at most."""


@dataclass(eq=False)
class TokenEpisode:
    """One copy's episode."""

    index: int
    """Which example."""
    example: PromptExample
    prompt: np.ndarray
    """int32, shape (prompt tokens,); shared by episodes, never written to."""
    ids: np.ndarray
    """int32, shape (prompt tokens + max_tokens,): prompt and response, zeros where nothing is written yet."""
    base_seed: int
    """From which the seed of the episode's score is derived."""
    choices: Choices | None = None
    """The allowed responses, where decoding is constrained."""
    tokens: list[int] = field(default_factory=list)
    """The response so far."""
    given: int = 0
    """How many of them ``options["prefix"]`` gave."""
    finish_reason: str = ""
    """Why the episode ended: ``illegal``, ``choice``, ``eos``, ``stop`` or ``length``."""
    text: str = ""
    """The response's text, without what ended it; empty before the end."""

    def state(self, written: int | None = None) -> np.ndarray:
        """int32: prompt and the first ``written`` response tokens (all by default); a view that is never rewritten."""
        return self.ids[: len(self.prompt) + (len(self.tokens) if written is None else written)]

    def response(self, tokenizer: Tokenizer) -> str:
        """The response's text so far."""
        return self.text if self.finish_reason else tokenizer.decode(self.tokens)

    def write(self, tokens: Sequence[int], tokenizer: Tokenizer, spec: GenerationSpec) -> int:
        """Appends tokens until the episode ends.

        Args:
            tokens: ids in [0, vocabulary).
            tokenizer: decodes them.
            spec: where responses end.

        Returns:
            How many were appended, the last one included.
        """
        written, prompt = self.tokens, len(self.prompt)
        stop = spec.stop
        if stop and len(tokens) > 1 and not any("\N{REPLACEMENT CHARACTER}" in text for text in stop):
            # A text without a stop string has none at any of its tokens: one look spares one per token.
            whole = tokenizer.decode([*written, *tokens[: spec.max_tokens]])
            stop = stop if any(text in whole for text in stop) else ()
        for count, token in enumerate(tokens):
            if self.finish_reason:
                return count
            # Tokens that left the trie are never looked up: its memory stays as small as the choices.
            legal = self.choices is None or token in self.choices.allowed(written)  # type: ignore[operator]
            self.ids[prompt + len(written)] = token
            written.append(token)
            if not legal:
                self._finish("illegal", tokenizer.decode(written))
            elif self.choices is not None and self.choices.complete(written):
                self._finish("choice", tokenizer.decode(written[:-1] if token in spec.eos_ids else written))
            elif token in spec.eos_ids:
                self._finish("eos", tokenizer.decode(written[:-1]))
            elif stop and (text := stopped_text(tokenizer.hf, written, stop)) is not None:
                self._finish("stop", text)
            elif len(written) == spec.max_tokens:
                self._finish("length", tokenizer.decode(written))
        return len(tokens)

    def _finish(self, reason: str, text: str) -> None:
        self.finish_reason, self.text = reason, text
