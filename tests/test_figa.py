"""FIGA: which tokens weigh what, the loss by hand, and what is learned and unlearned from edits."""

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import KVWriter, Logger
from tiny_models import build_model

from instructgym.agents.policy.language_model import LanguageModelPolicy
from instructgym.agents.supervised.figa import FIGA, FIGASettings, figa_weights
from instructgym.agents.supervised.reward_modelling import TokenizedPair, tokenize_pairs
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.causal_lm import CausalLM
from instructgym.llm_backends.local.tokenization import WordTokenizer
from instructgym.llm_backends.training.adapters import LoraSettings
from instructgym.rewards.learned.edits import EditedPair

WORDS = ("red", "blue", "sea", "sky", "end")
RED, BLUE, SEA, SKY, END, EOS, UNK = range(7)
TOKENIZER = WordTokenizer(words=WORDS, positions=64)
PAIRS = [
    EditedPair("red", "sea sky end", "sea blue end", "swap"),
    EditedPair("blue", "sky sky", "sky end end", "cut off", finished=False),
    EditedPair("sea", "red sky", "red", "deletion"),
    EditedPair("end", "sky", "blue end", "rewrite"),
]


class Rows(KVWriter):
    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values))

    def close(self):
        pass


def make_policy(seed=0):
    model = build_model(vocabulary=TOKENIZER.vocabulary)
    model.generation_config.eos_token_id = EOS
    lm = CausalLM(model, TOKENIZER.hf, name="tiny")
    return LanguageModelPolicy(lm, LoraSettings(rank=4), value="none", dtype="float32", seed=seed)


def logged(trainer):
    writer = Rows()
    trainer.set_logger(Logger(folder=None, output_formats=[writer]))
    return trainer, writer.rows


def tokenized(pairs=PAIRS):
    return tokenize_pairs(pairs, TOKENIZER, 64)[0]


def likelihoods(policy, pairs, side):
    with torch.no_grad():
        scores = policy.score([p.prompt for p in pairs], [getattr(p, side) for p in pairs], [None] * len(pairs), False)
    lengths = [len(getattr(p, side)) for p in pairs]
    return np.split(scores.logprobs.numpy(), np.cumsum(lengths)[:-1])


def pair(original, edited, removed, written):
    return TokenizedPair(
        np.array([RED], np.int32),
        np.array(original, np.int32),
        np.array(edited, np.int32),
        np.array(removed, bool),
        np.array(written, bool),
    )


def test_weights_by_hand():
    one = pair([SEA, SKY, RED, EOS], [SEA, BLUE, BLUE, EOS], [0, 1, 1, 0], [0, 1, 1, 0])
    edited, original = figa_weights(one, EOS, FIGASettings(), np.array([0.1, 0.6, 0.61, 0.1]))
    assert edited.tolist() == [0.0, 1.0, 1.0, 1.0], "what was written, and the end"
    assert original.tolist() == [0.0, -0.5, 0.0, 0.0], "what was removed and likely; neither the rest nor its end"
    assert edited.dtype == original.dtype == np.float32
    cut = pair([SEA, SKY], [SEA, BLUE, END], [0, 1], [0, 1, 0])
    edited, original = figa_weights(cut, EOS, FIGASettings(nll_limit=5.0, removed_weight=2.0), np.array([9.0, 4.0]))
    assert edited.tolist() == [0.0, 1.0, 0.0] and original.tolist() == [0.0, -2.0]
    assert figa_weights(cut, None, FIGASettings(), np.array([9.0, 9.0]))[0].tolist() == [0.0, 1.0, 0.0]
    assert not cut.written[2], "the pair itself is left alone"


@pytest.mark.parametrize("limit", [0.6, 100.0])
def test_the_loss_is_the_weighted_sum_over_the_number_of_weights(limit):
    pairs, policy = tokenized(), make_policy()
    edited, original = likelihoods(policy, pairs, "edited"), likelihoods(policy, pairs, "original")
    total, written, removed = 0.0, 0, 0
    for one, after, before in zip(pairs, edited, original, strict=True):
        for token, changed, logprob in zip(one.edited, one.written, after, strict=True):
            if changed or token == EOS:
                total, written = total - logprob, written + 1
        for changed, logprob in zip(one.removed, before, strict=True):
            if changed and -logprob <= limit:
                total, removed = total + 0.5 * logprob, removed + 1
    assert written == 8 and (removed == 4 if limit == 100.0 else removed < 4)
    trainer, rows = logged(FIGA(policy, nll_limit=limit, epochs=1))
    trainer.fit(pairs)
    assert rows[0]["train/loss"] == pytest.approx(total / (written + removed), rel=1e-5)
    assert rows[0]["train/written_tokens"] == written and rows[0]["train/removed_tokens"] == removed


def test_the_gradient_is_that_of_the_loss_however_the_batch_is_cut():
    pairs = tokenized()
    policy = make_policy()
    logprobs = []
    for side in ("edited", "original"):
        scores = policy.score([p.prompt for p in pairs], [getattr(p, side) for p in pairs], [None] * 4, False)
        logprobs.append(scores.logprobs)
    written = np.concatenate([p.written | (p.edited == EOS) for p in pairs])
    removed = np.concatenate([p.removed for p in pairs])
    loss = 0.5 * logprobs[1][torch.from_numpy(removed)].sum() - logprobs[0][torch.from_numpy(written)].sum()
    expected = torch.autograd.grad(loss / (written.sum() + removed.sum()), list(policy.parameters().values()))
    for budget in (1, 16, 4096):
        trainer = FIGA(make_policy(), nll_limit=100.0, epochs=1, token_budget=budget)
        seen = []

        def step(optimizer=trainer.optimizer, seen=seen):
            seen.append([p.grad.clone() for p in optimizer.parameters.values()])
            return 0.0

        trainer.optimizer.step = step
        trainer.fit(pairs)
        for mine, true in zip(seen[0], expected, strict=True):
            torch.testing.assert_close(mine, true, atol=1e-5, rtol=1e-4)


def test_what_was_written_grows_likely_and_what_was_removed_unlikely():
    pairs, policy = tokenized([PAIRS[0], PAIRS[3]]), make_policy()
    trainer = FIGA(policy, learning_rate=1e-2, batch_size=2, epochs=40, nll_limit=3.0)
    before = likelihoods(policy, pairs, "original")
    trainer.fit(pairs)
    after, edited = likelihoods(policy, pairs, "original"), likelihoods(policy, pairs, "edited")
    for one, old, new, side in zip(pairs, before, after, edited, strict=True):
        assert side[one.written].min() > np.log(0.5) and side[-1] > np.log(0.5)
        assert (new[one.removed] < np.maximum(old[one.removed], -3.0)).all()
        assert (new[one.removed] > -30).all(), "unlearning stops below the limit"


def test_unlearning_alone_stops_at_the_limit():
    pairs, policy = tokenized([PAIRS[2]]), make_policy()
    FIGA(policy, learning_rate=1e-2, epochs=60, written_weight=0.0, nll_limit=4.0, batch_size=1).fit(pairs)
    [row] = likelihoods(policy, pairs, "original")
    [removed] = row[pairs[0].removed]
    assert -12.0 < removed < -3.0


def test_a_batch_without_a_weight_changes_nothing():
    pairs, policy = tokenized([PAIRS[2]]), make_policy()
    weights = {name: p.detach().clone() for name, p in policy.parameters().items()}
    trainer, rows = logged(FIGA(policy, learning_rate=1e-2, epochs=2, written_weight=0.0, nll_limit=0.0))
    trainer.fit(pairs)
    assert rows[0]["train/loss"] == 0.0
    for name, weight in weights.items():
        torch.testing.assert_close(policy.parameters()[name].detach(), weight, rtol=0, atol=0)


def test_training_goes_on_from_a_checkpoint(tmp_path):
    def trainer():
        return logged(FIGA(make_policy(), learning_rate=1e-2, batch_size=2, epochs=3))

    (whole, expected), (first, seen), (second, more) = trainer(), trainer(), trainer()
    whole.fit(tokenized())
    first.fit(tokenized(), callback=lambda agent: agent.steps < 3)
    first.save(tmp_path)
    second.restore(tmp_path)
    second.fit(tokenized())
    assert len(seen) == 3 and seen + more == expected and len(expected) == 6


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="there are none"):
        FIGA(make_policy()).fit([])
    for name in ("written_weight", "removed_weight", "nll_limit"):
        with pytest.raises(InputError, match=name):
            FIGASettings(**{name: -1.0})
    with pytest.raises(InputError, match="nothing would be learned"):
        FIGASettings(written_weight=0.0, removed_weight=0.0)


def test_the_defaults_are_those_of_the_published_code():
    settings = FIGASettings()
    assert (settings.learning_rate, settings.schedule, settings.epochs, settings.batch_size) == (
        1e-5,
        "constant",
        5,
        128,
    )
    assert (settings.written_weight, settings.removed_weight, settings.nll_limit) == (1.0, 0.5, 0.6)
