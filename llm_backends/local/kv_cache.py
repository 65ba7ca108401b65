"""Key-value caches: one preallocated buffer for a batch, and an automatic cache of shared prompt prefixes.

Transformers' ``DynamicCache`` copies every key and value at each decoded token, a quarter of the time of a step of a
small model on a CPU. Here a batch has one buffer that is written in place.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, DynamicLayer

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
