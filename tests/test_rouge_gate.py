"""The ROUGE-L gate says what comparing with every text of the pool says, and stays fast."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from instructgym.envs.tasks.instruction.seeds import load_instructions
from instructgym.rewards import RougeGate, RougePool
from instructgym.rewards.texts import rouge
from instructgym.rewards.texts.rouge import TOLERANCE

SCORER = RougeScorer(["rougeL"])
# Few words, so that texts overlap; repeated words, case, punctuation and words without an ASCII letter.
WORD = st.sampled_from(["the", "The", "sea", "bird", "sings,", "red", "a", "é", "--"])
TEXT = st.lists(WORD, max_size=9).map(" ".join)


def reference(text, others):
    """Similarities to all others by the rouge-score package."""
    return [SCORER.score(other, text)["rougeL"].fmeasure for other in others]


@given(TEXT, st.lists(TEXT, max_size=12))
def test_nearest_is_the_maximum_over_all_pairs(text, others):
    scores = reference(text, others)
    best = max(scores, default=0.0)
    expected = (best, scores.index(best)) if best > 0 else (0.0, -1)
    assert RougeGate(texts=others).nearest(text) == expected


@given(st.lists(TEXT, max_size=20), st.sampled_from([0.3, 0.5, 0.6, 0.7, 0.8, 1.0]))
def test_the_gate_accepts_what_the_exact_gate_accepts(texts, threshold):
    gate, kept = RougeGate(threshold), []
    for text in texts:
        admitted = all(score <= threshold + TOLERANCE for score in reference(text, kept))
        assert gate.add_if_new(text) == admitted
        kept += [text] * admitted
        assert len(gate) == len(kept)


@given(TEXT, st.lists(TEXT, max_size=12), st.floats(0, 1))
def test_similarities_up_to_a_floor_are_not_looked_for(text, others, floor):
    similarity, index = RougePool(others).most_similar(text, floor)
    scores = reference(text, others)
    best = max(scores, default=0.0)
    assert (similarity, index) == ((best, scores.index(best)) if best > floor else (floor, -1))


@given(st.lists(TEXT, min_size=1, max_size=10), TEXT, st.data())
def test_indices_count_from_the_oldest_text_that_is_left(texts, text, data):
    pool, gone = RougePool(texts), data.draw(st.integers(0, len(texts)))
    for _ in range(gone):
        pool.discard_oldest()
    assert pool.most_similar(text) == RougePool(texts[gone:]).most_similar(text)


def test_a_pool_that_discards_for_long_forgets_and_answers_alike():
    texts = [f"number {i} of {i % 7} birds" for i in range(500)]
    pool = RougePool()
    for text in texts:
        pool.add(text)
        if len(pool) > 40:
            pool.discard_oldest()
    assert len(pool) == 40 and len(pickle.dumps(pool)) < len(pickle.dumps(RougePool(texts))) / 2
    assert pool.most_similar("number 470 of birds") == RougePool(texts[-40:]).most_similar("number 470 of birds")
    with pytest.raises(IndexError, match="empty"):
        RougePool().discard_oldest()


WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


@pytest.mark.parametrize(
    ("shared", "size", "other", "kept"),
    [
        (7, 10, 10, True),  # 0.7 exactly
        (7, 7, 13, True),  # 0.7, but rouge-score's floats say 0.7000000000000001
        (7, 9, 10, False),  # 14 / 19 = 0.737
        (8, 10, 10, False),  # 0.8
        (7, 10, 11, True),  # 2 / 3
    ],
)
def test_a_similarity_of_exactly_the_threshold_passes(shared, size, other, kept):
    first = WORDS[:shared] + [f"a{i}" for i in range(size - shared)]
    second = WORDS[:shared] + [f"b{i}" for i in range(other - shared)]
    gate = RougeGate(0.7, [" ".join(second)])
    similarity, index = gate.nearest(" ".join(first))
    assert similarity == pytest.approx(2 * shared / (size + other)) and index == 0
    assert gate.rejects(similarity) is not kept
    assert gate.add_if_new(" ".join(first)) is kept
    assert len(gate) == 1 + kept


def test_order_and_repetition_count():
    gate = RougeGate(texts=["one two three four", "bird bird bird sea"])
    assert gate.nearest("four three two one")[0] == pytest.approx(0.25)
    assert gate.nearest("bird bird red tree") == (pytest.approx(0.5), 1)


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.01])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\]"):
        RougeGate(threshold)


def instruction_like(count, seed=0):
    """Texts of the length and word frequencies of instructions: pieces of the package's seeds, cut and joined anew."""
    rng = np.random.default_rng(seed)
    seeds = [instruction.text.split() for instruction in load_instructions()]
    words = [word for seed_words in seeds for word in seed_words]
    texts = []
    for _ in range(count):
        head, tail = (seeds[i] for i in rng.integers(len(seeds), size=2))
        own = [words[i] for i in rng.integers(len(words), size=rng.integers(2, 8))]
        texts.append(" ".join([*head[: rng.integers(1, 6)], *own, *tail[-rng.integers(1, 6) :]]))
    return texts


def test_a_large_pool_is_searched_exactly_and_mostly_without_comparing(monkeypatch):
    texts = instruction_like(2100)
    pool = RougePool(texts[:2000])
    for text in texts[2000:2004]:
        scores = reference(text, texts[:2000])
        assert pool.most_similar(text) == (max(scores), scores.index(max(scores)))
    compared, length = [], rouge.lcs_length
    monkeypatch.setattr(rouge, "lcs_length", lambda *given: compared.append(1) or length(*given))
    for text in texts[2000:]:
        pool.nearest(text)
    assert 100 <= len(compared) < 2000 * 100 / 20
