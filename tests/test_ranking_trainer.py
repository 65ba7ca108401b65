"""Training on ranked candidates: what is refused, what an update is, resuming, and that a rule is learned."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from stable_baselines3.common.logger import KVWriter, Logger
from tiny_models import build_model

from instructgym.agents.policy.language_model import POLICY, LanguageModelPolicy
from instructgym.agents.preferences.losses import LOSSES
from instructgym.agents.preferences.trainer import RankingTrainer, TokenizedRankedList
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.causal_lm import CausalLM
from instructgym.llm_backends.local.tokenization import WordTokenizer
from instructgym.llm_backends.training.adapters import LoraSettings

TOKENIZER = WordTokenizer(words=("red", "blue", "sea", "sky", "end"), positions=64)
RED, BLUE, SEA, SKY, END, EOS, UNK = range(7)


def make_policy(rank=4, dropout=0.0, scale=0.0, **options):
    model = build_model(vocabulary=TOKENIZER.vocabulary, context=64)
    lora = LoraSettings(rank=rank, dropout=dropout)
    policy = LanguageModelPolicy(
        CausalLM(model, TOKENIZER.hf, name="tiny"), lora, value="none", dtype="float32", **options
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return policy


def random_lists(count, seed=0, most=5, prompt=(1, 12)):
    """The fewer times the word "red" is there, the better; ties, lists of one candidate and references occur."""
    rng = np.random.default_rng(seed)
    lists = []
    for _ in range(count):
        words = [rng.integers(0, END + 1, rng.integers(2, 7)) for _ in range(rng.integers(1, most + 1))]
        lists.append(
            TokenizedRankedList(
                prompt=rng.integers(0, END + 1, rng.integers(*prompt)).tolist(),
                candidates=[[*w.tolist(), EOS] for w in words],
                scores=[-float((w == RED).sum()) for w in words],
                reference=[*rng.integers(BLUE, END + 1, 3).tolist(), EOS],
            )
        )
    return lists


ONE = TokenizedRankedList([SEA, SKY], [[BLUE, EOS], [RED, RED, EOS]], ranks=[1, 2], reference=[SKY, EOS])


class Rows(KVWriter):
    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append({key: float(key_values[key]) for key in sorted(key_values)})

    def close(self):
        pass


def logged(trainer):
    trainer.set_logger(Logger(folder=None, output_formats=[writer := Rows()]))
    return trainer, writer.rows


def weights(policy):
    return {name: parameter.detach().clone() for name, parameter in policy.parameters().items()}


def sums(policy, one, reference=False):
    prompts, candidates = [np.array(one.prompt)] * len(one.candidates), [np.array(c) for c in one.candidates]
    score = policy.reference_logprobs if reference else policy.score
    with torch.no_grad():
        got = score(prompts, candidates, [None] * len(candidates))
    flat = got if reference else got.logprobs
    return np.array([float(x.sum()) for x in flat.split([len(c) for c in candidates])])


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained():
    """A policy for what is refused before a step: no test changes it."""
    return make_policy()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "best"}, "unknown loss 'best': use tuna, "),
        ({"beta": 0.1}, "beta is no option of the loss tuna, which has margin"),
        ({"loss": "dpo", "margin": 0.1}, "margin is no option of the loss dpo"),
        ({"loss": "spin", "pairs": "all"}, "pairs is no option"),
        ({"loss": "dpo", "pairs": "some"}, "pairs must be all or best_worst"),
        ({"loss": "dpo", "beta": 0.0}, "beta must be above 0"),
        ({"loss": "dpo", "label_smoothing": 0.5}, "label_smoothing must be below 0.5"),
        ({"loss": "tdpo1", "alpha": 0.5}, "alpha is no option of the loss tdpo1, which has beta, pairs"),
        ({"loss": "dpo", "alpha": 0.5}, "alpha is no option"),
        ({"loss": "tdpo2", "alpha": -0.1}, "alpha must be at least 0"),
        ({"loss": "tdpo2", "alpha": float("nan")}, "alpha must be at least 0"),
        ({"margin": -0.1}, "margin must be at least 0"),
        ({"mle_weight": float("nan")}, "mle_weight must be at least 0"),
        ({"imitate": "worst"}, "imitate must be reference, best or all"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_settings_are_refused(options, message, untrained):
    with pytest.raises(InputError, match=message):
        RankingTrainer(untrained, **options)


def test_a_reference_policy_must_be_there():
    for loss in ("dpo", "tdpo1", "tdpo2"):
        with pytest.raises(InputError, match="compares with a reference policy, this policy has none"):
            RankingTrainer(make_policy(reference="none"), loss=loss)
    RankingTrainer(make_policy(reference="none")).fit([ONE])


@pytest.mark.parametrize(
    ("change", "loss", "message"),
    [
        ({"prompt": []}, "tuna", "list 1 has an empty prompt"),
        ({"candidates": [], "ranks": []}, "tuna", "list 1 has no candidates"),
        ({"candidates": [[BLUE], []]}, "tuna", "list 1: the candidate 1 has no token"),
        ({"reference": []}, "tuna", "list 1: the reference has no token"),
        ({"candidates": [[BLUE], [RED] * 63]}, "tuna", r"candidate 1 have 2 \+ 63 tokens, tiny reads 64"),
        ({"candidates": [[BLUE], [UNK + 1]]}, "tuna", "list 1 has a token id outside 0 to 6"),
        ({"reference": [-1]}, "tuna", "list 1 has a token id outside"),
        ({"ranks": None}, "tuna", "needs ranks or scores, not both"),
        ({"scores": [0, 1]}, "tuna", "needs ranks or scores, not both"),
        ({"ranks": [1]}, "tuna", "one finite rank or score for each of its 2 candidates"),
        ({"ranks": [1, float("nan")]}, "tuna", "one finite rank or score"),
        ({"reference": None}, "tuna", "no reference response to imitate"),
        ({"reference": None}, "spin", "no reference response, over whose candidates"),
        ({}, "lipo_lambda", "needs scores"),
        ({"ranks": None, "scores": [0.0, 90.0]}, "lipo_lambda", "of 32 at most in size"),
    ],
)
def test_bad_lists_are_refused_before_training(change, loss, message, untrained):
    good = replace(ONE, ranks=None, scores=[1.0, 0.0]) if loss == "lipo_lambda" else ONE
    trainer = RankingTrainer(untrained, loss=loss, batch_size=1)
    with pytest.raises(InputError, match=message):
        trainer.fit([good, replace(ONE, **change)])
    assert trainer.steps == 0


def test_nothing_to_rank_is_refused(untrained):
    ties = replace(ONE, ranks=[2, 2])
    alone = replace(ONE, candidates=[[RED]], ranks=[1])
    for lists in ([], [ties], [alone, ties]):
        with pytest.raises(InputError, match="there is nothing to rank"):
            RankingTrainer(untrained).fit(lists)


# --- updates -------------------------------------------------------------------------------------------------------


def test_the_first_step_is_logged_as_its_parts():
    policy = make_policy()
    lists = [ONE, replace(ONE, candidates=[[RED]], ranks=[1], reference=[BLUE, SEA])]
    better, worse = sums(policy, ONE) / [2, 3]
    references = [float(sums(policy, replace(ONE, candidates=[one.reference]))[0]) for one in lists]
    trainer, rows = logged(RankingTrainer(policy, batch_size=2, mle_weight=0.5))
    trainer.fit(lists)
    hinge, mle = max(0.0, worse - better + 0.1), -sum(references) / 4
    assert rows[0]["train/ranking_loss"] == pytest.approx(hinge, abs=1e-5)  # of the one list that has pairs
    assert rows[0]["train/mle_loss"] == pytest.approx(mle, abs=1e-5)
    assert rows[0]["train/loss"] == pytest.approx(hinge + 0.5 * mle, abs=1e-5)
    assert rows[0]["train/accuracy"] == float(better > worse)
    assert rows[0]["train/margin"] == pytest.approx(better - worse, abs=1e-5)
    assert rows[0]["train/pairs"] == 1 and rows[0]["train/lists_without_pairs"] == 1
    assert trainer.lists_without_pairs == 1 and trainer.steps == 1


@pytest.mark.parametrize(("imitate", "expected"), [("reference", [2]), ("best", [0]), ("all", [0, 1, 2])])
def test_what_is_imitated(imitate, expected):
    policy = make_policy()
    whole = replace(ONE, candidates=[*ONE.candidates, ONE.reference], ranks=None)
    totals, lengths = sums(policy, whole), np.array([2, 3, 2])
    trainer, rows = logged(RankingTrainer(policy, imitate=imitate))
    trainer.fit([ONE])
    assert rows[0]["train/mle_loss"] == pytest.approx(-totals[expected].sum() / lengths[expected].sum(), abs=1e-5)


def test_log_ratios_are_to_the_frozen_reference():
    policy = make_policy(scale=0.3)
    base = make_policy(scale=0.0)
    ratios = sums(policy, ONE) - sums(base, ONE)
    trainer, rows = logged(RankingTrainer(policy, loss="dpo", beta=0.5))
    trainer.fit([ONE])
    assert rows[0]["train/margin"] == pytest.approx(ratios[0] - ratios[1], abs=1e-4)
    assert rows[0]["train/loss"] == pytest.approx(np.log1p(np.exp(-0.5 * (ratios[0] - ratios[1]))), abs=1e-4)
    policy.freeze_reference("before")
    trainer, rows = logged(RankingTrainer(policy, loss="dpo"))
    trainer.fit([ONE])
    assert rows[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-5)


def kl_sums(policy, one):
    """KL(reference || policy) of each candidate, summed over its tokens, from all logits in float64."""
    totals = []
    for candidate in one.candidates:
        ids = torch.tensor([[*one.prompt, *candidate]])
        rows = []
        for name in (None, POLICY):
            with torch.no_grad(), policy.adapter(name) as lm:
                logits = lm.model(input_ids=ids).logits[0, len(one.prompt) - 1 : -1, : TOKENIZER.vocabulary]
            rows.append(logits.double().log_softmax(dim=-1))
        totals.append(float(torch.nn.functional.kl_div(rows[1], rows[0], reduction="sum", log_target=True)))
    return np.array(totals)


@pytest.mark.parametrize(("loss", "alpha"), [("tdpo1", 1.0), ("tdpo2", 0.5), ("tdpo2", 2.0)])
@pytest.mark.parametrize("rank", [0, 4])
def test_tdpo_compares_log_ratios_and_divergences(rank, loss, alpha):
    policy, base = make_policy(rank, scale=0.2 if rank else 0.05), make_policy(rank)
    ratios, kls = sums(policy, ONE) - sums(base, ONE), kl_sums(policy, ONE)
    assert min(kls) > 0.1 and abs(kls[0] - kls[1]) > 0.1
    options = {} if loss == "tdpo1" else {"alpha": alpha}
    trainer, rows = logged(RankingTrainer(policy, loss=loss, beta=0.5, **options))
    trainer.fit([ONE])
    logit = 0.5 * (ratios[0] - ratios[1] - alpha * (kls[1] - kls[0]))
    assert rows[0]["train/loss"] == pytest.approx(np.log1p(np.exp(-logit)), abs=1e-4)
    assert rows[0]["train/margin"] == pytest.approx(ratios[0] - ratios[1], abs=1e-4)
    assert rows[0]["train/reference_kl"] == pytest.approx(kls.mean(), abs=1e-4)


@pytest.mark.parametrize("loss", ["tdpo1", "tdpo2"])
@pytest.mark.parametrize("rank", [0, 4])
def test_tdpo_starts_at_log_2_and_goes_down(rank, loss):
    lists = [one for one in random_lists(12) if len(set(one.scores)) > 1]
    policy = make_policy(rank)
    options = {"learning_rate": 1e-2 if rank else 1e-3, "batch_size": len(lists), "epochs": 3}
    trainer, rows = logged(RankingTrainer(policy, loss=loss, **options))
    trainer.fit(lists)
    assert rows[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-6) and rows[0]["train/reference_kl"] == 0.0
    assert rows[0]["train/loss"] > rows[1]["train/loss"] > rows[2]["train/loss"]
    assert rows[2]["train/reference_kl"] > 0


def test_tdpo_without_its_divergences_takes_the_steps_of_dpo():
    lists, policy = random_lists(8), make_policy(scale=0.3)
    expected, logs = gradients(policy, "dpo", 60, lists)
    found, found_logs = gradients(policy, "tdpo2", 60, lists, alpha=0.0)
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name] / scale, gradient / scale, atol=2e-5, rtol=1e-3)
    assert found_logs.pop("train/reference_kl") > 0.1
    assert found_logs == pytest.approx(logs, rel=1e-4, abs=1e-4)


def test_the_reference_is_read_once_a_step_also_where_parts_are_read_again(monkeypatch):
    policy, reads = make_policy(), []
    original = policy.reference_hidden
    monkeypatch.setattr(policy, "reference_hidden", lambda *given: reads.append(len(given[0])) or original(*given))
    lists = [one for one in random_lists(5) if len(set(one.scores)) > 1]
    gradients(policy, "tdpo2", 1, lists)
    assert sum(reads) == sum(len(one.candidates) for one in lists) and set(reads) == {1}


def test_win_rates_come_from_scores_or_ranks():
    one = replace(ONE, ranks=None, scores=[1.0, -1.0])
    sigmoid = 1 / (1 + np.exp(-2.0))
    assert one.win_rates() == pytest.approx([(0.5 + sigmoid) / 2, (1.5 - sigmoid) / 2])
    three = TokenizedRankedList([SEA], [[RED]] * 3, ranks=[7, 3, 7])
    assert three.win_rates() == pytest.approx([1 / 3, 5 / 6, 1 / 3]) and three.order().tolist() == [1, 0, 1]


def test_only_the_order_of_ranks_counts():
    ends = []
    for ranks in ([1, 2, 3], [-5, 0.5, 100]):
        one = replace(ONE, candidates=[[BLUE], [SEA, SKY], [RED]], ranks=ranks)
        policy = make_policy()
        RankingTrainer(policy, learning_rate=1e-2).fit([one])
        ends.append(weights(policy))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def gradients(policy, loss, budget, lists, **options):
    """Of one batch of all lists, without a step."""
    trainer, rows = logged(RankingTrainer(policy, loss=loss, batch_size=len(lists), token_budget=budget, **options))
    found = {}

    def take():
        for name, parameter in policy.parameters().items():
            found[name], parameter.grad = parameter.grad.clone(), None
        return 0.0

    trainer.optimizer.step = take
    trainer.fit(lists)
    return found, rows[0]


@pytest.mark.parametrize("loss", ["tuna_released", "spin", "sppo", "lipo_lambda", "tdpo1", "tdpo2"])
def test_the_token_budget_does_not_change_gradients(loss):
    lists, policy = random_lists(7), make_policy(scale=0.3)
    whole, logs = gradients(policy, loss, 10**6, lists, imitate="all")
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-3
    scale = max(float(g.abs().max()) for g in whole.values())
    for budget in (1, 60):  # row by row; some lists split, others together
        split, split_logs = gradients(policy, loss, budget, lists, imitate="all")
        for name in whole:
            torch.testing.assert_close(split[name] / scale, whole[name] / scale, atol=2e-5, rtol=1e-3)
        assert split_logs == pytest.approx(logs, rel=1e-3, abs=1e-3)


def test_lists_are_split_only_where_one_alone_is_over_the_budget(monkeypatch):
    lists, policy = random_lists(12), make_policy()
    calls = []
    original = policy.score

    def score(prompts, responses, allowed, values=True):
        calls.append([np.array(p) for p in prompts])
        return original(prompts, responses, allowed, values)

    monkeypatch.setattr(policy, "score", score)
    budget, sizes = 60, {}
    for one in lists:
        responses, shared = [*one.candidates, one.reference], len(one.prompt) - 1 if len(one.prompt) > 8 else 0
        width = len(one.prompt) - shared + max(map(len, responses))
        sizes[tuple(one.prompt)] = shared + len(responses) * width
    gradients(policy, "tuna", budget, lists)
    assert min(sizes.values()) <= budget < max(sizes.values())
    for prompt, size in sizes.items():
        reads = sum(any(tuple(p) == prompt for p in call) for call in calls)
        assert reads == 1 if size <= budget else reads >= 4  # parts are read again in the backward pass
    assert len([call for call in calls if len({tuple(p) for p in call}) > 1]) > 0


def test_references_are_computed_once_per_list(monkeypatch):
    policy, calls = make_policy(), []
    original = policy.reference_logprobs
    monkeypatch.setattr(policy, "reference_logprobs", lambda *given: calls.append(1) or original(*given))
    lists = random_lists(6, most=3)
    ranked = sum(len(set(one.scores)) > 1 for one in lists)
    RankingTrainer(policy, loss="dpo", batch_size=3, epochs=3).fit(lists)
    assert len(calls) == ranked > 0


@pytest.mark.parametrize(
    ("loss", "dropout", "budget"), [("tuna", 0.0, 1024), ("dpo", 0.0, 50), ("spin", 0.2, 50), ("tdpo2", 0.2, 50)]
)
def test_a_resumed_training_is_the_undisturbed_one(tmp_path, loss, dropout, budget):
    def start():
        torch.manual_seed(3)
        options = {"learning_rate": 1e-2, "batch_size": 5, "epochs": 2, "schedule": "cosine", "token_budget": budget}
        return logged(RankingTrainer(make_policy(dropout=dropout), loss=loss, **options))

    lists = random_lists(13)
    whole, expected = start()
    whole.fit(lists)
    first, _ = start()
    first.fit(lists, lambda trainer: trainer.steps < 4)
    first.save(tmp_path)
    second, rows = start()
    second.restore(tmp_path)
    second.fit(lists)
    assert rows == expected[4:] and len(rows) == 2
    for name, parameter in weights(whole.policy).items():
        assert torch.equal(weights(second.policy)[name], parameter), name


# --- what is learned -----------------------------------------------------------------------------------------------


def tau(policy, lists, ratio):
    """Mean Kendall tau between the rule and what the policy ranks by."""
    taus = []
    for one in lists:
        values = sums(policy, one)
        values = values - sums(policy, one, reference=True) if ratio else values / [len(c) for c in one.candidates]
        taus.append(kendalltau(values, one.scores).statistic)
    return float(np.mean(taus))


def ruled_lists(count, seed):
    """Five words and the end each, 0 to 4 of them "red" in any order: the fewer the better."""
    rng = np.random.default_rng(seed)
    lists = []
    for _ in range(count):
        reds = rng.permutation(5)[:4]
        candidates = [rng.permutation([RED] * k + rng.integers(BLUE, END + 1, 5 - k).tolist()) for k in reds]
        lists.append(
            TokenizedRankedList(
                rng.integers(BLUE, END + 1, 3).tolist(),
                [[*c.tolist(), EOS] for c in candidates],
                scores=[1.0 - k / 4 for k in reds],
                reference=[*rng.integers(BLUE, END + 1, 5).tolist(), EOS],
            )
        )
    return lists


QUICK = [(loss, 64) for loss in ("tuna", "dpo", "lipo_lambda", "tdpo2")]
SLOW = [pytest.param(loss, 128, marks=pytest.mark.slow) for loss in ("ipo", "sppo", "tdpo1", "tuna_released")]


@pytest.mark.parametrize(("loss", "count"), [*QUICK, *SLOW])
def test_held_out_candidates_are_ranked_by_the_rule(loss, count):
    held_out, policy = ruled_lists(20, seed=1), make_policy(rank=8)
    ratio = LOSSES[loss].needs_reference_policy  # at first all log-ratios are 0
    assert ratio or tau(policy, held_out, ratio) < 0.6
    options = {"beta": 0.005} if loss == "sppo" else {}  # the published 0.001 has targets a hundred nats away
    options |= {"learning_rate": 5e-3, "batch_size": count // 8, "epochs": 3}
    RankingTrainer(policy, loss=loss, **options).fit(ruled_lists(count, 0))
    assert tau(policy, held_out, ratio) > 0.8


def test_spin_moves_towards_the_references():
    lists, policy = ruled_lists(80, 0), make_policy(rank=8)
    trainer, rows = logged(RankingTrainer(policy, loss="spin", learning_rate=1e-2, batch_size=16, epochs=2))
    trainer.fit(lists)
    assert rows[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert rows[-1]["train/accuracy"] > 0.8 and rows[-1]["train/loss"] < 0.5
