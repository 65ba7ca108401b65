"""Proof that a fast way of reading a model is exact, by comparison with its plain forward pass when it is opened.

Padding, gaps in a mask, shared prefixes and caches of our own assume things of a model that no configuration tells
reliably. So the ways of :data:`READINGS` are tried, the fastest first, on a
ragged batch with a shared prefix, and the first that gives the model's own log-probs is used. What shows only at
greater lengths (windows of local attention, rope that changes) is checked when a batch is longer than all before it.
Of large models and of those in other dtypes than float32, a small float32 model of the same configuration is probed.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from ..errors import InputError
from .caches import select_rows

Reading: TypeAlias = Literal["blocks", "cached", "padded", "single"]
"""A way of reading a model. ``blocks``: batches with padding on the left, keys and values in a :class:`BatchCache`, and
shared prefixes read once; ``cached``: such batches with transformers' own cache; ``padded``: whole rows at every step,
padded on the right; ``single``: whole rows, one at a time."""

READINGS: tuple[Reading, ...] = ("blocks", "cached", "padded", "single")
"""All ways, the fastest first. The last two assume nothing of a model but that it is causal."""

SLOW: dict[Reading, str] = {
    "cached": "without shared prefixes",
    "padded": "whole at every step, without a cache",
    "single": "whole and row by row at every step, without a cache",
}
"""What a slower way does, for the warning that a model needs it."""


PROBE_TOKENS = 44
"""Number of positions of the batch on which a way of reading is tried when a model is opened."""

TOLERANCE = 1e-4
"""Largest difference of log-probs, in nats, between two ways of reading a model in float32."""

ROUGH_TOLERANCE = 0.25
"""Largest such difference in another dtype, for a model of whose configuration no small model can be made."""

LARGEST_PROBED = 10_000_000
"""Number of parameters up to which a model is probed itself when it is opened. Of a larger one, for which that would
take seconds, a small model of its configuration is probed, and one row of the first batch."""

_FOUND: dict[str, Reading] = {}
"""The exact reading by configuration, so that a process proves it once."""

SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
"""Sizes of a small model of some configuration; all else, windows and layer types included, stays."""


class ReadingChangedError(Exception):
    """Raised when a batch shows that the model cannot be read as it was so far: the work is to be done again."""


def plain_logits(lm: Any, tokens: Sequence[int], last: int) -> torch.Tensor:
    """Returns the logits of the last positions of one row by the model's own forward pass, without mask or cache.

    Args:
        lm: the model.
        tokens: token ids of the row.
        last: number of positions.

    Returns:
        float32, shape (last, vocabulary).
    """
    ids = torch.tensor([[int(token) for token in tokens]], device=lm.device)
    # Keeps the logits of a long row out of memory, where the model can.
    kept = {"logits_to_keep": last} if lm.keeps_logits else {}
    with torch.no_grad():
        return lm.model(input_ids=ids, use_cache=False, **kept).logits[0, -last:, : lm.vocabulary].float()


def difference(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Returns the largest difference between the log-probs of two rows of logits, in nats; infinity for NaN."""
    first, second = logits.float().log_softmax(-1), others.float().log_softmax(-1)
    gap = (first - second).abs()
    return float("inf") if bool(gap.isnan().any()) else float(gap.max())


def probe_rows(lm: Any, length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Returns ragged prompts, most of which share a beginning, and completions, together at most ``length`` tokens."""
    rng = np.random.default_rng(0)
    # Without the padding token, about which transformers warns where there is no mask.
    known = np.setdiff1d(np.arange(lm.vocabulary), [getattr(lm.text_config, "pad_token_id", None) or 0])

    def draw(size: int) -> list[int]:
        return known[rng.integers(len(known), size=max(size, 1))].tolist()

    length = max(min(length, lm.context_length), 4)
    head = draw(length // 2)
    rest = max(length - len(head) - 4, 1)
    prompts = [head + draw(count) for count in dict.fromkeys((1, rest // 2 + 1, rest))] + [draw(length // 8)]
    sizes = [min(count, length - len(prompt)) for prompt, count in zip(prompts, (3, 1, 4, 2), strict=False)]
    return prompts, [draw(size) for size in sizes]


def find_reading(lm: Any, readings: Sequence[Reading]) -> Reading:
    """Returns the first of some ways of reading a model that is exact.

    Raises:
        InputError: if none is: what a model says of a token then depends on the tokens after it.
    """
    key = config_key(lm.model)
    if key not in _FOUND or _FOUND[key] not in readings:
        subject = probe_subject(lm)
        tolerance = TOLERANCE if subject.in_float32 else ROUGH_TOLERANCE
        found = next((reading for reading in readings if _worst(subject, reading, PROBE_TOKENS) <= tolerance), None)
        if found is None:
            raise InputError(
                f"{lm.name} is not causal: what it says of a token changes with the tokens after it (a decoder needs "
                "is_decoder=True in its config.json)"
            )
        _FOUND[key] = found
    return _FOUND[key]


def _worst(lm: Any, reading: Reading, length: int) -> float:
    """Returns the largest difference from the plain forward pass of what a way of reading gives; inf if it fails."""
    before, lm.reading, lm.checked = (lm.reading, lm.checked), reading, sys.maxsize
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prompts, completions = probe_rows(lm, length)
            worst = 0.0
            # Scored twice: the second time prefixes come from the cache.
            for _ in range(2):
                scores = lm.logprobs(prompts, completions)
                for prompt, completion, row in zip(prompts, completions, scores, strict=True):
                    logits = plain_logits(lm, prompt + completion, len(completion) + 1)[:-1].log_softmax(-1)
                    expected = logits.gather(1, torch.tensor(completion, device=lm.device)[:, None])[:, 0]
                    worst = max(worst, float(np.abs(row - expected.cpu().numpy()).max(initial=0.0)))
            for tokens, logits in _written(lm, prompts):
                worst = max(worst, difference(logits[None], plain_logits(lm, tokens, 1)))
        return worst if np.isfinite(worst) else float("inf")
    except Exception:  # whatever an architecture raises: this way is not for it
        return float("inf")
    finally:
        lm.prefix_cache.clear()
        lm.reading, lm.checked = before


@torch.inference_mode()
def _written(lm: Any, prompts: Sequence[list[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Decodes greedily, each prompt in two rows, of which one leaves the batch at each step, as in sampling.

    Yields:
        The tokens of a row at each step, and the logits after them as they were read in the batch, shape (vocabulary,).
    """
    rows = [prompt for prompt in prompts for _ in range(2)]
    state = lm.prefill(prompts, len(rows))
    owners = torch.arange(len(prompts), device=lm.device).repeat_interleave(2)
    cache, mask, logits = select_rows(state.cache, owners), state.mask[owners], state.logits[owners]
    while True:
        yield from zip(rows, logits, strict=True)
        if len(rows) < 5:
            return
        left = torch.arange(1, len(rows), device=lm.device)
        ids = logits[1:].argmax(dim=-1)
        rows = [[*row, token] for row, token in zip(rows[1:], ids.tolist(), strict=True)]
        cache, mask = select_rows(cache, left), torch.nn.functional.pad(mask[left], (0, 1), value=1)
        logits = lm.forward(ids[:, None], mask, cache)


def holds_at(lm: Any, columns: int, rows: Sequence[tuple[Sequence[int], torch.Tensor]]) -> bool:
    """Returns whether a model in its present reading is exact in a batch of some length.

    Args:
        lm: the model.
        columns: number of positions of the batch, padding included.
        rows: token ids of rows, and the logits after each as they were read in the batch, shape (vocabulary,).
    """
    own = lm.in_float32 and not torch.is_autocast_enabled(lm.device.type)
    if not own and (small := miniature(lm)).in_float32:
        return _worst(small, lm.reading, columns) <= TOLERANCE
    gaps = [difference(logits[None], plain_logits(lm, tokens, 1)) for tokens, logits in rows]
    return max(gaps) <= (TOLERANCE if own else ROUGH_TOLERANCE)


def probe_subject(lm: Any) -> Any:
    """Returns the model on which ways of reading are tried: the model itself if it is small and in float32."""
    small = lm.in_float32 and sum(parameter.numel() for parameter in lm.model.parameters()) <= LARGEST_PROBED
    return lm if small else miniature(lm)


def miniature(lm: Any) -> Any:
    """Returns a small model of the same configuration in float32; the model itself if none can be made of it."""
    from transformers import AutoModelForCausalLM

    from .loading import quiet_loading

    if lm.small is None:
        config = copy.deepcopy(lm.model.config)
        text_config = config.get_text_config()
        for name, size in SMALL.items():
            if isinstance(getattr(text_config, name, None), int):
                setattr(text_config, name, min(size, getattr(text_config, name)))
        kinds = list(dict.fromkeys(getattr(text_config, "layer_types", None) or []))
        if kinds:
            text_config.num_hidden_layers, text_config.layer_types = len(kinds), kinds
        try:
            with quiet_loading():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            small = type(lm)(model, None, f"a small model like {lm.name}", lm.prefix_cache.capacity, lm.reading)
            plain_logits(small, [1, 2, 3], 1)
            lm.small = small
        except Exception:  # sizes that do not fit together
            lm.small = lm
    return lm.small


def config_key(model: Any) -> str:
    """Returns a text that is the same for models of one architecture and configuration, whatever their weights."""
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("_name_or_path", "dtype", "torch_dtype", "transformers_version")
    }
    attention = getattr(model.config, "_attn_implementation", None)
    return json.dumps([type(model).__name__, attention, config], sort_keys=True, default=str)
