"""The decode loop: which tokens are drawn, where a completion ends, and that nothing but the request decides it."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from instructgym.llm_backends.base import Sampling
from instructgym.llm_backends.local.causal_lm import CausalLM
from instructgym.llm_backends.local.sampling import DRAWS, generate, sample_tokens

ARCHITECTURES = ["llama", "gpt2", "qwen3", "mistral-sliding", "gemma3-mixed"]
PROMPTS = [
    "sea",
    "write a short poem about the sea",
    "Answer: naïve café, 日本語のテキスト. Answer: naïve café, 日本語のテキスト. List three things.",
    "Answer: naïve café, 日本語のテキスト. Answer: naïve café, 日本語のテキスト. Write.",
    "### Instruction:\nList three things.",
]
HEADER = "### Instruction:\nList three things about a short poem, then answer in Japanese: 日本語のテキスト.\n"


# ---- one step -------------------------------------------------------------------------------------------------------


def intended(logits, sampling):
    """The distribution that the sampling parameters ask for, by definition and in float64."""
    scaled = np.asarray(logits, dtype=np.float64) / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    ranked = np.argsort(-p)
    if sampling.top_k:
        p[ranked[sampling.top_k :]] = 0
        p /= p.sum()
    before = np.cumsum(p[ranked]) - p[ranked]
    p[ranked[before >= sampling.top_p]] = 0
    return p / p.sum()


def nucleus_is_clear(logits, sampling):
    """Whether no cumulative probability lies so close to top_p that rounding decides about a token."""
    if sampling.top_p == 1:
        return True
    whole = intended(logits, Sampling(temperature=sampling.temperature, top_k=sampling.top_k))
    return np.abs(np.cumsum(np.sort(whole)[::-1]) - sampling.top_p).min() > 1e-5


@cache
def uniform_draws(draws):
    return torch.rand(draws, DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def drawn(logits, sampling, draws):
    """How often each token comes up."""
    rows = torch.tensor(logits, dtype=torch.float32).expand(draws, -1)
    ids, _ = sample_tokens(rows, [sampling] * draws, uniform_draws(draws))
    return np.bincount(ids.numpy(), minlength=len(logits))


def assert_drawn_from(logits, sampling, draws):
    """Exactly the possible tokens come up, each as often as it should within five standard deviations."""
    p, counts = intended(logits, sampling), drawn(logits, sampling, draws)
    assert set(np.flatnonzero(counts)) == set(np.flatnonzero(p))
    assert (np.abs(counts - draws * p) <= 5 * np.sqrt(draws * p * (1 - p)) + 1e-3).all()


@given(
    logits=st.lists(st.integers(-12, 12), min_size=2, max_size=10, unique=True).map(lambda xs: [x / 8 for x in xs]),
    temperature=st.floats(0.7, 2.0),
    top_k=st.integers(0, 14),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
)
def test_draws_follow_the_truncated_distribution(logits, temperature, top_k, top_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    assume(nucleus_is_clear(logits, sampling))
    assert_drawn_from(logits, sampling, 20_000)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_p=0.9),
        Sampling(top_k=400),
        Sampling(top_k=400, top_p=0.8, temperature=1.3),
        Sampling(top_k=100, top_p=0.5),
        Sampling(top_k=5000, top_p=0.7),
        Sampling(top_k=256),
        Sampling(top_k=257),
    ],
    ids=str,
)
def test_a_flat_distribution_over_many_tokens_is_truncated_exactly(sampling):
    logits = np.random.default_rng(0).permutation(np.linspace(0, 0.5, 700)).astype(np.float32)
    assert nucleus_is_clear(logits, sampling)
    assert_drawn_from(logits, sampling, 20_000)


def test_a_row_that_needs_many_candidates_does_not_change_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    flat, peaked = torch.linspace(0, 0.1, 700), torch.randn(700, generator=generator) * 5
    uniforms = torch.rand(50, DRAWS, generator=generator, dtype=torch.float64)
    sampling = Sampling(top_p=0.9)
    alone, _ = sample_tokens(peaked.expand(50, -1), [sampling] * 50, uniforms)
    mixed, _ = sample_tokens(
        torch.cat([flat.expand(1, -1), peaked.expand(50, -1)]), [sampling] * 51, torch.cat([uniforms[:1], uniforms])
    )
    assert mixed[1:].tolist() == alone.tolist()


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("vocabulary", [6, 600])
@pytest.mark.parametrize("parameters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.9}], ids=str)
def test_the_ends_of_the_unit_interval_give_possible_tokens(uniform, vocabulary, parameters):
    logits = torch.full((1, vocabulary), -torch.inf)
    logits[0, 1:4] = torch.tensor([1.0, 3.0, 2.0])
    ids, logprobs = sample_tokens(
        logits, [Sampling(**parameters)], torch.full((1, DRAWS), uniform, dtype=torch.float64)
    )
    assert ids.item() in (1, 2, 3)
    assert torch.isfinite(logprobs).all()


def test_mixed_batches_and_logprobs_before_truncation():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    samplings = [Sampling(temperature=0), Sampling(), Sampling(top_k=2, temperature=0.5), Sampling(top_p=0.3)]
    uniforms = torch.rand(4, DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ids, logprobs = sample_tokens(logits, samplings, uniforms)
    one_by_one = [
        sample_tokens(logits[i : i + 1], samplings[i : i + 1], uniforms[i : i + 1])[0].item() for i in range(4)
    ]
    assert ids.tolist() == one_by_one
    assert ids[0] == logits[0].argmax()
    expected = torch.log_softmax(logits, dim=-1).gather(1, ids.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30])
def test_a_temperature_close_to_zero_is_greedy(temperature):
    logits = torch.tensor([[30.0, 80.0, 79.0]])
    ids, _ = sample_tokens(
        logits, [Sampling(temperature=temperature)], torch.full((1, DRAWS), 0.99, dtype=torch.float64)
    )
    assert ids.item() == 1


# ---- the loop -------------------------------------------------------------------------------------------------------


def encode(lm, texts):
    return [lm.encode(text) for text in texts]


def plain_logprobs(lm, prompt, completion):
    """Log-probs by one forward pass over the whole sequence, without any cache or padding."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.inference_mode():
        logits = lm.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(dim=-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1).numpy()


def greedy_by_transformers(lm, prompt, tokens):
    ids = torch.tensor([prompt])
    end = lm.tokenizer.eos_token_id
    output = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=end
    )
    return output[0, len(prompt) :].tolist()


class TokensRead:
    """Counts the tokens that a model is given, padding included, while the context is open."""

    def __init__(self, lm):
        self.model, self.tokens = lm.model, 0

    def __enter__(self):
        self.hook = self.model.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def _count(self, module, args, kwargs):
        self.tokens += kwargs["input_ids"].numel()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_decoding_is_that_of_transformers(tiny_lms, architecture):
    lm = tiny_lms(architecture)
    prompts = encode(lm, PROMPTS[:3])
    ours = generate(lm, prompts, [Sampling(max_tokens=12, temperature=0)] * len(prompts))
    for prompt, (completion,) in zip(prompts, ours, strict=True):
        assert completion.token_ids == greedy_by_transformers(lm, prompt, 12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reported_logprobs_are_those_of_a_plain_forward_pass(tiny_lms, architecture):
    lm = tiny_lms(architecture)
    prompts = encode(lm, PROMPTS)
    samplings = [Sampling(max_tokens=12, temperature=0.8, top_p=0.9, seed=i, n=2) for i in range(len(prompts))]
    pairs = [(p, c) for p, results in zip(prompts, generate(lm, prompts, samplings), strict=True) for c in results]
    rescored = lm.logprobs([p for p, _ in pairs], [c.token_ids for _, c in pairs])
    for (prompt, completion), row in zip(pairs, rescored, strict=True):
        expected = plain_logprobs(lm, prompt, completion.token_ids)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
        np.testing.assert_allclose(row, expected, atol=1e-4)
        assert row.dtype == np.float32


REQUEST = st.builds(
    lambda prompt, **kwargs: (prompt, Sampling(**kwargs)),
    st.sampled_from([*PROMPTS, HEADER + "One", HEADER + "Two and more", "a", "### "]),
    max_tokens=st.integers(1, 9),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_p=st.sampled_from([1.0, 0.9]),
    top_k=st.sampled_from([0, 5]),
    n=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
    stop=st.sampled_from([(), ("e",), ("a", "th")]),
)


@pytest.mark.parametrize("architecture", ["llama", "mistral-sliding"])
@settings(max_examples=25)
@given(requests=st.lists(REQUEST, min_size=1, max_size=6), random=st.randoms(use_true_random=False))
def test_a_result_depends_on_its_request_only(tiny_lms, architecture, requests, random):
    warm = tiny_lms(architecture)
    cold = CausalLM(warm.model, warm.tokenizer, prefix_cache_tokens=0)

    def run(lm, some):
        return generate(lm, encode(lm, [prompt for prompt, _ in some]), [sampling for _, sampling in some])

    def outcome(completions):
        return [(c.text, c.token_ids, c.finish_reason) for c in completions]

    alone = [run(cold, [request])[0] for request in requests]
    order = random.sample(range(len(requests)), len(requests))
    for lm in (cold, warm, warm):
        together = run(lm, [requests[i] for i in order])
        for i, completions in zip(order, together, strict=True):
            assert outcome(completions) == outcome(alone[i])
            for one, other in zip(completions, alone[i], strict=True):
                np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_batches_too_large_for_one_cache_keep_order_and_results(tiny_lm):
    prompts = [[5 + i % 300] * (1 + 37 * i % 200) for i in range(120)]
    samplings = [Sampling(max_tokens=3, seed=i) for i in range(len(prompts))]
    together = generate(tiny_lm, prompts, samplings)
    for i in (0, 1, 59, 118, 119):
        assert together[i][0].token_ids == generate(tiny_lm, [prompts[i]], [samplings[i]])[0][0].token_ids


def test_finished_rows_leave_and_shared_prompts_are_read_once(tiny_lm):
    lm = CausalLM(tiny_lm.model, tiny_lm.tokenizer, prefix_cache_tokens=0)
    lm.checked = lm.context_length  # a batch of a new length would have a row read once more
    prompt = lm.encode(PROMPTS[1])
    with TokensRead(lm) as shared:
        generate(lm, [prompt], [Sampling(max_tokens=1, n=16)])
    assert shared.tokens == len(prompt)
    with TokensRead(lm) as ragged:
        generate(lm, [prompt] * 16, [Sampling(max_tokens=1 if i else 50, temperature=0) for i in range(16)])
    assert ragged.tokens <= len(prompt) + 50


def test_samples_of_one_request_differ_and_extend_each_other(tiny_lm):
    prompt = tiny_lm.encode(PROMPTS[1])

    def texts(**kwargs):
        return [c.text for c in generate(tiny_lm, [prompt], [Sampling(max_tokens=16, **kwargs)])[0]]

    assert len(set(texts(n=8, seed=3))) == 8
    assert texts(n=2, seed=3) == texts(n=8, seed=3)[:2]
    assert texts(n=8, seed=3) == texts(n=8, seed=3)
    assert texts(n=8, seed=3) != texts(n=8, seed=4)
    assert len(set(texts(n=3, temperature=0))) == 1


def test_first_tokens_over_many_seeds_follow_the_model(tiny_lm):
    prompt = tiny_lm.encode(PROMPTS[0])
    with torch.inference_mode():
        p = tiny_lm.model(input_ids=torch.tensor([prompt])).logits[0, -1, :320].double().softmax(dim=-1).numpy()
    draws = generate(tiny_lm, [prompt], [Sampling(max_tokens=1, n=4000)])[0]
    counts = np.bincount([c.token_ids[0] for c in draws], minlength=320)
    assert np.abs(counts / 4000 - p).max() < 5 * np.sqrt(0.25 / 4000)


# ---- where a completion ends ----------------------------------------------------------------------------------------


class Dictated(CausalLM):
    """The tiny model, except that it says the given tokens after a prompt of ``length`` tokens, whatever it thinks."""

    def __init__(self, lm, tokens, length=1):
        super().__init__(lm.model, lm.tokenizer, prefix_cache_tokens=0)
        self.tokens, self.length = tokens, length

    def forward(self, ids, mask, cache, logits_to_keep=1):
        logits = super().forward(ids, mask, cache, logits_to_keep)
        for row, position in enumerate((mask.sum(dim=1) - self.length).tolist()):
            logits[row, self.tokens[position]] += 1000
        return logits


def dictate(lm, tokens, **kwargs):
    ((completion,),) = generate(Dictated(lm, tokens), [[7]], [Sampling(max_tokens=len(tokens), **kwargs)])
    return completion


@pytest.fixture(scope="module")
def free_runs(tiny_lm):
    """Completions without stop strings by seed."""
    prompt = tiny_lm.encode(PROMPTS[1])
    results = generate(tiny_lm, [prompt] * 8, [Sampling(max_tokens=16, seed=seed) for seed in range(8)])
    return [completion for (completion,) in results]


@given(seed=st.integers(0, 7), data=st.data())
def test_text_ends_before_the_stop_string_that_is_complete_first(tiny_lm, free_runs, seed, data):
    prompt, free = tiny_lm.encode(PROMPTS[1]), free_runs[seed]
    spans = [(a, b) for a in range(len(free.text)) for b in range(a + 1, min(a + 12, len(free.text)) + 1)]
    whole = [free.text[a:b] for a, b in spans if "\ufffd" not in free.text[a:b]]  # a broken character may still mend
    assume(whole)
    stops = tuple(data.draw(st.lists(st.sampled_from(whole), min_size=1, max_size=2)))
    stopped = generate(tiny_lm, [prompt], [Sampling(max_tokens=16, seed=seed, stop=stops)])[0][0]
    said = tiny_lm.decode(stopped.token_ids)
    assert stopped.text == said[: min(said.find(stop) for stop in stops if stop in said)]
    assert free.text.startswith(stopped.text)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert not any(stop in tiny_lm.decode(stopped.token_ids[:-1]) for stop in stops)
    assert len(stopped.logprobs) == len(stopped.token_ids)


@pytest.mark.parametrize("stop", ["日本語", "🙂🙃🙂", "ß" * 9, "\n\n", "END OF TEXT"])
def test_stop_strings_of_single_byte_tokens(tiny_lm, stop):
    """Every byte its own token: the longest way to spell a stop string."""
    alphabet = {tiny_lm.tokenizer.convert_ids_to_tokens(i): i for i in range(320)}
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spell = [alphabet[bytes_to_unicode()[byte]] for byte in f"before{stop}after".encode()]
    completion = dictate(tiny_lm, spell, stop=stop)
    assert (completion.text, completion.finish_reason) == ("before", "stop")
    assert len(completion.token_ids) == len(f"before{stop}".encode())


def test_a_stop_string_in_the_first_token_leaves_an_empty_text(tiny_lm):
    completion = dictate(tiny_lm, tiny_lm.encode("write a short poem"), stop="w")
    assert (completion.text, completion.finish_reason, len(completion.token_ids)) == ("", "stop", 1)
    assert completion.mean_logprob == pytest.approx(completion.logprobs[0])


def test_a_stop_string_in_the_prompt_does_not_count(tiny_lm):
    prompt = tiny_lm.encode("the sea")
    free, stopped = generate(tiny_lm, [prompt] * 2, [Sampling(max_tokens=4), Sampling(max_tokens=4, stop="the sea")])
    assert free == stopped


def test_end_of_sequence_ends_the_completion(tiny_lm):
    words = tiny_lm.encode("the sea")
    completion = dictate(tiny_lm, [*words, 1, *words])
    assert (completion.text, completion.finish_reason) == ("the sea", "stop")
    assert completion.token_ids == [*words, 1]
    assert len(completion.logprobs) == len(completion.token_ids)


def test_every_end_token_of_the_generation_config_counts(tiny_lm, monkeypatch):
    words = tiny_lm.encode("the sea")
    monkeypatch.setattr(tiny_lm.model.generation_config, "eos_token_id", [words[-1], 3])
    assert dictate(tiny_lm, words * 2).token_ids == words


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_max_tokens_is_the_length(tiny_lm, max_tokens):
    completion = dictate(tiny_lm, tiny_lm.encode("abcdefghijklmnop")[:max_tokens])
    assert (len(completion.token_ids), completion.finish_reason) == (max_tokens, "length")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_full_context_ends_that_row_and_no_other(tiny_lms, architecture):
    lm = tiny_lms(architecture)
    prompts = [[9] * (lm.context_length - 2), *([9, i] for i in range(10, 17))]
    samplings = [Sampling(max_tokens=20, seed=i) for i in range(len(prompts))]
    together = generate(lm, prompts, samplings)
    assert len(together[0][0].token_ids) == 2
    assert together[0][0].finish_reason == "length"
    for i, (completion,) in enumerate(together):
        assert completion.token_ids == generate(lm, [prompts[i]], [samplings[i]])[0][0].token_ids


def test_floating_point_noise_hardly_ever_decides_a_draw():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 50_000, generator=generator).expand(100, -1) * 2
    noisy = logits + 1e-3 * torch.randn(100, 50_000, generator=generator)  # a hundred times that of float32
    uniforms = torch.rand(100, DRAWS, dtype=torch.float64, generator=generator)
    one, other = (sample_tokens(x, [Sampling()] * 100, uniforms)[0] for x in (logits, noisy))
    assert (one != other).sum() <= 1


@pytest.mark.slow
def test_the_embedded_model_decodes_like_transformers():
    from instructgym.llm_backends.local.backend import EmbeddedBackend

    lm = EmbeddedBackend().lm
    prompts = encode(lm, ["The capital of France is", "Instruction: Name a colour.\nAnswer:"])
    ours = generate(lm, prompts, [Sampling(max_tokens=12, temperature=0)] * 2)
    assert "Paris" in ours[0][0].text
    for prompt, (completion,) in zip(prompts, ours, strict=True):
        assert completion.token_ids == greedy_by_transformers(lm, prompt, 12)
        expected = plain_logprobs(lm, prompt, completion.token_ids)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
        np.testing.assert_allclose(lm.logprobs([prompt], [completion.token_ids])[0], expected, atol=1e-4)


def test_tokens_that_tie_with_the_kth_stay():
    logits = torch.zeros((1, 1000))
    logits[0, :3] = 5.0
    logits[0, 3:8] = 4.0
    seeds = torch.rand((2000, DRAWS), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = sample_tokens(logits.expand(2000, -1), [Sampling(top_k=5)] * 2000, seeds)[0]
    assert sorted(set(drawn.tolist())) == list(range(8))
    flat = sample_tokens(torch.zeros((2000, 1000)), [Sampling(top_k=2)] * 2000, seeds)[0]
    assert len(set(flat.tolist())) > 500  # all tie
