"""Candidates: temperatures and seeds of the tries, what is kept, failures, and files of ranked lists."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructgym.envs.tasks.responses.candidates import (
    Candidates,
    DiverseSampling,
    RankedList,
    read_ranked_lists,
    sample_candidates,
    write_ranked_lists,
)
from instructgym.llm_backends import BackendError, ContextLengthError, ScriptedBackend, request_seed
from instructgym.llm_backends.local.backend import TransformersBackend

APART = ["red fish swim", "old trees grow", "birds sing loud", "he runs fast"]
CLOSE = ["one two three four five"] * 4


class Tries(ScriptedBackend):
    """Replies with one list of texts (or an error) per temperature, and notes the requests."""

    def __init__(self, by_temperature):
        super().__init__()
        self.by_temperature, self.seen = by_temperature, []

    def _complete(self, prompt, sampling):
        self.seen.append((prompt, sampling))
        given = self.by_temperature[sampling.temperature]
        given = given[prompt] if isinstance(given, dict) else given
        if isinstance(given, BackendError):
            return given
        texts = iter(given)
        self.reply = lambda _: next(texts)
        return super()._complete(prompt, sampling)


def test_one_try_where_responses_differ():
    backend = Tries({1.0: APART})
    [found] = sample_candidates(backend, ["p"])
    assert found == Candidates(tuple(APART), 1.0, 1, 0.0, finished=(True,) * 4)
    [(_, sampling)] = backend.seen
    assert (sampling.n, sampling.max_tokens, sampling.top_p) == (4, 512, 1.0)


def test_the_temperature_rises_for_the_prompts_that_need_it():
    backend = Tries({1.0: {"p": APART, "q": CLOSE}, 1.1: CLOSE, 1.2: APART})
    first, second = sample_candidates(backend, ["p", "q"], seed=7)
    assert (first.tries, first.temperature, second.tries, second.temperature) == (1, 1.0, 3, 1.2)
    assert second.texts == tuple(APART) and second.max_rouge == 0
    assert [(prompt, s.temperature) for prompt, s in backend.seen] == [("p", 1.0), ("q", 1.0), ("q", 1.1), ("q", 1.2)]
    assert [s.seed for _, s in backend.seen] == [request_seed(7, *at) for at in ((0, 0), (1, 0), (1, 1), (1, 2))]
    assert backend.usage.calls == 3


def test_where_no_try_is_enough_the_lowest_mean_is_kept():
    near = ["one two three four five", "one two three four six", "seven eight nine", "seven eight nine"]
    backend = Tries({1.0: CLOSE, 1.1: near, 1.2: CLOSE})
    [found] = sample_candidates(backend, ["p"])
    assert (found.texts, found.temperature, found.tries, found.max_rouge) == (tuple(near), 1.1, 3, 1.0)
    assert found.distinct == tuple(near[:3])


def test_a_rouge_of_the_threshold_is_too_much_and_stems_are_compared():
    texts = ["one two three four five", "one two three four six"]  # 4 of 5 words
    settings = DiverseSampling(n=2, tries=1)
    [found] = sample_candidates(Tries({1.0: texts}), ["p"], settings)
    assert found.max_rouge == pytest.approx(0.8)
    for second, tries in (("one two three four six", 2), ("one two three five six seven", 1)):
        [found] = sample_candidates(
            Tries({1.0: [texts[0], second], 1.1: ["a", "b"]}), ["p"], DiverseSampling(n=2, tries=2)
        )
        assert found.tries == tries
    [found] = sample_candidates(Tries({1.0: ["runs jumping", "running jumps"]}), ["p"], settings)
    assert found.max_rouge == 1.0


def test_a_failed_request_is_a_try_and_typed():
    down, long = BackendError("down"), ContextLengthError("long")
    backend = Tries({1.0: {"p": down, "q": down, "r": long}, 1.1: {"p": APART, "q": down}, 1.2: down})
    first, second, third = sample_candidates(backend, ["p", "q", "r"])
    assert first == Candidates(tuple(APART), 1.1, 2, 0.0, (down,), (True,) * 4)
    assert second == Candidates((), 1.2, 3, None, (down, down, down))
    assert third == Candidates((), 1.0, 1, None, (long,)) and third.distinct == ()


def test_empty_and_foreign_duplicates_are_alike():
    [found] = sample_candidates(Tries({1.0: ["", "", "猫", "猫"]}), ["p"], DiverseSampling(tries=1))
    assert found.max_rouge == 1.0 and found.distinct == ("猫",)


def test_a_part_of_the_rows_gives_the_same_responses(tiny_model_path):
    backend = TransformersBackend(str(tiny_model_path), dtype="float32")
    settings = DiverseSampling(n=3, max_tokens=6)
    prompts = ["the cat", "a dog sat", "on the mat"]
    whole = sample_candidates(backend, prompts, settings, seed=3)
    assert sample_candidates(backend, prompts[1:], settings, seed=3, rows=[1, 2]) == whole[1:]
    assert sample_candidates(backend, prompts, settings, seed=4) != whole
    assert all(len(found.texts) == 3 and found.max_rouge is not None for found in whole)


@pytest.mark.parametrize(
    "bad",
    [{"n": 1}, {"temperature": 0.0}, {"step": -0.1}, {"tries": 0}, {"threshold": 0.0}, {"max_tokens": 0}, {"top_p": 2}],
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        DiverseSampling(**bad)


def test_row_numbers_are_those_of_the_prompts():
    with pytest.raises(ValueError, match="2 prompts but 1 row numbers"):
        sample_candidates(ScriptedBackend(), ["p", "q"], rows=[0])
    assert sample_candidates(ScriptedBackend(), []) == []


# --- ranked lists ---

WORDS = st.text(alphabet=st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(str.strip)
SCORED = st.lists(st.tuples(WORDS, st.floats(allow_nan=False, allow_infinity=False)), min_size=1, max_size=4)


@given(WORDS, SCORED, st.none() | WORDS)
def test_what_was_written_is_read(tmp_path_factory, prompt, scored, reference):
    texts, scores = zip(*scored, strict=True)
    lists = [RankedList("a", prompt, texts, scores, reference), RankedList("b", "q", ("x",), (1,), metadata={"k": 1})]
    path = tmp_path_factory.mktemp("lists") / "deep" / "lists.jsonl"
    write_ranked_lists(path, lists)
    assert read_ranked_lists(path) == lists
    assert [file.name for file in path.parent.iterdir()] == ["lists.jsonl"]


ROW = {"id": "a", "prompt": "p", "candidates": ["x", "y"], "scores": [1, 0.5]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "'id' must be a text"),
        ({"id": "first"}, "'id' 'first' is that of .* row 1"),
        ({"prompt": None}, "'prompt' must be a text"),
        ({"candidates": "xy"}, "'candidates' must be a list"),
        ({"candidates": []}, "'candidates' is empty"),
        ({"candidates": ["x", " "]}, r"'candidates\[1\]' must be a text"),
        ({"candidates": ["x", 3]}, r"'candidates\[1\]' must be a text"),
        ({"candidates": ["x", "\ud800"]}, r"'candidates\[1\]' holds a lone surrogate"),
        ({"scores": [1]}, "'scores' has 1 numbers for 2 candidates"),
        ({"scores": [1, True]}, r"'scores\[1\]' must be a number, got true"),
        ({"scores": [1, "2"]}, r"'scores\[1\]' must be a number"),
        ({"scores": [1, float("nan")]}, "'scores' has nan in place 1"),
        ({"scores": [1, 10**400]}, "too large"),
        ({"reference": 3}, "'reference' must be a text"),
        ({"metadata": []}, "'metadata' is a list"),
        ({"score": [1]}, "unknown field 'score'"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    path = tmp_path / "lists.jsonl"
    rows = [ROW | {"id": "first"}, ROW | change]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=f"lists.jsonl row 2: .*{message}"):
        read_ranked_lists(path)


@pytest.mark.parametrize("missing", ["id", "prompt", "candidates", "scores"])
def test_missing_fields_are_named(tmp_path, missing):
    path = tmp_path / "lists.jsonl"
    path.write_text(json.dumps({name: value for name, value in ROW.items() if name != missing}))
    with pytest.raises(ValueError, match=f"row 1: field '{missing}' must be .*it is missing"):
        read_ranked_lists(path)


def test_an_empty_file_and_bad_lists_are_refused(tmp_path):
    (tmp_path / "lists.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no ranked list"):
        read_ranked_lists(tmp_path / "lists.jsonl")
    for text, message in ((" ", "has a blank text in place 1"), ("\ud800", "in place 1 holds a lone surrogate")):
        with pytest.raises(ValueError, match=f"ranked list 'a': field 'candidates' {message}"):
            RankedList("a", "p", ("x", text), (1, 0))


def test_numbers_and_ends_of_the_distinct_ones():
    drawn = Candidates(("a b", " ", "a  b", "c", "c"), 1.0, 1, 0.5, finished=(True, True, False, False, True))
    assert drawn.distinct_indices == (0, 3) and drawn.distinct == ("a b", "c")
    assert [drawn.finished[number] for number in drawn.distinct_indices] == [True, False]


def test_a_response_that_a_limit_cut_off_is_not_finished(tiny_model_path):
    backend = TransformersBackend(tiny_model_path)
    [short] = sample_candidates(backend, ["Say"], DiverseSampling(max_tokens=2))
    assert short.finished == (False,) * 4
