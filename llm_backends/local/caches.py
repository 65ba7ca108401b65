"""Key-value caches of a local model: one preallocated buffer per batch, shared prefixes, and whole rows."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import torch
from transformers.cache_utils import Cache, DynamicLayer

BLOCK = 16
"""Tokens in one cached prefix block."""

BlockKey = tuple[int, ...]
"""All tokens of a prompt up to the end of a block: keys and values of a block depend on everything before it."""


class _BufferLayer(DynamicLayer):
    """The view of one layer on the buffer of a :class:`BatchCache`."""

    def __init__(self, buffer: torch.Tensor, length: int) -> None:
        super().__init__()
        self.buffer, self.length = buffer, length
        self.dtype, self.device = buffer.dtype, buffer.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes new keys and values after the stored ones and returns views of all, (batch, heads, length, dim)."""
        end = self.length + key_states.shape[-2]
        self.buffer[0, :, :, self.length : end] = key_states
        self.buffer[1, :, :, self.length : end] = value_states
        self.length = end
        return self.buffer[0, :, :, :end], self.buffer[1, :, :, :end]

    def get_seq_length(self) -> int:
        """Returns the number of positions in use, padding included."""
        return self.length


class BatchCache(Cache):
    """A key-value cache in one preallocated tensor, shape (layers, 2, batch, heads, capacity, head dim).

    Transformers' ``DynamicCache`` copies every key and value at each decoded token, which takes a quarter of the time
    of a step of a small model on a CPU; this buffer is written in place.

    Args:
        buffer: the tensor; positions before ``length`` hold keys (index 0) and values (index 1), the rest is free.
        length: positions in use, the same for all rows (rows are padded on the left).
    """

    def __init__(self, buffer: torch.Tensor, length: int) -> None:
        self.buffer = buffer
        super().__init__(layers=[_BufferLayer(layer, length) for layer in buffer])

    @classmethod
    def allocate(
        cls, config: object, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> BatchCache:
        """Returns an empty cache for a model with full attention in every layer.

        Args:
            config: the model's configuration.
            batch: number of rows.
            capacity: number of positions.
            dtype: dtype of keys and values.
            device: device of the buffer.
        """
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads  # type: ignore[attr-defined]
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads  # type: ignore[attr-defined]
        shape = (config.num_hidden_layers, 2, batch, heads, capacity, dim)  # type: ignore[attr-defined]
        return cls(torch.empty(shape, dtype=dtype, device=device), 0)

    def select(self, rows: torch.Tensor, capacity: int | None = None) -> BatchCache:
        """Returns a copy of some rows.

        Args:
            rows: int64 row numbers; repeats are allowed.
            capacity: number of positions of the copy; None: as many as here.
        """
        length = self.get_seq_length()
        layers, two, _, heads, old, dim = self.buffer.shape
        buffer = self.buffer.new_empty((layers, two, len(rows), heads, capacity or old, dim))
        buffer[..., :length, :] = self.buffer[..., :length, :].index_select(2, rows)
        return BatchCache(buffer, length)


class PrefixCache:
    """Stores keys and values of prompt prefixes that occur more than once (few-shot headers, system messages).

    A prompt is cut into blocks of :data:`BLOCK` tokens, each keyed by all tokens up to its end. A block is stored when
    its key is seen for the second time, so that one-off text takes no memory. When the cache is full, the least
    recently used block is evicted.

    Args:
        capacity: largest number of stored tokens; 0 turns the cache off.
    """

    def __init__(self, capacity: int = 8192) -> None:
        self.capacity = capacity
        self._blocks: OrderedDict[BlockKey, torch.Tensor] = OrderedDict()
        # Hashes of keys seen once, not the keys: a key has up to ``capacity`` tokens.
        self._seen: OrderedDict[int, None] = OrderedDict()

    def lookup(self, tokens: Sequence[int]) -> torch.Tensor | None:
        """Returns keys and values of the longest stored prefix, shape (layers, 2, heads, tokens, head dim), or None.

        The prefix is shorter than the prompt: at least one token has to be read to get logits.
        """
        stored_keys: list[BlockKey] = []
        for end in range(BLOCK, len(tokens), BLOCK):
            key = tuple(tokens[:end])
            if key not in self._blocks:
                break
            stored_keys.append(key)
        # In reverse, so that the first block is the most recently used and eviction begins at the end of a prefix: a
        # block is of no use without those before it.
        for key in reversed(stored_keys):
            self._blocks.move_to_end(key)
        return torch.cat([self._blocks[key] for key in stored_keys], dim=-2) if stored_keys else None

    def prefixes_to_prefill(self, prompts: Sequence[Sequence[int]]) -> list[BlockKey]:
        """Returns prefixes to read once, in a separate batch, and to store before these prompts are read.

        These are prefixes seen before or shared by two of the prompts, and those of a prompt with far more left to read
        than the shortest one, since the whole batch would be padded to its length. Of several nested prefixes only the
        longest is returned.
        """
        # Blocks of each prompt that are not stored, without one that ends with the prompt: lookup never returns it.
        unread = []
        for tokens in prompts:
            ends = range(BLOCK, min(len(tokens), self.capacity + 1), BLOCK)
            unread.append([key for end in ends if (key := tuple(tokens[:end])) not in self._blocks])
        counts = Counter(key for keys in unread for key in keys)
        shortest = min(map(len, unread))
        separate = {
            key
            for keys in unread
            for key in keys
            if counts[key] > 1 or hash(key) in self._seen or len(keys) > 2 * shortest + 4
        }
        # Drop each prefix that a longer one contains; sorting makes the order of the batch independent of the set's.
        return sorted(separate - {key[:-BLOCK] for key in separate})

    def store(self, tokens: Sequence[int], row: torch.Tensor, store_all: bool = False) -> None:
        """Stores those blocks of a prompt that were seen before, and notes the others as seen.

        Args:
            tokens: token ids of the prompt.
            row: its keys and values, shape (layers, 2, heads, len(tokens), head dim).
            store_all: whether to store all blocks at once, for a prefix that :meth:`prefixes_to_prefill` returned.
        """
        # From the last block to the first, so that an overflowing cache evicts the end of a prefix first. A block that
        # ends with ``tokens`` is stored only if they are a prefix of other prompts (``store_all``).
        for end in reversed(range(BLOCK, min(len(tokens) + store_all, self.capacity + 1), BLOCK)):
            key = tuple(tokens[:end])
            if key in self._blocks:
                continue
            digest = hash(key)
            if not store_all and digest not in self._seen:
                self._seen[digest] = None
                while len(self._seen) > 65_536:
                    self._seen.popitem(last=False)
                continue
            # A clone: a view would keep the buffer of the whole batch alive.
            self._blocks[key] = row[..., end - BLOCK : end, :].clone()
            while len(self._blocks) * BLOCK > self.capacity:
                self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Drops all blocks and what was seen; call it when the model's weights change."""
        self._blocks.clear()
        self._seen.clear()


class RowCache:
    """What stands for a cache where whole rows are read at every step: the tokens of each row.

    Args:
        rows: token ids of the rows.
    """

    def __init__(self, rows: Iterable[Sequence[int]]) -> None:
        self.rows = [list(row) for row in rows]


def select_rows(cache: Cache | RowCache, rows: torch.Tensor, capacity: int | None = None) -> Cache | RowCache:
    """Returns some rows of a cache; transformers' own is changed in place, the others are copied.

    Args:
        cache: the cache.
        rows: int64 row numbers; repeats are allowed.
        capacity: number of positions of the copy; None: unchanged.
    """
    if isinstance(cache, RowCache):
        return RowCache(cache.rows[row] for row in rows.tolist())
    if isinstance(cache, BatchCache):
        return cache.select(rows, capacity)
    for layer in cache.layers:
        layer.batch_select_indices(rows)  # type: ignore[union-attr]
    return cache


def gap_sizes(mask: torch.Tensor) -> torch.Tensor:
    """Returns the number of masked positions behind the first token of each row of a mask, int64, shape (rows,)."""
    return mask.shape[1] - mask.argmax(dim=1) - mask.sum(dim=1)


def extreme_rows(mask: torch.Tensor) -> list[int]:
    """Returns the rows of a mask that are the likeliest to be read wrong.

    These are the row with the largest gap between its tokens, or the longest one, as windows of attention that count
    positions instead of tokens go wrong there first; and the shortest row, as some models compute positions from the
    longest.
    """
    tokens = mask.sum(dim=1)
    return sorted({int((gap_sizes(mask) * (mask.shape[1] + 1) + tokens).argmax()), int(tokens.argmin())})
