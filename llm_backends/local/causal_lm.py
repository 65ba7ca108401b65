"""A causal language model as the rest of the library sees it: prompts to tokens, prefill, and log-probs of tokens."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..base import ContextLengthError, Prompt
from .loading import ModelLoadError, load_config, load_error, load_tokenizer, quiet_loading
from .tokenization import decode_ids, prompt_ids

BLOCK = 16
"""Tokens in one cached prefix block."""

BlockKey = tuple[int, ...]


class _BufferLayer(DynamicLayer):
    """One layer's window on the buffer of a :class:`BatchCache`."""

    def __init__(self, buffer: torch.Tensor, length: int) -> None:
        super().__init__()
        self.buffer, self.length = buffer, length
        self.dtype, self.device = buffer.dtype, buffer.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new keys and values behind the present ones and returns all, (batch, heads, length, dim)."""
        end = self.length + key_states.shape[-2]
        self.buffer[0, :, :, self.length : end] = key_states
        self.buffer[1, :, :, self.length : end] = value_states
        self.length = end
        return self.buffer[0, :, :, :end], self.buffer[1, :, :, :end]

    def get_seq_length(self) -> int:
        """Positions written so far, padding included."""
        return self.length


class BatchCache(Cache):
    """Keys and values of a batch in one tensor, shape (layers, 2, batch, heads, capacity, head dim).

    Args:
        buffer: the tensor; positions before ``length`` hold keys and values, the rest is free.
        length: positions in use, the same for all rows (rows are padded on the left).
    """

    def __init__(self, buffer: torch.Tensor, length: int) -> None:
        self.buffer = buffer
        super().__init__(layers=[_BufferLayer(layer, length) for layer in buffer])

    @classmethod
    def allocate(
        cls, config: object, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> BatchCache:
        """An empty cache for a model with full attention in every layer."""
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads  # type: ignore[attr-defined]
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads  # type: ignore[attr-defined]
        shape = (config.num_hidden_layers, 2, batch, heads, capacity, dim)  # type: ignore[attr-defined]
        return cls(torch.empty(shape, dtype=dtype, device=device), 0)

    def select(self, rows: torch.Tensor, capacity: int | None = None) -> BatchCache:
        """A cache of the given rows (repeats allowed), int64, with room for ``capacity`` positions."""
        length = self.get_seq_length()
        layers, two, _, heads, old, dim = self.buffer.shape
        buffer = self.buffer.new_empty((layers, two, len(rows), heads, capacity or old, dim))
        buffer[..., :length, :] = self.buffer[..., :length, :].index_select(2, rows)
        return BatchCache(buffer, length)


class PrefixCache:
    """Keys and values of prompt prefixes that came more than once (few-shot headers, system messages).

    A prompt is cut into blocks of :data:`BLOCK` tokens, each keyed by all tokens up to its end. A block is stored when
    its key is seen for the second time, so one-off text takes no memory; the least recently used block leaves first.

    Args:
        capacity: stored tokens at most; 0 turns the cache off.
    """

    def __init__(self, capacity: int = 8192) -> None:
        self.capacity = capacity
        self._blocks: OrderedDict[BlockKey, torch.Tensor] = OrderedDict()
        self._seen: OrderedDict[int, None] = OrderedDict()

    def lookup(self, tokens: Sequence[int]) -> torch.Tensor | None:
        """The longest stored prefix, shape (layers, 2, heads, tokens, head dim), short of the whole prompt; or None."""
        found: list[BlockKey] = []
        for end in range(BLOCK, len(tokens), BLOCK):
            key = tuple(tokens[:end])
            if key not in self._blocks:
                break
            found.append(key)
        for key in reversed(found):  # a prefix loses its end first: no block is found without those before it
            self._blocks.move_to_end(key)
        return torch.cat([self._blocks[key] for key in found], dim=-2) if found else None

    def apart(self, prompts: Sequence[Sequence[int]]) -> list[BlockKey]:
        """Prefixes that are better read once, apart from the batch, and stored.

        Those met before or in two of these prompts; and those of a prompt with far more to read than another one has,
        for the whole batch would be padded to its length.
        """
        unread = []
        for tokens in prompts:
            ends = range(BLOCK, min(len(tokens), self.capacity + 1), BLOCK)
            unread.append([key for end in ends if (key := tuple(tokens[:end])) not in self._blocks])
        counts = Counter(key for keys in unread for key in keys)
        shortest = min(map(len, unread))
        worth = {
            key
            for keys in unread
            for key in keys
            if counts[key] > 1 or hash(key) in self._seen or len(keys) > 2 * shortest + 4
        }
        return sorted(worth - {key[:-BLOCK] for key in worth})

    def store(self, tokens: Sequence[int], row: torch.Tensor, apart: bool = False) -> None:
        """Offers a prompt's keys and values, shape (layers, 2, heads, len(tokens), head dim).

        Args:
            tokens: the prompt.
            row: its keys and values.
            apart: store all of them now, for :meth:`apart` named them.
        """
        for end in reversed(range(BLOCK, min(len(tokens) + apart, self.capacity + 1), BLOCK)):
            key = tuple(tokens[:end])
            if key in self._blocks:
                continue
            digest = hash(key)
            if not apart and digest not in self._seen:
                self._seen[digest] = None
                while len(self._seen) > 65_536:
                    self._seen.popitem(last=False)
                continue
            self._blocks[key] = row[..., end - BLOCK : end, :].clone()
            while len(self._blocks) * BLOCK > self.capacity:
                self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Forgets everything; to be called when the model's weights change."""
        self._blocks.clear()
        self._seen.clear()


PREFILL_TOKENS = 16_384
"""Tokens, padding included, in one forward pass at most."""

GROUP_TOKENS = 1024
"""The same on a CPU, where larger batches are no faster and padding costs."""


def _logit_scale(config: Any) -> float:
    """What a model multiplies its logits by."""
    if getattr(config, "final_logit_softcapping", None):
        return float("nan")  # no constant: see LanguageModelPolicy, which refuses such models
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


@dataclass
class Prefilled:
    """State of a batch after its prompts were read; rows are padded on the left."""

    cache: Cache
    mask: torch.Tensor
    """int64, shape (batch, positions): 1 where a position holds a token, 0 for padding."""
    logits: torch.Tensor
    """float32, shape (batch, vocabulary): of the token after each prompt."""


class CausalLM:
    """A Hugging Face causal language model with its tokenizer.

    Args:
        model: in evaluation mode on its device.
        tokenizer: its tokenizer.
        name: what to call it in errors and keys.
        prefix_cache_tokens: size of the cache of shared prompt prefixes, in tokens; 0 turns it off.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "model", prefix_cache_tokens: int = 8192) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.lock = threading.RLock()
        self.adapted: Any = None  # the AdaptedTrunk on this model, once somebody has put adapters on it
        config = model.config.get_text_config()
        layer_types = getattr(config, "layer_types", None) or []
        # Sliding or linear attention keeps other state than (key, value) per position: leave those to transformers.
        self.plain_attention = set(layer_types) <= {"full_attention"} and not (
            not layer_types and getattr(config, "sliding_window", None)
        )
        self.logit_scale = _logit_scale(config)
        # A slice of the last positions is not contiguous; torch would then copy the output layer once per row.
        model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        self.prefix_cache = PrefixCache(prefix_cache_tokens if self.plain_attention else 0)
        self.text_config = config

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: str = "float32", device: str = "auto", **kwargs: Any) -> CausalLM:
        """Loads a model by local path or hub id.

        Raises:
            ModelLoadError: naming the path and the reason.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        torch_dtype = getattr(torch, dtype, None)
        if not isinstance(torch_dtype, torch.dtype):
            raise ModelLoadError(f"unknown dtype {dtype!r}: use 'float32', 'bfloat16' or 'float16'")
        try:
            with quiet_loading():
                load_config(path)  # a cheap refusal before the weights are read
                tokenizer = load_tokenizer(path)
                model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype)
        except (OSError, ValueError, KeyError) as error:
            raise load_error(path, error) from error
        return cls(model.to(device).eval(), tokenizer, name=f"{path}:{dtype}", **kwargs)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def trunk(self) -> Any:
        """The model without its output layer."""
        return self.model.base_model

    @property
    def head(self) -> Any:
        """The output layer, a linear one."""
        return self.model.get_output_embeddings()

    @property
    def context_length(self) -> int:
        """Positions the model was built for."""
        return int(getattr(self.text_config, "max_position_embeddings", None) or self.tokenizer.model_max_length)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a completion."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in [*ids, self.tokenizer.eos_token_id] if i is not None)

    def encode(self, prompt: Prompt, check: bool = True) -> list[int]:
        """Token ids of a prompt: chat messages through the chat template, strings with the tokenizer's own specials.

        Raises:
            ContextLengthError: if not one token would fit behind it.
            ValueError: for chat messages where the tokenizer has no chat template.
        """
        ids = prompt_ids(self.tokenizer, prompt, self.name)
        if check and len(ids) >= self.context_length:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, {self.name} reads {self.context_length} with its completion"
            )
        return ids

    def encode_completion(self, text: str) -> list[int]:
        """Token ids of a text that follows a prompt: no special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return decode_ids(self.tokenizer, ids)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> Prefilled:
        """Reads the prompts, those parts left out that the prefix cache holds.

        Args:
            prompts: token ids, none empty.
            room: positions to keep free for the tokens that follow.
        """
        if self.prefix_cache.capacity and (headers := self.prefix_cache.apart(prompts)):
            self._read(headers, 0, apart=True)
        return self._read(prompts, room)

    def _read(self, prompts: Sequence[Sequence[int]], room: int, apart: bool = False) -> Prefilled:
        batch = len(prompts)
        prefixes = [self.prefix_cache.lookup(p) if self.plain_attention else None for p in prompts]
        known = [0 if prefix is None else prefix.shape[-2] for prefix in prefixes]
        fresh = [len(p) - k for p, k in zip(prompts, known, strict=True)]
        # Row layout: [padding][stored prefix][padding][new tokens]; every row ends in the same column.
        groups = self._groups(fresh)
        columns = max(max(known[i] for i in group) + max(fresh[i] for i in group) for group in groups)
        mask = torch.zeros((batch, columns), dtype=torch.long)
        cache, logits = self._empty_cache(batch, columns + room), []
        for group in groups:
            past, new = max(known[i] for i in group), max(fresh[i] for i in group)
            rows, first, begin = slice(group[0], group[-1] + 1), columns - new - past, columns - new
            ids = torch.zeros((len(group), new), dtype=torch.long)
            if isinstance(cache, BatchCache):
                cache.buffer[:, :, rows, :, :begin] = 0  # padding is masked, but must not hold NaN
            for row, i in enumerate(group):
                ids[row, new - fresh[i] :] = torch.tensor(prompts[i][known[i] :])
                mask[i, columns - fresh[i] :] = 1
                mask[i, begin - known[i] : begin] = 1
                if (prefix := prefixes[i]) is not None:
                    cache.buffer[:, :, i, :, begin - known[i] : begin] = prefix  # type: ignore[attr-defined]
            window = BatchCache(cache.buffer[:, :, rows, :, first:], past) if isinstance(cache, BatchCache) else cache
            logits.append(self.forward(ids.to(self.device), mask[rows, first:].to(self.device), window))
            self._store_prefixes(prompts[rows], known[rows], past, window, apart)
        if isinstance(cache, BatchCache):
            cache = BatchCache(cache.buffer, columns)
        return Prefilled(cache, mask.to(self.device), torch.cat(logits))

    def _groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Consecutive rows to be read together: on a CPU few enough that short ones are not padded to the longest."""
        if not self.plain_attention:
            return [list(range(len(lengths)))]
        return list(token_budget_chunks(lengths, GROUP_TOKENS if self.device.type == "cpu" else PREFILL_TOKENS))

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Cache, keep: int = 1) -> torch.Tensor:
        """One step of the model on top of a cache.

        Args:
            ids: int64, shape (batch, new), the new tokens.
            mask: int64, shape (batch, past + new).
            cache: holds the past; the new keys and values are added to it.
            keep: number of last positions whose logits are wanted.

        Returns:
            float32 logits, shape (batch, vocabulary) for ``keep=1``, else (batch, keep, vocabulary).
        """
        # Padding and finished rows may stand outside the context; absolute position embeddings end there.
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0, max=self.context_length - 1)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits = output.logits.float()
        return logits[:, -1] if keep == 1 else logits[:, -keep:]

    def logprobs(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probs of completion tokens given their prompts.

        Prompts that stand in several rows are read once, and logits are computed at completion positions only.

        Args:
            prompts: n lists of token ids.
            completions: n non-empty lists of token ids.

        Returns:
            n float32 arrays, shape (len(completion),), in nats.
        """
        unique = {prompt: index for index, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        rows: list[np.ndarray] = [np.empty(0, np.float32)] * len(prompts)
        order = sorted(unique, key=len)
        width = max(map(len, completions))
        for chunk in token_budget_chunks([len(p) + width for p in order], PREFILL_TOKENS):
            members = {order[i]: k for k, i in enumerate(chunk)}
            wanted = [i for i, prompt in enumerate(prompts) if tuple(prompt) in members]
            with self.lock:
                state = self.prefill(list(members), room=width)
                owner = [members[tuple(prompts[i])] for i in wanted]
                scores = self.completion_logprobs(state, owner, [completions[i] for i in wanted])
            for i, row in zip(wanted, scores, strict=True):
                rows[i] = row
        return rows

    @torch.inference_mode()
    def completion_logprobs(
        self, state: Prefilled, owner: list[int], completions: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Log-probs of completions on top of prompts that were read.

        Args:
            state: of the prompts, with room for the longest completion; it stays as it is.
            owner: for each completion the row of its prompt.
            completions: token ids, none empty.

        Returns:
            A float32 array per completion, shape (len(completion),), in nats.
        """
        first = state.logits.log_softmax(dim=-1)
        scores = [first[o, completion[0]].reshape(1) for o, completion in zip(owner, completions, strict=True)]
        longer = [i for i, completion in enumerate(completions) if len(completion) > 1]
        if longer:
            # Right padding is safe here: a padded column is masked for the real ones by causality.
            new = max(len(completions[i]) for i in longer) - 1
            ids = torch.zeros((len(longer), new), dtype=torch.long)
            for row, i in enumerate(longer):
                ids[row, : len(completions[i]) - 1] = torch.tensor(completions[i][:-1])
            picked = torch.tensor([owner[i] for i in longer], device=self.device)
            cache = select_rows(state.cache, picked)
            mask = torch.cat([state.mask[picked], torch.ones_like(ids).to(self.device)], dim=1)
            logits = self.forward(ids.to(self.device), mask, cache, keep=new).reshape(len(longer), new, -1)
            for row, i in enumerate(longer):
                rest = torch.tensor(completions[i][1:], device=self.device)
                scores[i] = torch.cat([scores[i], selective_log_softmax(logits[row, : len(rest)], rest)])
        return [row.cpu().numpy().astype(np.float32) for row in scores]

    def _empty_cache(self, batch: int, capacity: int) -> Cache:
        if not self.plain_attention:
            return DynamicCache(config=self.text_config)
        return BatchCache.allocate(self.text_config, batch, capacity, self.model.dtype, self.device)

    def _store_prefixes(
        self, prompts: Sequence[Sequence[int]], known: Sequence[int], past: int, cache: Cache, apart: bool
    ) -> None:
        if not isinstance(cache, BatchCache) or not self.prefix_cache.capacity:
            return
        end = cache.get_seq_length()
        for row, (prompt, k) in enumerate(zip(prompts, known, strict=True)):
            keys_values = cache.buffer[:, :, row]
            stored, new = keys_values[..., past - k : past, :], keys_values[..., end - (len(prompt) - k) : end, :]
            self.prefix_cache.store(prompt, torch.cat([stored, new], dim=-2) if k else new, apart)


def select_rows(cache: Cache, rows: torch.Tensor, capacity: int | None = None) -> Cache:
    """The given rows of a cache (repeats allowed); a :class:`BatchCache` is copied, others change in place."""
    if isinstance(cache, BatchCache):
        return cache.select(rows, capacity)
    for layer in cache.layers:
        layer.batch_select_indices(rows)  # type: ignore[union-attr]
    return cache


def selective_log_softmax(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs of the chosen tokens only: logits (..., vocabulary) and ids (...) to float32 (...)."""
    chosen = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(dim=-1)


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
