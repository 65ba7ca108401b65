"""Prefill, prefix cache, scoring and loading of causal language models."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructgym.llm_backends.base import ContextLengthError
from instructgym.llm_backends.local import causal_lm
from instructgym.llm_backends.local.caches import BLOCK, PrefixCache
from instructgym.llm_backends.local.causal_lm import CausalLM, token_budget_chunks
from instructgym.llm_backends.local.loading import ModelLoadError

ARCHITECTURES = ["llama", "gpt2", "qwen3", "mistral-sliding", "gemma3-mixed"]
HEADER = [5 + i * 7 % 300 for i in range(100)]


def fresh(lm, tokens=8192):
    """The same model with a prefix cache of its own; lengths count as checked, so that no row is read once more."""
    copy = CausalLM(lm.model, lm.tokenizer, name=lm.name, prefix_cache_tokens=tokens)
    copy.checked = copy.context_length
    return copy


def plain_logits(lm, prompt):
    with torch.inference_mode():
        return lm.model(input_ids=torch.tensor([list(prompt)])).logits[0, -1]


def plain_logprobs(lm, prompt, completion):
    with torch.inference_mode():
        logits = lm.model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(dim=-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1).numpy()


def tokens_read(lm, call):
    """Tokens that the model is given during a call, padding included."""
    sizes = []
    hook = lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        call()
    finally:
        hook.remove()
    return sum(sizes)


@pytest.mark.parametrize("budget", [1024, 70, 1])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ragged_prompts_give_the_logits_they_give_alone(tiny_lms, architecture, budget, monkeypatch):
    monkeypatch.setattr(causal_lm, "GROUP_TOKENS", budget)
    lm = fresh(tiny_lms(architecture))
    prompts = [[7], HEADER[:3], HEADER[:31], HEADER[:32], HEADER[:33], HEADER]
    for _ in range(3):  # the second and third time with a warm prefix cache
        state = lm.prefill(prompts, free_positions=4)
        for row, prompt in enumerate(prompts):
            torch.testing.assert_close(state.logits[row], plain_logits(lm, prompt), atol=1e-4, rtol=1e-4)
        token = torch.full((len(prompts), 1), 9)
        logits = lm.forward(token, torch.nn.functional.pad(state.mask, (0, 1), value=1), state.cache)
        for row, prompt in enumerate(prompts):  # what was read together or apart is continued together
            torch.testing.assert_close(logits[row], plain_logits(lm, [*prompt, 9]), atol=1e-4, rtol=1e-4)


@settings(max_examples=10)
@given(
    prompts=st.lists(
        st.builds(lambda n, tail: [*HEADER[:n], *tail], st.integers(0, 100), st.lists(st.integers(5, 300), min_size=1)),
        min_size=1,
        max_size=5,
    ),
    capacity=st.sampled_from([0, 32, 96, 8192]),
    completion=st.lists(st.integers(2, 319), min_size=1, max_size=6),
)
def test_scores_do_not_depend_on_the_prefix_cache(tiny_lm, prompts, capacity, completion):
    lm = fresh(tiny_lm, capacity)
    for batch in (prompts, prompts[::-1], prompts):
        for prompt, row in zip(batch, lm.logprobs(batch, [completion] * len(batch)), strict=True):
            np.testing.assert_allclose(row, plain_logprobs(lm, prompt, completion), atol=1e-4)


@pytest.mark.parametrize("capacity", [64, 160, 1024])
def test_a_cache_that_overflows_gives_no_wrong_logits(tiny_lm, capacity):
    lm, generator = fresh(tiny_lm, capacity), random.Random(0)
    prompts = [
        [*HEADER[:32], *(generator.randrange(5, 300) for _ in range(generator.randrange(60, 120)))] for _ in range(12)
    ]
    for _ in range(3):
        state = lm.prefill(prompts, free_positions=1)
        for row, prompt in enumerate(prompts):
            torch.testing.assert_close(state.logits[row], plain_logits(lm, prompt), atol=1e-4, rtol=1e-4)


def test_a_prefix_that_comes_again_is_not_read_again(tiny_lm):
    lm = fresh(tiny_lm)
    reads = [tokens_read(lm, lambda i=i: lm.prefill([[*HEADER, i]], free_positions=1)) for i in (5, 6, 7)]
    assert reads == [101, 101, 101 - 96]
    lm.prefix_cache.clear()
    assert tokens_read(lm, lambda: lm.prefill([[*HEADER, 8]], free_positions=1)) == 101


def test_one_batch_of_prompts_with_a_common_header_warms_the_cache(tiny_lm):
    lm = fresh(tiny_lm)
    lm.prefill([[*HEADER, 5], [*HEADER, 6]], free_positions=1)
    assert tokens_read(lm, lambda: lm.prefill([[*HEADER, 7]], free_positions=1)) == 5


@pytest.mark.parametrize("architecture", ["mistral-sliding", "gemma3-mixed"])
def test_models_with_a_sliding_window_read_every_prompt_whole(tiny_lms, architecture):
    lm = fresh(tiny_lms(architecture))
    assert [tokens_read(lm, lambda: lm.prefill([HEADER], free_positions=1)) for _ in range(3)] == [100] * 3


def test_the_prefix_cache_keeps_to_its_capacity_and_forgets_the_oldest():
    cache = PrefixCache(capacity=64)
    rows = {name: torch.full((1, 2, 1, 70, 4), float(name)) for name in (1, 2, 3)}
    for name in (1, 2, 3):
        for _ in range(2):
            cache.store([name] * 70, rows[name])
    stored = {name: cache.lookup([name] * 70) for name in (1, 2, 3)}
    assert stored[1] is None and stored[2] is None
    assert stored[3].shape[-2] == 64
    assert (stored[3] == 3).all()


def test_what_is_left_of_an_evicted_prefix_is_its_beginning():
    cache = PrefixCache(capacity=96)
    for name, length in ((1, 100), (2, 40)):
        for _ in range(2):
            cache.store([name] * length, torch.zeros((1, 2, 1, length, 4)))
    assert cache.lookup([1] * 100).shape[-2] == 64
    for _ in range(2):
        cache.store([3] * 40, torch.zeros((1, 2, 1, 40, 4)))
    assert cache.lookup([1] * 100).shape[-2] in (32, 64)


def test_the_prefix_cache_never_answers_for_a_whole_prompt():
    cache = PrefixCache()
    for _ in range(2):
        cache.store([1] * (2 * BLOCK + 1), torch.zeros((1, 2, 1, 2 * BLOCK + 1, 4)))
    assert cache.lookup([1] * 2 * BLOCK).shape[-2] == BLOCK
    assert cache.lookup([1] * BLOCK) is None
    assert cache.lookup([1] * (BLOCK - 1) + [2] * 40) is None


def test_an_unread_header_is_read_apart_and_once():
    cache = PrefixCache()
    header, other = [1] * 3 * BLOCK, [2] * 3 * BLOCK
    assert cache.prefixes_to_prefill([[*header, 5], [*header, 6]]) == [tuple(header)]
    assert cache.prefixes_to_prefill([[*header, 5], [*other, 6]]) == []
    cache.store((*header,), torch.zeros((1, 2, 1, len(header), 4)), store_all=True)
    assert cache.prefixes_to_prefill([[*header, 5], [*header, 6]]) == []
    assert cache.prefixes_to_prefill([[*header, 5], [3] * 9 * BLOCK]) == [(3,) * 8 * BLOCK]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral-sliding"])
def test_scores_keep_the_order_of_mixed_rows(tiny_lms, architecture):
    lm = fresh(tiny_lms(architecture))
    long, short = HEADER, HEADER[:4]
    prompts = [long, short, long, [9], short]
    completions = [[3], [4, 5, 6], [7, 8], [9] * 200, [3]]
    for prompt, completion, row in zip(prompts, completions, lm.logprobs(prompts, completions), strict=True):
        np.testing.assert_allclose(row, plain_logprobs(lm, prompt, completion), atol=1e-4)


def test_a_completion_may_fill_the_context(tiny_lms):
    for architecture in ("llama", "gpt2"):
        lm = fresh(tiny_lms(architecture))
        prompts, completions = [HEADER, [9]], [[5] * 156, [6] * 255]
        for prompt, completion, row in zip(prompts, completions, lm.logprobs(prompts, completions), strict=True):
            np.testing.assert_allclose(row, plain_logprobs(lm, prompt, completion), atol=1e-4)


def test_a_prompt_in_many_rows_is_read_once(tiny_lm):
    lm = fresh(tiny_lm, 0)
    assert tokens_read(lm, lambda: lm.logprobs([HEADER] * 20, [[i] for i in range(20)])) == 100
    assert tokens_read(lm, lambda: lm.logprobs([HEADER] * 20, [[i, 5] for i in range(20)])) == 120


def test_prompts_as_text_tokens_and_chat(tiny_lm):
    text = "write a short poem"
    ids = tiny_lm.encode(text)
    assert tiny_lm.decode(ids) == text
    assert tiny_lm.encode(np.array(ids)) == tiny_lm.encode(ids) == ids
    assert all(type(token) is int for token in tiny_lm.encode(np.array(ids)))
    chat = tiny_lm.encode([{"role": "system", "content": "naïve"}, {"role": "user", "content": text}])
    assert tiny_lm.tokenizer.decode(chat) == f"<|system|>naïve</s><|user|>{text}</s><|assistant|>"
    assert chat.count(tiny_lm.tokenizer.eos_token_id) == 2
    assert tiny_lm.decode([*ids, tiny_lm.tokenizer.eos_token_id]) == text


def test_a_tokenizer_without_chat_template_says_so(tiny_lm, monkeypatch):
    monkeypatch.setattr(tiny_lm.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match=r"tiny has no chat template.*completion"):
        tiny_lm.encode([{"role": "user", "content": "hello"}])


def test_a_prompt_needs_room_for_one_token(tiny_lm):
    assert len(tiny_lm.encode([5] * 255)) == 255
    with pytest.raises(ContextLengthError, match="256"):
        tiny_lm.encode([5] * 256)


@given(lengths=st.lists(st.integers(1, 60)), budget=st.integers(1, 100))
def test_chunks_cover_all_rows_in_order_within_the_budget(lengths, budget):
    chunks = list(token_budget_chunks(lengths, budget))
    assert [index for chunk in chunks for index in chunk] == list(range(len(lengths)))
    for chunk in chunks:
        assert len(chunk) == 1 or max(lengths[i] for i in chunk) * len(chunk) <= budget
    for chunk, following in itertools.pairwise(chunks):  # no chunk ends before it must
        assert max(lengths[i] for i in [*chunk, following[0]]) * (len(chunk) + 1) > budget


def test_loading_a_model_leaves_the_random_generators_alone(tiny_model_path):
    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    def seed():
        random.seed(3), np.random.seed(3), torch.manual_seed(3)

    seed()
    expected = draw()
    seed()
    lm = CausalLM.from_pretrained(tiny_model_path)
    assert draw() == expected
    assert not lm.model.training


def test_a_loaded_model_is_the_saved_one(tiny_lm, tiny_model_path):
    loaded = CausalLM.from_pretrained(tiny_model_path)
    (ours,), (theirs,) = (lm.logprobs([HEADER], [[5, 6]]) for lm in (tiny_lm, loaded))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert loaded.context_length == 256
    assert loaded.eos_token_ids == {1}


def test_bfloat16_scores_are_close_and_still_float32(tiny_lm, tiny_model_path):
    lm = CausalLM.from_pretrained(tiny_model_path, dtype="bfloat16")
    (row,) = lm.logprobs([HEADER], [[5, 6, 7]])
    assert lm.model.dtype == torch.bfloat16
    assert row.dtype == np.float32
    np.testing.assert_allclose(row, plain_logprobs(tiny_lm, HEADER, [5, 6, 7]), atol=0.5)


def test_loading_errors_name_the_cause(tiny_model_path, tmp_path):
    with pytest.raises(ModelLoadError, match="float33"):
        CausalLM.from_pretrained(tiny_model_path, dtype="float33")
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ModelLoadError, match=str(path)):
            CausalLM.from_pretrained(path)
