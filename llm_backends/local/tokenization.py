"""Tokenizers without a model, whose token ids are the actions of a token environment, and functions that share them."""

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
"""A text that tokenizers of one vocabulary encode alike only if they agree on blanks, digits and special tokens."""


def prompt_ids(tokenizer: Any, prompt: Prompt, name: str) -> list[int]:
    """Returns the token ids of a prompt.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: a string, which gets the tokenizer's own special tokens; chat messages, which go through the chat
            template; or token ids, which are returned unchanged.
        name: name of the model in error messages.

    Raises:
        InputError: if the prompt is chat messages and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if isinstance(prompt[0], int | np.integer):
        return [int(token) for token in prompt]  # type: ignore[arg-type]
    if not tokenizer.chat_template:
        raise InputError(f"{name} has no chat template: pass prompts as strings (prompt_style='completion')")
    text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def decode_ids(tokenizer: Any, ids: Sequence[int]) -> str:
    """Returns the text of token ids by a Hugging Face tokenizer, without special tokens and with blanks unchanged."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stopped_text(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> str | None:
    """Returns the text before the first stop string if the newest token completed one, else None.

    Args:
        tokenizer: a Hugging Face tokenizer.
        ids: token ids of the whole response so far.
        stop: stop strings, none empty.
    """
    if not stop:
        return None
    # Decoding the whole response at each step would be quadratic in its length. A token is at least one byte, so the
    # last few tokens hold any stop string that ends with the newest one.
    tail = decode_ids(tokenizer, ids[-max(len(text.encode()) for text in stop) - 4 :])
    if not any(text in tail for text in stop):
        return None
    # The cut is made in the whole text, as the tail may begin in the middle of a character.
    text = decode_ids(tokenizer, ids)
    cuts = [at for string in stop if (at := text.find(string)) >= 0]
    return text[: min(cuts)] if cuts else None


@dataclass(eq=False)
class Tokenizer(Part):
    """A Hugging Face tokenizer by local path or hub id, loaded on first use.

    Args:
        model: local path or hub id.

    Raises:
        ModelLoadError: on first use, if there is no such tokenizer.
    """

    model: str

    def own_copy(self, memo: dict[int, Any]) -> Tokenizer:
        return self  # nothing changes it

    @property
    def name(self) -> str:
        """Identifies the token ids: envs and models of the same name have the same ones."""
        return self._path()

    @cached_property
    def hf(self) -> Any:
        """The Hugging Face tokenizer."""
        return load_tokenizer(self._path())

    @cached_property
    def vocabulary(self) -> int:
        """Number of token ids; a model may have more, unused ones."""
        return len(self.hf)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex, equal for tokenizers with the same tokens under the same ids, special tokens included.

        Names cannot decide this: a model and its copy in another folder have the same tokenizer.
        """
        tokens = json.dumps([self.hf.get_vocab(), sorted(self.eos_ids), self.encode(PROBE)], sort_keys=True)
        return hashlib.sha256(tokens.encode()).hexdigest()

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Ids of the tokens that end a response; empty if the tokenizer has none."""
        return frozenset(i for i in [self.hf.eos_token_id] if i is not None)

    @cached_property
    def context_length(self) -> int:
        """Context length, in tokens, of the model of this name."""
        return context_length(self._path())

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a prompt, with the tokenizer's own special tokens."""
        return self.hf(text)["input_ids"]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of several prompts, with the tokenizer's own special tokens."""
        return self.hf(list(texts))["input_ids"] if texts else []

    def encode_continuation(self, text: str) -> list[int]:
        """Returns the token ids of a text that follows a prompt, without special tokens."""
        return self.hf(text, add_special_tokens=False)["input_ids"]

    def chat_text(self, messages: Sequence[Message]) -> str:
        """Returns chat messages as the text that :meth:`encode` turns into the tokens of the chat template.

        The text ends where the assistant's answer begins.

        Raises:
            InputError: if the tokenizer has no chat template, or adds tokens around every prompt that the text cannot
                allow for.
        """
        return self._render(messages).removeprefix(self._added_start)

    def _render(self, messages: Sequence[Message]) -> str:
        if not self.hf.chat_template:
            raise InputError(f"{self.name} has no chat template: use a plain layout, or the tokenizer of a chat model")
        return self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    @cached_property
    def _added_start(self) -> str:
        """Special token that the chat template and :meth:`encode` both put first; empty if they put none twice."""
        text = self._render([{"role": "user", "content": "a"}])
        for start in ("", self.hf.bos_token or ""):
            if self.encode(text.removeprefix(start)) == self.encode_continuation(text):
                return start
        raise InputError(f"{self.name} puts tokens around its own chat template: use a plain layout")

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        return decode_ids(self.hf, ids)

    def _path(self) -> str:
        return self.model


class LoadedTokenizer(Tokenizer):
    """A Hugging Face tokenizer that is loaded already.

    Args:
        hf: the tokenizer.
        model: name of the model it belongs to.
        context_length: context length of that model, in tokens.
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
    """A tokenizer of a small vocabulary: one token per word, ``</s>`` to end and ``<unk>`` for any other word.

    Token ids are the positions in ``words``; ``</s>`` and ``<unk>`` come last.

    Args:
        words: distinct words without blanks.
        positions: context length in tokens.

    Raises:
        InputError: on construction, if ``words`` is empty, or has duplicates or words with blanks.
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
    """A tokenizer of one token per UTF-8 byte, and ``</s>`` (id 256): it encodes any text and needs no model.

    Args:
        positions: context length in tokens.
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
        # BPE without merges leaves every byte its own token.
        core = Core(models.BPE(vocab=vocabulary | {"</s>": len(vocabulary)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")

    @cached_property
    def context_length(self) -> int:
        return self.positions
