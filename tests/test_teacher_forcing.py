"""Hidden states and log-probs of given responses: equal to plain passes, row by row, gradients included."""

import copy

import numpy as np
import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from instructgym.llm_backends.local.causal_lm import CausalLM
from instructgym.llm_backends.training import output_layer
from instructgym.llm_backends.training import teacher_forcing as training_kernels
from instructgym.llm_backends.training.output_layer import OutputLayer
from instructgym.llm_backends.training.teacher_forcing import SHARED_PREFIX, common_prefix, response_hidden

HEADER = [5 + i * 7 % 300 for i in range(SHARED_PREFIX + 4)]
ROWS = {
    "alone": [([7, 8], [9])],
    "ragged": [([7], [8]), ([9, 10, 11, 12], [13, 14, 15]), ([7, 20], [21, 22, 23, 24, 25, 26]), ([3] * 15, [4])],
    "short shared prefix": [([*HEADER[:3], 40], [41, 42]), ([*HEADER[:3], 43, 44], [45])],
    "shared prefix": [([*HEADER, 40], [41, 42]), ([*HEADER, 43, 44], [45]), ([*HEADER, 46, 47], [48, 49, 50])],
    "one prompt": [(HEADER, [41, 42]), (HEADER, [45]), (HEADER, [41, 48, 49]), (HEADER, [41, 42])],
    "all the same": [(HEADER, [41, 42]), (HEADER, [41, 43]), (HEADER, [41, 42])],
    "prompts of several": [([k, *HEADER[k:]], [41 + j] * (j + 2)) for k in (1, 2, 1, 4, 4, 2) for j in range(2)],
    "prompts of several, one length": [([k, *HEADER[1:]], [41 + j, 3, k]) for k in (1, 2, 1, 4) for j in range(2)],
    "prompt within prompt": [(HEADER, [41, 42, 43]), ([*HEADER, 41], [42, 44]), ([*HEADER, 41, 42], [43])],
}


def rows(name):
    prompts, responses = zip(*ROWS[name], strict=True)
    return [np.array(p, np.int32) for p in prompts], [np.array(r, np.int32) for r in responses]


def plain_hidden(lm, prompts, responses):
    """The same by one transformers pass per row, without padding, cache or our attention."""
    states = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response[:-1]]).astype(np.int64))[None]
        states.append(lm.trunk(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 :])
    return torch.cat(states)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mistral-sliding"])
def test_hidden_states_are_those_of_a_plain_pass_per_row(tiny_lms, architecture, name):
    lm = tiny_lms(architecture)
    prompts, responses = rows(name)
    with torch.no_grad():
        mine, plain = response_hidden(lm, prompts, responses), plain_hidden(lm, prompts, responses)
    assert len(mine) == sum(map(len, responses))
    torch.testing.assert_close(mine, plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["ragged", *list(ROWS)[3:]])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_are_those_of_plain_passes(tiny_lms, architecture, name):
    lm = CausalLM(copy.deepcopy(tiny_lms(architecture).model), None)
    lm.model.requires_grad_(True)
    prompts, responses = rows(name)
    weights = torch.linspace(-1, 1, sum(map(len, responses)))[:, None]
    gradients = []
    for hidden in (response_hidden, plain_hidden):
        lm.model.zero_grad()
        (hidden(lm, prompts, responses).tanh() * weights).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 10 and gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][parameter], atol=1e-4, rtol=1e-3, msg=parameter)


def tokens_read(lm, name):
    sizes = []
    hook = lm.trunk.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        response_hidden(lm, *rows(name))
    finally:
        hook.remove()
    return sum(sizes)


def test_what_rows_share_is_read_once(tiny_lm):
    assert tokens_read(tiny_lm, "all the same") == len(HEADER) + 1
    # The last token of a prompt predicts the first one of its response, so it is never a part of the prefix.
    assert tokens_read(tiny_lm, "one prompt") == len(HEADER) - 1 + 3 * 3
    assert tokens_read(tiny_lm, "shared prefix") == len(HEADER) + 3 * 4
    assert tokens_read(tiny_lm, "short shared prefix") == 2 * 5
    several, (prompts, _) = tokens_read(tiny_lm, "prompts of several"), rows("prompts of several")
    assert several == 3 * 11 + 6 * 3 and len(prompts) == 12 and len({p.tobytes() for p in prompts}) == 3


def test_common_prefix():
    assert common_prefix([np.array([1, 2, 3])]) == 3
    assert common_prefix([np.array([1, 2, 3]), np.array([1, 2])]) == 2
    assert common_prefix([np.array([1, 2, 3]), np.array([1, 5, 3]), np.array([1, 2])]) == 1
    assert common_prefix([np.array([1]), np.array([], int)]) == 0


# --- log-probs ---------------------------------------------------------------------------------------------------


def layer(bias=True, trained=False, n=7, vocabulary=13, dim=5):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, dim, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, dim, generator=generator, requires_grad=trained)
    offset = torch.randn(vocabulary, generator=generator, requires_grad=trained) if bias else None
    return hidden, weight, offset, torch.randint(vocabulary, (n,), generator=generator)


def full(hidden, head, ids, scale):
    logits = (torch.nn.functional.linear(hidden, *head[:2]) * scale).log_softmax(dim=-1)
    return logits.gather(1, ids[:, None]).squeeze(1), -(logits.exp() * logits).sum(dim=-1)


@pytest.mark.parametrize("chunk", [1, 26, 10_000])
@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_log_probs_and_gradients_are_those_of_the_full_softmax(monkeypatch, bias, trained, scale, chunk):
    monkeypatch.setattr(output_layer, "CHUNK_LOGITS", chunk)
    weights, others = torch.linspace(-1, 2, 7), torch.linspace(3, -1, 7)
    outcomes = []
    for function in (output_layer.token_logprobs, full):
        hidden, weight, offset, ids = layer(bias, trained)
        extra = {"entropy_gradient": True} if function is not full else {}
        logprobs, entropies = function(hidden, OutputLayer(weight, offset), ids, scale=scale, **extra)
        (logprobs * weights + entropies * others).sum().backward()
        gradients = [t.grad for t in (hidden, weight, offset) if t is not None and t.grad is not None]
        outcomes.append([logprobs.detach(), entropies.detach(), *gradients])
    assert len(outcomes[0]) == 3 + trained * (1 + bias)
    for mine, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("trained", [False, True])
def test_entropies_carry_no_gradient_unless_asked_to(trained):
    hidden, weight, bias, ids = layer(trained=trained)
    logprobs, entropies = output_layer.token_logprobs(hidden, OutputLayer(weight, bias), ids)
    (0.0 * logprobs + entropies).sum().backward()
    assert not hidden.grad.any()


def test_log_probs_in_bfloat16_are_close():
    hidden, weight, bias, ids = layer()
    exact, entropy = output_layer.token_logprobs(hidden, OutputLayer(weight, bias), ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, rough_entropy = output_layer.token_logprobs(hidden, OutputLayer(weight, bias), ids)
    assert rough.dtype == rough_entropy.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.2 and (entropy - rough_entropy).abs().max() < 0.1
    rough.sum().backward()
    assert torch.isfinite(hidden.grad).all()


def allowed_sets(ids):
    rng = np.random.default_rng(0)
    return [np.unique(np.append(rng.integers(13, size=rng.integers(0, 6)), token)) for token in ids.tolist()]


@pytest.mark.parametrize("bias", [False, True])
def test_allowed_log_probs_are_a_masked_softmax(bias):
    outcomes = []
    for mine in (True, False):
        hidden, weight, offset, ids = layer(bias)
        allowed = allowed_sets(ids)
        if mine:
            logprobs, entropies = output_layer.allowed_logprobs(
                hidden, OutputLayer(weight, offset), ids, allowed, scale=0.7
            )
        else:
            mask = torch.full((7, 13), float("-inf"))
            for row, tokens in enumerate(allowed):
                mask[row, tokens] = 0.0
            logits = (torch.nn.functional.linear(hidden, weight, offset) * 0.7 + mask).log_softmax(dim=-1)
            logprobs = logits.gather(1, ids[:, None]).squeeze(1)
            entropies = -torch.where(mask == 0, logits.exp() * logits.masked_fill(mask != 0, 0.0), 0.0).sum(dim=-1)
        (logprobs.sum() + 2.0 * entropies.sum()).backward()
        outcomes.append((logprobs.detach(), entropies.detach(), hidden.grad))
    for ours, plain in zip(*outcomes, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


def test_a_single_allowed_token_is_certain():
    hidden, weight, bias, ids = layer()
    logprobs, entropies = output_layer.allowed_logprobs(
        hidden, OutputLayer(weight, bias), ids, [np.array([i]) for i in ids]
    )
    assert not logprobs.any() and not entropies.any()
    logprobs.sum().backward()
    assert not hidden.grad.any()


def test_a_token_that_is_not_allowed_is_refused():
    hidden, weight, bias, ids = layer()
    allowed = allowed_sets(ids)
    allowed[3] = np.array([(int(ids[3]) + 1) % 13, (int(ids[3]) + 2) % 13])
    with pytest.raises(ValueError, match="not among the allowed"):
        output_layer.allowed_logprobs(hidden, OutputLayer(weight, bias), ids, allowed)
    ids[3] = 0  # what shorter rows of the table are padded with is not allowed either
    allowed[3] = np.array([5])
    with pytest.raises(ValueError, match="not among the allowed"):
        output_layer.allowed_logprobs(hidden, OutputLayer(weight, bias), ids, allowed)


# --- attention ---------------------------------------------------------------------------------------------------

MASKS = ["none", "bool", "cache", "cache and bool", "float"]


def attended(kind, new=6, past=5):
    """Query, key, value and mask: four heads over two shared ones."""
    length = new + (past if "cache" in kind else 0)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, new, 8), (2, 2, length, 8), (2, 2, length, 8)]
    tensors = [torch.randn(shape, generator=generator).bfloat16().requires_grad_(True) for shape in shapes]
    causal = torch.ones(new, length, dtype=torch.bool).tril(length - new).expand(2, 1, new, length).clone()
    if "bool" in kind or kind == "float":
        causal[1, :, 2:, 1] = False  # a hole in the second row
    mask = torch.zeros_like(causal, dtype=torch.bfloat16).masked_fill(~causal, float("-inf"))
    return tensors, {"none": None, "cache": None, "float": mask}.get(kind, causal), causal


@pytest.mark.parametrize("kind", MASKS)
def test_training_attention_is_close_to_the_fused_kernel(tiny_lm, kind):
    module = tiny_lm.model.model.layers[0].self_attn
    outcomes = []
    for mine in (True, False):
        tensors, mask, causal = attended(kind)
        if mine:
            with training_kernels.training_kernels():
                output, _ = training_kernels.training_attention(module, *tensors, mask, scaling=0.3)
        else:
            output, _ = sdpa_attention_forward(module, *tensors, causal, scaling=0.3)
        (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        outcomes.append([output.detach(), *[tensor.grad for tensor in tensors]])
    assert outcomes[0][0].shape == outcomes[1][0].shape
    for ours, fused in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, fused, atol=0.06, rtol=0.06)


def test_training_attention_is_used_only_within_training_kernels(tiny_lm, monkeypatch):
    used = []
    kernel = training_kernels.matmul_attention
    monkeypatch.setattr(training_kernels, "matmul_attention", lambda *a: used.append(1) or kernel(*a))
    lm = CausalLM(copy.deepcopy(tiny_lm.model).bfloat16(), None)
    training_kernels.use_training_kernels(lm.model)
    ids = torch.tensor([[5, 6, 7]])

    def count(call):
        used.clear()
        call()
        return len(used)

    assert count(lambda: lm.model(input_ids=ids)) == 0
    assert count(lambda: response_hidden(lm, *rows("ragged"))) == 2  # one per layer
    assert count(lambda: response_hidden(lm, *rows("shared prefix"))) == 4
    with pytest.raises(ZeroDivisionError), training_kernels.training_kernels():
        _ = 1 / 0
    assert count(lambda: lm.model(input_ids=ids)) == 0
    lm.model.float()
    assert count(lambda: response_hidden(lm, *rows("ragged"))) == 0  # the fused kernel is as fast in float32


def test_training_attention_changes_nothing_in_float32(tiny_lm):
    lm = CausalLM(copy.deepcopy(tiny_lm.model), None)
    training_kernels.use_training_kernels(lm.model)
    assert lm.model.config._attn_implementation == training_kernels.ATTENTION_NAME
    for name in ("ragged", "shared prefix"):
        with torch.no_grad():
            mine, plain = response_hidden(lm, *rows(name)), response_hidden(tiny_lm, *rows(name))
        torch.testing.assert_close(mine, plain, atol=1e-6, rtol=1e-5)
