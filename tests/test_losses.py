"""PPO's clipped losses by hand, their gradients among them."""

import math

import numpy as np
import pytest
import torch

from instructgym.agents.policy_gradient.grpo import k3_penalty
from instructgym.agents.policy_gradient.on_policy import clipped_policy_loss, kl_estimate
from instructgym.agents.policy_gradient.ppo import clipped_value_loss


def tokens(*values):
    return torch.tensor(values, dtype=torch.float32, requires_grad=True)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, 2.0, -1.2 * 2.0, True),  # more likely and good: no further
        (0.5, 2.0, -0.5 * 2.0, False),  # less likely though good: back
        (1.5, -2.0, 1.5 * 2.0, False),  # more likely though bad: back
        (0.5, -2.0, 0.8 * 2.0, True),  # less likely and bad: no further
        (1.1, 2.0, -1.1 * 2.0, False),
        (0.9, -2.0, 0.9 * 2.0, False),
        (1.0, 0.0, 0.0, False),
    ],
)
def test_policy_loss_by_hand(ratio, advantage, loss, clipped):
    logprobs = tokens(math.log(ratio) - 1.0)
    losses, taken = clipped_policy_loss(logprobs, torch.tensor([-1.0]), torch.tensor([advantage]), 0.2)
    assert losses.item() == pytest.approx(loss, abs=1e-6)
    assert taken.tolist() == [clipped]
    losses.sum().backward()
    assert logprobs.grad.item() == pytest.approx(0.0 if clipped else -ratio * advantage, abs=1e-6)


def test_before_the_first_step_the_gradient_is_that_of_reinforce():
    logprobs, advantages = tokens(-0.3, -2.0, -5.0), torch.tensor([1.0, -2.0, 0.5])
    losses, clipped = clipped_policy_loss(logprobs, logprobs.detach(), advantages, 0.2)
    losses.sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)
    assert not clipped.any()


@pytest.mark.parametrize(
    ("value", "loss", "clipped"),
    [
        (0.5, 0.5 * 0.5**2, False),  # within reach of the old value 0.4
        (1.0, 0.5 * 0.4**2, True),  # arrived, but only a change of 0.2 counts
        (0.0, 0.5 * 1.0**2, False),  # moved away: the plain error is the larger one
        (2.0, 0.5 * 1.0**2, False),  # overshot by more than the clipped value lacks
    ],
)
def test_value_loss_by_hand(value, loss, clipped):
    values = tokens(value)
    losses, taken = clipped_value_loss(values, torch.tensor([0.4]), torch.tensor([1.0]), 0.2)
    assert losses.item() == pytest.approx(loss)
    assert taken.tolist() == [clipped]
    losses.sum().backward()
    assert values.grad.item() == pytest.approx(0.0 if clipped else value - 1.0)


def test_rounding_is_no_value_clipping():
    """Values that moved by less than the clip range, in float32, at sizes at which sums round differently."""
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 1.0, 300.0):
        values = size * torch.randn(5000, generator=generator)
        old = values + 0.1 * torch.randn(5000, generator=generator).clamp(-1.9, 1.9)
        returns = size * torch.randn(5000, generator=generator)
        losses, clipped = clipped_value_loss(values, old, returns, 0.2)
        assert not clipped.any()
        torch.testing.assert_close(losses, 0.5 * (values - returns).square())


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("ratio", [30.0, 89.0, 1e4, -1e4])
def test_extreme_ratios_have_finite_losses_and_gradients(ratio, advantage):
    logprobs = tokens(ratio, 0.1, ratio)
    losses, _ = clipped_policy_loss(logprobs, torch.zeros(3), torch.tensor([advantage, 1.0, advantage]), 0.2)
    (losses * torch.tensor([1.0, 1.0, 0.0])).sum().backward()  # the last token is masked out
    assert bool(losses.isfinite().all()) and bool(logprobs.grad.isfinite().all())
    assert logprobs.grad[1].item() == pytest.approx(-math.exp(0.1)) and logprobs.grad[2] == 0
    if advantage >= 0 or ratio < 0:
        assert logprobs.grad[0] == 0, "clipped away, or as good as impossible"


def test_k3_of_extreme_log_ratios_is_finite():
    logprobs = tokens(-200.0, -1.0, 0.0)
    penalty = k3_penalty(logprobs, torch.tensor([0.0, -1.5, -200.0]))
    penalty.sum().backward()
    assert bool(penalty.isfinite().all()) and bool(logprobs.grad.isfinite().all())
    assert logprobs.grad[2] == 1.0, "a policy far above its reference is still pulled back"
    assert np.isfinite(kl_estimate(np.float32([-200, 0]), np.float32([0, -200]), "k3")).all()


def test_value_clipping_can_be_off():
    values = tokens(5.0)
    losses, clipped = clipped_value_loss(values, torch.tensor([0.0]), torch.tensor([1.0]), 0.0)
    assert losses.item() == 8.0 and not clipped.any()
    losses.sum().backward()
    assert values.grad.item() == 4.0


def test_k3_penalty_by_hand():
    logprobs = tokens(math.log(0.5), math.log(0.25), -1.0)
    reference = torch.tensor([math.log(0.25), math.log(0.5), -1.0])
    penalty = k3_penalty(logprobs, reference)
    expected = torch.from_numpy(kl_estimate(logprobs.detach().numpy(), reference.numpy(), "k3"))
    torch.testing.assert_close(penalty.detach(), expected)
    penalty.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.5, -1.0, 0.0]))  # 1 - q / p
