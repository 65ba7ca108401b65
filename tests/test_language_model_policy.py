"""The language-model policy: its log-probs, its reference, its value function, saving and loading."""

import copy
import json

import numpy as np
import pytest
import torch
from tiny_models import build_model

from instructgym.agents.policy.language_model import POLICY, VALUE, LanguageModelPolicy
from instructgym.llm_backends.base import Sampling
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.causal_lm import CausalLM
from instructgym.llm_backends.local.sampling import Choices
from instructgym.llm_backends.local.tokenization import WordTokenizer
from instructgym.llm_backends.training.adapters import LoraSettings

WORDS = ("red", "blue", "sea", "sky", "end")
PROMPTS = [np.array(p, np.int32) for p in ([0, 1], [2], [4, 3, 2, 1, 0])]
RESPONSES = [np.array(r, np.int32) for r in ([1, 5], [0, 3, 3, 2], [4])]
FREE = [None] * 3


def tiny(architecture="llama", padding=0):
    tokenizer = WordTokenizer(words=WORDS).hf
    model = build_model(architecture, vocabulary=len(tokenizer) + padding)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return CausalLM(model, tokenizer, name="tiny")


def build(lm=None, rank=4, dtype="float32", **options):
    return LanguageModelPolicy(lm or tiny(), LoraSettings(rank=rank), dtype=dtype, **options)


def moved(policy, scale=0.3, seed=0):
    """The same policy with other weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    policy.clear_prefix_cache()
    return policy


def base_logprobs(lm, temperature=1.0):
    """Of RESPONSES, from all logits of a model without adapters."""
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        with torch.no_grad():
            logits = lm.model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].float()[:, : len(WORDS) + 2]
        rows.append((logits / temperature).log_softmax(dim=-1).gather(1, ids[len(prompt) :, None]).squeeze(1))
    return torch.cat(rows)


def scored(policy, **options):
    with torch.no_grad():
        return policy.score(PROMPTS, RESPONSES, FREE, **options)


def reference(policy):
    return policy.reference_logprobs(PROMPTS, RESPONSES, FREE)


def differ(a, b):
    return float((a - b).abs().max()) > 0.05


# --- log-probs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mistral-sliding"])
def test_a_new_policy_is_the_base_model(architecture):
    policy = build(tiny(architecture), temperature=0.7)
    expected = base_logprobs(tiny(architecture), temperature=0.7)
    torch.testing.assert_close(scored(policy).logprobs, expected, atol=1e-5, rtol=1e-5)


CHOICES = [Choices([[0], [1, 2], [1]], eos=5), None, Choices([[3, 3], [4]])]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("constrained", [False, True])
def test_scores_are_the_samplers_log_probs(constrained, temperature):
    policy = moved(build(temperature=temperature))
    choices = CHOICES if constrained else FREE
    samplings = [Sampling(max_tokens=6, temperature=temperature, seed=s) for s in range(4)]
    for sampling in samplings:
        completions = [c[0] for c in policy.generate(PROMPTS, sampling, choices)]
        responses = [np.array(c.token_ids, np.int32) for c in completions]
        allowed = [
            None if c is None else [c.allowed(r[:t].tolist()) for t in range(len(r))]
            for c, r in zip(choices, responses, strict=True)
        ]
        with torch.no_grad():
            scores = policy.score(PROMPTS, responses, allowed)
        drawn = np.concatenate([c.logprobs for c in completions])
        np.testing.assert_allclose(scores.logprobs.numpy(), drawn, atol=1e-4)
        assert (scores.entropies >= -1e-5).all() and scores.values.shape == scores.logprobs.shape


def test_constrained_and_free_responses_mix_in_order():
    policy = moved(build())
    allowed = [None, [np.array([0, 1]), np.array([3]), np.array([2, 3, 4]), np.array([0, 2])], None]
    with torch.no_grad():
        mixed = policy.score(PROMPTS, RESPONSES, allowed)
        alone = [policy.score([p], [r], [a]) for p, r, a in zip(PROMPTS, RESPONSES, allowed, strict=True)]
    for name in ("logprobs", "entropies", "values"):
        expected = torch.cat([getattr(scores, name) for scores in alone])
        torch.testing.assert_close(getattr(mixed, name), expected, atol=1e-5, rtol=1e-4)
    assert mixed.logprobs[3] == 0  # only one token was allowed


def test_greedy_completions_tell_log_probs_at_temperature_1():
    policy = moved(build(temperature=0.5))
    [[completion]] = policy.generate(PROMPTS[:1], Sampling(max_tokens=1, temperature=0))
    ids = torch.from_numpy(PROMPTS[0].astype(np.int64))[None]
    with torch.no_grad(), policy.adapter(POLICY) as lm:
        expected = lm.model(input_ids=ids).logits[0, -1].log_softmax(dim=-1).max()
    assert completion.logprobs[0] == pytest.approx(float(expected), abs=1e-4)


def test_tokens_beyond_the_tokenizer_are_never_written():
    policy = moved(build(tiny(padding=9)))
    completions = policy.generate(PROMPTS * 5, [Sampling(max_tokens=8, seed=s) for s in range(15)])
    assert max(max(c.token_ids) for [c] in completions) < len(WORDS) + 2
    sequences = [np.array(c.token_ids, np.int32) for [c] in completions]
    with torch.no_grad():
        logprobs = policy.score(PROMPTS * 5, sequences, [None] * 15).logprobs
    np.testing.assert_allclose(logprobs.numpy(), np.concatenate([c.logprobs for [c] in completions]), atol=1e-4)


def test_what_ends_a_completion_may_be_chosen():
    policy = build()
    sampling = Sampling(max_tokens=5, seed=1)
    [[ended]] = policy.generate(PROMPTS[:1], sampling, eos=frozenset(range(7)))
    [[running]] = policy.generate(PROMPTS[:1], sampling, eos=frozenset())
    assert (len(ended.token_ids), len(running.token_ids)) == (1, 5)


def test_bfloat16_is_close_to_float32():
    exact, lm = moved(build(), scale=0.02), tiny()
    lm.model.bfloat16()
    rough = moved(build(lm, dtype="bfloat16"), scale=0.02)
    assert all(p.dtype == torch.float32 for p in rough.parameters().values())
    difference = (scored(exact).logprobs - scored(rough).logprobs).abs().max()
    assert 0 < difference < 0.3


# --- reference ---------------------------------------------------------------------------------------------------


def step(policy, rate=0.5):
    """One step of gradient ascent on the responses' likelihood."""
    scores = policy.score(PROMPTS, RESPONSES, FREE)
    total = (
        scores.logprobs.sum() if scores.values is None else scores.logprobs.sum() - (scores.values - 1).square().sum()
    )
    total.backward()
    with torch.no_grad():
        for parameter in policy.parameters().values():
            if parameter.grad is not None:
                parameter += rate * parameter.grad.clamp(-0.1, 0.1)
                parameter.grad = None
    policy.clear_prefix_cache()


@pytest.mark.parametrize(("rank", "value"), [(4, "shared"), (4, "own_adapter"), (4, "none"), (0, "shared")])
def test_the_reference_is_the_base_model_also_after_training(rank, value):
    expected = base_logprobs(tiny())
    policy = build(rank=rank, value=value)
    torch.testing.assert_close(reference(policy), expected, atol=1e-6, rtol=1e-6)
    for _ in range(3):
        step(policy)
    assert differ(scored(policy).logprobs, expected)
    torch.testing.assert_close(reference(policy), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rank", [4, 0])
def test_a_frozen_reference_is_the_policy_at_that_time(rank):
    policy = build(rank=rank)
    for _ in range(2):
        step(policy)
        policy.freeze_reference()
        frozen = reference(policy).clone()
        torch.testing.assert_close(frozen, scored(policy).logprobs, atol=1e-6, rtol=1e-6)
        step(policy)
        assert differ(scored(policy).logprobs, frozen)
        torch.testing.assert_close(reference(policy), frozen, atol=0, rtol=0)


def test_freezing_leaves_what_is_trained_trainable():
    policy = build(value="own_adapter")
    parameters = policy.parameters()
    policy.freeze_reference()
    assert all(parameter.requires_grad for parameter in parameters.values())
    assert policy.parameters().keys() == parameters.keys()
    assert policy.frozen_adapters() == ["sft"]


def test_a_reference_cannot_take_the_policys_name():
    with pytest.raises(InputError, match="cannot be called 'value'"):
        build().freeze_reference(VALUE)


def test_adapters_are_off_outside_the_policys_own_calls():
    lm, prompts = tiny(), [p.tolist() for p in PROMPTS]
    policy, expected = moved(build(lm, value="own_adapter")), base_logprobs(tiny())
    completions = [r.tolist() for r in RESPONSES]

    def by_others():
        return np.concatenate(lm.logprobs(prompts, completions))

    def refused():
        with pytest.raises(ValueError, match="not among the allowed"):
            policy.score(PROMPTS, RESPONSES, [[np.array([6])] * len(r) for r in RESPONSES])

    for call in (
        lambda: None,
        lambda: policy.generate(PROMPTS * 2, Sampling(max_tokens=2)),
        lambda: policy.score(PROMPTS, RESPONSES, FREE),
        lambda: policy.freeze_reference(),
        lambda: reference(policy),
        lambda: policy.parameters(),
        refused,
    ):
        call()
        np.testing.assert_allclose(by_others(), expected.numpy(), atol=1e-5)
        torch.testing.assert_close(base_logprobs(lm), expected, atol=1e-5, rtol=1e-5)
    assert differ(scored(policy).logprobs, expected)


# --- gradients ---------------------------------------------------------------------------------------------------


def gradients(policy, loss):
    parameters = policy.parameters()
    loss(policy.score(PROMPTS, RESPONSES, FREE)).backward()
    found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None and p.grad.any()}
    for parameter in parameters.values():
        parameter.grad = None
    return found


def test_a_value_adapter_has_gradients_of_its_own():
    policy = moved(build(value="own_adapter"))
    of_policy = gradients(policy, lambda scores: scores.logprobs.sum())
    of_value = gradients(policy, lambda scores: scores.values.square().sum())
    both = gradients(policy, lambda scores: scores.logprobs.sum() + scores.values.square().sum())
    assert of_policy and all(f".{POLICY}." in name for name in of_policy)
    assert of_value and all(f".{VALUE}." in name or name.startswith("value_head.") for name in of_value)
    assert both.keys() == of_policy.keys() | of_value.keys() == policy.parameters().keys()
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, (of_policy | of_value)[name])


def test_a_shared_value_head_trains_the_trunk_as_well():
    policy = moved(build())
    assert len(gradients(policy, lambda scores: scores.values.square().sum())) == len(policy.parameters())


def test_only_adapters_and_head_are_trained():
    policy = build()
    names = policy.parameters()
    assert {n for n in names if n.startswith("value_head.")} == {"value_head.weight", "value_head.bias"}
    assert all(".lora_" in n or n.startswith("value_head.") for n in names)
    trained = {n for n, p in policy.lm.model.named_parameters() if p.requires_grad}
    assert trained == {n for n in names if ".lora_" in n}
    assert all(p.requires_grad for p in build(rank=0, value="none").lm.model.parameters())


def test_values_start_at_0():
    assert not scored(build()).values.any()
    assert scored(build(value="none")).values is None
    assert scored(build(), values=False).values is None


def test_dropout_acts_in_training_passes_only():
    policy = moved(LanguageModelPolicy(tiny(), LoraSettings(rank=4, dropout=0.5), dtype="float32"))
    policy.freeze_reference()
    calm = scored(policy).logprobs
    torch.testing.assert_close(scored(policy).logprobs, calm, atol=0, rtol=0)
    torch.testing.assert_close(reference(policy), calm, atol=1e-6, rtol=1e-6)
    assert differ(policy.score(PROMPTS, RESPONSES, FREE).logprobs.detach(), calm)
    [[completion]] = policy.generate(PROMPTS[:1], Sampling(max_tokens=4))
    with torch.no_grad():
        scores = policy.score(PROMPTS[:1], [np.array(completion.token_ids, np.int32)], [None])
    np.testing.assert_allclose(completion.logprobs, scores.logprobs.numpy(), atol=1e-4)


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, three = build(seed=1), build(seed=1), build(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    same = [torch.equal(a, b) for a, b in zip(one.parameters().values(), two.parameters().values(), strict=True)]
    other = [torch.equal(a, b) for a, b in zip(one.parameters().values(), three.parameters().values(), strict=True)]
    assert all(same) and not all(other)


# --- saving and loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("rank", "value"), [(4, "shared"), (4, "own_adapter"), (4, "none"), (0, "shared")])
def test_a_saved_policy_comes_back_bit_for_bit(tmp_path, rank, value, frozen):
    policy = moved(build(rank=rank, value=value))
    if frozen:
        policy.freeze_reference()
        moved(policy, seed=1)
    policy.save(tmp_path / "policy")
    other = build(rank=rank, value=value, seed=9)
    other.load(tmp_path / "policy")
    for name, parameter in policy.parameters().items():
        assert torch.equal(other.parameters()[name], parameter), name
    mine, theirs = scored(policy), scored(other)
    assert torch.equal(mine.logprobs, theirs.logprobs)
    assert value == "none" or torch.equal(mine.values, theirs.values)
    assert torch.equal(reference(policy), reference(other))
    assert other.reference == policy.reference and differ(reference(other), theirs.logprobs)


def refuses(policy, folder, message):
    with pytest.raises(InputError, match=message):
        policy.load(folder)


def test_a_policy_that_does_not_fit_is_refused(tmp_path):
    policy = moved(build())
    policy.save(tmp_path)
    refuses(build(rank=8), tmp_path, "rank")
    refuses(build(rank=0), tmp_path, "rank")
    refuses(build(value="own_adapter"), tmp_path, "value=shared")
    refuses(build(tiny("gpt2")), tmp_path, "other layers")
    deep = tiny()
    deep.model.model.layers.append(copy.deepcopy(deep.model.model.layers[-1]))
    refuses(build(deep), tmp_path, "other layers")
    refuses(policy, tmp_path / "nowhere", "cannot read a policy")


def test_a_broken_file_is_refused(tmp_path):
    policy = moved(build())
    policy.save(tmp_path)
    weights = tmp_path / POLICY / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refuses(policy, tmp_path, "cannot read a policy")
    weights.write_bytes(whole)
    (tmp_path / "policy.json").write_text(json.dumps({"lora": {}}), "utf-8")
    refuses(policy, tmp_path, "lora={}")
    (tmp_path / "policy.json").write_text("{", "utf-8")
    refuses(policy, tmp_path, "cannot read a policy")


def test_a_whole_model_of_other_layers_is_refused(tmp_path):
    build(rank=0).save(tmp_path)
    refuses(build(tiny("gpt2"), rank=0), tmp_path, "other layers")


# --- bad arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": "big"}, "value must be"),
        ({"reference": "sft"}, "reference base or none"),
        ({"value": "own_adapter", "rank": 0}, "needs adapters"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


# --- the LoRA kernel ---------------------------------------------------------------------------------------------


def without_kernel(policy):
    for layer in policy.lm.model.modules():
        layer.__dict__.pop("forward", None)
    return policy


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_the_lora_kernel_computes_what_peft_does(architecture, dtype, tolerance):
    ours = moved(build(tiny(architecture), dtype=dtype, value="own_adapter"), 0.1)
    theirs = without_kernel(moved(build(tiny(architecture), dtype=dtype, value="own_adapter"), 0.1))
    assert sum("forward" in layer.__dict__ for layer in ours.lm.model.modules()) > 4
    torch.testing.assert_close(scored(ours).logprobs, scored(theirs).logprobs, atol=tolerance, rtol=tolerance)
    mine, other = (
        gradients(policy, lambda scores: scores.logprobs.sum() + scores.values.square().sum())
        for policy in (ours, theirs)
    )
    assert mine.keys() == other.keys() == ours.parameters().keys()
    for name, gradient in mine.items():
        assert gradient.dtype == torch.float32
        assert (gradient - other[name]).norm() < 3 * tolerance * other[name].norm()


def test_the_lora_kernel_leaves_dropout_to_peft():
    policy = moved(LanguageModelPolicy(tiny(), LoraSettings(rank=4, dropout=0.5), dtype="float32"))
    assert torch.equal(scored(policy).logprobs, scored(policy).logprobs)
    one, two = (policy.score(PROMPTS, RESPONSES, FREE).logprobs for _ in range(2))
    assert not torch.allclose(one, two)
