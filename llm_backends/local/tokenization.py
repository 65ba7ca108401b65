"""Tokenizers without a model, whose token ids are the actions of a token environment, and functions that share them."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from jinja2 import TemplateError

from ..base import BackendError, Message, Prompt
from ..errors import InputError
from ..parts import Part
from .loading import context_length, embedded_model_path, end_ids, load_tokenizer

PROBE = "A probe: naïve  café, 12.5%\n\tend"
"""A text that tokenizers of one vocabulary encode alike only if they agree on blanks, digits and special tokens."""


ESCAPE = "\ue000"
"""A character of the private-use area, which :func:`render_chat` puts into control tokens that the data spell."""


def vocabulary_size(tokenizer: Any) -> int:
    """Returns the largest token id of a Hugging Face tokenizer plus one: ids need not be dense."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Returns the ids of the control tokens that a Hugging Face tokenizer recognises in a text."""
    return {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def prompt_ids(tokenizer: Any, prompt: Prompt, name: str) -> list[int]:
    """Returns the token ids of a prompt.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: a string, which gets the tokens that the tokenizer puts before a text; chat messages, which go through
            the chat template; or token ids, which are returned unchanged.
        name: name of the model in error messages.

    Raises:
        InputError: if the prompt is chat messages and the tokenizer has no chat template.
        BackendError: if the chat template refuses the messages.
    """
    if isinstance(prompt, str):
        return encode_texts(tokenizer, [prompt])[0]
    if isinstance(prompt[0], int | np.integer):
        return [int(token) for token in prompt]  # type: ignore[arg-type]
    # The template writes the special tokens itself.
    return encode_texts(tokenizer, [render_chat(tokenizer, prompt, name)], start=False, markup=True)[0]  # type: ignore[arg-type]


def encode_texts(tokenizer: Any, texts: Sequence[str], start: bool = True, markup: bool = False) -> list[list[int]]:
    """Returns the token ids of texts.

    A text is data: control tokens that it spells (``</s>`` of HTML) are encoded as letters. No end-of-sequence token is
    added, whatever the tokenizer does by itself: a prompt is to be continued.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts.
        start: whether to add the tokens that the tokenizer puts before a text.
        markup: whether :func:`render_chat` wrote the texts, so that the control tokens of the template are meant.

    Raises:
        InputError: if a text spells a control token that the tokenizer cannot write as letters.
    """
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    first = _start_tokens(tokenizer) if start else []
    spelled = "|".join(re.escape(_escaped(token) if markup else token) for token in control_tokens(tokenizer))
    encoded = []
    for text, ids in zip(texts, rows, strict=True):
        if spelled and re.search(spelled, text):
            ids = _markup_ids(tokenizer, text, spelled) if markup else _letters(tokenizer, text)
        encoded.append([*first, *ids])
    return encoded


def render_chat(tokenizer: Any, messages: Sequence[Message], name: str, answer_follows: bool = True) -> str:
    """Returns chat messages as the chat template writes them, with control tokens of their contents marked as data.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: the messages.
        name: name of the model in error messages.
        answer_follows: whether the text ends where the assistant's answer begins.

    Raises:
        InputError: if the tokenizer has no chat template.
        BackendError: if the template refuses the messages: some have no system role.
    """
    if not tokenizer.chat_template:
        raise InputError(f"{name} has no chat template: pass prompts as strings (prompt_style='completion')")
    spelled = "|".join(map(re.escape, control_tokens(tokenizer)))
    if spelled:
        messages = [
            dict(message) | {"content": re.sub(spelled, lambda match: _escaped(match[0]), message["content"])}
            for message in messages
        ]
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_follows)
    except (TemplateError, ValueError, TypeError) as error:
        raise BackendError(f"the chat template of {name} refuses the prompt: {error}") from error


def _start_tokens(tokenizer: Any) -> list[int]:
    """Returns the tokens that a tokenizer puts before a text."""
    text, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    return next((whole[:k] for k in range(len(whole)) if whole[k : k + len(text)] == text), [])


def _escaped(token: str) -> str:
    return token[0] + ESCAPE + token[1:]


def _markup_ids(tokenizer: Any, text: str, spelled: str) -> list[int]:
    """Returns the ids of a rendered chat in which matches of the pattern ``spelled`` are data."""
    ids: list[int] = []
    # re.split gives what is between the matches at even positions, the matches at odd ones.
    for number, piece in enumerate(re.split(f"({spelled})", text)):
        if number % 2:
            ids += _letters(tokenizer, piece.replace(ESCAPE, ""))
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def _letters(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of a text without any control token.

    Raises:
        InputError: if the tokenizer cannot write one of them as letters.
    """
    controls = set(control_tokens(tokenizer).values()) - {tokenizer.unk_token_id}
    twin = _letter_tokenizer(tokenizer)
    ids = twin(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if controls & set(ids):  # control tokens are words of the vocabulary too, which only single characters avoid
        ids = [
            i for letter in text for i in twin(letter, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ]
    if controls & set(ids):
        raise InputError(f"{text[:60]!r} spells a control token, which this tokenizer cannot write as letters")
    return ids


@lru_cache(maxsize=4)
def _letter_tokenizer(tokenizer: Any) -> Any:
    """Returns a copy, as ``split_special_tokens`` changes a tokenizer for the other threads that use it."""
    return copy.deepcopy(tokenizer)


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
        """Number of token ids, the largest one plus one; a model may have more, unused ones."""
        return vocabulary_size(self.hf)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex, equal for tokenizers with the same tokens under the same ids, special tokens included.

        Names cannot decide this: a model and its copy in another folder have the same tokenizer.
        """
        eos = [] if self.hf.eos_token_id is None else [self.hf.eos_token_id]
        tokens = json.dumps([self.hf.get_vocab(), eos, self.encode(PROBE)], sort_keys=True)
        return hashlib.sha256(tokens.encode()).hexdigest()

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Ids of the tokens that end a response: the tokenizer's EOS and those of the model's generation config."""
        eos = self.hf.eos_token_id
        return self.model_end_ids() | (frozenset() if eos is None else {eos})

    def model_end_ids(self) -> frozenset[int]:
        """Returns the end-of-sequence tokens that the generation config of the model names."""
        return end_ids(self._path())

    def closing(self, chat: bool = False) -> list[int]:
        """Returns the token that closes a whole response, as training writes it: one id, or none if there is none.

        Args:
            chat: whether the response is a turn of the chat template, which may close turns by a token of its own.

        Raises:
            InputError: for a chat without a chat template.
        """
        eos = self.hf.eos_token_id
        if chat:
            # Of what the template puts behind an answer, the last token that ends a response.
            question: list[Message] = [{"role": "user", "content": "a"}]
            answered: list[Message] = [*question, {"role": "assistant", "content": "b"}]
            opened = encode_texts(self.hf, [self._render(question)], start=False, markup=True)[0]
            closed = encode_texts(self.hf, [self._render(answered, False)], start=False, markup=True)[0]
            eos = next((i for i in reversed(closed[len(opened) :]) if i in self.eos_ids), eos)
        return sorted(self.eos_ids)[:1] if eos is None else [eos]

    def stop_ids(self, stop: Iterable[str]) -> frozenset[int]:
        """Returns the ids of those stop strings that are control tokens, which decoded texts do not show."""
        controls = control_tokens(self.hf)
        return frozenset(controls[text] for text in stop if text in controls)

    @cached_property
    def context_length(self) -> int:
        """Context length, in tokens, of the model of this name."""
        return context_length(self._path())

    def encode(self, text: str, markup: bool = False) -> list[int]:
        """Returns the token ids of a prompt, with the tokens that the tokenizer puts before a text.

        Args:
            text: the prompt. It is data: a control token that it spells is encoded as letters.
            markup: whether the text is of :meth:`chat_text`, whose control tokens are those of the template.
        """
        return self.encode_batch([text], markup)[0]

    def encode_batch(self, texts: Sequence[str], markup: bool = False) -> list[list[int]]:
        """Returns the token ids of several prompts, each as :meth:`encode` gives them."""
        return encode_texts(self.hf, texts, markup=markup)

    def encode_continuation(self, text: str) -> list[int]:
        """Returns the token ids of a text that follows a prompt; it is data, as in :meth:`encode`."""
        return encode_texts(self.hf, [text], start=False)[0]

    def chat_text(self, messages: Sequence[Message]) -> str:
        """Returns chat messages as the text that :meth:`encode` (``markup=True``) turns into the template's tokens.

        The text ends where the assistant's answer begins.

        Raises:
            InputError: if the tokenizer has no chat template, the template refuses the messages, or the tokenizer puts
                tokens before every prompt that the text cannot allow for.
        """
        return self._render(messages).removeprefix(self._added_start)

    def _render(self, messages: Sequence[Message], answer_follows: bool = True) -> str:
        if not self.hf.chat_template:
            raise InputError(f"{self.name} has no chat template: use a plain layout, or the tokenizer of a chat model")
        try:
            return render_chat(self.hf, messages, self.name, answer_follows)
        except BackendError as error:
            raise InputError(str(error)) from error

    @cached_property
    def _added_start(self) -> str:
        """Special token that the chat template and :meth:`encode` both put first; empty if they put none twice."""
        text = self._render([{"role": "user", "content": "a"}])
        ids = self.hf(text, add_special_tokens=False)["input_ids"]
        for start in ("", self.hf.bos_token or ""):
            if self.encode(text.removeprefix(start), markup=True) == ids:
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
        end_ids: ids of the tokens that end a response by that model's generation config.
    """

    def __init__(self, hf: Any, model: str, context_length: int, end_ids: frozenset[int] = frozenset()) -> None:
        super().__init__(model)
        self.hf, self.context_length, self._end_ids = hf, context_length, end_ids

    def model_end_ids(self) -> frozenset[int]:
        return self._end_ids


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

    def model_end_ids(self) -> frozenset[int]:
        return frozenset()  # it belongs to no model


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

    def model_end_ids(self) -> frozenset[int]:
        return frozenset()  # it belongs to no model
