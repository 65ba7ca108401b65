"""The cache of replies: what is sent, what is stored, several threads and processes, its size."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from fault_server import serving

from instructgym.llm_backends import Sampling, ScriptedBackend, resolve
from instructgym.llm_backends.base import BackendError
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.replies.cache import Cached, ReplyStore
from instructgym.llm_backends.serving.openai_backend import OpenAIBackend


def counting(reply=None, latency=0.0):
    seen = []

    def answer(prompt, sampling):
        seen.append((prompt, sampling.seed))
        return reply(prompt) if reply else f"{prompt}!"

    return ScriptedBackend(reply=answer, latency=latency), seen


def test_equal_requests_are_sent_once_and_then_never_again(tmp_path):
    inner, seen = counting()
    it = Cached(inner, ReplyStore(tmp_path / "c.db"))
    prompts = [f"p{i % 128}" for i in range(256)]
    first = it.generate(prompts)
    assert [r[0].text for r in first] == [f"{p}!" for p in prompts]
    assert len(seen) == 128 and it.usage.cache_hits == 128
    assert it.generate(prompts) == first and len(seen) == 128
    again, later = counting()
    assert Cached(again, ReplyStore(tmp_path / "c.db")).generate(prompts) == first and not later


def test_another_seed_and_refresh_give_fresh_samples(tmp_path):
    inner, seen = counting()
    store = ReplyStore(tmp_path / "c.db")
    it = Cached(inner, store)
    it.generate(["p"], Sampling(seed=1))
    it.generate(["p"], Sampling(seed=2))
    it.generate(["p"], Sampling(seed=1, temperature=0.5))
    assert len(seen) == 3
    Cached(inner, store, refresh=True).generate(["p"], Sampling(seed=1))
    assert len(seen) == 4
    it.generate(["p"], Sampling(seed=1))
    assert len(seen) == 4


def test_errors_are_not_stored(tmp_path):
    failing = [True]
    inner, seen = counting(lambda prompt: BackendError("down") if failing[0] else "up")
    it = Cached(inner, ReplyStore(tmp_path / "c.db"))
    assert isinstance(it.generate(["p"])[0], BackendError)
    failing[0] = False
    assert it.generate(["p"])[0][0].text == "up" and len(seen) == 2


def test_log_probs_are_stored_as_well(tmp_path):
    it = Cached(ScriptedBackend(score=lambda prompt, completion: -len(completion)), ReplyStore(tmp_path / "c.db"))
    first = it.logprobs(["p", "p", "q"], ["one two", "one two", "three"])
    np.testing.assert_array_equal(first[0], first[1])
    again = it.logprobs(["p", "q"], ["one two", "three"])
    np.testing.assert_array_equal(again[0], first[0])
    assert again[0].dtype == np.float32 and it.inner.usage.requests == 2


def test_text_that_is_no_unicode_survives(tmp_path):
    inner, _ = counting(lambda prompt: "caf\u00e9 \U0001f600\n\x00")
    it = Cached(inner, ReplyStore(tmp_path / "c.db"))
    first = it.generate(["p \udfff"])
    assert Cached(inner, ReplyStore(tmp_path / "c.db")).generate(["p \udfff"]) == first
    # In a reply, half a character is a failure.
    [failed] = Cached(counting(lambda prompt: "\ud800")[0], ReplyStore(tmp_path / "c.db")).generate(["q"])
    assert isinstance(failed, BackendError) and len(it.store) == 1


def test_threads_send_a_request_once(tmp_path):
    inner, seen = counting(latency=0.05)
    it, results = Cached(inner, ReplyStore(tmp_path / "c.db")), []
    threads = [threading.Thread(target=lambda: results.append(it.generate(["a", "b", "c"]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 3 and all(r == results[0] for r in results) and len(results) == 8


def test_who_waits_for_a_call_that_breaks_asks_by_itself(tmp_path):
    release, asked, calls = threading.Event(), threading.Event(), []

    def broken_at_first(prompt):
        calls.append(prompt)
        if len(calls) == 1:
            asked.set()
            release.wait(5)
            raise RuntimeError("broken")
        return "mended"

    it, waiting = Cached(ScriptedBackend(reply=broken_at_first), ReplyStore(tmp_path / "c.db")), []

    def first():
        with pytest.raises(RuntimeError):
            it.generate(["p"])

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert asked.wait(10)
    threads.append(threading.Thread(target=lambda: waiting.extend(it.generate(["p"]))))
    threads[1].start()
    time.sleep(0.05)
    release.set()
    for thread in threads:
        thread.join(10)
    assert waiting[0][0].text == "mended" and len(calls) == 2


def test_a_call_that_is_left_early_blocks_nobody(tmp_path):
    inner, _ = counting()
    it = Cached(inner, ReplyStore(tmp_path / "c.db"))
    it.generate(["stored"])
    for _ in it.generate_each(["stored", "new"]):
        break
    # A request that counted as under way would be waited for.
    assert [reply.text for [reply] in it.generate(["new", "stored"])] == ["new!", "stored!"]


def test_greedy_requests_are_equal_whatever_their_seeds(tmp_path):
    inner, seen = counting()
    it = Cached(inner, ReplyStore(tmp_path / "c.db"))
    it.generate(["p"] * 4, [Sampling(temperature=0, seed=seed) for seed in range(4)])
    assert len(seen) == 1


def test_tokens_are_counted_once_however_many_threads_ask(tmp_path):
    inner, _ = counting(latency=0.01)
    it = Cached(inner, ReplyStore(tmp_path / "c.db"))
    threads = [threading.Thread(target=it.generate, args=([f"one {i}"],)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert it.usage.prompt_tokens == inner.usage.prompt_tokens == 12


def _fill(path, which):
    store = ReplyStore(path)
    for i in range(200):
        store.put(f"{which}-{i}", json.dumps(i))


def test_processes_share_a_store(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill, args=(tmp_path / "c.db", which)) for which in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    store = ReplyStore(tmp_path / "c.db")
    assert len(store) == 400 and store.get("1-199") == "199"


def test_the_size_is_kept_and_what_is_used_stays(tmp_path):
    store = ReplyStore(tmp_path / "c.db", max_mb=0.1, memory=10)
    for i in range(2048):
        store.put(f"k{i}", "x" * 200)
        assert store.get("k0") is not None, f"dropped after {i} although it is in use"
    assert len(store) * 200 / 1000 + 100 > 100 and len(store) * 200 <= 100_000 + 256 * 200


def test_a_file_that_is_no_store(tmp_path):
    (tmp_path / "c.db").write_text("no database " * 100)
    with pytest.raises(InputError, match="cannot use"):
        ReplyStore(tmp_path / "c.db")
    with pytest.raises(InputError, match="cannot use"):
        resolve("backend", {"id": "cached", "kwargs": {"inner": "scripted", "path": "/proc/nowhere/c.db"}})


RUN = """
import sys
from instructgym.llm_backends.replies.cache import Cached, ReplyStore
from instructgym.llm_backends.serving.openai_backend import OpenAIBackend
it = Cached(OpenAIBackend("m", base_url=sys.argv[1], concurrency=8), ReplyStore(sys.argv[2]))
print(sum(r[0].text == f"echo: p{i}" for i, r in enumerate(it.generate([f"p{i}" for i in range(300)]))))
"""


def test_a_killed_run_sends_nothing_again_that_was_stored(tmp_path):
    with serving(latency=0.02) as server:
        command = [sys.executable, "-c", RUN, server.url, str(tmp_path / "c.db")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while sum(server.answered.values()) < 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        stored = len(ReplyStore(tmp_path / "c.db"))
        assert 80 <= stored < 300
        before = sum(server.attempts.values())
        out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert int(out.stdout) == 300
        assert sum(server.attempts.values()) - before == 300 - stored


def test_the_backend_of_a_server_is_not_mixed_up_with_another(tmp_path):
    store = ReplyStore(tmp_path / "c.db")
    with serving(text=lambda body: "one") as one, serving(text=lambda body: "two") as two:
        first = Cached(OpenAIBackend("m", base_url=one.url), store).generate(["p"])
        second = Cached(OpenAIBackend("m", base_url=two.url), store).generate(["p"])
    assert (first[0][0].text, second[0][0].text) == ("one", "two")
