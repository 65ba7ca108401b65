"""Advantages by hand and against plain loops: KL estimates, GAE, whitening, group baselines, the KL coefficient."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructgym.agents.policy_gradient.grpo import group_advantages, leave_one_out_advantages
from instructgym.agents.policy_gradient.on_policy import KLController, effective_sample_size, kl_estimate, whiten
from instructgym.agents.policy_gradient.ppo import discounted_gae, explained_variance


def f32(*values):
    return np.array(values, dtype=np.float32)


# --- GAE ---------------------------------------------------------------------------------------------------------


def test_gae_by_hand_on_ragged_episodes():
    rewards, values = f32(0, 1, 2), f32(0.5, 1.0, -1.0)
    advantages, returns = discounted_gae(rewards, values, [2, 1], gamma=0.9, lam=0.5)
    # Episode 1: delta_1 = 1 - 1 = 0, delta_0 = 0 + 0.9 * 1 - 0.5 = 0.4, A_0 = 0.4 + 0.45 * 0. Episode 2: 2 + 1 = 3.
    np.testing.assert_allclose(advantages, [0.4, 0.0, 3.0], atol=1e-6)
    np.testing.assert_allclose(returns, [0.9, 1.0, 2.0], atol=1e-6)
    assert advantages.dtype == returns.dtype == np.float32


def test_gae_on_dense_rewards_by_hand():
    advantages, _ = discounted_gae(f32(0, 0.5, -0.3, 1), f32(0.2, 0.1, 0.4, 0.3), [4], gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages, [0.899162, 1.05175, 0.265, 0.7], atol=1e-5)


def test_gae_bootstraps_truncated_episodes():
    advantages, _ = discounted_gae(f32(0, 1, 2), f32(0.5, 1.0, -1.0), [2, 1], 0.9, 0.5, bootstrap=f32(10, 20))
    # delta_1 = 1 + 9 - 1 = 9, A_0 = 0.4 + 0.45 * 9 = 4.45; episode 2: 2 + 18 + 1 = 21.
    np.testing.assert_allclose(advantages, [4.45, 9.0, 21.0], rtol=1e-6)


def test_gae_with_lambda_1_is_the_return_less_the_value():
    rewards, values = f32(1, 0, 3), f32(0.3, 0.7, 0.1)
    advantages, returns = discounted_gae(rewards, values, [3], gamma=1.0, lam=1.0)
    np.testing.assert_allclose(returns, [4, 3, 3], rtol=1e-6)
    np.testing.assert_allclose(advantages, returns - values, rtol=1e-6)


def looped_gae(rewards, values, lengths, gamma, lam, bootstrap):
    advantages, start = [], 0
    for length, after in zip(lengths, bootstrap, strict=True):
        mine = []
        running, following = 0.0, float(after)
        for t in reversed(range(start, start + length)):
            running = float(rewards[t]) + gamma * following - float(values[t]) + gamma * lam * running
            following = float(values[t])
            mine.append(running)
        advantages += mine[::-1]
        start += length
    return np.array(advantages)


numbers = st.floats(-5, 5, width=32)


@given(lengths=st.lists(st.integers(0, 6), max_size=6), gamma=st.floats(0, 1), lam=st.floats(0, 1), data=st.data())
def test_gae_is_the_loop_over_each_episode(lengths, gamma, lam, data):
    def draw(size):
        return np.array(data.draw(st.lists(numbers, min_size=size, max_size=size)), dtype=np.float32)

    rewards, values, bootstrap = draw(sum(lengths)), draw(sum(lengths)), draw(len(lengths))
    advantages, returns = discounted_gae(rewards, values, lengths, gamma, lam, bootstrap)
    expected = looped_gae(rewards, values, lengths, gamma, lam, bootstrap)
    np.testing.assert_allclose(advantages, expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(returns, expected + values, atol=1e-4, rtol=1e-4)


def test_gae_does_not_leak_from_one_episode_into_another():
    rng = np.random.default_rng(0)
    lengths = [3, 1, 4]
    rewards, values = rng.normal(size=(2, 8)).astype(np.float32)
    before, _ = discounted_gae(rewards, values, lengths, 0.9, 0.9)
    rewards[3] += 100
    values[3] -= 50
    after, _ = discounted_gae(rewards, values, lengths, 0.9, 0.9)
    others = [0, 1, 2, 4, 5, 6, 7]
    np.testing.assert_array_equal(before[others], after[others])
    assert after[3] == pytest.approx(before[3] + 150, rel=1e-5)


# --- KL ----------------------------------------------------------------------------------------------------------


def test_kl_estimates_by_hand():
    logprobs, reference = np.log(f32(0.5, 0.25)), np.log(f32(0.25, 0.5))
    np.testing.assert_allclose(kl_estimate(logprobs, reference), [math.log(2), -math.log(2)], rtol=1e-6)
    # q / p - 1 - log(q / p), for q / p of a half and of two
    expected = [0.5 - 1 + math.log(2), 2 - 1 - math.log(2)]
    np.testing.assert_allclose(kl_estimate(logprobs, reference, "k3"), expected, rtol=1e-6)


def test_k1_and_k3_agree_in_expectation():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    exact = float((p * np.log(p / q)).sum())
    for estimator in ("k1", "k3"):
        assert float((p * kl_estimate(np.log(p), np.log(q), estimator)).sum()) == pytest.approx(exact)


def test_k3_is_never_negative():
    rng = np.random.default_rng(0)
    assert (kl_estimate(rng.normal(size=1000), rng.normal(size=1000), "k3") >= 0).all()
    assert kl_estimate(f32(-1.5), f32(-1.5), "k3").tolist() == [0]


def test_an_unknown_kl_estimator_is_refused():
    with pytest.raises(ValueError, match="k2"):
        kl_estimate(f32(0), f32(0), "k2")


# --- whitening ---------------------------------------------------------------------------------------------------


def test_whitening_looks_at_unmasked_tokens_only():
    mask = np.array([True, False, True, True, False])
    whitened = whiten(f32(1, 1e6, 2, 3, -1e6), mask)
    np.testing.assert_allclose(whitened, [-1, 0, 0, 1, 0], atol=1e-6)  # the sample deviation of 1, 2, 3 is 1
    assert whitened.dtype == np.float32


def test_whitening_may_leave_the_mean():
    whitened = whiten(f32(1, 2, 3), np.ones(3, bool), shift_mean=False)
    assert whitened.mean() == pytest.approx(2)
    assert whitened.std(ddof=1) == pytest.approx(1)


def test_whitening_takes_moments_over_all_processes():
    rng = np.random.default_rng(0)
    values, mask = rng.normal(3, 2, size=20).astype(np.float32), rng.random(20) < 0.7
    kept = values[mask].astype(np.float64)
    moments = np.array([len(kept), kept.sum(), (kept**2).sum()])
    seen = []

    def total(sums):
        seen.append(sums)
        return moments

    halves = [whiten(values[rows], mask[rows], total=total) for rows in (slice(8), slice(8, 20))]
    np.testing.assert_allclose(np.sum(seen, axis=0), moments)
    np.testing.assert_allclose(np.concatenate(halves), whiten(values, mask), atol=1e-6)


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=30))
def test_whitening_is_that_of_trl_and_verl(values):
    array = np.array(values, np.float32)
    exact = array.astype(np.float64)
    expected = (exact - exact.mean()) / np.sqrt(exact.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(whiten(array, np.ones(len(values), bool)), expected, atol=1e-4)


def test_whitening_does_not_blow_up_rounding():
    assert np.abs(whiten(f32(0.1, 0.1 + 1e-8, 0.1), np.ones(3, bool))).max() < 1e-3


@pytest.mark.parametrize("values", [f32(2, 2, 2), f32(7, 0, 0), f32(5, 6, 7)])
def test_whitening_without_variance_gives_0(values):
    mask = np.array([True, False, False]) if values[0] == 7 else np.ones(3, bool)
    if values[0] == 5:
        mask[:] = False
    np.testing.assert_allclose(whiten(values, mask), [0, 0, 0], atol=1e-6)


# --- groups ------------------------------------------------------------------------------------------------------


def test_group_advantages_by_hand():
    returns, groups = f32(1, 5, 3, 5), ["a", "b", "a", "b"]
    # Group a: mean 2, sample deviation sqrt(2). Group b does not vary.
    np.testing.assert_allclose(group_advantages(returns, groups), [-(0.5**0.5), 0, 0.5**0.5, 0], atol=1e-5)
    np.testing.assert_allclose(group_advantages(returns, groups, scale=False), [-1, 0, 1, 0])


def test_leave_one_out_advantages_by_hand():
    returns, groups = f32(0, 3, 6, 1, 1), ["a", "a", "a", "b", "b"]
    np.testing.assert_allclose(leave_one_out_advantages(returns, groups), [-4.5, 0, 4.5, 0, 0])


@pytest.mark.parametrize("baseline", [group_advantages, leave_one_out_advantages])
def test_a_group_of_one_teaches_nothing(baseline):
    assert baseline(f32(7, 1, 3), ["alone", "pair", "pair"])[0] == 0
    assert len(baseline(f32(), [])) == 0


@given(returns=st.lists(numbers, min_size=2, max_size=8))
def test_leave_one_out_is_the_scaled_distance_from_the_mean(returns):
    returns, groups = f32(*returns), ["g"] * len(returns)
    centred = group_advantages(returns, groups, scale=False)
    size = len(returns)
    np.testing.assert_allclose(leave_one_out_advantages(returns, groups), centred * size / (size - 1), atol=1e-4)
    assert group_advantages(returns, groups).sum() == pytest.approx(0, abs=1e-3)


# --- diagnostics and the coefficient -----------------------------------------------------------------------------


def test_explained_variance():
    returns = f32(1, 2, 3, 4)
    assert explained_variance(returns, returns) == 1
    assert explained_variance(np.full(4, 9, np.float32), returns) == pytest.approx(0)
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert math.isnan(explained_variance(returns, np.ones(4)))
    assert math.isnan(explained_variance(f32(), f32()))


def test_effective_sample_size():
    assert effective_sample_size(f32(2, 2, 2)) == pytest.approx(1)
    assert effective_sample_size(f32(1, 0, 0, 0)) == pytest.approx(0.25)
    assert effective_sample_size(f32(1, 3)) == pytest.approx(16 / 20)
    assert math.isnan(effective_sample_size(f32()))


@pytest.mark.parametrize(("kl", "factor"), [(6.6, 1.01), (5.4, 0.99), (6.0, 1.0), (600.0, 1.02), (0.0, 0.98)])
def test_the_kl_coefficient_moves_towards_its_target_by_a_bounded_step(kl, factor):
    controller = KLController(0.5, target=6.0, horizon=100)
    controller.update(kl, episodes=10)
    assert controller.coefficient == pytest.approx(0.5 * factor)


def test_the_kl_coefficient_is_fixed_without_a_target():
    controller = KLController(0.5)
    controller.update(1000.0, episodes=1000)
    assert controller.coefficient == 0.5
