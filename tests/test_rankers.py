"""Rankers: what each one measures, how often it asks, duplicates and ties, and what has no ranking."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructgym.llm_backends import (
    BackendError,
    FunctionBackend,
    ScriptedBackend,
    UnknownPartError,
    UnsupportedRequestError,
    resolve,
)
from instructgym.llm_backends.local.backend import TransformersBackend
from instructgym.llm_backends.prompting import load_prompts
from instructgym.rewards import (
    CandidateScores,
    ContextualRanker,
    GroundTruthRanker,
    NonFiniteRewardError,
    PairwiseRanker,
    ProbabilisticRanker,
    RankingJudge,
    Sample,
    Score,
    pairwise_rouge_l,
    rouge_l,
)
from instructgym.rewards.judges.ranking import ranking_prompt
from instructgym.rewards.rankers.pairwise import all_pairs, heapsort, sliding

TEXTS = ["q3", "q1", "q4", "q2"]
"""Candidates that say how good they are; the lowest number is the best."""

FORMS = ("backend", "chat")


def chat(reply, **kwargs) -> ScriptedBackend:
    return ScriptedBackend(reply=reply, prompt_style="chat", **kwargs)


def shown(prompt: str) -> dict[str, str]:
    """The candidates of a contextual or pairwise request by letter."""
    found = re.findall(r"<(candidate|response)_(\w)>\n(.*?)\n</\1_\2>", prompt, re.DOTALL)
    return {letter.upper(): text for _, letter, text in found}


def asked_by(act) -> str:
    """The one request of what is done with a judge."""
    seen = []
    act(chat(lambda prompt: seen.append(prompt) or by_quality(prompt)))
    [prompt] = seen
    return prompt


def by_quality(prompt: str) -> str:
    candidates = shown(prompt)
    return " > ".join(sorted(candidates, key=candidates.__getitem__))


def better(prompt: str) -> str:
    candidates = shown(prompt)
    return min(candidates, key=lambda letter: int(candidates[letter][1:]))


# --- the contract ---


def test_places_share_ties_and_skip_none():
    assert CandidateScores(np.array([1.5, 3.0, 1.5, -2.0])).places.tolist() == [1, 0, 1, 2]
    result = CandidateScores.invalid(3, "why", calls=2)
    assert (result.valid, result.calls, result.feedback) == (False, 2, "why")
    assert result.scores.dtype == np.float32 and result.scores.tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [[math.nan], [math.inf, 1], [[1.0]]])
def test_scores_are_one_finite_number_each(bad):
    with pytest.raises(NonFiniteRewardError, match="one finite number"):
        CandidateScores(np.array(bad))


def test_lengths_have_to_agree():
    ranker = resolve("ranker", lambda prompt, texts: [len(text) for text in texts])
    assert ranker.rank([], []) == []
    for args, message in (
        ((["p"], []), "1 prompts but 0 lists"),
        ((["p"], [["a"]], ["r", "s"]), "1 prompts but 2 references"),
        ((["p"], [["a"]], None, [1, 2]), "1 prompts but 2 seeds"),
        ((["p", "q"], [["a"], []]), "prompt 1 has no candidates"),
        ((["p"], ["ab"]), "must be a list of texts"),
        ((["p"], [["a", None]]), "must be a list of texts"),
    ):
        with pytest.raises(ValueError, match=message):
            ranker.rank(*args)


def test_a_function_is_a_ranker():
    first, second = resolve("ranker", lambda prompt, texts: [len(prompt + text) for text in texts]).rank(
        ["p", "pp"], [["a", "aaa"], ["bb"]]
    )
    assert (first.scores.tolist(), second.scores.tolist()) == ([2, 4], [4])
    with pytest.raises(ValueError, match="1 scores for 2 candidates"):
        resolve("ranker", lambda prompt, texts: [0.0]).rank(["p"], [["a", "b"]])


@pytest.mark.parametrize("name", ["probabilistic", "contextual", "pairwise"])
def test_rankers_are_parts(name):
    ranker = resolve("ranker", {"id": name, "kwargs": {"backend": "scripted"}})
    assert ranker.name == name
    with pytest.raises(UnknownPartError, match="ground-truth"):
        resolve("ranker", "nosuch")


# --- probabilistic ---


def test_the_teachers_score_is_the_sum_over_a_power_of_the_length():
    totals = {"a b c d": -8.0, "a b": -3.0, "e": -2.5}
    backend = ScriptedBackend(score=lambda prompt, text: totals[text.strip()])
    for beta, expected in (
        (1.3, [-8 / 4**1.3, -3 / 2**1.3, -2.5]),
        (1.0, [-2.0, -1.5, -2.5]),
        (0.0, [-8.0, -3.0, -2.5]),
    ):
        [found] = ProbabilisticRanker(backend, beta).rank(["Do it."], [list(totals)])
        assert found.scores == pytest.approx(expected, rel=1e-6) and found.calls == 3
    assert ProbabilisticRanker(backend).beta == 1.3
    [found] = ProbabilisticRanker(backend, 1.3).rank(["Do it."], [list(totals)])
    assert found.places.tolist() == [1, 0, 2]


def test_all_prompts_go_to_the_teacher_in_one_call():
    backend = ScriptedBackend()
    found = ProbabilisticRanker(backend).rank(["p", "q"], [["a", "b", "c"], ["d"]])
    assert [len(one.scores) for one in found] == [3, 1] and backend.usage.calls == 1


@pytest.mark.parametrize("form", ["backend", "raw", "chat"])
def test_the_score_is_that_of_a_real_models_log_probs(tiny_model_path, form):
    backend = TransformersBackend(str(tiny_model_path))
    texts = ["the cat", "a dog sat on the mat"]
    [found] = ProbabilisticRanker(backend, form=form).rank(["Tell me"], [texts])
    prompt = "Tell me" if form == "raw" else [{"role": "user", "content": "Tell me"}]
    lead = " " if form == "raw" else ""
    rows = backend.logprobs([prompt] * 2, [lead + text for text in texts])
    assert found.scores == pytest.approx([row.sum() / len(row) ** 1.3 for row in rows], rel=1e-5)


def test_a_raw_prompt_is_handed_on_as_it_is():
    seen = []
    backend = ScriptedBackend(score=lambda prompt, text: seen.append((prompt, text)) or -1.0)
    ProbabilisticRanker(backend, form="raw").rank(["Film review: the", "<user>hi\n"], [["plot", " plot"], ["plot"]])
    assert seen == [("Film review: the", " plot"), ("Film review: the", " plot"), ("<user>hi\n", "plot")]


def test_a_small_models_few_shot_form_and_its_chat_form(tiny_model_path):
    """By default the form is the backend's own; a teacher that drew candidates as a chat model is asked as one."""
    backend = TransformersBackend(str(tiny_model_path), prompt_style="completion")
    [few_shot], [chat] = (ProbabilisticRanker(backend, form=form).rank(["Tell"], [["a b"]]) for form in FORMS)
    own = load_prompts("instructgym.rewards.quality", "quality")["likelihood"]["completion"].replace("{prompt}", "Tell")
    [row] = backend.logprobs([own], [" a b"])
    assert few_shot.scores[0] == pytest.approx(row.sum() / len(row) ** 1.3, rel=1e-5) != chat.scores[0]
    with pytest.raises(ValueError, match="unknown form"):
        ProbabilisticRanker(backend, form="free")


def test_an_empty_candidate_is_below_all_others():
    backend = ScriptedBackend(score=lambda prompt, text: -4.0)
    first, second = ProbabilisticRanker(backend).rank(["p", "q"], [["", "a", ""], ["", ""]])
    assert first.scores.tolist() == [-5, -4, -5] and first.calls == 1
    assert second.places.tolist() == [0, 0] and second.calls == 0


def test_a_log_prob_that_cannot_be_had_leaves_no_ranking_of_that_prompt():
    class Broken(ScriptedBackend):
        def _logprobs(self, prompts, completions):
            rows = super()._logprobs(prompts, completions)
            return [BackendError("too long") if "bad" in c else r for c, r in zip(completions, rows, strict=True)]

    for form in ("backend", "raw", "chat"):
        first, second = ProbabilisticRanker(Broken(), form=form).rank(["p", "q"], [["a", "bad"], ["a", "b"]])
        assert not first.valid and "candidate 1: too long" in first.feedback and second.valid
        [found] = ProbabilisticRanker(ScriptedBackend(score=lambda p, t: -math.inf), form=form).rank(["p"], [["a"]])
        assert not found.valid
        with pytest.raises(UnsupportedRequestError):
            ProbabilisticRanker(FunctionBackend(reply=str), form=form)


@pytest.mark.parametrize("beta", [-0.1, math.inf, math.nan])
def test_bad_betas(beta):
    with pytest.raises(ValueError, match="beta"):
        ProbabilisticRanker("scripted", beta=beta)


# --- contextual ---


def test_contextual_scores_follow_the_texts_whatever_the_presentation():
    backend = chat(by_quality)
    found = ContextualRanker(backend, rounds=3).rank(["Do it."] * 4, [TEXTS] * 4, seeds=range(4))
    assert all(one.scores.tolist() == [-2, 0, -3, -1] and one.calls == 3 for one in found)
    assert backend.usage.calls == 1 and "agreement of the rounds 1" in found[0].feedback


def test_presentation_is_shuffled_by_the_seed_and_repeats():
    seen = []
    backend = chat(lambda prompt: seen.append(tuple(shown(prompt).values())) or by_quality(prompt))
    ContextualRanker(backend).rank(["Do it."] * 20, [TEXTS] * 20, seeds=range(20))
    assert len(set(seen)) > 8
    ContextualRanker(backend).rank(["Do it."] * 20, [TEXTS] * 20, seeds=range(20))
    assert seen[:20] == seen[20:]


def test_duplicates_are_shown_once_and_score_alike():
    seen = []
    backend = chat(lambda prompt: seen.append(shown(prompt)) or by_quality(prompt))
    [found] = ContextualRanker(backend).rank(["Do it."], [["q2", "q1", " q2\n", "q3"]])
    assert sorted(seen[0].values()) == ["q1", "q2", "q3"] and found.scores.tolist() == [-1, 0, -1, -2]
    same, alone = ContextualRanker(chat(lambda prompt: pytest.fail("asked"))).rank(["p", "q"], [["a", "a "], ["b"]])
    assert (same.places.tolist(), same.calls, alone.places.tolist(), alone.calls) == ([0, 0], 0, [0], 0)


def test_each_kind_of_request_has_its_criteria():
    seen = {}
    for kind in ("open", "closed", "either"):
        seen[kind] = asked_by(lambda backend, kind=kind: ContextualRanker(backend, kind).rank(["p"], [TEXTS]))
        few = ranking_prompt("completion", "p", TEXTS, kind).split("\n")[0]
        seen[f"{kind} few"] = few
    assert len(set(seen.values())) == 6 and not any("{" in text for text in seen.values())
    assert "keeps to the request" in seen["open"] and "how clear" not in seen["open"]
    assert "how clear" in seen["closed"] and "keeps to the request" not in seen["closed"]
    assert all(word in seen["either"] for word in ("how clear", "keeps to the request", "Decide first"))
    group = [Sample(text, "p", group="g") for text in TEXTS]
    judged = asked_by(lambda backend: RankingJudge(backend).reward(group))
    assert "keeps to the request" in judged and "Decide first" not in judged


def test_the_judges_own_answer_is_ranked_among_the_candidates():
    def reply(prompt):
        return by_quality(prompt) if shown(prompt) else {"first": "q0 ", "second": "q2"}[prompt]

    backend = chat(reply)
    first, second = ContextualRanker(backend, own_answer=True).rank(["first", "second"], [TEXTS, ["q3", "q2", "q1"]])
    assert first.added == ("q0",) and first.added_scores.tolist() == [0]
    assert first.scores.tolist() == [-3, -1, -4, -2] and first.calls == 2
    assert second.added_scores.tolist() == [-1] and second.scores.tolist() == [-2, -1, 0]
    assert backend.usage.calls == 2 and ContextualRanker(backend, own_answer=True, rounds=3).max_calls(5) == 4
    [alone] = ContextualRanker(backend, own_answer=True).rank(["first"], [["q9"]])
    assert (alone.scores.tolist(), alone.added_scores.tolist()) == ([-1], [0])


def test_without_its_own_answer_there_is_no_ranking():
    def reply(prompt):
        return by_quality(prompt) if shown(prompt) else BackendError("down") if prompt == "x" else prompt.strip("y")

    found = ContextualRanker(chat(reply), own_answer=True).rank(["x", "y", "q0"], [TEXTS] * 3)
    assert [one.valid for one in found] == [False, False, True] and [one.calls for one in found] == [1, 1, 2]
    assert "own answer: down" in found[0].feedback and "it is empty" in found[1].feedback


def test_nonsense_is_no_ranking_and_a_retry_is_sampled():
    seen = []
    backend = chat(lambda prompt, sampling: seen.append(sampling.temperature) or "hm")
    [found] = ContextualRanker(backend).rank(["p"], [TEXTS])
    assert not found.valid and found.calls == 1 and "not a ranking of 4" in found.feedback
    ContextualRanker(backend).rank_samples([[Sample(text, "p", metadata={"attempt": 1}) for text in TEXTS]])
    assert seen[0] == 0 < seen[1]


def test_too_many_candidates_are_refused_before_anything_is_asked():
    backend = chat(lambda prompt: pytest.fail("asked"))
    with pytest.raises(ValueError, match="at most 26 different candidates, got 27"):
        ContextualRanker(backend, own_answer=True).rank(["p", "q"], [TEXTS, list(map(str, range(26)))])
    for kwargs in ({"rounds": 0}, {"kind": "ajar"}, {"answer_tokens": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(kwargs)) if 'kind' not in kwargs else 'ajar'}"):
            ContextualRanker(backend, **kwargs)


# --- pairwise ---


def play(schedule, judge):
    """The scores of a schedule, and the pairs it asked about."""
    asked, outcomes = [], None
    while True:
        try:
            pairs = next(schedule) if outcomes is None else schedule.send(outcomes)
        except StopIteration as end:
            return end.value, asked
        asked += pairs
        outcomes = [judge(i, j) for i, j in pairs]


def by_value(values):
    return lambda i, j: 1.0 if values[i] > values[j] else 0.5 if values[i] == values[j] else 0.0


WEAK_ORDERS = st.lists(st.integers(0, 6), min_size=2, max_size=14)


@settings(max_examples=200)
@given(WEAK_ORDERS)
def test_every_sort_finds_the_order_with_its_ties(values):
    count = len(values)
    expected = CandidateScores(np.array(values)).places
    for schedule in (all_pairs(count), heapsort(count), sliding(count, count - 1)):
        scores, asked = play(schedule, by_value(values))
        assert CandidateScores(scores).places.tolist() == expected.tolist()
        assert len({frozenset(pair) for pair in asked}) == len(asked)  # no pair twice


@settings(max_examples=200)
@given(st.integers(2, 14).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.integers(1, n))))
def test_passes_settle_the_top_and_leave_the_rest_together(case):
    values, passes = case
    scores, asked = play(sliding(len(values), passes), by_value(values))
    expected = np.minimum(CandidateScores(np.array(values)).places, passes)
    assert CandidateScores(scores).places.tolist() == expected.tolist()
    assert len(asked) <= passes * (len(values) - 1)


@given(st.integers(2, 12), st.sampled_from(["heapsort", "sliding", "all"]), st.randoms(use_true_random=False))
def test_a_judge_that_contradicts_itself_ends_as_well(count, method, random):
    schedule = {"all": all_pairs, "heapsort": heapsort, "sliding": lambda n: sliding(n, 3)}[method](count)
    scores, asked = play(schedule, lambda i, j: random.choice([0.0, 0.5, 1.0]))
    assert scores.shape == (count,) and len(asked) <= PairwiseRanker("scripted", method, passes=3).max_comparisons(
        count
    )


@pytest.mark.parametrize("count", [2, 3, 4, 7, 16, 50])
def test_numbers_of_comparisons(count):
    texts = [f"q{number}" for number in np.random.default_rng(count).permutation(count)]
    places = [int(text[1:]) for text in texts]
    made = {}
    for method in ("all", "heapsort", "sliding"):
        ranker = PairwiseRanker(chat(better), method, passes=2)
        [found] = ranker.rank(["p"], [texts])
        made[method] = found.calls // 2
        assert found.calls == ranker.backend.usage.requests <= ranker.max_calls(count)
        assert found.places.tolist() == (places if method != "sliding" else [min(place, 2) for place in places])
    assert made["all"] == count * (count - 1) // 2
    assert count - 1 <= made["sliding"] <= 2 * (count - 1)
    # The best comes last: each pass carries it past all others, so no comparison is known from the pass before.
    reverse = PairwiseRanker(chat(better), "sliding", passes=2).rank(["p"], [[f"q{count - i}" for i in range(count)]])
    assert reverse[0].calls // 2 == (count - 1) + (count - 2)
    assert made["heapsort"] <= 2 * count * math.log2(count)
    if count == 50:
        assert made["heapsort"] < 0.4 * made["all"]


def test_prompts_are_compared_side_by_side():
    backend = chat(better)
    one = PairwiseRanker(backend, "heapsort").rank(["p"], [[f"q{i}" for i in range(6)]])
    steps = backend.usage.calls
    many = PairwiseRanker(backend, "heapsort").rank(["p"] * 5 + ["r"], [[f"q{i}" for i in range(6)]] * 5 + [["q1"]])
    assert backend.usage.calls - steps == steps
    assert [found.scores.tolist() for found in many] == [one[0].scores.tolist()] * 5 + [[0.0]]
    assert many[5].calls == 0


@pytest.mark.parametrize("method", ["all", "heapsort", "sliding"])
def test_a_judge_that_follows_the_position_finds_ties(method):
    [found] = PairwiseRanker(chat(lambda prompt: "A"), method).rank(["p"], [TEXTS])
    assert found.places.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("method", ["all", "heapsort", "sliding"])
def test_twins_are_compared_once(method):
    ranker = PairwiseRanker(chat(better), method, passes=9)
    [found] = ranker.rank(["p"], [["q2", "q1", " q2", "q2"]])
    assert found.places.tolist() == [1, 0, 1, 1] and found.calls == 2
    [same] = ranker.rank(["p"], [["q1", "q1\n"]])
    assert same.places.tolist() == [0, 0] and same.calls == 0


@pytest.mark.parametrize("method", ["all", "heapsort", "sliding"])
def test_a_comparison_without_outcome_ends_that_prompt_only(method):
    backend = chat(lambda prompt: "hm" if "broken" in shown(prompt).values() else better(prompt))
    first, second = PairwiseRanker(backend, method, passes=9).rank(["p", "q"], [["q1", "broken", "q2"], TEXTS])
    assert (
        not first.valid and 2 <= first.calls <= 6 and re.search(r"candidates \d and \d: not a verdict", first.feedback)
    )
    assert second.places.tolist() == [2, 0, 3, 1]


def test_bad_pairwise_arguments():
    for kwargs, message in (({"method": "bogo"}, "bogo"), ({"passes": 0}, "passes"), ({"mode": "x"}, "judge mode")):
        with pytest.raises(ValueError, match=message):
            PairwiseRanker("scripted", **kwargs)


# --- ground truth ---


def test_rouge_l_to_the_reference():
    texts = ["the cat sat", "a dog ran", "the cat sat down"]
    [found] = GroundTruthRanker().rank(["p"], [texts], ["the cat sat down"])
    assert found.scores == pytest.approx([rouge_l(text, "the cat sat down") for text in texts])
    assert found.places.tolist() == [1, 2, 0] and found.calls == 0
    with pytest.raises(ValueError, match="prompt 'p' has none"):
        GroundTruthRanker().rank(["p"], [texts])


def test_any_reward_ranks():
    def reward(samples):
        return [Score(float(len(s.response)), calls=2) if s.response else Score.invalid("blank", 1) for s in samples]

    first, second = GroundTruthRanker(reward).rank(["p", "q"], [["aaa", "a"], ["a", ""]])
    assert first.scores.tolist() == [3, 1] and first.calls == 4
    assert not second.valid and second.calls == 3 and "candidate 1: blank" in second.feedback
    [found] = GroundTruthRanker({"id": "pairwise-judge", "kwargs": {"backend": chat(better)}}).rank(
        ["p"], [["q1", "q3"]], ["q2"]
    )
    assert found.scores.tolist() == [1, 0] and found.calls == 4


# --- similarity ---


@given(st.lists(st.text(alphabet="abc runing.\n", max_size=25), min_size=1, max_size=5))
def test_pairwise_rouge_is_rouge_scores(texts):
    from rouge_score.rouge_scorer import RougeScorer

    for stem in (False, True):
        scorer = RougeScorer(["rougeL"], use_stemmer=stem)
        table = pairwise_rouge_l(texts, stem)
        for i, first in enumerate(texts):
            for j, second in enumerate(texts):
                same = first.split() == second.split()
                expected = 1.0 if same else scorer.score(first, second)["rougeL"].fmeasure
                assert table[i, j] == pytest.approx(expected, abs=1e-12)
