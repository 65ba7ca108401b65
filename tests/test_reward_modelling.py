"""Training of reward models: pairs as tokens, the losses, resuming, and what is learned of known bad tokens."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from stable_baselines3.common.logger import KVWriter, Logger
from tiny_models import build_model

from instructgym.agents.policy.optimization import TrainingDivergedError
from instructgym.agents.supervised.reward_modelling import (
    LOSSES,
    PairSide,
    RewardTrainer,
    edited_only_bt,
    evaluate_reward_model,
    mean_bt,
    sequence_bt,
    tlcr_ce,
    tokenize_pairs,
    unchanged_penalty,
)
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.causal_lm import CausalLM
from instructgym.llm_backends.local.tokenization import ByteTokenizer, WordTokenizer
from instructgym.llm_backends.training.adapters import LoraSettings
from instructgym.rewards.learned.edits import EditedPair
from instructgym.rewards.learned.reward_model import RewardModel

# --- losses ------------------------------------------------------------------------------------------------------


def side(rows, changed=None):
    flat = torch.tensor(list(itertools.chain(*rows)), dtype=torch.float32, requires_grad=True)
    marks = [[False] * len(row) for row in rows] if changed is None else changed
    return PairSide(flat, torch.tensor([len(row) for row in rows]), torch.tensor(list(itertools.chain(*marks))))


# ABC -> A'C in the spirit of the papers' figures: the second token is bad, the last one dropped.
EDITED = side([[0.5, 1.0, -0.2]], [[False, True, False]])
ORIGINAL = side([[0.5, -1.0, -0.2, 0.1]], [[False, True, False, True]])


def value(losses):
    assert losses.shape == (1,)
    return float(losses.detach())


def bce(logit, label):
    p = 1 / (1 + np.exp(-logit))
    return -(label * np.log(p) + (1 - label) * np.log(1 - p))


def test_mean_bt_of_a_worked_pair():
    assert float(EDITED.mean().detach()) == pytest.approx(0.433333, abs=1e-6)
    assert float(ORIGINAL.mean().detach()) == pytest.approx(-0.15, abs=1e-6)
    assert value(mean_bt(EDITED, ORIGINAL)) == pytest.approx(0.443426, abs=1e-6)


def test_edited_only_bt_of_a_worked_pair():
    assert value(edited_only_bt(EDITED, ORIGINAL)) == pytest.approx(
        np.log1p(np.exp(-(1.0 - (-1.0 + 0.1) / 2))), abs=1e-6
    )


def test_a_side_without_changed_tokens_counts_as_0():
    grown = side([[0.5, 1.0, -0.2]], [[False, True, False]]), side([[0.5, -0.2]], [[False, False]])
    assert value(edited_only_bt(*grown)) == pytest.approx(np.log1p(np.exp(-1.0)), abs=1e-6)
    assert value(edited_only_bt(side([[3.0]]), side([[9.0]]))) == pytest.approx(np.log(2), abs=1e-6)


def test_tlcr_ce_of_a_worked_pair():
    unchanged = np.mean([bce(x, 0.5) for x in (0.5, -0.2, 0.5, -0.2)])
    expected = bce(1.0, 1) + np.mean([bce(-1.0, 0), bce(0.1, 0)]) + unchanged
    assert value(tlcr_ce(EDITED, ORIGINAL)) == pytest.approx(expected, abs=1e-6)


def test_sequence_bt_of_a_worked_pair():
    scores = [PairSide(torch.tensor([s]), torch.tensor([4]), torch.zeros(4, dtype=torch.bool)) for s in (0.7, -0.4)]
    assert value(sequence_bt(*scores)) == pytest.approx(np.log1p(np.exp(-1.1)), abs=1e-6)


def test_the_penalty_is_on_unchanged_tokens():
    assert value(unchanged_penalty(EDITED, ORIGINAL)) == pytest.approx((0.25 + 0.04 + 0.25 + 0.04) / 4, abs=1e-6)
    changed = side([[2.0]], [[True]])
    assert value(unchanged_penalty(changed, changed)) == 0.0


TOKEN_LOSSES = [mean_bt, edited_only_bt, tlcr_ce, unchanged_penalty]


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
@given(
    pairs=st.lists(
        st.tuples(*[st.lists(st.tuples(st.floats(-3, 3, width=32), st.booleans()), min_size=1, max_size=5)] * 2),
        min_size=1,
        max_size=4,
    )
)
def test_pairs_in_a_batch_do_not_mix(loss, pairs):
    def sides(chosen):
        return [
            side([[x for x, _ in pair[k]] for pair in chosen], [[mark for _, mark in pair[k]] for pair in chosen])
            for k in (0, 1)
        ]

    together = loss(*sides(pairs)).detach()
    torch.testing.assert_close(together, torch.cat([loss(*sides([pair])).detach() for pair in pairs]))


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_gradients_are_those_of_finite_differences(loss):
    marks = [[[False, True, False], [True]], [[False, True], [True, False, False]]]
    lengths = [torch.tensor([3, 1]), torch.tensor([2, 3])]
    flags = [torch.tensor(list(itertools.chain(*rows))) for rows in marks]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, dtype=torch.float64, generator=generator).requires_grad_() for n in (4, 5)]

    def function(a, b):
        return loss(PairSide(a, lengths[0], flags[0]), PairSide(b, lengths[1], flags[1]))

    assert torch.autograd.gradcheck(function, inputs)


# --- pairs -------------------------------------------------------------------------------------------------------

WORDS = ("red", "blue", "sea", "sky", "end")
RED, BLUE, SEA, SKY, END, EOS, UNK = range(7)
TOKENIZER = WordTokenizer(words=WORDS, positions=64)


def test_pairs_become_tokens_with_labels():
    pairs = [
        EditedPair("red sea", "blue sky end", "blue end sea", id="a"),
        EditedPair("sky", "red", "sea", finished=False),
    ]
    (one, two), dropped = tokenize_pairs(pairs, TOKENIZER, 64)
    assert one.prompt.tolist() == [RED, SEA] and one.id == "a"
    assert one.original.tolist() == [BLUE, SKY, END, EOS] and one.edited.tolist() == [BLUE, END, SEA, EOS]
    assert one.removed.tolist() == [False, True, False, False] and one.written.tolist() == [False, False, True, False]
    assert two.original.tolist() == [RED] and two.edited.tolist() == [SEA]
    assert two.removed.tolist() == two.written.tolist() == [True]
    assert one.prompt.dtype == one.original.dtype == np.int32
    assert dropped == {"empty": 0, "identical": 0, "too_long": 0}


def test_pairs_that_teach_nothing_are_counted():
    pair = EditedPair("red", "blue sky", "blue sea")
    pairs = [
        pair,
        replace(pair, edited=""),
        replace(pair, original=" "),
        replace(pair, edited="blue sky"),
        replace(pair, edited="blue  sky"),  # another text of the same tokens
        replace(pair, edited="blue sky sky sky"),  # 1 + 4 + EOS
    ]
    kept, dropped = tokenize_pairs(pairs, TOKENIZER, 5)
    assert len(kept) == 1 and dropped == {"empty": 2, "identical": 2, "too_long": 1}
    assert len(tokenize_pairs(pairs, TOKENIZER, 6)[0]) == 2
    assert len(tokenize_pairs([replace(pairs[-1], finished=False)], TOKENIZER, 5)[0]) == 1


def test_pairs_that_cannot_be_read_are_refused():
    with pytest.raises(InputError, match="give at least one"):
        tokenize_pairs([], TOKENIZER, 64)
    with pytest.raises(InputError, match=r"pair 1 \(x\) has an empty prompt"):
        tokenize_pairs([EditedPair("a", "b", "c"), EditedPair(" ", "b", "c", id="x")], ByteTokenizer(), 64)
    endless = ByteTokenizer()
    endless.hf.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        tokenize_pairs([EditedPair("a", "b", "c")], endless, 64)


# --- training ----------------------------------------------------------------------------------------------------


def tiny_model(level="token", rank=4, tokenizer=TOKENIZER, dropout=0.0):
    model = build_model(vocabulary=tokenizer.vocabulary)
    lm = CausalLM(model, tokenizer.hf, name="tiny")
    return RewardModel(lm, LoraSettings(rank=rank, dropout=dropout), level, dtype="float32")


def random_pairs(count, seed=0, tokenizer=TOKENIZER):
    """The word "red" is bad, and an editor puts "blue" in its place."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        words = rng.choice(["sea", "sky", "end"], size=rng.integers(2, 8)).tolist()
        bad = rng.choice(len(words), size=rng.integers(1, 3), replace=False)
        texts = [" ".join(new if k in bad else w for k, w in enumerate(words)) for new in ("red", "blue")]
        pairs.append(EditedPair(str(rng.choice(["sea sky", "end"])), *texts))
    return tokenize_pairs(pairs, tokenizer, 64)[0]


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


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.parameters().items()}


def level_of(loss):
    return LOSSES[loss].level


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_the_first_losses_are_those_of_zero_scores(loss):
    trainer, rows = logged(RewardTrainer(tiny_model(level_of(loss)), loss, batch_size=7, learning_rate=1e-2))
    trainer.fit(random_pairs(7))
    assert rows[0]["train/loss"] == pytest.approx(np.log(2) * (3 if loss == "tlcr_ce" else 1), abs=1e-5)
    assert rows[0]["train/accuracy"] == 0 and rows[0]["train/margin"] == 0


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_the_token_budget_does_not_change_results(loss):
    ends = []
    for budget in (1, 10**6):
        model = tiny_model(level_of(loss))
        trainer, rows = logged(RewardTrainer(model, loss, learning_rate=1e-3, batch_size=6, token_budget=budget))
        trainer.fit(random_pairs(20))
        ends.append((weights(model), rows))
    for name in ends[0][0]:
        torch.testing.assert_close(ends[0][0][name], ends[1][0][name], atol=2e-4, rtol=1e-3)
    for one, two in zip(ends[0][1], ends[1][1], strict=True):
        assert one == pytest.approx(two, abs=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_training_is_the_undisturbed_one(tmp_path, dropout):
    def start():
        torch.manual_seed(3)
        options = {"learning_rate": 1e-2, "batch_size": 5, "epochs": 2, "schedule": "cosine"}
        return logged(RewardTrainer(tiny_model(dropout=dropout), "tlcr_ce", **options))

    pairs = random_pairs(18)
    whole, expected = start()
    whole.fit(pairs)
    first, _ = start()
    first.fit(pairs, lambda trainer: trainer.steps < 3)
    first.save(tmp_path)
    second, rows = start()
    second.restore(tmp_path)
    second.fit(pairs)
    assert rows == expected[3:] and len(rows) == 5
    for name, parameter in weights(whole.model).items():
        assert torch.equal(weights(second.model)[name], parameter), name
    assert (second.model.mean, second.model.std) == (whole.model.mean, whole.model.std)
    assert second.model.transform == "signed-probability"


def test_a_trained_model_knows_the_scores_of_its_originals():
    pairs = random_pairs(12)
    model = tiny_model()
    RewardTrainer(model, learning_rate=1e-2, batch_size=6).fit(pairs)
    scores = model.sequence_scores([p.prompt for p in pairs], [p.original for p in pairs])
    assert model.mean == pytest.approx(scores.mean(), abs=1e-5) and model.std == pytest.approx(scores.std(), abs=1e-5)
    assert (model.loss, model.transform, model.free_level) == ("mean_bt", "identity", True)
    RewardTrainer(model, unchanged_penalty=0.1)
    assert model.mean is None and not model.free_level


def test_the_head_has_a_learning_rate_of_its_own():
    model = tiny_model()
    before = weights(model)
    RewardTrainer(model, learning_rate=1e-30, value_learning_rate=1e-2, batch_size=12).fit(random_pairs(12))
    moved = {name for name, parameter in weights(model).items() if (parameter - before[name]).abs().max() > 1e-6}
    assert moved == {"reward_head.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss must be one of"),
        ({"loss": "sequence_bt"}, "trains models of level sequence"),
        ({"unchanged_penalty": -1.0}, "unchanged_penalty must be at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        RewardTrainer(tiny_model(), **options)
    with pytest.raises(InputError, match="needs a token-level loss"):
        RewardTrainer(tiny_model("sequence"), "sequence_bt", unchanged_penalty=0.1)


def test_bad_pairs_are_refused_before_training():
    trainer = RewardTrainer(tiny_model(), batch_size=1)
    pairs = random_pairs(3)
    with pytest.raises(InputError, match="there are none"):
        trainer.fit([])
    with pytest.raises(InputError, match="row 2"):
        trainer.fit([*pairs[:2], replace(pairs[2], prompt=np.zeros(400, np.int32))])
    assert trainer.steps == 0


def test_non_finite_gradients_stop_training():
    model = tiny_model()
    trainer = RewardTrainer(model, batch_size=1)
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(TrainingDivergedError):
        trainer.fit(random_pairs(12))


# --- what is learned ---------------------------------------------------------------------------------------------


def test_measures_are_what_they_say():
    pairs, model = random_pairs(9), tiny_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters().values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    measures = evaluate_reward_model(model, pairs)
    before, after = ([], []), ([], [])
    margins = []
    for pair in pairs:
        [original] = model.score([pair.prompt], [pair.original])
        [edited] = model.score([pair.prompt], [pair.edited])
        margins.append(edited.mean() - original.mean())
        for r, gone in zip(original, pair.removed, strict=True):
            before[0].append(-r), before[1].append(gone)
        for r, new in zip(edited, pair.written, strict=True):
            after[0].append(r), after[1].append(new)
    assert measures["accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    assert measures["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert measures["removed_auc"] == pytest.approx(roc_auc_score(before[1], before[0]), abs=1e-6)
    assert measures["written_auc"] == pytest.approx(roc_auc_score(after[1], after[0]), abs=1e-6)
    assert measures["removed_reward"] == pytest.approx(-np.array(before[0])[np.array(before[1])].mean(), abs=1e-5)
    ties = evaluate_reward_model(tiny_model(), pairs)
    assert (ties["accuracy"], ties["removed_auc"], ties["written_auc"]) == (0.5, 0.5, 0.5)
    grown = [replace(p, removed=np.zeros_like(p.removed)) for p in pairs]
    assert "removed_auc" not in evaluate_reward_model(model, grown)
    with pytest.raises(InputError, match="there are none"):
        evaluate_reward_model(model, [])


@pytest.mark.parametrize(
    ("loss", "rank", "options"),
    [
        ("mean_bt", 8, {"unchanged_penalty": 0.1}),
        ("mean_bt", 0, {"unchanged_penalty": 0.1, "learning_rate": 3e-3, "epochs": 8}),
        ("edited_only_bt", 8, {"unchanged_penalty": 0.1}),
        ("tlcr_ce", 8, {}),
    ],
)
def test_bad_tokens_are_found(loss, rank, options):
    model = tiny_model(rank=rank)
    RewardTrainer(model, loss, **{"learning_rate": 1e-2, "batch_size": 32, "epochs": 3} | options).fit(
        random_pairs(160)
    )
    measures = evaluate_reward_model(model, random_pairs(60, seed=1))
    assert measures["removed_auc"] > 0.95 and measures["written_auc"] > 0.95 and measures["accuracy"] > 0.95
    assert measures["removed_reward"] < measures["unchanged_reward"] < measures["written_reward"]
    if loss == "tlcr_ce":  # a second softmax would keep rewards within 0.462
        assert measures["written_reward"] > 0.8 and measures["removed_reward"] < -0.8
        assert abs(measures["unchanged_reward"]) < 0.2


def test_a_sequence_model_learns_which_response_is_better():
    model = tiny_model("sequence", rank=8)
    RewardTrainer(model, "sequence_bt", learning_rate=1e-2, batch_size=32, epochs=3).fit(random_pairs(160))
    measures = evaluate_reward_model(model, random_pairs(60, seed=1))
    assert measures["accuracy"] > 0.95 and "removed_auc" not in measures
