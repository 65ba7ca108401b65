"""The request journal and the JSONL files below it: nothing is paid twice, nothing torn is believed."""

import asyncio
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from instructgym.llm_backends.base import Backend, BackendError, Completion, Sampling
from instructgym.llm_backends.records import RecordError, append_lines, read_records
from instructgym.llm_backends.replies.journal import Journal, Journaled
from instructgym.llm_backends.scripted import ScriptedBackend

ANY_TEXT = st.text(st.characters(), max_size=8)  # lone surrogates too: servers send them in JSON escapes
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), ANY_TEXT)
ROW = st.dictionaries(ANY_TEXT, st.one_of(SCALAR, st.lists(SCALAR, max_size=3)), max_size=3)


class Counting(Backend):
    """Answers every request differently and remembers what it was asked."""

    def __init__(self, name="counting"):
        self.name, self.asked = name, []

    def _generate(self, prompts, samplings):
        self.asked += zip(prompts, samplings, strict=True)
        self.usage.prompt_tokens += 10 * len(prompts)
        self.usage.cost += 0.5 * len(prompts)
        replies = []
        for prompt, sampling in zip(prompts, samplings, strict=True):
            number = len(self.asked) + len(replies)
            replies.append(
                BackendError(f"no answer to {prompt}")
                if "bad" in prompt
                else [
                    Completion(f"{self.name} {number} {k}\n日本\u2028", [number, k], [-0.1, -float(k)], "stop")
                    for k in range(sampling.n)
                ]
            )
        return replies

    def _logprobs(self, prompts, completions):
        self.asked += zip(prompts, completions, strict=True)
        generator = np.random.default_rng(len(self.asked))
        return [generator.standard_normal(5).astype(np.float32) * 1e-3 - 17 for _ in prompts]


# ---- files ----------------------------------------------------------------------------------------------------------


@given(rows=st.lists(ROW, min_size=1, max_size=4), batches=st.booleans())
@example(rows=[{"lone surrogate": "\ud83d"}], batches=False)
def test_rows_come_back_as_written(tmp_path_factory, rows, batches):
    path = tmp_path_factory.mktemp("records") / "new" / "folder" / "rows.jsonl"
    for part in [rows] if batches else [[row] for row in rows]:
        append_lines(path, part)
    assert read_records(path) == rows


@settings(max_examples=15)
@given(rows=st.lists(ROW, min_size=1, max_size=3))
def test_a_file_cut_at_any_byte_of_its_last_line_loses_that_line_only(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("records") / "rows.jsonl"
    append_lines(path, rows)
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for size in range(start, len(whole)):
        path.write_bytes(whole[:size])
        assert read_records(path) == rows[:-1]
        assert path.stat().st_size == size
        assert read_records(path, repair=True) == rows[:-1]
        append_lines(path, rows[-1:])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("broken", ['{"a": ', "", "no json", "[1, 2]", "3", "null"])
def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path, broken):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{broken}\n{{"a": 3}}\n')
    with pytest.raises(RecordError, match=r"rows\.jsonl line 2"):
        read_records(path)
    with pytest.raises(RecordError, match="line 2"):
        Journal(path)
    assert len(path.read_text().splitlines()) == 3


def test_an_absent_or_empty_file_has_no_rows(tmp_path):
    assert read_records(tmp_path / "absent") == []
    append_lines(tmp_path / "absent", [])
    assert not (tmp_path / "absent").exists()
    (tmp_path / "empty").touch()
    assert read_records(tmp_path / "empty", repair=True) == []


# ---- replies --------------------------------------------------------------------------------------------------------


def test_a_second_run_sends_nothing(tmp_path):
    prompts = ["one", "two", [{"role": "user", "content": "three"}], [1, 2, 3]]
    samplings = [Sampling(seed=i, n=1 + i, stop=("x",)) for i in range(4)]
    first = Journaled(Counting(), Journal(tmp_path / "j.jsonl"))
    replies = first.generate(prompts, samplings)
    assert first.generate(prompts, samplings) == replies

    later = Journaled(Counting(), Journal(tmp_path / "j.jsonl"))
    assert later.generate(prompts[::-1], samplings[::-1]) == replies[::-1]
    assert later.inner.asked == []
    assert later.usage.cache_hits == 4
    assert (later.usage.prompt_tokens, later.usage.cost) == (0, 0)
    assert (later.usage.calls, later.usage.requests) == (1, 4)


def test_only_what_is_missing_is_sent_in_one_call(tmp_path):
    backend = Journaled(Counting(), Journal(tmp_path / "j.jsonl"))
    backend.generate(["b"])
    replies = backend.generate(["a", "b", "c", "a"])
    assert [prompt for prompt, _ in backend.inner.asked] == ["b", "a", "c"]
    assert backend.inner.usage.calls == 2
    assert replies[0] == replies[3] != replies[2]
    assert backend.usage.cache_hits == 2
    assert backend.usage.cost == backend.inner.usage.cost == 1.5
    assert backend.usage.prompt_tokens == 30


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"n": 2}, {"max_tokens": 3}, {"temperature": 0.5}, {"top_p": 0.5}, {"top_k": 2}, {"stop": "a"}],
    ids=str,
)
def test_every_parameter_is_part_of_the_request(tmp_path, change):
    backend = Journaled(Counting(), Journal(tmp_path / "j.jsonl"))
    backend.generate(["a", "a"], [Sampling(), replace(Sampling(), **change)])
    assert len(backend.inner.asked) == 2


def test_equal_requests_have_equal_keys_whatever_their_types(tmp_path):
    backend = Journaled(Counting(), Journal(tmp_path / "j.jsonl"))
    backend.generate([[1, 2]], Sampling(temperature=1.0, stop=("a",), seed=3))
    backend.generate([np.array([1, 2])], Sampling(temperature=1, stop="a", seed=np.int64(3)))
    backend.generate([(1, 2)], Sampling(temperature=np.float32(1), top_p=1, stop=["a"], seed=3))
    assert len(backend.inner.asked) == 1


def test_text_chat_and_token_prompts_are_different_requests(tmp_path):
    backend = Journaled(Counting(), Journal(tmp_path / "j.jsonl"))
    backend.generate(["12", [{"role": "user", "content": "12"}], [{"role": "system", "content": "12"}], [12], [1, 2]])
    assert len(backend.inner.asked) == 5


def test_models_share_a_journal_but_no_replies(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    one, other = (Journaled(Counting(name), journal) for name in ("one", "other"))
    assert one.generate(["a"])[0][0].text.startswith("one ")
    assert other.generate(["a"])[0][0].text.startswith("other ")
    one.logprobs(["a"], ["b"])
    other.logprobs(["a"], ["b"])
    assert len(other.inner.asked) == 2
    assert len(Journal(tmp_path / "j.jsonl")) == 4


def test_an_error_that_the_run_survived_is_replayed_and_one_at_the_end_is_asked_again(tmp_path):
    path = tmp_path / "j.jsonl"
    backend = Journaled(Counting(), Journal(path))
    for _ in range(2):
        good, bad, again = backend.generate(["good", "bad", "bad"])
        assert good[0].text
        assert isinstance(bad, BackendError) and str(bad) == str(again)
    assert [prompt for prompt, _ in backend.inner.asked] == ["good", "bad"]
    assert backend.usage.errors == 4
    reopened = Journaled(Counting(), Journal(path))
    reopened.generate(["bad"])
    assert len(reopened.inner.asked) == 1
    reopened.generate(["better"])
    survived = Journaled(Counting(), Journal(path))
    assert isinstance(survived.generate(["bad"])[0], BackendError) and not survived.inner.asked


def test_a_line_that_is_no_entry_is_named(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"key": "a", "reply": []}\n{"other": 1}\n{"key": "b", "reply": []}\n')
    with pytest.raises(RecordError, match="line 2"):
        Journal(path)


def test_a_models_draws_do_not_reach_the_callers_generators(tmp_path):
    torch = pytest.importorskip("torch")

    def noisy(prompt):
        return f"{random.random()} {np.random.rand()} {torch.rand(1).item()}"

    states = []
    for _ in range(2):  # the first asks, the second replays
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(3)
        Journaled(ScriptedBackend(reply=noisy), Journal(tmp_path / "j.jsonl")).generate(["a"])
        states.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert states[0] == states[1]


@pytest.mark.parametrize("reopen", [False, True])
def test_logprobs_come_back_bit_for_bit(tmp_path, reopen):
    backend = Journaled(Counting(), Journal(tmp_path / "j.jsonl"))
    first = backend.logprobs(["a", "b"], ["x", "y"])
    if reopen:
        backend = Journaled(Counting(), Journal(tmp_path / "j.jsonl"))
    again = backend.logprobs(["a", "b"], ["x", "y"])
    for one, other in zip(first, again, strict=True):
        assert one.dtype == other.dtype == np.float32
        assert one.tobytes() == other.tobytes()


@given(
    text=ANY_TEXT,
    ids=st.lists(st.integers(0, 2**31), max_size=4),
    logprobs=st.lists(st.floats(max_value=0, allow_nan=False), max_size=4),
)
@example(text="\ud83d", ids=[1], logprobs=[float("-inf")])
def test_any_completion_survives(tmp_path_factory, text, ids, logprobs):
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    said = [Completion(text, ids, logprobs, "length")]
    backend = Counting()
    backend._generate = lambda prompts, samplings: [said]
    [told] = Journaled(backend, Journal(path)).generate([text or "a"])
    if not is_whole(text):
        assert isinstance(told, BackendError)  # half a character is no reply
        return
    assert told == said
    assert Journaled(Counting(), Journal(path)).generate([text or "a"]) == [said]


def is_whole(text):
    return not any("\ud800" <= character <= "\udfff" for character in text)


def test_a_journal_cut_at_any_byte_pays_for_its_last_reply_only(tmp_path):
    path = tmp_path / "j.jsonl"
    prompts = ["a", "b", "c"]
    replies = Journaled(Counting(), Journal(path)).generate(prompts)
    whole = path.read_bytes()
    for size in range(whole[:-1].rfind(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:size])
        backend = Journaled(Counting(), Journal(path))
        assert backend.generate(prompts)[:2] == replies[:2]
        assert [prompt for prompt, _ in backend.inner.asked] == ["c"]
        assert len(read_records(path)) == 3


def test_replies_are_on_disk_before_the_caller_sees_them(tmp_path):
    path = tmp_path / "deep" / "j.jsonl"
    backend = Journaled(Counting(), Journal(path))
    assert not path.exists()
    backend.generate(["a", "b"])
    assert len(Journal(path)) == 2


def test_a_call_that_fails_stores_nothing_and_can_be_repeated(tmp_path):
    backend = Journaled(Counting(), Journal(tmp_path / "j.jsonl"))
    working = backend.inner._generate

    def interrupted(prompts, samplings):
        raise KeyboardInterrupt

    backend.inner._generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        backend.generate(["a"])
    backend.inner._generate = working
    assert backend.generate(["a"])[0][0].text
    assert len(read_records(tmp_path / "j.jsonl")) == 1


def test_name_style_and_async_calls_pass_through(tmp_path):
    backend = Journaled(Counting("inner"), Journal(tmp_path / "j.jsonl"))
    assert (backend.name, backend.prompt_style) == ("inner", backend.inner.prompt_style)

    async def many():
        return await asyncio.gather(*(backend.agenerate([f"p{i}"]) for i in range(8)))

    replies = asyncio.run(many())
    assert len(Journal(tmp_path / "j.jsonl")) == 8
    assert [backend.generate([f"p{i}"]) for i in range(8)] == replies
