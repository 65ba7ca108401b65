"""Comparison of two models' predictions from hidden states: values, gradients, chunks, bfloat16, and by the policy."""

import numpy as np
import pytest
import torch
from tiny_models import build_model

from instructgym.agents.policy.language_model import POLICY, LanguageModelPolicy
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.causal_lm import CausalLM
from instructgym.llm_backends.local.tokenization import WordTokenizer
from instructgym.llm_backends.training import output_layer
from instructgym.llm_backends.training.adapters import LoraSettings
from instructgym.llm_backends.training.output_layer import OutputLayer, compared_tokens

ROWS, VOCABULARY, DIM = 7, 13, 5


def layers(bias=True, trained=False, dtype=torch.float64):
    """Hidden states and output layer of a model and of its reference, and chosen tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, trained=False):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(trained)

    head = OutputLayer(draw(VOCABULARY, DIM, trained=trained), draw(VOCABULARY, trained=trained) if bias else None)
    other = OutputLayer(draw(VOCABULARY, DIM), draw(VOCABULARY) if bias else None)
    ids = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return draw(ROWS, DIM, trained=True), head, draw(ROWS, DIM), other, ids


def full(hidden, head, reference_hidden, reference_head, ids, scale=1.0):
    """The same from all logits."""
    rows = (torch.nn.functional.linear(hidden, *head[:2]) * scale).log_softmax(dim=-1)
    references = (torch.nn.functional.linear(reference_hidden, *reference_head[:2]) * scale).log_softmax(dim=-1)
    kls = torch.nn.functional.kl_div(rows, references, reduction="none", log_target=True).sum(dim=-1)
    return rows.gather(1, ids[:, None]).squeeze(1), references.gather(1, ids[:, None]).squeeze(1), kls


@pytest.mark.parametrize("chunk", [1, 52, 10_000])
@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_full_logits(monkeypatch, bias, trained, scale, chunk):
    monkeypatch.setattr(output_layer, "CHUNK_LOGITS", chunk)
    weights, others = torch.linspace(-1, 2, ROWS), torch.linspace(3, -1, ROWS)
    outcomes = []
    for function in (compared_tokens, full):
        hidden, head, *rest = layers(bias, trained)
        logprobs, references, kls = function(hidden, head, *rest, scale=scale)
        (logprobs * weights + kls * others).sum().backward()
        gradients = [t.grad for t in (hidden, *head[:2]) if t is not None and t.grad is not None]
        outcomes.append([logprobs.detach(), references.detach(), kls.detach(), *gradients])
    assert len(outcomes[0]) == 4 + trained * (1 + bias)
    assert float(outcomes[0][2].min()) > 0.05
    for mine, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_are_those_of_finite_differences(trained):
    hidden, head, *rest = layers(trained=trained)

    def function(hidden, *head):
        logprobs, _, kls = compared_tokens(hidden, OutputLayer(*head[:2]), *rest, scale=0.7)
        return logprobs, kls

    assert torch.autograd.gradcheck(function, (hidden, *head[:2]))


def test_float32_is_close_to_float64():
    exact = compared_tokens(*layers())
    rough = compared_tokens(*layers(dtype=torch.float32))
    for mine, expected in zip(rough, exact, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), expected, atol=1e-6, rtol=1e-6)


def test_a_worked_divergence():
    """Over two tokens: p = (1/2, 1/2), q = (3/4, 1/4)."""
    head, reference = (OutputLayer(torch.zeros(2, 1), torch.tensor([x, 0.0])) for x in (0.0, float(np.log(3))))
    got = compared_tokens(torch.ones(1, 1), head, torch.ones(1, 1), reference, torch.tensor([1]))
    expected = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert [float(x) for x in got] == pytest.approx([np.log(0.5), np.log(0.25), expected])


@pytest.mark.parametrize("trained", [False, True])
def test_the_same_model_has_no_divergence_and_no_gradient_of_it(trained):
    hidden, head, _, _, ids = layers(trained=trained, dtype=torch.float32)
    reference = OutputLayer(*(t.detach() for t in head[:2]))
    logprobs, references, kls = compared_tokens(hidden, head, hidden.detach(), reference, ids)
    assert not kls.any() and torch.equal(logprobs, references) and not references.requires_grad
    kls.sum().backward()
    assert float(hidden.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("trained", [False, True])
def test_bfloat16_is_close(trained):
    exact = compared_tokens(*layers(trained=trained, dtype=torch.float32))
    hidden, *rest = layers(trained=trained, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = compared_tokens(hidden, *rest)
    for mine, expected in zip(rough, exact, strict=True):
        assert mine.dtype == torch.float32
        assert 0 < (mine - expected).abs().max() < 0.2
    rough.kls.sum().backward()
    assert torch.isfinite(hidden.grad).all() and hidden.grad.any()


# --- by the policy -----------------------------------------------------------------------------------------------

WORDS = WordTokenizer(words=("red", "blue", "sea", "sky", "end"))
PROMPTS = [np.array(p, np.int32) for p in ([0, 1], [2], [4, 3, 2, 1, 0], list(range(5)) * 2, list(range(5)) * 2)]
RESPONSES = [np.array(r, np.int32) for r in ([1, 5], [0, 3, 3, 2], [4], [1, 5], [2, 2, 5])]


def build(rank, scale, padding=9, dtype="float32", bias=False, double=False, **options):
    """A policy whose weights are ``scale`` away from those of its reference; logits are padded."""
    model = build_model(vocabulary=WORDS.vocabulary + padding)
    generator = torch.Generator().manual_seed(0)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(len(model.lm_head.weight), generator=generator))
    if double:  # gradients that cancel: in float32 what is left would depend on the CPU's kernels
        model = model.double()
    policy = LanguageModelPolicy(
        CausalLM(model, WORDS.hf, name="tiny"), LoraSettings(rank=rank), dtype=dtype, value="none", **options
    )
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return policy


def from_logits(policy, name):
    """Log-probs of all tokens at each response token, with a graph: a plain pass per row, at temperature 0.7."""
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        with policy.adapter(name) as lm:
            logits = lm.model(input_ids=ids).logits[0, len(prompt) - 1 : -1, : WORDS.vocabulary]
        rows.append((logits.double() / 0.7).log_softmax(dim=-1))
    return torch.cat(rows)


def slopes(policy, loss):
    for parameter in policy.parameters().values():
        parameter.grad = None
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.parameters().items() if p.grad is not None}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_policy_is_compared_with_its_reference(rank, bias, frozen):
    policy = build(rank, 0.3 if rank else 0.05, temperature=0.7, bias=bias, double=True)
    if frozen:
        policy.freeze_reference("before")
        with torch.no_grad():
            for parameter in policy.parameters().values():
                parameter += 0.02
    policy.lm.model.double()  # the adapters too
    got = policy.compare(PROMPTS, RESPONSES)
    rows = from_logits(policy, POLICY)
    references = from_logits(policy, "before" if frozen and rank else None).detach()
    ids = torch.from_numpy(np.concatenate(RESPONSES).astype(np.int64))[:, None]
    kls = torch.nn.functional.kl_div(rows, references, reduction="none", log_target=True).sum(dim=-1)
    expected = rows.gather(1, ids).squeeze(1), references.gather(1, ids).squeeze(1), kls
    assert float(kls.detach().max()) > 0.05
    for mine, plain in zip(got, expected, strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, plain, atol=1e-9, rtol=1e-9)
    assert not got.reference_logprobs.requires_grad
    mine, plain = (slopes(policy, x.sum()) for x in (got.kls, kls))
    assert set(mine) == set(plain) and mine
    scale = max(float(g.abs().max()) for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(mine[name] / scale, gradient / scale, atol=1e-9, rtol=1e-7)


def test_a_comparison_agrees_with_scores():
    policy = build(4, 0.3)
    with torch.no_grad():
        got = policy.compare(PROMPTS, RESPONSES)
        mine = policy.score(PROMPTS, RESPONSES, [None] * len(RESPONSES)).logprobs
        hidden = policy.reference_hidden(PROMPTS, RESPONSES)
        again = policy.compare(PROMPTS, RESPONSES, hidden)
    torch.testing.assert_close(got.logprobs, mine)
    torch.testing.assert_close(
        got.reference_logprobs, policy.reference_logprobs(PROMPTS, RESPONSES, [None] * len(RESPONSES))
    )
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_new_policy_is_its_reference(rank, dtype):
    got = build(rank, 0.0, dtype=dtype).compare(PROMPTS, RESPONSES)
    assert not got.kls.any() and torch.equal(got.logprobs, got.reference_logprobs)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_policy_in_bfloat16_is_close(rank):
    scale = 0.1 if rank else 0.02
    exact, policy = build(rank, scale).compare(PROMPTS, RESPONSES), build(rank, scale, dtype="bfloat16")
    rough = policy.compare(PROMPTS, RESPONSES)
    for mine, expected in zip(rough, exact, strict=True):
        assert mine.dtype == torch.float32 and 0 < (mine - expected).abs().max() < 0.3
    gradients = slopes(policy, rough.kls.sum())
    assert all(bool(g.isfinite().all()) for g in gradients.values()) and any(g.any() for g in gradients.values())


def test_without_a_reference_there_is_nothing_to_compare_with():
    with pytest.raises(InputError, match="has no reference policy"):
        build(4, 0.0, reference="none").compare(PROMPTS, RESPONSES)
