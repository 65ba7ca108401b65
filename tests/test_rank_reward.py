"""The rank reward: places to values, groups, samples alone, retries, and episodes paid by it."""

import gymnasium
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import instructgym
from instructgym.llm_backends import BackendError, ScriptedBackend, resolve
from instructgym.rewards import PairwiseRanker, Ranker, RankReward, Sample, score_with_retries
from instructgym.rewards.rankers.base import CandidateScores


def by_length(prompt: str, texts: list[str]) -> list[float]:
    return [len(text) for text in texts]


def group(*texts: str, name: str = "g", **kwargs) -> list[Sample]:
    return [Sample(text, prompt="Do it.", group=name, **kwargs) for text in texts]


def test_values_go_from_one_to_zero_and_ties_share():
    scores = RankReward(by_length).reward(group("aaaa", "b", "cc", "dd"))
    assert [score.value for score in scores] == [1, 0, 0.5, 0.5]
    assert [score.terms["place"] for score in scores] == [1, 3, 2, 2]
    assert [score.terms["ranker_score"] for score in scores] == [4, 1, 2, 2]
    assert scores[2].feedback == "place 2 of 3" and all(score.terms["alone"] == 0 for score in scores)
    assert all(score.terms["rank"] == score.value for score in scores)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=16))
def test_values_keep_the_order_and_its_ties(lengths):
    values = [score.value for score in RankReward(by_length).reward(group(*("x" * n for n in lengths)))]
    assert all((values[i] > values[j]) == (a > b) for i, a in enumerate(lengths) for j, b in enumerate(lengths))
    if len(set(lengths)) > 1:
        assert (max(values), min(values)) == (1, 0)
    else:
        assert set(values) == {0.5}


def test_groups_are_ranked_apart_in_one_call():
    calls = []

    class Counting(Ranker):
        def _rank(self, groups):
            calls.append([[sample.response for sample in one] for one in groups])
            return [CandidateScores(np.arange(len(one)), calls=3) for one in groups]

    x, y = group("a", "b", name="x"), [Sample("c", "Do that.", episode_id="y"), Sample("d", "Do that.", episode_id="y")]
    scores = RankReward(Counting()).reward([x[0], y[0], x[1], y[1], *group("e", name="z")])
    assert calls == [[["a", "b"], ["c", "d"]]]
    assert [score.value for score in scores] == [0, 0, 1, 1, 0.5]
    assert [score.calls for score in scores] == [3, 3, 0, 0, 0]


def test_a_sample_alone_is_worth_a_half_and_says_so():
    [score] = RankReward(by_length).reward(group("a"))
    assert score.valid and score.value == 0.5 and score.terms == {"rank": 0.5, "alone": 1.0}
    [again] = RankReward(by_length).reward(group("a", metadata={"attempt": 1}))
    assert not again.valid


def test_without_a_ranking_the_whole_group_is_invalid_and_ranked_again():
    replies = []

    def reply(prompt):
        replies.append(prompt)
        return "hm" if len(replies) <= 6 else BackendError("down") if "never" in prompt else "A"

    reward = RankReward(PairwiseRanker(ScriptedBackend(reply=reply, prompt_style="chat")))
    scores = score_with_retries(reward, group("a", "b", "c"))
    assert [score.valid for score in scores] == [True] * 3 and {score.value for score in scores} == {0.5}
    assert [score.calls for score in scores] == [12, 0, 0] and len(replies) == 12
    scores = reward.reward(group("never", "b", name="x") + group("a", "b", name="y"))
    assert [score.valid for score in scores] == [False, False, True, True] and "down" in scores[1].feedback


def test_requests_to_reserve_per_sample():
    backend = ScriptedBackend()
    assert RankReward(PairwiseRanker(backend), largest_group=5).calls_per_sample == 4  # 2 x 10 comparisons, 5 samples
    assert RankReward({"id": "probabilistic", "kwargs": {"backend": backend}}).calls_per_sample == 1
    assert RankReward({"id": "contextual", "kwargs": {"backend": backend, "rounds": 4}}).calls_per_sample == 2
    with pytest.raises(ValueError, match="has 3 samples, the rank reward was built for 2"):
        RankReward(by_length, largest_group=2).reward(group("a", "b", "c"))
    with pytest.raises(ValueError, match="at least 1 sample"):
        RankReward(by_length, largest_group=0)


def test_samples_of_a_group_answer_one_prompt():
    with pytest.raises(ValueError, match=r"the rank reward compares .* group 'g' holds different prompts"):
        RankReward(by_length).reward([Sample("a", "x", group="g"), Sample("b", "y", group="g")])


def test_reset_and_tokenizer_reach_the_ranker():
    seen = []

    class Watching(Ranker):
        def _rank(self, groups):
            return []

        def reset(self):
            seen.append("reset")

        def check_tokenizer(self, tokenizer):
            seen.append(tokenizer)

    reward = RankReward(Watching())
    reward.reset()
    reward.check_tokenizer("tokenizer")
    assert seen == ["reset", "tokenizer"]


def test_it_is_a_part_of_json():
    given = {"id": "rank", "kwargs": {"ranker": {"id": "ground-truth"}}}
    scores = resolve("reward", given).reward(group("a b", "a c", "b", reference="a b c d"))
    assert [score.value for score in scores] == [1, 1, 0]


def test_a_group_of_episodes_is_paid_by_its_places():
    instructgym.register_envs()
    env = gymnasium.make_vec(
        "instructgym/GenerateResponse-v0",
        num_envs=6,
        tokenizer="bytes",
        max_tokens=8,
        group_size=3,
        reward=RankReward(by_length),
    )
    env.reset(seed=0)
    eos = min(env.unwrapped.generation.eos_ids)
    played = env.unwrapped.play([np.array([97] * length + [eos], np.int32) for length in (3, 1, 7, 2, 2, 5)])
    assert [float(rewards.sum()) for rewards in played.rewards] == [0.5, 0, 1, 0, 0, 1]
    assert np.asarray(played.valid).all()
    env.close()
