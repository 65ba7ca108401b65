"""A causal language model as the library uses it: tokens of prompts, prefill with a prefix cache, log-probs of tokens.

:class:`CausalLM` is the entry; ``sampling.py`` generates with it and ``shared_prefix.py`` scores continuations.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache

from ..base import ContextLengthError, Prompt
from ..errors import InputError
from ..parts import SharedModel
from .caches import BatchCache, PrefixCache, RowCache, extreme_rows, select_rows
from .loading import (
    ModelLoadError,
    configured_context,
    id_set,
    load_config,
    load_error,
    load_tokenizer,
    quiet_loading,
)
from .tokenization import decode_ids, encode_texts, prompt_ids, vocabulary_size
from .verification import (
    PROBE_TOKENS,
    READINGS,
    SLOW,
    Reading,
    ReadingChangedError,
    find_reading,
    holds_at,
    probe_subject,
)

PREFILL_TOKENS = 16_384
"""Largest number of tokens, padding included, in one forward pass."""

GROUP_TOKENS = 1024
"""Largest number of tokens in one pass on a CPU, where larger batches are no faster and padding costs time."""


@dataclass
class Prefilled:
    """State of a batch after its prompts were read; rows are padded on the left, so that all end in the same column."""

    cache: Cache | RowCache
    """Keys and values of the prompts, or the prompts where a model is read without a cache."""
    mask: torch.Tensor
    """int64, shape (batch, positions): 1 where a position holds a token, 0 for padding."""
    logits: torch.Tensor
    """float32, shape (batch, vocabulary): logits of the token after each prompt."""


Work = TypeVar("Work", bound=Callable[..., Any])


def until_exact(work: Work) -> Work:
    """Decorates what reads a model: it is done again if a batch shows that the model must be read in another way."""

    @wraps(work)
    def done(*args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return work(*args, **kwargs)
            except ReadingChangedError:  # at most once per slower way
                continue

    return done  # type: ignore[return-value]


class CausalLM(SharedModel):
    """A Hugging Face causal language model with its tokenizer.

    Args:
        model: the transformers model, in evaluation mode on its device.
        tokenizer: its Hugging Face tokenizer; None: the model is used on token ids alone.
        name: name in error messages and keys.
        prefix_cache_tokens: capacity of the cache of shared prompt prefixes, in tokens; 0 turns it off.
        reading: the way in which the model is read; None: the fastest that a comparison with its plain forward pass
            proves exact.

    Raises:
        InputError: if the tokenizer has more token ids than the model has embeddings, or the model is not causal.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str = "model",
        prefix_cache_tokens: int = 8192,
        reading: Reading | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        rows = len(model.get_input_embeddings().weight)
        self.vocabulary = rows if tokenizer is None else vocabulary_size(tokenizer)
        """Number of token ids of the tokenizer; the model's output layer may be padded beyond it."""
        if self.vocabulary > rows:
            raise InputError(
                f"the tokenizer of {name} has token ids up to {self.vocabulary - 1}, but the model embeds only {rows}: "
                f"resize the model's embeddings to {self.vocabulary}, or use the tokenizer that it was trained with"
            )
        # Guards the prefix cache and the active adapter, which are state of the model that all its users share.
        self.lock = threading.RLock()
        self.adapted: Any = None  # the AdaptedTrunk of this model, once it has adapters
        self.text_config = config = model.config.get_text_config()
        signature = inspect.signature(model.forward).parameters
        self.keeps_logits = "logits_to_keep" in signature
        self.cache_argument = "cache" if "cache" in signature else "past_key_values"
        """Name of the argument for a key-value cache, which transformers has changed."""
        # The slice of the last positions is not contiguous; torch would then copy the output layer once per row.
        if (head := model.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
        self.prefix_cache = PrefixCache(prefix_cache_tokens)
        self.small: CausalLM | None = None  # see verification.miniature
        self.training: Any = None  # see training/teacher_forcing.py, which proves how hidden states are read
        self.checked = PROBE_TOKENS
        """Largest number of positions of a ragged batch at which the reading has been found exact."""
        self.checked_even = 0
        """Largest number of positions of a batch without padding at which the reading has been found exact."""
        # Sliding or linear attention keeps other state than one (key, value) per position.
        sliding = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        layer_types = set(getattr(config, "layer_types", None) or (["sliding"] if sliding else []))
        self.reading: Reading = "blocks"
        if reading is None:
            candidates = READINGS if layer_types <= {"full_attention"} else READINGS[1:]
            reading = find_reading(self, candidates)
            if reading not in READINGS[:2] or (layer_types <= {"full_attention"} and reading != "blocks"):
                self._warn(reading)
            self.checked = PROBE_TOKENS if probe_subject(self) is self else 0
        self.reading = reading

    def _warn(self, reading: Reading) -> None:
        """Says that the model is read in a slower way."""
        warnings.warn(f"{self.name} is read {SLOW[reading]}: faster ways are not exact for it", stacklevel=3)

    @property
    def shares_prefixes(self) -> bool:
        """Whether prefixes that prompts share are read once."""
        return self.reading == "blocks"

    @property
    def in_float32(self) -> bool:
        """Whether the weights are in float32, in which exact ways of reading agree closely."""
        return self.model.dtype == torch.float32

    def check(self, columns: int, rows: Sequence[tuple[Sequence[int], torch.Tensor]]) -> None:
        """Checks some rows of a batch that is longer than any checked before.

        Args:
            columns: number of positions of the batch, padding included.
            rows: token ids of the rows that are the likeliest to be wrong, and the logits after each as they were read
                in the batch, shape (vocabulary,).

        Raises:
            ReadingChangedError: if they are not those of the plain forward pass; the model is read in a slower way from
                now on.
        """
        # A batch without padding says nothing of ragged ones.
        ragged = any(len(tokens) < columns for tokens, _ in rows)
        if columns <= (self.checked if ragged else max(self.checked, self.checked_even)) or self.reading == "single":
            return
        if holds_at(self, columns, rows):
            self.checked, self.checked_even = (columns, self.checked_even) if ragged else (self.checked, columns)
            return
        self.prefix_cache.clear()
        self.reading = READINGS[READINGS.index(self.reading) + 1]
        self._warn(self.reading)
        raise ReadingChangedError

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: str = "float32", device: str = "auto", **kwargs: Any) -> CausalLM:
        """Loads a model by local path or hub id.

        Args:
            path: local path or hub id.
            dtype: dtype of the weights, e.g. ``"float32"`` or ``"bfloat16"``.
            device: torch device; ``"auto"``: a GPU if there is one, else the CPU.
            kwargs: further arguments of the constructor.

        Raises:
            ModelLoadError: if it cannot be loaded or the dtype is unknown; the message names the path and the reason.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        torch_dtype = getattr(torch, dtype, None)
        if not isinstance(torch_dtype, torch.dtype):
            raise ModelLoadError(f"unknown dtype {dtype!r}: use 'float32', 'bfloat16' or 'float16'")
        try:
            with quiet_loading():
                load_config(path)  # fails fast, before weights are read
                tokenizer = load_tokenizer(path)
                model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype)
        except (OSError, ValueError, KeyError) as error:
            raise load_error(path, error) from error
        return cls(model.to(device).eval(), tokenizer, name=f"{path}:{dtype}", **kwargs)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device

    @property
    def trunk(self) -> Any:
        """The model without its output layer."""
        return self.model.base_model

    @property
    def head(self) -> Any:
        """The output layer, a linear map from last hidden states to logits."""
        return self.model.get_output_embeddings()

    @property
    def context_length(self) -> int:
        """Context length in tokens."""
        return configured_context(self.model.config)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids of the tokens that end a completion, from the generation config and the tokenizer."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        return id_set(configured) | id_set(self.tokenizer.eos_token_id)

    def encode(self, prompt: Prompt, check: bool = True) -> list[int]:
        """Returns the token ids of a prompt.

        Chat messages go through the chat template; strings get the tokens that the tokenizer puts before a text.

        Args:
            prompt: string, chat messages or token ids.
            check: whether to raise :class:`ContextLengthError`.

        Raises:
            ContextLengthError: if the context has no room for even one token after the prompt.
            BackendError: if the chat template refuses the messages.
            InputError: if the prompt is chat messages and the tokenizer has no chat template.
        """
        ids = prompt_ids(self.tokenizer, prompt, self.name)
        if check and len(ids) >= self.context_length:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, {self.name} reads {self.context_length} with its completion"
            )
        return ids

    def encode_completion(self, text: str) -> list[int]:
        """Returns the token ids of a text that follows a prompt, without special tokens."""
        return encode_texts(self.tokenizer, [text], start=False)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens; empty without a tokenizer."""
        return "" if self.tokenizer is None else decode_ids(self.tokenizer, ids)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], free_positions: int, are_prefixes: bool = False) -> Prefilled:
        """Reads the prompts, except for prefixes that the prefix cache holds, in groups, into one cache.

        Args:
            prompts: token ids, none empty.
            free_positions: number of positions to keep free in the cache for the tokens that follow.
            are_prefixes: whether the prompts are prefixes of others, all of which are stored in the prefix cache.
        """
        if self.reading in ("padded", "single"):
            mask = torch.ones((len(prompts), 1), dtype=torch.long, device=self.device)
            return Prefilled(RowCache(prompts), mask, self._read_rows(prompts, 1)[:, -1])
        # Prefixes that are read first are found in the cache when the prompts are read.
        look_for_prefixes = self.shares_prefixes and self.prefix_cache.capacity and not are_prefixes
        if look_for_prefixes and (shared := self.prefix_cache.prefixes_to_prefill(prompts)):
            self.prefill(shared, 0, are_prefixes=True)
        batch = len(prompts)
        prefixes = [self.prefix_cache.lookup(p) if self.shares_prefixes else None for p in prompts]
        known = [0 if prefix is None else prefix.shape[-2] for prefix in prefixes]
        fresh = [len(p) - k for p, k in zip(prompts, known, strict=True)]
        # Row layout: [padding][stored prefix][gap][new tokens]. Every row ends in the same column, so that decoding
        # appends one column to all. The new tokens of a group are one rectangle, so a row with fewer of them has a gap
        # before its own. The mask hides the gap, and positions are counted from the mask (see forward).
        groups = self._groups(fresh)
        columns = max(max(known[i] for i in group) + max(fresh[i] for i in group) for group in groups)
        mask = torch.zeros((batch, columns), dtype=torch.long)
        cache, logits = self._empty_cache(batch, columns + free_positions), []
        for group in groups:
            past, new = max(known[i] for i in group), max(fresh[i] for i in group)
            # In this group columns [first, begin) hold the stored prefixes and [begin, columns) the new tokens.
            rows, first, begin = slice(group[0], group[-1] + 1), columns - new - past, columns - new
            ids = torch.zeros((len(group), new), dtype=torch.long)
            if isinstance(cache, BatchCache):
                # The buffer is uninitialised. Padding is masked, but NaN times an attention weight of 0 is NaN.
                cache.buffer[:, :, rows, :, :begin] = 0
            for row, i in enumerate(group):
                ids[row, new - fresh[i] :] = torch.tensor(prompts[i][known[i] :])
                mask[i, columns - fresh[i] :] = 1
                mask[i, begin - known[i] : begin] = 1
                if (prefix := prefixes[i]) is not None:
                    cache.buffer[:, :, i, :, begin - known[i] : begin] = prefix  # type: ignore[attr-defined]
            # The group's pass starts at its own first column; the columns before that are padding for all its rows.
            window = BatchCache(cache.buffer[:, :, rows, :, first:], past) if isinstance(cache, BatchCache) else cache
            logits.append(self.forward(ids.to(self.device), mask[rows, first:].to(self.device), window))
            self._store_prefixes(prompts[rows], known[rows], past, window, are_prefixes)
        # The groups wrote into views of the buffer: only the length of the whole is missing.
        if isinstance(cache, BatchCache):
            cache = BatchCache(cache.buffer, columns)
        state = Prefilled(cache, mask.to(self.device), torch.cat(logits))
        if columns > self.checked:
            self.check(columns, [(prompts[row], state.logits[row]) for row in extreme_rows(mask)])
        return state

    def _groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Returns groups of consecutive rows to read together, on a CPU smaller ones, to pad short rows less."""
        # Transformers' own cache cannot be filled in parts of its rows.
        if not self.shares_prefixes:
            return [list(range(len(lengths)))]
        return list(token_budget_chunks(lengths, GROUP_TOKENS if self.device.type == "cpu" else PREFILL_TOKENS))

    def _read_rows(self, rows: Sequence[Sequence[int]], last: int) -> torch.Tensor:
        """Returns the logits of the last positions of whole rows, float32, shape (rows, last, vocabulary)."""
        together = token_budget_chunks(list(map(len, rows)), GROUP_TOKENS)
        read = []
        for group in together if self.reading == "padded" else ([k] for k in range(len(rows))):
            # By causality no position sees the padding behind it, the last token again.
            width = max(len(rows[k]) for k in group)
            ids = torch.tensor([[*rows[k], *[rows[k][-1]] * (width - len(rows[k]))] for k in group])
            logits = self.model(input_ids=ids.to(self.device), use_cache=False).logits
            read += [logits[row, len(rows[k]) - last : len(rows[k]), : self.vocabulary] for row, k in enumerate(group)]
        return torch.stack(read).float()

    @torch.inference_mode()
    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Cache | RowCache, logits_to_keep: int = 1
    ) -> torch.Tensor:
        """Runs the model on new tokens after those of a cache.

        Args:
            ids: new token ids, int64, shape (batch, new).
            mask: 1 for tokens and 0 for padding, int64, shape (batch, past + new).
            cache: keys and values of the past, to which those of the new tokens are added.
            logits_to_keep: number of last positions to return the logits of.

        Returns:
            float32 logits of the tokenizer's ids, shape (batch, vocabulary) for ``logits_to_keep=1``, else (batch,
            logits_to_keep, vocabulary).
        """
        if isinstance(cache, RowCache):
            for row, new in zip(cache.rows, ids.tolist(), strict=True):
                row += new
            logits = self._read_rows(cache.rows, logits_to_keep)
            return logits[:, -1] if logits_to_keep == 1 else logits
        # Positions count the tokens in the mask, so that padding and gaps take up none. Leading padding would get -1,
        # and finished rows may run past the context, where a table of position embeddings ends: clamp both.
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0, max=self.context_length - 1)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **{self.cache_argument: cache},
        )
        # Output layers may be padded beyond the tokenizer. Softmax and logsumexp are in float32 whatever the dtype.
        logits = output.logits[..., : self.vocabulary].float()
        return logits[:, -1] if logits_to_keep == 1 else logits[:, -logits_to_keep:]

    @until_exact
    def logprobs(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Returns the log-probs of completion tokens given their prompts.

        Prompts that several rows have are read once, and logits are computed at completion positions only.

        Args:
            prompts: n lists of token ids.
            completions: n non-empty lists of token ids.

        Returns:
            n float32 arrays, shape (len(completion),), in nats.
        """
        unique = {prompt: index for index, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        rows: list[np.ndarray] = [np.empty(0, np.float32)] * len(prompts)
        order = sorted(unique, key=len)  # prompts of similar length together: less padding
        width = max(map(len, completions))
        for chunk in token_budget_chunks([len(p) + width for p in order], PREFILL_TOKENS):
            members = {order[i]: k for k, i in enumerate(chunk)}
            chunk_rows = [i for i, prompt in enumerate(prompts) if tuple(prompt) in members]
            with self.lock:
                state = self.prefill(list(members), free_positions=width)
                owner = [members[tuple(prompts[i])] for i in chunk_rows]
                chosen = [completions[i] for i in chunk_rows]
                scores = self.completion_logprobs(state, owner, chosen, list(members))
            for i, row in zip(chunk_rows, scores, strict=True):
                rows[i] = row
        return rows

    @torch.inference_mode()
    def completion_logprobs(
        self,
        state: Prefilled,
        owner: list[int],
        completions: Sequence[Sequence[int]],
        prompts: Sequence[Sequence[int]] | None = None,
    ) -> list[np.ndarray]:
        """Returns the log-probs of completions after prompts that have been read.

        Args:
            state: state of the prompts, with room for the longest completion; left unchanged if the model has full
                attention throughout.
            owner: for each completion the row of its prompt in ``state``.
            completions: token ids, none empty.
            prompts: token ids of the rows of ``state``, by which a batch of new length is checked; None: it is not.

        Returns:
            A float32 array per completion, shape (len(completion),), in nats.
        """
        # The first token of a completion is predicted by its prompt's logits, without another pass.
        first = state.logits.log_softmax(dim=-1)
        scores = [first[o, completion[0]].reshape(1) for o, completion in zip(owner, completions, strict=True)]
        longer = [i for i, completion in enumerate(completions) if len(completion) > 1]
        if longer:
            # Right padding is safe here: by causality no real position attends to the padding after it. The last token
            # of a completion is not read, since nothing after it is scored.
            new = max(len(completions[i]) for i in longer) - 1
            ids = torch.zeros((len(longer), new), dtype=torch.long)
            for row, i in enumerate(longer):
                ids[row, : len(completions[i]) - 1] = torch.tensor(completions[i][:-1])
            owner_rows = torch.tensor([owner[i] for i in longer], device=self.device)
            cache = select_rows(state.cache, owner_rows)
            mask = torch.cat([state.mask[owner_rows], torch.ones_like(ids).to(self.device)], dim=1)
            logits = self.forward(ids.to(self.device), mask, cache, logits_to_keep=new).reshape(len(longer), new, -1)
            for row, i in enumerate(longer):
                rest = torch.tensor(completions[i][1:], device=self.device)
                scores[i] = torch.cat([scores[i], selective_log_softmax(logits[row, : len(rest)], rest)])
            if prompts is not None and mask.shape[1] > self.checked:
                extremes = [
                    (row, completions[longer[row]][:-1], prompts[owner[longer[row]]]) for row in extreme_rows(mask)
                ]
                self.check(
                    mask.shape[1], [([*prompt, *read], logits[row, len(read) - 1]) for row, read, prompt in extremes]
                )
        return [row.cpu().numpy().astype(np.float32) for row in scores]

    def _empty_cache(self, batch: int, capacity: int) -> Cache:
        """Returns a cache for a batch; other than full attention needs transformers' own."""
        if not self.shares_prefixes:
            return DynamicCache(config=self.text_config)
        return BatchCache.allocate(self.text_config, batch, capacity, self.model.dtype, self.device)

    def _store_prefixes(
        self, prompts: Sequence[Sequence[int]], known: Sequence[int], past: int, cache: Cache, store_all: bool
    ) -> None:
        """Passes keys and values of each prompt, without the gap between prefix and new tokens, to the prefix cache."""
        if not isinstance(cache, BatchCache) or not self.prefix_cache.capacity:
            return
        end = cache.get_seq_length()
        for row, (prompt, known_length) in enumerate(zip(prompts, known, strict=True)):
            keys_values = cache.buffer[:, :, row]
            stored, new = (
                keys_values[..., past - known_length : past, :],
                keys_values[..., end - (len(prompt) - known_length) : end, :],
            )
            self.prefix_cache.store(prompt, torch.cat([stored, new], dim=-2) if known_length else new, store_all)


def selective_log_softmax(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns the log-probs of given tokens, without a log-softmax over the vocabulary for each.

    Args:
        logits: float32, shape (..., vocabulary).
        ids: int64, shape (...): the tokens.

    Returns:
        float32, shape (...), in nats.
    """
    token_logits = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return token_logits - logits.logsumexp(dim=-1)


def token_budget_chunks(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Splits rows 0..n-1, in order, into chunks whose padded size (rows x longest) stays within ``budget`` tokens.

    A row longer than the budget is a chunk by itself.
    """
    chunk: list[int] = []
    longest = 0
    for index, length in enumerate(lengths):
        if chunk and max(longest, length) * (len(chunk) + 1) > budget:
            yield chunk
            chunk, longest = [], 0
        chunk.append(index)
        longest = max(longest, length)
    if chunk:
        yield chunk
