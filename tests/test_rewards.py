"""Reward composition, diversity pools, elimination rules and retries."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructgym.llm_backends import BackendError, ScriptedBackend, resolve
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.embeddings import FunctionEmbedder, HashingEmbedder
from instructgym.rewards import (
    DiversityReward,
    EliminationReward,
    FunctionReward,
    JudgedElimination,
    NonFiniteRewardError,
    Reward,
    RougePool,
    Sample,
    Score,
    WeightedSum,
    eliminated_by,
    rouge_l,
    score_with_retries,
)
from instructgym.rewards.elimination import STRING_RULES
from instructgym.rewards.texts import rouge

TEXTS = ["name a red bird", "name a blue bird", "sing a song", "how deep is the sea"]
WORDS = st.lists(st.sampled_from("a bird fish red sea sings the".split()), max_size=8).map(" ".join)


def constant(value, name="term"):
    def function(samples):
        return [value if isinstance(value, Score) else float(value) for _ in samples]

    function.__name__ = name
    return FunctionReward(function)


def samples_of(texts):
    return [Sample(text) for text in texts]


def values(scores):
    return [score.value for score in scores]


# --- functions and sums ------------------------------------------------------------------------------------------


def test_a_plain_function_is_a_reward():
    def words(samples):
        return [len(sample.response.split()) for sample in samples]

    reward = resolve("reward", words)
    [first, second] = reward.reward(samples_of(["one two", "three"]))
    assert (first.value, second.value) == (2.0, 1.0)
    assert first.terms == {"words": 2.0}


def test_a_function_may_return_scores_of_its_own():
    score = Score(0.5, terms={"mine": 1.0}, feedback="so so", calls=3)
    assert constant(score).reward([Sample("x")]) == [score]


def test_a_function_must_take_samples_and_score_each_of_them():
    with pytest.raises(TypeError, match="takes nothing"):
        FunctionReward(lambda: [1.0])
    with pytest.raises(ValueError, match="returned 1 scores for 2 samples"):
        FunctionReward(lambda samples: [1.0]).reward(samples_of("ab"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_valid_score_is_finite(bad):
    with pytest.raises(NonFiniteRewardError, match="finite"):
        Score(bad)
    with pytest.raises(NonFiniteRewardError):
        constant(bad).reward([Sample("x")])
    with pytest.raises(NonFiniteRewardError):
        WeightedSum({"a": constant(1)}, {"a": bad}).reward([Sample("x")])


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=4))
def test_a_sum_is_weighted(pairs):
    names = [f"t{i}" for i in range(len(pairs))]
    total = WeightedSum(
        {name: constant(value) for name, (value, _) in zip(names, pairs, strict=True)},
        {name: weight for name, (_, weight) in zip(names, pairs, strict=True)},
    )
    [score] = total.reward([Sample("x")])
    assert score.value == pytest.approx(sum(value * weight for value, weight in pairs))
    assert {name: score.terms[name] for name in names} == {n: v for n, (v, _) in zip(names, pairs, strict=True)}


def test_weights_default_to_one_and_parts_are_logged_below_their_term():
    total = WeightedSum({"rules": "elimination", "bonus": constant(Score(2.0, terms={"size": 7.0}))}, {"bonus": 0.5})
    [score] = total.reward([Sample("Name a bird.", previous="Sing.")])
    assert score.value == 4 + 1
    assert score.terms["rules"] == 4 and score.terms["rules/refusal"] == 1
    assert (score.terms["bonus"], score.terms["bonus/size"]) == (2.0, 7.0)  # as scored, before the weight


def test_a_metric_of_weight_zero_is_logged_but_neither_paid_nor_asked_to_be_valid():
    total = WeightedSum(
        {"paid": constant(3), "metric": constant(5), "broken": constant(Score.invalid("why", calls=2))},
        {"metric": 0, "broken": 0},
    )
    [score] = total.reward([Sample("x")])
    assert (score.valid, score.value) == (True, 3.0)
    assert score.terms["metric"] == 5.0
    assert "broken" not in score.terms
    assert score.calls == 2
    assert "broken: why" in score.feedback


def test_a_sum_is_invalid_where_a_paid_term_is():
    def half(samples):
        return [Score.invalid("cannot say") if sample.response == "bad" else 1.0 for sample in samples]

    good, bad = WeightedSum({"a": constant(1), "b": half}).reward(samples_of(["good", "bad"]))
    assert (good.valid, good.value) == (True, 2.0)
    assert not bad.valid and "b: cannot say" in bad.feedback
    assert bad.terms["a"] == 1.0 and "b" not in bad.terms


def test_token_splits_are_weighted_and_added():
    split = Score(3.0, per_token=np.array([1.0, 2.0], np.float32))
    [score] = WeightedSum({"a": constant(split), "b": constant(split)}, {"b": 2}).reward([Sample("x")])
    np.testing.assert_allclose(score.per_token, [3, 6])
    assert score.value == 9


class Timed(FunctionReward):
    """A reward of a given timing that gives every sample the same score."""

    def __init__(self, timing, score):
        super().__init__(lambda samples: [score for _ in samples])
        self.timing = timing


def split_of(*values):
    return Score(float(sum(values)), per_token=np.array(values, np.float32))


def test_terms_of_one_timing_keep_it_and_a_mixture_is_known_at_the_end():
    terms = {
        "whole": Timed("whole", split_of(1)),
        "causal": Timed("causal", split_of(1)),
        "other": Timed("causal", split_of(1)),
        "end": constant(1),
    }
    for paid, timing in [
        ({"end"}, "terminal"),
        ({"causal"}, "causal"),
        ({"causal", "other"}, "causal"),
        ({"causal", "end"}, "whole"),
        ({"whole", "end"}, "whole"),
        ({"whole", "causal"}, "whole"),
        ({"whole"}, "whole"),
        (set(), "terminal"),
    ]:
        assert WeightedSum(terms, {name: float(name in paid) for name in terms}).timing == timing


def test_in_a_mixture_a_terminal_term_is_earned_by_the_last_token():
    terms = {"each": Timed("causal", split_of(1, 2, 3)), "end": constant(5), "metric": constant(7)}
    [score] = WeightedSum(terms, {"each": 2, "end": 0.5, "metric": 0}).reward([Sample("x")])
    assert score.per_token.tolist() == [2, 4, 8.5] and score.value == 14.5
    [score] = WeightedSum({"a": terms["each"], "b": Timed("whole", split_of(0, 1, 0))}).reward([Sample("x")])
    assert score.per_token.tolist() == [1, 3, 3]
    assert terms["each"].reward([Sample("x")])[0].per_token.tolist() == [1, 2, 3]


def test_a_mixture_has_no_split_where_a_term_owes_one():
    owing = WeightedSum({"each": Timed("causal", Score(3.0)), "whole": Timed("whole", split_of(1, 2))})
    assert owing.reward([Sample("x")])[0].per_token is None
    assert WeightedSum({"a": constant(1), "b": constant(2)}).reward([Sample("x")])[0].per_token is None
    broken = WeightedSum({"each": Timed("causal", split_of(1, 2)), "end": constant(Score.invalid("no"))})
    [score] = broken.reward([Sample("x")])
    assert not score.valid and score.per_token is None


def test_bad_sums():
    with pytest.raises(ValueError, match="needs terms"):
        WeightedSum({})
    with pytest.raises(ValueError, match="weights without a term: \\['y'\\]"):
        WeightedSum({"x": constant(1)}, {"y": 2})
    with pytest.raises(ValueError, match="unknown reward 'nice'"):
        WeightedSum({"x": "nice"})


def test_a_sum_hands_judge_and_embedder_to_its_terms_and_resets_them():
    backend, embedder = ScriptedBackend(), HashingEmbedder()
    total = WeightedSum({"judge": "judge", "new": "diversity"}, backend=backend, embedder=embedder)
    assert total.terms["judge"].backend is backend
    assert total.terms["new"].embedder is embedder
    total.reward([Sample("a b", previous="a")])
    assert total.terms["new"].pool == ["a b"]
    total.reset()
    assert total.terms["new"].pool == []


# --- diversity ---------------------------------------------------------------------------------------------------


def diversity(form, **kwargs):
    return DiversityReward(form, embedder=HashingEmbedder(256), **kwargs)


def similarity(form, one, other):
    if form == "rouge":
        return rouge_l(one, other)
    first, second = HashingEmbedder(256).embed([one, other])
    return float(first @ second)


FORMS = pytest.mark.parametrize("form", ["cosine", "rouge"])


@FORMS
@given(st.lists(st.lists(st.tuples(WORDS, st.none() | WORDS), min_size=1, max_size=3), max_size=4))
def test_every_sample_is_scored_against_the_pool_at_the_start_of_its_call(form, calls):
    reward, pool = diversity(form), []
    for call in calls:
        scores = reward.reward([Sample(text, previous=previous) for text, previous in call])
        for score, (text, previous) in zip(scores, call, strict=True):
            others = [*pool, *([] if previous is None else [previous])]
            nearest = max((similarity(form, text, other) for other in others), default=0.0)
            assert score.value == pytest.approx(np.clip(1 - nearest, 0, 1), abs=1e-5)
            assert 0 <= score.value <= 1 and score.terms == {"diversity": score.value}
        pool += [text for text, _ in call]
        assert reward.pool == pool


@FORMS
def test_the_pool_forgets_on_reset_only(form):
    reward = diversity(form)
    assert values(reward.reward(samples_of(["a red bird", "a red bird"]))) == [1.0, 1.0]
    assert values(reward.reward(samples_of(["a red bird"]))) == [pytest.approx(0.0, abs=1e-6)]
    reward.reset()
    assert values(reward.reward(samples_of(["a red bird"]))) == [1.0]


@FORMS
def test_the_text_before_counts_without_entering_the_pool(form):
    reward = diversity(form)
    [score] = reward.reward([Sample("a red bird", previous="a red bird")])
    assert score.value == pytest.approx(0.0, abs=1e-6)
    assert reward.pool == ["a red bird"]


@FORMS
@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_the_oldest_text_leaves_a_full_pool(form, capacity):
    small, words = diversity(form, capacity=capacity), "ab cd ef gh ij kl".split()
    for start in range(0, 6, 2):  # also more at once than the pool holds
        small.reward(samples_of(words[start : start + 2]))
        assert small.pool == words[: start + 2][-capacity:]
    scores = values(small.reward(samples_of(words)))
    assert [round(value) for value in scores] == [1] * (6 - capacity) + [0] * capacity


def test_cosine_diversity_embeds_a_call_at_once():
    embedder = HashingEmbedder()
    reward = DiversityReward(embedder=embedder)
    for calls in (1, 2):
        reward.reward([Sample(f"{text} {calls}", previous=text) for text in TEXTS])
        assert embedder.usage.calls == calls


def test_opposite_texts_are_no_more_diverse_than_unrelated_ones():
    embedder = FunctionEmbedder(lambda texts: np.array([[1.0, 0.0] if t == "yes" else [-1.0, 0.0] for t in texts]))
    [score] = DiversityReward(embedder=embedder).reward([Sample("yes", previous="no")])
    assert score.value == 1.0


def test_bad_diversity_arguments():
    with pytest.raises(ValueError, match="unknown diversity form 'bleu'"):
        DiversityReward("bleu")
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        DiversityReward("rouge", capacity=0)


@given(WORDS, WORDS)
def test_rouge_l_is_the_reference_implementations(text, other):
    from rouge_score.rouge_scorer import RougeScorer

    assert rouge_l(text, other) == RougeScorer(["rougeL"]).score(other, text)["rougeL"].fmeasure


@given(st.lists(WORDS, max_size=12), WORDS, st.floats(0, 1))
def test_the_nearest_text_of_a_pool_is_found_exactly(texts, text, floor):
    best = max((rouge_l(text, other) for other in texts), default=0.0)
    assert RougePool(texts).nearest(text) == pytest.approx(best)
    assert RougePool(texts).nearest(text, floor) == pytest.approx(max(best, floor))


def test_most_pairs_of_a_pool_are_never_compared(monkeypatch):
    pool = RougePool([f"word{i} other{i}" for i in range(50)] + ["a red bird sings"])
    compared, lcs = [], rouge.lcs_length
    monkeypatch.setattr(rouge, "lcs_length", lambda *sequences: compared.append(lcs(*sequences)) or compared[-1])
    assert pool.nearest("a red bird sang") == pytest.approx(0.75)
    assert compared == [3]


def test_a_pool_forgets_its_oldest_text():
    pool = RougePool(["a red bird", "the sea"])
    pool.discard_oldest()
    assert len(pool) == 1
    assert (pool.nearest("a red bird"), pool.nearest("the sea")) == (0.0, 1.0)


# --- elimination -------------------------------------------------------------------------------------------------


def words(count, *extra):
    return " ".join([*extra, *(f"word{i}" for i in range(count - len(extra)))])


@pytest.mark.parametrize(
    ("text", "previous", "rule"),
    [
        ("Name a bird.", "Name a fish.", None),
        ("Name a bird.", None, None),
        # 1 no information gain
        ("Name a bird.", "Name a bird.", "no_information_gain"),
        ("name a  BIRD!", "Name a bird.", "no_information_gain"),
        ("a bird name", "Name a bird.", None),
        # 2 refusal
        (words(79, "Sorry"), "x", "refusal"),
        (words(80, "Sorry"), "x", None),
        (words(79, "SORRY,"), None, "refusal"),
        ("I am sorry.", "Write about someone who is sorry.", None),
        ("Explain apologies.", "x", None),
        ("Explain why sorrywort grows.", "x", None),
        # 3 no content
        ("", "x", "no_content"),
        ("?! ...", "x", "no_content"),
        ("and so on, if it is not red.", "x", None),
        ("and so on, if it is.", "x", "no_content"),
        ("Why is the sea salty?", "x", None),
        ("\u65e5\u672c\u306b\u3064\u3044\u3066", "x", None),
        # 4 meta words
        ("Here is the rewritten prompt: sing.", "x", "meta_words"),
        ("Answer the GIVEN  Prompt.", "x", "meta_words"),
        ("#Rewritten Prompt# sing", "x", "meta_words"),
        ("The new instructions are to sing.", "x", "meta_words"),
        ("Use the given prompt in a song.", "Explain the given prompt.", None),
        ("Use the new prompt.", "Explain the given prompt.", "meta_words"),
        ("Give a prompt answer.", "x", None),
        # the first rule that strikes is named
        ("...", "?", "no_information_gain"),
    ],
)
def test_elimination_rules(text, previous, rule):
    assert eliminated_by(text, previous) == rule
    [score] = EliminationReward().reward([Sample(text, previous=previous)])
    assert set(score.terms) == set(STRING_RULES)
    assert score.value == sum(score.terms.values())
    assert (score.value == 4) == (rule is None)
    if rule is not None:
        assert score.terms[rule] == 0
        assert eliminated_by(text, previous, [r for r in STRING_RULES if score.terms[r]]) is None


@given(st.text(max_size=60), st.none() | st.text(max_size=60))
def test_elimination_takes_any_text(text, previous):
    assert eliminated_by(text, previous) in (None, *STRING_RULES)
    assert eliminated_by(text, previous, ()) is None
    assert eliminated_by(text, text) == "no_information_gain"


def test_unknown_rules_are_refused():
    for build in (EliminationReward, lambda rules: JudgedElimination("scripted", rules=rules)):
        with pytest.raises(ValueError, match=r"unknown elimination rule 'length'.*refusal"):
            build(rules=["length"])
    with pytest.raises(ValueError, match="unknown elimination rule"):
        eliminated_by("x", None, ["length"])


def test_judged_elimination_asks_everything_in_one_call():
    said = {"<first>": "Not Equal", "Answers": "refuses.", "Content": "Content", "Copied": "Clean"}
    backend = ScriptedBackend(reply=said, prompt_style="chat")
    scores = JudgedElimination(backend).reward([Sample(text, previous="x y") for text in TEXTS])
    assert (backend.usage.calls, backend.usage.requests) == (1, 4 * len(TEXTS))
    for score in scores:
        assert score.terms == {"no_information_gain": 1, "refusal": 0, "no_content": 1, "meta_words": 1}
        assert (score.value, score.calls) == (3.0, 4)


def test_judged_elimination_by_likelihood_is_one_call_too():
    backend = ScriptedBackend()
    scores = JudgedElimination(backend, rules=["refusal", "no_content"]).reward(samples_of(TEXTS))
    assert backend.usage.calls == 1
    assert all(score.valid and set(score.terms) == {"refusal", "no_content"} for score in scores)


@pytest.mark.parametrize("bad", ["perhaps", BackendError("server is down")])
def test_one_missing_verdict_makes_a_judged_elimination_invalid(bad):
    said = {"<first>": "Not Equal", "Answers": bad, "Content": "Content", "Copied": "Clean"}
    backend = ScriptedBackend(reply=said, prompt_style="chat")
    [score] = JudgedElimination(backend).reward([Sample("x", previous="y")])
    assert not score.valid
    assert score.calls == 4
    assert str(bad) in score.feedback


# --- retries -----------------------------------------------------------------------------------------------------


class Moody(FunctionReward):
    """Invalid until the attempt that its text asks for."""

    def __init__(self):
        self.seen = []

    def reward(self, samples):
        self.seen.append([(s.response, s.seed, s.metadata.get("attempt", 0)) for s in samples])
        return [
            Score(1.0, calls=1) if s.metadata.get("attempt", 0) >= int(s.response) else Score.invalid("hm", calls=1)
            for s in samples
        ]


@given(st.lists(st.integers(0, 3), max_size=6), st.integers(0, 3))
def test_retries_ask_again_for_what_is_missing_only(needs, retries):
    reward = Moody()
    scores = score_with_retries(reward, samples_of(map(str, needs)), retries)
    assert [score.valid for score in scores] == [need <= retries for need in needs]
    assert [score.calls for score in scores] == [min(need, retries) + 1 for need in needs]
    for attempt, call in enumerate(reward.seen):
        assert [text for text, _, _ in call] == [str(need) for need in needs if need >= attempt]
        assert all(number == attempt for _, _, number in call)
    assert len(reward.seen) == 1 + min(max(needs, default=0), retries)


def test_every_attempt_has_a_seed_of_its_own():
    reward = Moody()
    score_with_retries(reward, [Sample("9", seed=1), Sample("9", seed=2)], retries=3)
    seeds = [seed for call in reward.seen for _, seed, _ in call]
    assert len(set(seeds)) == len(seeds) == 8


def test_a_retried_sample_keeps_its_metadata():
    seen = []

    def reward(samples):
        seen.extend(sample.metadata for sample in samples)
        return [Score.invalid("hm") for _ in samples]

    score_with_retries(FunctionReward(reward), [Sample("x", metadata={"row": 3})])
    assert seen == [{"row": 3}, {"row": 3, "attempt": 1}]


@FORMS
def test_asking_the_judge_again_does_not_put_a_text_into_the_pool_twice(form):
    def judge(samples):
        return [1.0 if s.metadata.get("attempt") else Score.invalid("hm") for s in samples]

    new = diversity(form)
    total = WeightedSum({"judge": judge, "new": new})
    new.reward(samples_of(["the sea"]))
    scores = score_with_retries(total, samples_of(["a red bird", "the sea"]))
    assert values(scores) == [2.0, pytest.approx(1.0, abs=1e-6)]  # the bird is new, whatever the judge's trouble
    assert new.pool == ["the sea", "a red bird", "the sea"]


# --- rewards that return something else --------------------------------------------------------------------------


def forgets(samples):
    """Has no return."""


class Bare(Reward):
    """Returns what it is told to."""

    name = "bare"

    def __init__(self, scores):
        self.scores = scores

    def reward(self, samples):
        return self.scores


@pytest.mark.parametrize(
    ("reward", "match"),
    [
        (forgets, "reward 'forgets' returned None: it must return a list"),
        (lambda samples: 0.5, "reward 'lambda' returned 0.5"),
        (lambda samples: "high", "reward 'lambda' returned 'high'"),
        (lambda samples: {"a": 1}, "reward 'lambda' returned {'a': 1}"),
        (lambda samples: [1.0, None], "reward 'lambda' returned None for a sample: it must be a number or a Score"),
        (lambda samples: [1.0, [2.0]], r"returned \[2.0\] for a sample"),
        (lambda samples: [1.0], "reward 'lambda' returned 1 scores for 2 samples"),
        (lambda samples: [1.0] * 3, "reward 'lambda' returned 3 scores for 2 samples"),
        (Bare(None), "reward 'bare' returned None: it must return a Score per sample"),
        (Bare([Score(1.0)]), "reward 'bare' returned 1 scores for 2 samples"),
        (Bare([1.0, 2.0]), r"reward 'bare' returned \[1.0, 2.0\]: .* a Score per sample"),
    ],
)
def test_a_reward_that_returns_something_else_is_named(reward, match):
    samples = [Sample("a"), Sample("b")]
    for asked in (resolve("reward", reward), WeightedSum({"term": reward})):
        with pytest.raises(InputError, match=match):
            score_with_retries(asked, samples)


@pytest.mark.parametrize("values", [(1.0, 2), np.float32([1, 2]), iter([1, np.float64(2)]), (Score(1.0), 2.0)])
def test_numbers_of_any_kind_are_scores(values):
    assert [score.value for score in resolve("reward", lambda samples: values).reward([Sample("a")] * 2)] == [1, 2]
