"""The decode loop: batched, with a key-value cache, a random generator per request, stop strings and log-probs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..base import Completion, Sampling, request_seed
from .caches import gap_sizes, select_rows
from .causal_lm import CausalLM, token_budget_chunks, until_exact
from .tokenization import control_tokens, stopped_text


class Choices:
    """The allowed responses (verbalizers) of one prompt, for constrained decoding.

    A response is complete when it equals an allowed one that no other continues. If one response begins another
    ("1", "10"), the end-of-sequence token is allowed after the shorter one.

    Args:
        responses: token ids of each response, none empty.
        eos: id of an end-of-sequence token; needed only if a response begins another.

    Raises:
        ValueError: if there are no responses, one is empty, or ``eos`` is missing although it is needed.
    """

    def __init__(self, responses: Sequence[Sequence[int]], eos: int | None = None) -> None:
        if not responses or not all(map(len, responses)):
            raise ValueError("choices need at least one response, and none may be empty")
        # Token id to the subtree of what may follow; an empty node is the end of a response.
        self._trie: dict[int, Any] = {}
        ends: list[dict[int, Any]] = []
        for response in responses:
            node = self._trie
            for token in response:
                node = node.setdefault(int(token), {})
            ends.append(node)
        # A response that ends at an inner node begins another: it needs an end-of-sequence token to stop there.
        for node in ends:
            if node:
                if eos is None:
                    raise ValueError("one response begins another: an end-of-sequence token is needed")
                node[eos] = {}
        self._arrays: dict[tuple[int, ...], np.ndarray | None] = {}

    def allowed(self, prefix: Sequence[int]) -> np.ndarray | None:
        """Returns the ids of the tokens allowed after ``prefix``.

        Returns:
            int64, sorted; empty if ``prefix`` is a complete response; None if no response begins with ``prefix``.
        """
        key = tuple(prefix)
        if key not in self._arrays:
            node: dict[int, Any] | None = self._trie
            for token in key:
                node = node.get(int(token)) if node is not None else None
            self._arrays[key] = None if node is None else np.array(sorted(node), dtype=np.int64)
        return self._arrays[key]

    def suffixes(self, prefix: Sequence[int]) -> Choices:
        """Returns the choices of what may follow ``prefix``.

        Raises:
            ValueError: if nothing may follow.
        """
        if not prefix:
            return self
        node: Any = self._trie
        for token in prefix:
            node = node.get(int(token)) if node else None
        if not node:
            raise ValueError(f"nothing may follow the tokens {list(prefix)}")
        rest = copy.copy(self)
        rest._trie, rest._arrays = node, {}
        return rest

    def complete(self, prefix: Sequence[int]) -> bool:
        """Returns whether ``prefix`` is a complete response."""
        allowed = self.allowed(prefix)
        return allowed is not None and not len(allowed)


NUCLEUS_CANDIDATES = 256
"""Number of most likely tokens that top-p sorts first; it sorts the whole vocabulary only if they do not suffice."""

BRANCHES = 16
"""Children of a node in the tree over the vocabulary by which tokens are drawn (see :func:`_draw`)."""

DRAWS = 6
"""Uniform numbers per token, one for each level of that tree: enough for a vocabulary of 16 ** 6 tokens."""

CACHE_TOKENS = 16_384
"""Largest number of positions, padding included, in the key-value cache of one batch."""


@dataclass
class _Row:
    """A completion that is being generated."""

    request: int
    """Index of its request in the batch of requests."""
    prompt: int
    """Index of its prompt among the distinct prompts."""
    sampling: Sampling
    uniforms: torch.Tensor
    """float64, shape (max new tokens, DRAWS): drawn in advance from the request's own generator."""
    eos: frozenset[int]
    """Ids of the tokens that end the row."""
    choices: Choices | None = None
    """Allowed responses, with which the row ends; None for free generation."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str | None = None
    """Text before the stop string that ended the row; None if none did."""

    def finished(self, lm: CausalLM) -> bool:
        """Returns whether the row ends with its newest token; sets ``text`` if a stop string ends it."""
        if self.token_ids[-1] in self.eos:
            return True
        if self.choices is not None and self.choices.complete(self.token_ids):
            return True
        self.text = stopped_text(lm.tokenizer, self.token_ids, self.sampling.stop)
        if self.text is not None:
            return True
        return len(self.token_ids) == len(self.uniforms)

    def completion(self, lm: CausalLM) -> Completion:
        """Returns the finished row as a completion."""
        stopped = self.text is not None or self.token_ids[-1] in self.eos
        stopped = stopped or (self.choices is not None and self.choices.complete(self.token_ids))
        text = lm.decode(self.token_ids) if self.text is None else self.text
        return Completion(text, self.token_ids, self.logprobs, "stop" if stopped else "length")


@until_exact
def generate(
    lm: CausalLM,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    choices: Sequence[Choices | None] | None = None,
    eos: frozenset[int] | None = None,
    tempered_logprobs: bool = False,
) -> list[list[Completion]]:
    """Completes every prompt with its own sampling parameters.

    A prompt with ``n > 1`` is read once. Every completion draws from its own generator, seeded by the request, so that
    its tokens do not depend on the other rows (up to floating-point noise, which float32 makes negligible).

    Args:
        lm: the model.
        prompts: n lists of token ids, each shorter than the model's context.
        samplings: n sets of sampling parameters.
        choices: for each prompt the allowed responses, or None for free generation; log-probs are then those among the
            allowed tokens. None: free generation for all prompts.
        eos: ids of the tokens that end a completion; None: the model's own.
        tempered_logprobs: whether log-probs are at the temperature of sampling (1 for greedy decoding) instead of at 1.

    Returns:
        n lists of ``sampling.n`` completions.
    """
    completions: list[list[Completion]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together: less padding
    sizes = [(len(prompts[i]) + samplings[i].max_tokens) * samplings[i].n for i in order]
    for chunk in token_budget_chunks(sizes, CACHE_TOKENS):
        members = [order[k] for k in chunk]
        with lm.lock:
            allowed = [None if choices is None else choices[i] for i in members]
            requests = [prompts[i] for i in members], [samplings[i] for i in members]
            for row in _decode(lm, *requests, allowed, lm.eos_token_ids if eos is None else eos, tempered_logprobs):
                completions[members[row.request]].append(row.completion(lm))
    return completions


@torch.inference_mode()
def _decode(
    lm: CausalLM,
    prompts: list[Sequence[int]],
    samplings: list[Sampling],
    choices: list[Choices | None],
    eos: frozenset[int],
    tempered_logprobs: bool,
) -> list[_Row]:
    """Generates all completions of one batch and returns them in the order of the requests."""
    # Read each distinct prompt once, then give every completion a row of the cache.
    unique = {prompt: index for index, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    controls = control_tokens(lm.tokenizer) if any(sampling.stop for sampling in samplings) else {}
    rows = []
    for i, sampling in enumerate(samplings):
        # Texts do not show control tokens: one that is a stop string ends a row by its id.
        ends = eos | {controls[text] for text in sampling.stop if text in controls}
        rows += [
            _Row(i, unique[tuple(prompts[i])], sampling, _uniforms(lm, prompts[i], sampling, k), ends, choices[i])
            for k in range(sampling.n)
        ]
    free_positions = max(len(row.uniforms) for row in rows)
    state = lm.prefill(list(unique), free_positions)
    cache, mask, logits = state.cache, state.mask, state.logits
    if len(rows) > len(unique):
        owners = torch.tensor([row.prompt for row in rows], device=lm.device)
        cache, mask, logits = select_rows(cache, owners), mask[owners], logits[owners]
    else:  # one row per prompt: sorting the rows into the order of the cache saves a copy of it
        rows.sort(key=lambda row: row.prompt)

    live = list(range(len(rows)))  # index in ``rows`` of each row of the batch
    done = [False] * len(rows)
    # Built once, as creating small tensors at each step costs as much as a layer of a small model. The mask holds the
    # ones of all tokens to come; each step uses a slice.
    uniforms = _stack_uniforms([row.uniforms for row in rows], free_positions).to(lm.device)
    mask = torch.nn.functional.pad(mask, (0, free_positions), value=1)
    constrained = any(row.choices is not None for row in rows)
    length, step = mask.shape[1] - free_positions, 0
    prompt_mask = mask[:, :length]
    # Of rows that ended beyond the checked length: their number of columns and their last logits.
    ended: dict[int, tuple[int, torch.Tensor]] = {}
    while True:
        read = logits  # before constraints
        if constrained and any(rows[i].choices is not None for i in live):
            logits = _masked(logits, [rows[i] for i in live])
        # Sample a token for every row, finished ones included, and append it to the others.
        ids, logprobs = sample_tokens(logits, [rows[i].sampling for i in live], uniforms[step], tempered_logprobs)
        for k, (i, token, logprob) in enumerate(zip(live, ids.tolist(), logprobs.tolist(), strict=True)):
            if not done[i]:
                rows[i].token_ids.append(token)
                rows[i].logprobs.append(logprob)
                done[i] = rows[i].finished(lm)
                if done[i] and length + step > lm.checked:
                    ended[i] = length + step, read[k]
        going = [k for k, i in enumerate(live) if not done[i]]
        if not going:
            if ended:
                # The rows that are the likeliest to be wrong, see caches.extreme_rows.
                gaps = gap_sizes(prompt_mask).tolist()
                read_tokens = {i: [*prompts[rows[i].request], *rows[i].token_ids[:-1]] for i in ended}
                gap = max(ended, key=lambda i: (gaps[i], len(read_tokens[i])))
                extremes = {gap, min(ended, key=lambda i: len(read_tokens[i]))}
                columns = max(columns for columns, _ in ended.values())
                lm.check(columns, [(read_tokens[i], ended[i][1]) for i in sorted(extremes)])
            return sorted(rows, key=lambda row: row.request)
        # Finished rows leave the batch. Not one by one, as each time the cache of the others is copied.
        if len(going) <= 0.75 * len(live):
            going_rows = torch.tensor(going, device=lm.device)
            cache, mask, ids = select_rows(cache, going_rows), mask[going_rows], ids[going_rows]
            uniforms, live = uniforms[:, going], [live[k] for k in going]
        step += 1
        logits = lm.forward(ids.unsqueeze(1), mask[:, : length + step], cache)


def _stack_uniforms(uniforms: list[torch.Tensor], steps: int) -> torch.Tensor:
    """Stacks the uniforms of rows, float64, shape (steps, rows, DRAWS); shorter rows repeat their last ones, unused."""
    table = torch.stack([torch.cat([row, row[-1:].expand(steps - len(row), -1)]) for row in uniforms])
    return table.transpose(0, 1).contiguous()


def _masked(logits: torch.Tensor, rows: list[_Row]) -> torch.Tensor:
    """Returns the logits with minus infinity for tokens that are not allowed; finished rows are unchanged."""
    logits = logits.clone()  # the logits of a prompt may be shared
    for k, row in enumerate(rows):
        allowed = row.choices.allowed(row.token_ids) if row.choices is not None else None
        if allowed is not None and len(allowed):
            allowed_logits = logits[k, torch.as_tensor(allowed, device=logits.device)]
            logits[k] = float("-inf")
            logits[k, torch.as_tensor(allowed, device=logits.device)] = allowed_logits
    return logits


def _uniforms(lm: CausalLM, prompt: Sequence[int], sampling: Sampling, index: int) -> torch.Tensor:
    """Returns the uniforms of completion ``index`` of a request, one row per token that it may generate."""
    # The first completion uses the request's seed, the others derived ones. A CPU generator gives the same numbers on
    # every device.
    generator = torch.Generator().manual_seed(request_seed(sampling.seed, index) if index else sampling.seed)
    steps = min(sampling.max_tokens, lm.context_length - len(prompt))
    return torch.rand(steps, DRAWS, generator=generator, dtype=torch.float64)


def sample_tokens(
    logits: torch.Tensor, samplings: Sequence[Sampling], uniforms: torch.Tensor, tempered_logprobs: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token per row.

    Temperature is applied first, then top-k, then top-p to what top-k left, as in transformers and vLLM.

    Args:
        logits: float32, shape (batch, vocabulary).
        samplings: sampling parameters of each row.
        uniforms: float64, shape (batch, DRAWS), in [0, 1).
        tempered_logprobs: whether log-probs are at the temperature of sampling (1 for greedy decoding) instead of at 1.

    Returns:
        int64 token ids and float32 log-probs before truncation, each of shape (batch,).
    """
    vocabulary = logits.shape[-1]
    drawn = [i for i, s in enumerate(samplings) if s.temperature > 0]
    plain = [i for i in drawn if samplings[i].top_p == 1 and not 0 < samplings[i].top_k < vocabulary]
    # ``plain`` rows are sampled without truncation, ``truncated`` ones with top-k or top-p, the rest greedily.
    if len(plain) == len(samplings):  # the usual case in training, without a copy of all logits
        ids = _draw(_scaled(logits, samplings, plain).softmax(dim=-1), uniforms)
    else:
        ids = logits.argmax(dim=-1)
        truncated = sorted(set(drawn) - set(plain))
        if plain:
            ids[plain] = _draw(_scaled(logits, samplings, plain).softmax(dim=-1), uniforms[plain])
        if truncated:
            weights = _truncate(_scaled(logits, samplings, truncated), [samplings[i] for i in truncated])
            ids[truncated] = _draw(weights, uniforms[truncated])
    if tempered_logprobs and any(samplings[i].temperature != 1 for i in drawn):
        logits = logits.index_copy(0, torch.tensor(drawn, device=logits.device), _scaled(logits, samplings, drawn))
    logprobs = logits.gather(1, ids.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=-1)
    return ids, logprobs


def _scaled(logits: torch.Tensor, samplings: Sequence[Sampling], rows: list[int]) -> torch.Tensor:
    """Returns the logits of some rows divided by their temperatures, without a copy if that changes nothing."""
    if len(rows) == len(logits):
        if all(samplings[i].temperature == 1 for i in rows):
            return logits
        temperatures = torch.tensor([samplings[i].temperature for i in rows], device=logits.device)
        return logits / temperatures.unsqueeze(1)
    temperatures = torch.tensor([samplings[i].temperature for i in rows], device=logits.device)
    return logits[rows] / temperatures.unsqueeze(1)


def _truncate(scaled: torch.Tensor, samplings: list[Sampling]) -> torch.Tensor:
    """Returns probabilities, not normalised, with those outside top-k and top-p set to 0."""
    vocabulary = scaled.shape[-1]
    top_k = torch.tensor([s.top_k or vocabulary for s in samplings], device=scaled.device).unsqueeze(1)
    top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float64, device=scaled.device).unsqueeze(1)
    normaliser = scaled.logsumexp(dim=-1, keepdim=True)
    # Try the most likely tokens first; sort the whole vocabulary only if they do not decide every row.
    for candidates in (min(NUCLEUS_CANDIDATES, vocabulary), vocabulary):
        values, indices = scaled.topk(candidates, dim=-1)
        probabilities = (values - normaliser).exp().double()
        # Tokens that tie with the k-th one stay, as in transformers.
        kth = values.gather(1, top_k.clamp(max=candidates) - 1)
        probabilities = probabilities * (values >= kth)
        cumulative = probabilities.cumsum(dim=-1)
        # top-p is a share of this mass: that of the k best tokens if they are all among the candidates, else 1.
        inside = (top_k < candidates) & (values[:, -1:] < kth)
        mass = torch.where(inside | (candidates == vocabulary), cumulative[:, -1:], torch.ones_like(top_p))
        enough = (cumulative[:, -1:] >= top_p * mass) & (inside | (top_k == vocabulary))
        if candidates == vocabulary or bool(enough.all()):
            break
    # A token stays if those before it do not reach top-p yet: the one that crosses it stays, and so does the first.
    kept = cumulative - probabilities < top_p * mass
    return torch.zeros_like(scaled).scatter(1, indices, (probabilities * kept).to(scaled.dtype))


def _draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws an index per row in proportion to its weights, walking down a tree over the vocabulary.

    One cumulative sum over the vocabulary would be shorter, but the floating-point noise of a batch moves each of its
    49,000 steps: with SmolLM2 one draw in 350 depended on the other rows, with the tree none in 36,000.

    Args:
        weights: float32, shape (batch, vocabulary), of which at least one per row is positive.
        uniforms: float64, shape (batch, DRAWS).
    """
    uniforms = uniforms.to(weights.device)
    # Build the tree from the leaves: each level holds the summed weights of the level below, in groups of BRANCHES.
    levels = []
    while weights.shape[1] > 1:
        if missing := -weights.shape[1] % BRANCHES:
            weights = torch.nn.functional.pad(weights, (0, missing))
        weights = weights.unflatten(1, (-1, BRANCHES))
        levels.append(weights)
        weights = weights.sum(dim=-1)
    # Walk down from the root, drawing a branch at each level.
    rows = torch.arange(len(weights), device=weights.device)
    index = torch.zeros_like(rows)
    for depth, level in enumerate(reversed(levels)):
        index = index * BRANCHES + _invert(level[rows, index].double().cumsum(dim=-1), uniforms[:, depth])
    return index


def _invert(cumulative: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Returns the first index whose cumulative mass exceeds the uniform's share of the total, never one of mass 0."""
    threshold = uniforms.unsqueeze(1) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    # Rounding may lift the threshold to the total, beyond which no index has mass: stop at the first that reaches it.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()).squeeze(1)
    return torch.minimum(index, last)
