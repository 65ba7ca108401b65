"""A model is read in the fastest way that gives its own log-probs: contracts over odd architectures."""

import warnings

import numpy as np
import pytest
import torch
import transformers
from architectures import FIGURES, MODEL_TYPES, build, measure
from tiny_models import build_model, build_tokenizer

from instructgym.agents import LanguageModelPolicy, LoraSettings
from instructgym.llm_backends import Sampling, resolve
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.causal_lm import CausalLM
from instructgym.llm_backends.local.sampling import generate


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def spread(model):
    """The model with weights so wide that a fault in reading it shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    return model


def local_attention(window=256):
    """A model that is exact up to its window, which no field names as other models name theirs."""
    config = transformers.GPTNeoConfig(
        vocab_size=320,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=1024,
        attention_types=[[["global", "local"], 1]],
        window_size=window,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return spread(transformers.AutoModelForCausalLM.from_config(config).eval())


def alone(model, prompt, response):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits[:, :320].log_softmax(-1).gather(1, torch.tensor(list(response))[:, None])[:, 0].numpy()


def rows(lengths, head=0, seed=0):
    rng = np.random.default_rng(seed)
    start = rng.integers(4, 320, head).tolist()
    return [start + rng.integers(4, 320, n).tolist() for n in lengths]


def worst(lm, prompts, responses, scores):
    expected = [alone(lm.model, p, r) for p, r in zip(prompts, responses, strict=True)]
    return max(float(np.abs(np.asarray(a) - b).max()) for a, b in zip(scores, expected, strict=True))


def test_a_window_shows_at_the_first_batch_that_is_longer_than_it():
    lm = CausalLM(local_attention(), build_tokenizer(), "neo")
    assert lm.reading == "blocks"
    prompts, responses = rows((20, 300), head=160), rows((4, 4), seed=1)
    for _ in range(2):
        assert worst(lm, prompts, responses, lm.logprobs(prompts, responses)) < 1e-4
    assert lm.reading == "cached"


def test_a_window_shows_while_a_batch_is_written():
    lm = CausalLM(local_attention(64), build_tokenizer(), "neo")
    prompts = rows((3, 20, 9), head=40)
    samplings = [Sampling(max_tokens=n, seed=n) for n in (30, 3, 12)]
    written = [completion for [completion] in generate(lm, prompts, samplings, eos=frozenset())]
    responses = [completion.token_ids for completion in written]
    assert list(map(len, responses)) == [30, 3, 12]
    assert worst(lm, prompts, responses, [completion.logprobs for completion in written]) < 1e-4


def test_a_window_shows_in_training():
    lm = CausalLM(local_attention(), build_tokenizer(), "neo")
    policy = LanguageModelPolicy(lm, LoraSettings(rank=2), value="none", dtype="float32", device="cpu")
    prompts, responses = rows((60, 460)), rows((20,) * 8, seed=1)
    prompts = [prompts[k // 4] for k in range(8)]
    arrays = [[np.array(row) for row in side] for side in (prompts, responses)]
    with torch.no_grad():
        scores = policy.score(*arrays, [None] * 8, values=False).logprobs.numpy()
    assert worst(lm, prompts, responses, np.split(scores, 8)) < 1e-4
    assert lm.training.reading == "padded"


def test_the_embedded_kinds_take_the_fast_way():
    for architecture, reading in (("llama", "blocks"), ("gpt2", "blocks"), ("mistral-sliding", "cached")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing to say
            assert CausalLM(build_model(architecture), build_tokenizer(), "tiny").reading == reading


def test_a_slower_way_is_said_once():
    with pytest.warns(UserWarning, match="rwkv is read whole at every step"):
        CausalLM(build("rwkv"), build_tokenizer(), "rwkv")


def test_a_model_that_sees_what_follows_is_refused():
    config = transformers.BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    torch.manual_seed(0)
    with pytest.raises(InputError, match=r"bert is not causal.*is_decoder=True"):
        CausalLM(transformers.BertLMHeadModel(config).eval(), build_tokenizer(), "bert")


@pytest.mark.parametrize("model_type", ["gemma2", "bloom", "mamba", "gpt_bigcode", "roberta", "cohere", "qwen3_5"])
def test_odd_architectures_are_exact(model_type):
    found = measure(model_type)
    assert {name: found[name] for name in FIGURES if found.get(name, 0) > (1e-3 if name == "gradient" else 1e-4)} == {}


def test_soft_capped_logits_are_trained():
    lm = CausalLM(build("gemma2"), build_tokenizer(), "gemma2")
    policy = LanguageModelPolicy(lm, LoraSettings(rank=2), value="none", dtype="float32", device="cpu", temperature=0.7)
    prompt, response = np.array([5, 6, 7, 8]), np.array([9, 10, 11])
    allowed = [np.array([9, 12, 40]), np.array([10, 13]), np.array([11, 3, 30])]
    for sets in (None, allowed):
        scores = policy.score([prompt], [response], [sets], values=False)
        with policy.adapter("policy"):
            logits = lm.model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, 3:-1, :320] / 0.7
        if sets is not None:
            mask = torch.full_like(logits, float("-inf"))
            for row, tokens in zip(mask, sets, strict=True):
                row[tokens] = 0.0
            logits = logits + mask
        expected = logits.log_softmax(-1)[range(3), response]
        torch.testing.assert_close(scores.logprobs, expected, atol=1e-5, rtol=1e-5)


def test_adapters_on_the_output_layer_and_the_embeddings_are_refused():
    for targets, part in (
        ("q_proj,lm_head", "output layer"),
        ("lm_head", "output layer"),
        ("embed_tokens", "embeddings"),
    ):
        lm = CausalLM(build_model(), build_tokenizer(), "tiny")
        with pytest.raises(InputError, match=f"the {part} of tiny: leave it out"):
            LanguageModelPolicy(lm, LoraSettings(rank=4, targets=targets), dtype="float32", device="cpu")
    transposed = CausalLM(build_model("gpt2"), build_tokenizer(), "tiny")
    with pytest.raises(InputError, match="wte"):
        LanguageModelPolicy(transposed, LoraSettings(rank=4, targets="c_attn,wte"), dtype="float32", device="cpu")


def test_a_model_without_a_length_limit_reads_any_prompt(tmp_path):
    build("bloom").save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    backend = resolve("backend", {"id": "transformers", "kwargs": {"model": str(tmp_path), "device": "cpu"}})
    [[completion]] = backend.generate(["hello " * 100], Sampling(max_tokens=3))
    assert len(completion.token_ids) == 3


def test_a_model_in_another_dtype_is_proved_by_a_small_one():
    lm = CausalLM(local_attention().to(torch.bfloat16), build_tokenizer(), "neo")
    assert lm.reading == "blocks"
    prompts, responses = rows((20, 300), head=160), rows((4, 4), seed=1)
    lm.logprobs(prompts, responses)
    assert lm.reading == "cached"


@pytest.mark.slow
def test_every_causal_architecture_is_exact_or_refused():
    exact, wrong = [], {}
    for model_type in MODEL_TYPES:
        found = measure(model_type)
        if isinstance(found, dict):
            off = {n: found[n] for n in FIGURES if n in found and found[n] > (1e-3 if n == "gradient" else 1e-4)}
            wrong |= {model_type: off} if off else {}
            exact += [model_type] * ("score" in found and not off)
    assert wrong == {}
    assert len(exact) >= 60


def test_rope_that_changes_with_length_shows_in_ragged_batches():
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_scaling={"rope_type": "dynamic", "factor": 4.0},
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = spread(transformers.LlamaForCausalLM(config).eval())
    model.config.max_position_embeddings = 256
    lm = CausalLM(model, build_tokenizer(), "rope")
    for lengths in ((100,), (100, 20), (12, 90, 60)):
        prompts, responses = rows(lengths), [[7]] * len(lengths)
        assert worst(lm, prompts, responses, lm.logprobs(prompts, responses)) < 1e-4
