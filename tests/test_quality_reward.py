"""The linear quality reward: its rules at corner points, malformed text, failures, and how it plugs in."""

import copy
import json

import numpy as np
import pytest
from tiny_models import build_model

from instructgym.llm_backends import BackendError, FunctionBackend, ScriptedBackend, UnsupportedRequestError, resolve
from instructgym.llm_backends.local.tokenization import ByteTokenizer
from instructgym.rewards import LinearReward, Sample, Score, SequenceReward, score_with_retries
from instructgym.rewards.base import Reward
from instructgym.rewards.quality.instance_format import Instance
from instructgym.rewards.quality.linear import PRESETS

WELL = Sample("Input: France\nOutput: Paris", metadata={"instruction": "Name the capital."})


class Fixed(Reward):
    """Pays a number, or what a function of the samples says; keeps what it saw."""

    def __init__(self, value=0.0):
        self.value, self.seen, self.resets = value, [], 0

    def reset(self):
        self.resets += 1

    def reward(self, samples):
        self.seen += samples
        values = [self.value(sample) if callable(self.value) else self.value for sample in samples]
        return [value if isinstance(value, Score) else Score(value, calls=1) for value in values]


def fixed(preset="instruction_mining", **values):
    return LinearReward(preset, {name: Fixed(value) for name, value in values.items()})


@pytest.mark.parametrize(
    ("preset", "terms", "value"),
    [
        ("instruction_mining", {"rew": 0, "und": 0, "nat": 0, "coh": 0}, -0.0274),
        ("instruction_mining", {"rew": 0, "und": 1, "nat": 1, "coh": 1}, 0.0037),
        ("instruction_mining", {"rew": 5, "und": 0, "nat": 1, "coh": 1}, 0.4848),
        ("instruction_mining", {"rew": -5, "und": 1, "nat": 0, "coh": 0}, -0.5085),
        ("no_und", {"rew": 10, "nat": 1, "coh": 0}, 0.3718),
        ("abs_weights", {"rew": 0, "und": 1, "nat": 1, "coh": 1}, 0.8879),
        ("rm_only", {"rew": 10}, 0.0506),
        ("earlier", {"rew": 0, "len_out": 0, "knn_6": 0}, -1.0694),
        ("earlier", {"rew": 2, "len_out": 1000, "knn_6": 1}, 0.08263),
    ],
)
def test_corner_points(preset, terms, value):
    [score] = fixed(preset, **terms).reward([WELL])
    assert score.valid and score.value == pytest.approx(value, abs=1e-12)
    assert score.terms == {**terms, "well_formed": 1.0}
    assert score.calls == len(terms)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_sign_of_every_term(preset):
    signs = {"rew": 1, "nat": 1, "coh": 1, "und": -1, "len_out": -1, "knn_6": 1}
    if preset == "abs_weights":
        signs["und"] = 1
    names = PRESETS[preset].weights
    [base] = fixed(preset, **dict.fromkeys(names, 0.0)).reward([WELL])
    for name in names:
        [more] = fixed(preset, **(dict.fromkeys(names, 0.0) | {name: 1.0})).reward([WELL])
        assert np.sign(more.value - base.value) == signs[name], name


def test_scorers_see_instruction_input_and_output_only():
    reward = fixed("rm_only", rew=1.0)
    classified = Sample(
        " old\nInput: Rome",
        prompt="a few-shot prompt",
        metadata={"instruction": "Is it old?", "order": "output_first", "opening": "Class label:"},
    )
    alone = Sample("Output: Sing a song.", prompt="Write a line.")
    reward.reward([WELL, classified, alone])
    seen = reward.sum.terms["rew"].seen
    assert [(s.prompt, s.response) for s in seen] == [
        ("Name the capital.\n\nFrance", "Paris"),
        ("Is it old?\n\nRome", "old"),
        ("Write a line.", "Sing a song."),
    ]


@pytest.mark.parametrize(
    ("response", "metadata", "reason"),
    [
        ("Input: France", {}, "no_output"),
        ("Output: a\nOutput: b", {}, "fields"),
        ("Input: a\nOutput: Name  the capital.", {"instruction": "Name the capital."}, "echo"),
        ("Input: a\nOutput: b", {"order": "output_first"}, "no_output"),
        ("Input: a\nOutput: b", {"opening": "Input:"}, "field_inside"),
        ("Input: a\nOutput: b", {"finish_reason": "length"}, "cut"),
    ],
)
def test_malformed_text_gets_the_format_reward_and_is_not_scored(response, metadata, reason):
    reward = fixed("rm_only", rew=7.0)
    bad, good = reward.reward([Sample(response, metadata=metadata), WELL])
    assert (bad.value, bad.valid, bad.terms, bad.calls) == (-1.0, True, {"well_formed": 0.0}, 0)
    assert bad.feedback == f"malformed: {reason}"
    assert good.terms == {"rew": 7.0, "well_formed": 1.0} and len(reward.sum.terms["rew"].seen) == 1


def test_the_format_reward_and_the_constant_can_be_set():
    reward = LinearReward("rm_only", {"rew": Fixed(1.0)}, weights={"rew": 2.0}, constant=0.5, format_reward=-4)
    assert [score.value for score in reward.reward([WELL, Sample("x")])] == [2.5, -4.0]
    worst = fixed("earlier", rew=-6.0, len_out=500.0, knn_6=0.0)
    good, bad = worst.reward([WELL, Sample("x")])
    assert bad.value < good.value  # with the preset's own


def test_a_parser_of_ones_own():
    def parse(text):
        left, _, right = text.partition("=")
        return Instance(left, right) if right else None

    reward = LinearReward("rm_only", {"rew": Fixed(lambda s: float(len(s.response)))}, parse=parse)
    good, bad = reward.reward([Sample("a=bcd"), Sample("abcd")])
    assert good.terms["rew"] == 3 and bad.value == -1 and bad.terms == {"well_formed": 0.0}


def test_an_invalid_paid_term_is_an_invalid_score():
    reward = fixed(
        "rm_only", rew=lambda s: Score.invalid("no idea", calls=1) if s.response == "Paris" else Score(2.0, calls=1)
    )
    bad, good = reward.reward([WELL, Sample("Output: Rome")])
    assert not bad.valid and "no idea" in bad.feedback and "rew" not in bad.terms and bad.calls == 1
    assert good.valid and good.value == pytest.approx(2 * 0.0078 - 0.0274)


def test_a_term_of_weight_zero_is_logged_and_may_be_invalid():
    scorers = {"rew": Fixed(1.0), "wit": Fixed(3.0), "luck": Fixed(lambda s: Score.invalid("none"))}
    [score] = LinearReward("rm_only", scorers, weights={"wit": 0, "luck": 0}).reward([WELL])
    assert score.valid and score.value == pytest.approx(0.0078 - 0.0274)
    assert score.terms == {"rew": 1.0, "wit": 3.0, "well_formed": 1.0}


def test_a_failing_backend_is_invalid_never_zero_and_is_asked_again():
    def fails_once(sample):
        if not sample.metadata.get("attempt"):
            raise BackendError("server is down")
        return 1.0

    reward = fixed("rm_only", rew=fails_once)
    bad, malformed = reward.reward([WELL, Sample("x")])
    assert not bad.valid and "server is down" in bad.feedback and bad.terms == {"well_formed": 1.0}
    assert malformed.valid and malformed.value == -1
    [score] = score_with_retries(reward, [WELL])
    assert score.valid and score.value == pytest.approx(0.0078 - 0.0274)


def test_what_no_retry_would_mend_is_raised():
    with pytest.raises(UnsupportedRequestError, match="no log-probs"):
        LinearReward(backend=FunctionBackend(reply=lambda prompt: "Yes")).reward([WELL])


def test_one_row_that_fails_leaves_the_others_alone():
    class Flaky(ScriptedBackend):
        def _logprobs(self, prompts, completions):
            rows = super()._logprobs(prompts, completions)
            return [BackendError("too long") if "Paris" in c else row for c, row in zip(completions, rows, strict=True)]

    bad, good = LinearReward(backend=Flaky()).reward([WELL, Sample("Output: Rome")])
    assert not bad.valid and "too long" in bad.feedback
    assert good.valid and set(good.terms) >= {"rew", "nat", "und", "coh", "well_formed"}


def test_the_offline_scorers_read_each_output_once_in_either_way():
    backend = ScriptedBackend()
    reward = LinearReward(backend=backend)
    first = reward.reward([WELL, Sample("Output: Rome", prompt="Say a name."), WELL])
    assert (backend.usage.calls, backend.usage.requests) == (2, 4)
    again = reward.reward([WELL])
    assert backend.usage.requests == 4 and again[0].value == first[0].value == first[2].value
    terms = first[0].terms
    weights = PRESETS["instruction_mining"].weights
    assert first[0].value == pytest.approx(sum(w * terms[name] for name, w in weights.items()) - 0.0274)
    assert terms["rew"] == terms["coh/log_ratio"]


def test_the_earlier_rule_remembers_outputs_until_it_is_reset():
    reward = LinearReward("earlier", {"rew": Fixed()}, backend="scripted", embedder="hashing")
    many = [Sample(f"Output: a small house {i}") for i in range(6)]
    assert reward.reward(many)[0].terms["knn_6"] == pytest.approx(2**0.5)
    near = reward.reward([many[0]])[0].terms
    assert near["knn_6"] < 1 and near["len_out"] == 4
    reward.reset()
    assert reward.reward([many[0]])[0].terms["knn_6"] == pytest.approx(2**0.5)
    assert reward.sum.terms["rew"].resets == 1


def test_terms_that_read_token_ids_get_those_of_the_output():
    tokenizer = ByteTokenizer()
    reward = fixed("rm_only", rew=lambda s: float(len(s.token_ids)))
    reward.check_tokenizer(tokenizer)
    [score] = reward.reward([WELL])
    assert score.terms["rew"] == len("Paris") + 1  # and what ends it
    seen = reward.sum.terms["rew"].seen[0]
    assert seen.token_ids.tolist() == [*tokenizer.encode("Paris"), *tokenizer.eos_ids]


def test_a_trained_reward_model_plugs_in(tiny_tokenizer):
    import torch

    from instructgym.llm_backends.local.causal_lm import CausalLM
    from instructgym.rewards.learned.reward_model import RewardModel

    model = RewardModel(CausalLM(build_model(), tiny_tokenizer))  # it is changed in place
    with torch.no_grad():
        model.head.weight.fill_(0.3)
    reward = LinearReward("rm_only", {"rew": SequenceReward(model)})
    reward.check_tokenizer(model.tokenizer)
    one, other = reward.reward([WELL, Sample("Output: something else", prompt="Write.")])
    prompt = model.tokenizer.encode("Name the capital.\n\nFrance")
    ids = [*model.tokenizer.encode_continuation("Paris"), 1]
    expected = model.sequence_scores([np.array(prompt)], [np.array(ids)])[0]
    assert one.terms["rew"] == pytest.approx(expected, abs=1e-5) and one.terms["rew"] != other.terms["rew"]
    assert one.value == pytest.approx(0.0078 * expected - 0.0274, abs=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"preset": "best"}, "unknown preset 'best': use .*no_und"),
        ({"scorers": {"wit": Fixed()}}, r"scorers without a weight: \['wit'\]"),
        ({"weights": {"wit": 1}}, r"terms without a scorer: \['wit'\]"),
        ({"constant": float("nan")}, "finite"),
        ({"weights": {"nat": float("inf")}}, "finite"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LinearReward(backend="scripted", **kwargs)


def test_a_term_that_is_not_terminal_is_refused():
    class Causal(Fixed):
        timing = "causal"

    with pytest.raises(ValueError, match="'rew' is causal"):
        LinearReward("rm_only", {"rew": Causal()})


def test_it_is_a_part_whose_spec_is_json():
    spec = {
        "id": "quality",
        "kwargs": {
            "preset": "no_und",
            "scorers": {"nat": {"id": "boolean-qa", "kwargs": {"aspect": "natural"}}, "rew": "likelihood-ratio"},
            "backend": "scripted",
            "format_reward": -2,
        },
    }
    reward = resolve("reward", json.loads(json.dumps(spec)))
    assert copy.deepcopy(reward) is reward
    good, bad = reward.reward([WELL, Sample("x")])
    assert set(good.terms) >= {"rew", "nat", "coh", "well_formed"} and bad.value == -2
    assert isinstance(reward.sum.terms["rew"].likelihoods.backend, ScriptedBackend)  # given by default


def test_no_samples_no_call():
    backend = ScriptedBackend()
    assert LinearReward(backend=backend).reward([]) == [] and backend.usage.calls == 0
