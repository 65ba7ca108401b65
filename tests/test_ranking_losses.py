"""Losses on ranked candidates: worked values, gradients by finite differences, ties, ragged lists, invariances."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from instructgym.agents.preferences.losses import (
    LOSSES,
    UNRANKED,
    RankedListBatch,
    dpo,
    ipo,
    lipo_lambda,
    nll,
    spin,
    sppo,
    tdpo1,
    tdpo2,
    tuna,
    tuna_released,
)


def make(*rows, lengths=None, ratios=None, scores=None, wins=None, kls=None):
    """Lists of (mean log-prob, rank); every candidate has two tokens unless told otherwise."""
    flat = [one for row in rows for one in row]
    lengths = torch.tensor(lengths or [2] * len(flat))
    logprobs = torch.tensor([value for value, _ in flat], dtype=torch.float64) * lengths
    return RankedListBatch(
        logprobs=logprobs,
        lengths=lengths,
        counts=torch.tensor([len(row) for row in rows]),
        ranks=torch.tensor([rank for _, rank in flat]),
        reference_logprobs=None if ratios is None else logprobs - torch.tensor(ratios, dtype=torch.float64),
        scores=None if scores is None else torch.tensor(scores, dtype=torch.float64),
        win_rates=None if wins is None else torch.tensor(wins, dtype=torch.float64),
        reference_kls=None if kls is None else torch.tensor(kls, dtype=torch.float64),
    )


def by_ratio(ratios, ranks, **more):
    return make([(-1.0, rank) for rank in ranks], ratios=ratios, **more)


FOUR = [(-1.0, 0), (-1.2, 1), (-0.9, 2), (-2.0, 3)]


def test_tuna_of_a_worked_list():
    lists = make(FOUR, lengths=[1, 5, 2, 3])
    assert tuna(lists).tolist() == pytest.approx([0.7])  # 0.3 of the 1st and 3rd, 0.4 of the 2nd and 3rd
    assert tuna_released(lists).tolist() == pytest.approx([0.3 / 2 + 0.4 / 3])
    assert tuna(lists, margin=0.0).tolist() == pytest.approx([0.1 + 0.3])


def released(values, margin=0.1):
    """Gap by gap over lists of one length, best first: values (lists, candidates)."""
    total = 0.0
    for gap in range(1, values.shape[1]):
        good, bad = values[:, :-gap].reshape(-1), values[:, gap:].reshape(-1)
        total += torch.nn.functional.margin_ranking_loss(good, bad, torch.ones_like(good), margin=margin * gap)
    return float(total)


def test_the_released_form_is_torchs_margin_loss_averaged_within_each_gap():
    values = -torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lists = make(*[[(float(v), k) for k, v in enumerate(row)] for row in values])
    assert float(tuna_released(lists).mean()) == pytest.approx(released(values))


def test_dpo_of_a_worked_pair():
    lists = RankedListBatch(
        logprobs=torch.tensor([-4.0, -6.0]),
        lengths=torch.tensor([3, 7]),
        counts=torch.tensor([2]),
        ranks=torch.tensor([0, 1]),
        reference_logprobs=torch.tensor([-5.0, -5.5]),
    )
    x = 0.1 * ((-4.0 + 5.0) - (-6.0 + 5.5))
    assert dpo(lists).tolist() == pytest.approx([np.log1p(np.exp(-x))], abs=1e-6)
    smooth = 0.8 * np.log1p(np.exp(-x)) + 0.2 * np.log1p(np.exp(x))
    assert dpo(lists, label_smoothing=0.2).tolist() == pytest.approx([smooth], abs=1e-6)
    assert ipo(lists, beta=0.25).tolist() == pytest.approx([(1.5 - 2.0) ** 2])
    assert dpo(lists).dtype == torch.float32


def test_lists_of_more_than_two_give_the_mean_over_pairs():
    lists = by_ratio([3.0, 1.0, 0.5], [0, 1, 2])
    expected = np.mean([np.log1p(np.exp(-d)) for d in (2.0, 2.5, 0.5)])
    assert dpo(lists, beta=1.0).tolist() == pytest.approx([expected])
    assert dpo(lists, beta=1.0, pairs="best_worst").tolist() == pytest.approx([np.log1p(np.exp(-2.5))])
    assert ipo(lists, beta=0.5, pairs="best_worst").tolist() == pytest.approx([1.5**2])


def test_the_best_and_the_worst_may_be_several():
    lists = by_ratio([1.0, 2.0, 5.0, -1.0], [0, 0, 2, 3])
    assert [rows.tolist() for rows in lists.pairs("best_worst")] == [[0, 1], [3, 3]]
    assert ipo(lists, beta=0.5, pairs="best_worst").tolist() == pytest.approx([((2 - 1) ** 2 + (3 - 1) ** 2) / 2])


def test_spin_prefers_the_reference_to_every_candidate():
    lists = by_ratio([0.5, -1.0, 2.0], [0, 1, UNRANKED])
    expected = np.mean([np.log1p(np.exp(-0.1 * d)) for d in (1.5, 3.0)])
    assert spin(lists).tolist() == pytest.approx([expected])
    assert spin(by_ratio([0.5, -1.0], [0, 1])).tolist() == [0.0]


def test_sppo_of_a_worked_list():
    lists = by_ratio([2.0, 7.0, -1.0], [0, 1, 2], wins=[0.8, 0.5, 0.2])
    assert sppo(lists, beta=0.1).tolist() == pytest.approx([((2.0 - 3.0) ** 2 + (-1.0 + 3.0) ** 2) / 2])
    assert sppo(by_ratio([300.0, -300.0], [0, 1], wins=[0.8, 0.2])).tolist() == pytest.approx([0.0])


def test_lipo_of_a_worked_list():
    lists = by_ratio([1.0, 2.0, -1.0], [0, 1, 2], scores=[1.0, 0.5, 0.0])
    gain, discount = [2.0, 2**0.5, 1.0], [1 / np.log(3), 1 / np.log(2), 1 / np.log(4)]  # the 2nd comes first
    expected = sum(
        abs(gain[i] - gain[j]) * abs(discount[i] - discount[j]) * np.log1p(np.exp(-0.1 * d))
        for i, j, d in ((0, 1, -1.0), (0, 2, 2.0), (1, 2, 3.0))
    )
    assert lipo_lambda(lists).tolist() == pytest.approx([expected])


def test_at_equal_log_ratios_lipo_still_has_something_to_learn():
    for order in ([0, 1, 2], [2, 0, 1]):
        lists = by_ratio([0.0] * 3, order, scores=[1.0 - rank / 2 for rank in order])
        gain, discount = [2.0, 2**0.5, 1.0], [1 / np.log(2 + k) for k in range(3)]
        weights = [(gain[i] - gain[j]) * (discount[i] - discount[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert lipo_lambda(lists).tolist() == pytest.approx([sum(weights) * np.log(2)])


def kl_slopes(loss, lists, **options):
    """The losses' sum differentiated by each candidate's KL divergence."""
    kls = lists.reference_kls.clone().requires_grad_()
    LOSSES[loss].function(replace(lists, reference_kls=kls), **options).sum().backward()
    return kls.grad.tolist()


def test_tdpo_of_a_worked_pair():
    lists = by_ratio([1.5, 0.5], [0, 1], kls=[0.25, 2.0])
    first, second = 0.1 * (1.0 - (2.0 - 0.25)), 0.1 * (1.0 - 0.5 * (2.0 - 0.25))  # of tdpo1 and tdpo2
    assert tdpo1(lists).tolist() == pytest.approx([np.log1p(np.exp(-first))])
    assert tdpo2(lists).tolist() == pytest.approx([np.log1p(np.exp(-second))])
    assert tdpo2(lists, beta=2.0, alpha=3.0).tolist() == pytest.approx([np.log1p(np.exp(-2 * (1 - 3 * 1.75)))])
    push = 0.1 / (1 + np.exp(first))
    assert kl_slopes("tdpo1", lists) == pytest.approx([-push, push])
    push = 0.1 * 0.5 / (1 + np.exp(second))
    assert kl_slopes("tdpo2", lists) == pytest.approx([0.0, push])  # that of the better one is held


def test_tdpo_of_a_list_is_the_mean_over_its_pairs():
    lists = by_ratio([3.0, 1.0, 0.5], [0, 1, 2], kls=[0.2, 0.4, 1.0])
    expected = np.mean([np.log1p(np.exp(-d)) for d in (2.0 - 0.1, 2.5 - 0.4, 0.5 - 0.3)])
    assert tdpo2(lists, beta=1.0).tolist() == pytest.approx([expected])
    ends = np.log1p(np.exp(-(2.5 - 0.8)))
    assert tdpo1(lists, beta=1.0, pairs="best_worst").tolist() == pytest.approx([ends])
    middle = kl_slopes("tdpo2", lists, beta=1.0)[1]  # one is the worse of a pair and the better of another
    assert middle == pytest.approx(0.5 / (1 + np.exp(1.9)) / 3)


def test_tdpo_without_its_divergences_is_dpo():
    lists = lists_of([[(-1.0, 0), (-0.8, 1), (-0.5, 1)], [(-0.3, 0), (-0.9, 2)]])
    for pairs in ("all", "best_worst"):
        torch.testing.assert_close(tdpo2(lists, 0.3, alpha=0.0, pairs=pairs), dpo(lists, 0.3, pairs=pairs))
        even = replace(lists, reference_kls=torch.full_like(lists.reference_kls, 1.7))
        torch.testing.assert_close(tdpo1(even, 0.3, pairs=pairs), dpo(lists, 0.3, pairs=pairs))


def test_nll_counts_what_is_imitated():
    lists = make(FOUR[:2], FOUR[2:], lengths=[1, 5, 2, 3])
    assert nll(lists, torch.tensor([True, True, False, True])).tolist() == pytest.approx([7.0, 6.0])
    assert nll(lists, torch.tensor([False, True, False, False])).tolist() == pytest.approx([6.0, 0.0])


# --- all of them -------------------------------------------------------------------------------------------------

RANKINGS = st.lists(st.lists(st.tuples(st.floats(-2, -0.1), st.integers(0, 3)), min_size=1, max_size=5), min_size=1)


def lists_of(drawn, seed=0):
    """Ragged lists with ties, everything that any loss needs, and a reference behind the candidates of each."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in drawn:
        ranks = [sum(other < rank for _, other in row) for _, rank in row]
        rows.append([*((value, rank) for (value, _), rank in zip(row, ranks, strict=True)), (-0.7, UNRANKED)])
    flat = [rank for row in rows for _, rank in row]
    return make(
        *rows,
        lengths=rng.integers(1, 6, len(flat)).tolist(),
        ratios=rng.normal(size=len(flat)).tolist(),
        scores=[0.0 if rank == UNRANKED else -0.3 * rank for rank in flat],
        wins=rng.random(len(flat)).tolist(),
        kls=rng.random(len(flat)).tolist(),
    )


def part(lists, rows, counts):
    rows = torch.as_tensor(rows)
    tensors = {
        name: getattr(lists, name)[rows]
        for name in ("logprobs", "lengths", "ranks", "reference_logprobs", "scores", "win_rates", "reference_kls")
    }
    return RankedListBatch(counts=torch.as_tensor(counts), **tensors)


@pytest.mark.parametrize("loss", sorted(LOSSES))
@given(drawn=RANKINGS)
def test_lists_do_not_mix(loss, drawn):
    lists = lists_of(drawn)
    together = LOSSES[loss].function(lists)
    assert together.shape == (len(drawn),) and bool(torch.isfinite(together).all())
    alone = [
        LOSSES[loss].function(part(lists, rows, [len(rows)]))
        for rows in torch.arange(len(lists.ranks)).split(lists.counts.tolist())
    ]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("loss", sorted(LOSSES))
@given(drawn=RANKINGS, seed=st.integers(0, 9))
def test_the_order_of_candidates_does_not_matter(loss, drawn, seed):
    lists = lists_of(drawn)
    rng, rows = np.random.default_rng(seed), torch.arange(len(lists.ranks)).split(lists.counts.tolist())
    shuffled = torch.cat([r[torch.from_numpy(rng.permutation(len(r)))] for r in rows])
    function = LOSSES[loss].function
    torch.testing.assert_close(function(lists), function(part(lists, shuffled, lists.counts)))


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_gradients_are_those_of_finite_differences(loss):
    rng = np.random.default_rng(2)
    lists = lists_of([[(v, k % 3) for k, v in enumerate(-rng.random(n) - 0.1)] for n in (4, 1, 3)])
    rows = lists.logprobs.clone().requires_grad_()
    function = LOSSES[loss].function
    assert float(function(lists).sum()) > 0
    assert torch.autograd.gradcheck(lambda x: function(replace(lists, logprobs=x)), [rows])


def gradient(function, lists, **options):
    rows = lists.logprobs.clone().requires_grad_()
    losses = function(replace(lists, logprobs=rows), **options)
    losses.sum().backward()
    return losses.detach(), rows.grad


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"spin"}))
def test_ties_and_single_candidates_push_nothing(loss):
    for ranks in ([0], [0, 0], [0, 0, 0, UNRANKED]):
        n = len(ranks)
        lists = make(
            [(-1.0 - k, rank) for k, rank in enumerate(ranks)],
            ratios=[0.5] * n,
            scores=[1.0] * n,
            wins=[0.5] * n,
            kls=[2.0] * n,
        )
        losses, slopes = gradient(LOSSES[loss].function, lists)
        assert losses.tolist() == [0.0] and slopes.tolist() == [0.0] * n


@pytest.mark.parametrize("loss", ["tuna", "tuna_released", "dpo", "ipo", "lipo_lambda", "tdpo1", "tdpo2"])
def test_the_better_one_is_pushed_up_and_the_worse_one_down(loss):
    lists = make([(-1.0, 1), (-1.0, 0)], ratios=[0.0, 0.0], scores=[0.0, 1.0], kls=[0.0, 0.0])
    losses, slopes = gradient(LOSSES[loss].function, lists)
    assert float(losses) > 0 and slopes[0] > 0 > slopes[1]
    assert float(slopes.sum()) == pytest.approx(0.0)


def test_differences_alone_count_for_all_losses_but_the_regression():
    lists = lists_of([[(-1.0, 0), (-0.8, 1), (-0.5, 2)]])
    moved = replace(lists, logprobs=lists.logprobs + 3.0)
    for loss in ("dpo", "ipo", "spin", "lipo_lambda", "tdpo1", "tdpo2"):
        torch.testing.assert_close(LOSSES[loss].function(lists), LOSSES[loss].function(moved))
    assert float((sppo(lists) - sppo(moved)).abs()) > 0.01
    further = replace(lists, logprobs=lists.logprobs + 3.0 * lists.lengths)
    torch.testing.assert_close(tuna(lists), tuna(further))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("dpo", "needs reference log-probs"),
        ("sppo", "win rates"),
        ("lipo_lambda", "scores"),
        ("tdpo1", "needs KL divergences"),
        ("tdpo2", "needs KL divergences"),
    ],
)
def test_what_a_loss_needs_must_be_there(loss, message):
    lists = make(FOUR) if loss == "dpo" else make(FOUR, ratios=[0.0] * 4)
    with pytest.raises(ValueError, match=message):
        LOSSES[loss].function(lists)
