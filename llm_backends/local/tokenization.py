"""Tokenizers as parts: what a token environment counts its actions in, without a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..base import Message, Prompt
from ..errors import InputError
from ..parts import Part
from .loading import context_length, embedded_model_path, load_tokenizer

PROBE = "A probe: naïve  café, 12.5%\n\tend"
"""A text that tokenizers of one vocabulary split alike only if they agree on blanks, digits and special tokens."""


def prompt_ids(tokenizer: Any, prompt: Prompt, name: str) -> list[int]:
    """Token ids of a prompt: chat messages through the chat template, strings with the tokenizer's own specials.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: a text, messages, or token ids, which stay what they are.
        name: what to call the model in errors.

    Raises:
        InputError: for chat messages where the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if isinstance(prompt[0], int | np.integer):
        return [int(token) for token in prompt]  # type: ignore[arg-type]
    if not tokenizer.chat_template:
        raise InputError(f"{name} has no chat template: pass prompts as strings (prompt_style='completion')")
    text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def decode_ids(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of token ids by a Hugging Face tokenizer, special tokens left out and blanks as they are."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stopped_text(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> str | None:
    """The text before the first stop string, if the newest token completed one; else None.

    Args:
        tokenizer: a Hugging Face tokenizer.
        ids: all tokens of the response so far.
        stop: stop strings, none empty.
    """
    if not stop:
        return None
    # A token is at least one byte, so the last few tokens hold any stop string that ends now.
    tail = decode_ids(tokenizer, ids[-max(len(text.encode()) for text in stop) - 4 :])
    if not any(text in tail for text in stop):
        return None
    text = decode_ids(tokenizer, ids)
    cuts = [at for string in stop if (at := text.find(string)) >= 0]
    return text[: min(cuts)] if cuts else None


@dataclass(eq=False)
class Tokenizer(Part):
    """A Hugging Face tokenizer by local path or hub id, loaded on first use.

    Args:
        model: path or hub id.

    Raises:
        ModelLoadError: on first use, if there is no such tokenizer.
    """

    model: str

    @property
    def name(self) -> str:
        """Says which token ids: envs and models of one name count alike."""
        return self._path()

    @cached_property
    def hf(self) -> Any:
        """The tokenizer itself."""
        return load_tokenizer(self._path())

    @cached_property
    def vocabulary(self) -> int:
        """Number of token ids; a model may have some unused ones besides."""
        return len(self.hf)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two tokenizers if they have the same tokens under the same ids, special ones included.

        Names do not tell: a model and a copy of it in another folder count alike.
        """
        tokens = json.dumps([self.hf.get_vocab(), sorted(self.eos_ids), self.encode(PROBE)], sort_keys=True)
        return hashlib.sha256(tokens.encode()).hexdigest()

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a response."""
        return frozenset(i for i in [self.hf.eos_token_id] if i is not None)

    @cached_property
    def context_length(self) -> int:
        """Positions that the model of this name reads."""
        return context_length(self._path())

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the tokenizer's own special tokens."""
        return self.hf(text)["input_ids"]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Likewise for many prompts."""
        return self.hf(list(texts))["input_ids"] if texts else []

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that follows a prompt: no special tokens."""
        return self.hf(text, add_special_tokens=False)["input_ids"]

    def chat_text(self, messages: Sequence[Message]) -> str:
        """Chat messages as a prompt: the text that :meth:`encode` turns into the tokens of the chat template.

        It ends where the assistant's answer begins.

        Raises:
            InputError: if the tokenizer has no chat template, or puts tokens of its own around any prompt.
        """
        return self._render(messages).removeprefix(self._added_start)

    def _render(self, messages: Sequence[Message]) -> str:
        if not self.hf.chat_template:
            raise InputError(f"{self.name} has no chat template: use a plain layout, or the tokenizer of a chat model")
        return self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    @cached_property
    def _added_start(self) -> str:
        """The special token that the chat template begins with, where encode puts it before every prompt anyway."""
        text = self._render([{"role": "user", "content": "a"}])
        for start in ("", self.hf.bos_token or ""):
            if self.encode(text.removeprefix(start)) == self.encode_continuation(text):
                return start
        raise InputError(f"{self.name} puts tokens around its own chat template: use a plain layout")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return decode_ids(self.hf, ids)

    def _path(self) -> str:
        return self.model


class LoadedTokenizer(Tokenizer):
    """A Hugging Face tokenizer that is loaded already.

    Args:
        hf: the tokenizer.
        model: name of the model it belongs to.
        context_length: positions which that model reads.
    """

    def __init__(self, hf: Any, model: str, context_length: int) -> None:
        super().__init__(model)
        self.hf, self.context_length = hf, context_length


@dataclass(eq=False)
class EmbeddedTokenizer(Tokenizer):
    """The tokenizer of the embedded model."""

    model: str = field(default="smollm2-135m-instruct", init=False)

    @property
    def name(self) -> str:
        return "embedded"

    def _path(self) -> str:
        return embedded_model_path()


@dataclass(eq=False)
class WordTokenizer(Tokenizer):
    """A small vocabulary: one token per word, ``</s>`` to end and ``<unk>`` for any other word.

    Token ids are the positions in ``words``; ``</s>`` and ``<unk>`` come last.

    Args:
        words: distinct words without blanks.
        positions: context length.
    """

    model: str = field(default="words", init=False)
    words: Sequence[str] = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    positions: int = 64

    def __post_init__(self) -> None:
        words = list(self.words)
        if len(set(words)) != len(words) or not words or any(not w or w.split() != [w] for w in words):
            raise InputError(f"a word tokenizer needs distinct words without blanks, got {words!r}")

    @property
    def name(self) -> str:
        return "words:" + " ".join(self.words)

    @cached_property
    def hf(self) -> Any:
        from tokenizers import Tokenizer as Core
        from tokenizers import models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = {word: index for index, word in enumerate([*self.words, "</s>", "<unk>"])}
        core = Core(models.WordLevel(vocabulary, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", pad_token="</s>")

    @cached_property
    def context_length(self) -> int:
        return self.positions


@dataclass(eq=False)
class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8, and ``</s>`` (id 256): any text, no model.

    Args:
        positions: context length.
    """

    model: str = field(default="bytes", init=False)
    positions: int = 2048

    @property
    def name(self) -> str:
        return "bytes"

    @cached_property
    def hf(self) -> Any:
        from tokenizers import Tokenizer as Core
        from tokenizers import decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        core = Core(models.BPE(vocab=vocabulary | {"</s>": len(vocabulary)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")

    @cached_property
    def context_length(self) -> int:
        return self.positions
