"""Chosen logits and their logsumexp from hidden states: values, gradients, chunks, bfloat16."""

import pytest
import torch

from instructgym.llm_backends.training import output_layer
from instructgym.llm_backends.training.output_layer import OutputLayer, chosen_logits

ROWS, VOCABULARY, DIM = 7, 13, 5


def layer(bias=True, trained=False, dtype=torch.float64):
    """Hidden states, an output layer and chosen tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, trained=False):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(trained)

    head = OutputLayer(draw(VOCABULARY, DIM, trained=trained), draw(VOCABULARY, trained=trained) if bias else None)
    return draw(ROWS, DIM, trained=True), head, torch.randint(VOCABULARY, (ROWS,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 26, 10_000])
@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_chosen_logits_and_gradients_are_those_of_full_logits(monkeypatch, bias, trained, scale, chunk):
    monkeypatch.setattr(output_layer, "CHUNK_LOGITS", chunk)
    weights, others = torch.linspace(-1, 2, ROWS), torch.linspace(3, -1, ROWS)
    outcomes = []
    for whole in (False, True):
        hidden, head, ids = layer(bias, trained)
        if whole:
            logits = torch.nn.functional.linear(hidden, *head[:2]) * scale
            values = logits.logsumexp(dim=-1)
            chosen = logits.gather(1, ids[:, None]).squeeze(1)
            logprobs = chosen - values
        else:
            found = chosen_logits(hidden, head, ids, scale)
            (logprobs, values), chosen = found, found.logits
        (logprobs * weights + values * others + chosen**2).sum().backward()
        gradients = [t.grad for t in (hidden, *head[:2]) if t is not None and t.grad is not None]
        outcomes.append([logprobs.detach(), values.detach(), *gradients])
    assert len(outcomes[0]) == 3 + trained * (1 + bias)
    for mine, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("trained", [False, True])
def test_chosen_logits_in_bfloat16_are_close(trained):
    exact = chosen_logits(*layer(trained=trained, dtype=torch.float32))
    hidden, *rest = layer(trained=trained, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = chosen_logits(hidden, *rest)
    for mine, expected in zip(rough, exact, strict=True):
        assert mine.dtype == expected.dtype == torch.float32
        assert 0 < (mine - expected).abs().max() < 0.2
    rough.logits.sum().backward()
    assert torch.isfinite(hidden.grad).all() and hidden.grad.any()
