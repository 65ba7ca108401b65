"""The OpenAI-compatible backend against a server on loopback: forms of request, faults, limits, budget, secrets."""

import asyncio
import json
import logging
import os
import signal
import threading
import time

import pytest
from fault_server import serving

from instructgym.llm_backends import Journal, Journaled, Sampling, resolve
from instructgym.llm_backends.base import BackendError, UnsupportedRequestError
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.serving.budget import Budget, BudgetExceededError, Spending
from instructgym.llm_backends.serving.openai_backend import OpenAIBackend, max_prompt_tokens
from instructgym.llm_backends.serving.sending import retry_after
from instructgym.llm_backends.serving.vllm_server import VLLMServerBackend
from instructgym.rewards import Sample
from instructgym.rewards.judges.verdict import EqualityJudge

KEY = "sk-secret-of-the-tests"


@pytest.fixture
def server():
    with serving() as running:
        yield running


def backend(server, **options):
    options = {"prompt_style": "completion", "timeout": 60.0, "backoff": 0.01} | options
    return OpenAIBackend("m", base_url=server.url, **options)


def texts(results):
    return [result if isinstance(result, BackendError) else result[0].text for result in results]


# --- requests and replies ----------------------------------------------------------------------------------------


def test_prompts_and_replies_keep_their_order(server):
    server.latency = 0.005
    prompts = [f"prompt {i}" for i in range(40)]
    assert texts(backend(server).generate(prompts)) == [f"echo: prompt {i}" for i in range(40)]


def test_every_sampling_parameter_is_sent(server):
    sampling = Sampling(max_tokens=9, temperature=0.5, top_p=0.9, top_k=5, stop=("end",), n=2, seed=2**40 + 3)
    [completions] = backend(server, extra_body={"min_p": 0.1}).generate(["one"], sampling)
    [body] = server.bodies
    assert len(completions) == 2
    wanted = {"model": "m", "prompt": "one", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "n": 2, "stop": ["end"]}
    assert body == wanted | {"seed": 3, "top_k": 5, "min_p": 0.1}


def test_greedy_completions_are_asked_for_once(server):
    [completions] = backend(server).generate(["one"], Sampling(temperature=0, n=3))
    assert server.bodies[0]["n"] == 1 and [c.text for c in completions] == ["echo: one"] * 3


def test_chat_takes_strings_and_messages(server):
    chat = backend(server, prompt_style="chat")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two"}]
    assert texts(chat.generate(["one", messages])) == ["echo: one", "echo: two"]
    assert server.bodies[-1].keys() >= {"messages"} and all("prompt" not in body for body in server.bodies)


def test_token_ids_go_in_and_come_out_as_they_are(server):
    server.text = lambda body: "a b c"
    [[completion]] = backend(server, logprobs=True, token_ids=True).generate([[5, 6, 7]])
    assert server.bodies[0]["prompt"] == [5, 6, 7] and server.bodies[0]["return_token_ids"] is True
    assert completion.token_ids == [0, 1, 2] and completion.logprobs == [-0.5] * 3


@pytest.mark.parametrize("style", ["chat", "completion"])
def test_log_probs_come_where_they_are_asked_for(server, style):
    [[completion]] = backend(server, prompt_style=style, logprobs=True).generate(["x y"])
    assert completion.logprobs == [-0.5] * 3  # "echo: x y"
    [[without]] = backend(server, prompt_style=style).generate(["x y"])
    assert without.logprobs == []


def test_what_a_form_cannot_carry_is_an_error_of_that_prompt(server):
    mixed = backend(server).generate([[{"role": "user", "content": "x"}], "fine"])
    assert isinstance(mixed[0], UnsupportedRequestError) and mixed[1][0].text == "echo: fine"
    [ids] = backend(server, prompt_style="chat").generate([[1, 2]])
    assert isinstance(ids, UnsupportedRequestError)


def test_usage_is_the_servers(server):
    it = backend(server, prices=(1.0, 10.0))
    it.generate(["one", "two"])
    assert (it.usage.prompt_tokens, it.usage.completion_tokens, it.usage.requests) == (14, 6, 2)
    assert it.usage.cost == pytest.approx((14 + 60) / 1e6)


def test_async_calls_and_calls_from_a_running_loop(server):
    it = backend(server)

    async def both():
        first, second = await asyncio.gather(it.agenerate(["one"]), it.agenerate(["two"]))
        return texts(first + second + it.generate(["three"]))

    assert asyncio.run(both()) == ["echo: one", "echo: two", "echo: three"]


def test_it_is_a_part():
    built = resolve("backend", {"id": "openai", "kwargs": {"model": "m", "base_url": "http://127.0.0.1:9/v1"}})
    assert isinstance(built, OpenAIBackend) and built.prompt_style == "chat"


# --- structured outputs ------------------------------------------------------------------------------------------

WORDS = ("Equal", "Not Equal")


def test_choices_in_vllms_form(server):
    server.text = lambda body: body["structured_outputs"]["choice"][1]
    [[completion]] = backend(server, structured="vllm").generate(["x"], Sampling(choices=WORDS))
    assert completion.text == "Not Equal"


def test_choices_in_openais_form(server):
    def answer(body):
        schema = body["response_format"]["json_schema"]
        assert schema["strict"] and schema["schema"]["additionalProperties"] is False
        return json.dumps({"answer": schema["schema"]["properties"]["answer"]["enum"][0]})

    server.text = answer
    [[completion]] = backend(server, structured="json_schema", logprobs=True).generate(["x"], Sampling(choices=WORDS))
    assert completion.text == "Equal" and completion.token_ids == completion.logprobs == []


@pytest.mark.parametrize("reply", ["Perhaps", "", '{"answer": "Perhaps"}', '{"verdict": "Equal"}', "[1]"])
@pytest.mark.parametrize("structured", ["vllm", "json_schema"])
def test_a_reply_that_is_no_choice_is_an_error(server, structured, reply):
    server.text = lambda body: reply
    [result] = backend(server, structured=structured, attempts=2).generate(["x"], Sampling(choices=WORDS))
    assert isinstance(result, BackendError) and server.attempts["x"] == 2


def test_a_choice_that_was_cut_is_not_asked_for_again(server):
    server.text = lambda body: '{"answer": "Not'
    server.finish = "length"
    [result] = backend(server, structured="json_schema").generate(["x"], Sampling(choices=WORDS, stop=("}",)))
    assert isinstance(result, BackendError) and "cut at max_tokens" in str(result) and server.attempts["x"] == 1
    [body] = server.bodies
    assert body["max_tokens"] > 64 + len("Not Equal") and "stop" not in body, "the limits are those of the answer"


def test_a_name_says_what_decides_on_a_reply():
    options = [{}, {"structured": "vllm"}, {"structured": "json_schema"}, {"logprobs": True}, {"extra_body": {"a": 1}}]
    built = [OpenAIBackend("m", base_url="http://host/v1", **kwargs) for kwargs in options]
    built.append(VLLMServerBackend("m", "http://host/v1", logprobs=False, token_ids=False, structured="none"))
    assert len({it.name for it in built}) == len(built)


def test_extra_body_stands_above_vllms_defaults(server):
    VLLMServerBackend("m", server.url, logprobs=False, token_ids=False, extra_body={"min_p": 0.1}).generate(["x"])
    [body] = server.bodies
    assert (body["min_p"], body["repetition_penalty"], body["top_k"]) == (0.1, 1.0, -1)


def test_choices_are_refused_where_a_server_is_not_said_to_know_them(server):
    with pytest.raises(UnsupportedRequestError, match="no constrained decoding"):
        backend(server).generate(["x"], Sampling(choices=WORDS))
    assert not server.bodies


def test_a_judge_holds_verdicts_to_its_answers_where_it_can(server):
    server.text = lambda body: body.get("structured_outputs", {"choice": ["Perhaps"]})["choice"][0]
    sample = Sample("Name a fish.", previous="Name a bird.")
    [held] = EqualityJudge(backend(server, prompt_style="chat", structured="vllm"), mode="verdict").reward([sample])
    [free] = EqualityJudge(backend(server, prompt_style="chat"), mode="verdict").reward([sample])
    assert held.valid and not free.valid


# --- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["drop", "429", "500", "truncated", "empty", "lengths", "slow"])
def test_a_fault_is_tried_again(fault):
    # Only a slow answer may run out of time: elsewhere a busy machine would add retries of its own.
    timeout, count = (1.0, 12) if fault == "slow" else (60.0, 30)
    with serving(rate=0.4, faults=(fault,), slow=2.5) as server:
        it = backend(server, attempts=20, timeout=timeout, logprobs=True, token_ids=True)
        prompts = [f"p{i}" for i in range(count)]
        assert texts(it.generate(prompts)) == [f"echo: {p}" for p in prompts]
        assert it.retries >= server.failed[fault] > 1 and it.usage.errors == 0
        assert fault == "slow" or it.retries == server.failed[fault]


def test_what_keeps_failing_is_an_error_in_its_place():
    with serving(rate=1.0, faults=("500",)) as server:
        it = backend(server, attempts=3)
        results = it.generate(["one", "two"])
        assert all(isinstance(r, BackendError) and "500" in str(r) for r in results)
        assert it.usage.errors == 2 and server.attempts == {"one": 3, "two": 3}


@pytest.mark.parametrize("fault", ["filtered", "one choice", "403"])
def test_replies_that_would_not_come_out_better_are_asked_for_once(fault):
    with serving(rate=1.0, faults=(fault,)) as server:
        [result] = backend(server, prompt_style="chat").generate(["one"], Sampling(n=2))
        assert isinstance(result, BackendError) and server.attempts["one"] == 1


def test_half_a_character_is_not_sent(server):
    results = backend(server).generate(["\ud800", "fine"])
    assert isinstance(results[0], UnsupportedRequestError) and results[1][0].text == "echo: fine"


def test_a_reply_that_trickles_is_given_up(server):
    server.trickle = 20
    [result] = backend(server, timeout=0.5, attempts=1).generate(["one"])
    assert "no answer within" in str(result)
    assert server.in_flight == 1, "the server is still writing"


def test_a_process_that_was_forked_sends_by_itself(server):
    it = backend(server)
    assert texts(it.generate(["one"])) == ["echo: one"]
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if texts(it.generate(["two"])) == ["echo: two"] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_what_no_retry_can_mend_is_not_tried_again():
    with serving(rate=1.0, faults=("400",)) as server:
        assert isinstance(backend(server).generate(["one"])[0], BackendError)
        assert server.attempts["one"] == 1
    with serving(rate=1.0, faults=("401",)) as server, pytest.raises(InputError, match=r"401.*base_url"):
        backend(server).generate(["one"])


def test_a_server_that_is_not_there():
    it = OpenAIBackend("m", base_url="http://127.0.0.1:9/v1", attempts=2, backoff=0.01)
    [error] = it.generate(["one"])
    assert isinstance(error, BackendError) and "cannot be reached" in str(error)


def test_the_server_says_how_long_to_wait():
    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({}) == retry_after({"retry-after": "soon"}) == 0
    assert retry_after({"retry-after": "inf"}) == retry_after({"retry-after": "nan"}) == 0
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < retry_after({"retry-after": later}) <= 30


@pytest.mark.slow
def test_two_thousand_judge_calls_among_faults_lose_none():
    def verdict(body):
        return "Not Equal" if len(body["messages"][-1]["content"]) % 3 else "Perhaps?"

    with serving(rate=0.2, text=verdict, slow=6.0) as server:
        faulty = {"concurrency": 32, "attempts": 12, "timeout": 4.0, "logprobs": True, "token_ids": True}
        judge = EqualityJudge(backend(server, prompt_style="chat", **faulty), mode="verdict")
        samples = [Sample(prompt="p", response=f"list {i} things " + "x" * (i % 7), previous="p") for i in range(2000)]
        scores = judge.reward(samples)
    valid = [score.valid for score in scores]
    assert len(scores) == 2000 and sum(server.answered.values()) == 2000
    assert max(server.answered.values()) == 1, "a request was answered twice"
    odd = [len(str(k)) % 3 == 0 for k in server.answered]
    assert valid.count(False) == sum(odd) > 100, "garbage is invalid, never a zero"
    assert all(score.value == 1 for score in scores if score.valid)


# --- limits ------------------------------------------------------------------------------------------------------


def test_no_more_requests_are_in_flight_than_allowed():
    with serving(latency=0.01) as server:
        backend(server, concurrency=5).generate([f"p{i}" for i in range(40)])
        assert 2 <= server.most_in_flight <= 5


@pytest.mark.parametrize("options", [{"requests_per_minute": 60}, {"tokens_per_minute": 60 * 66}])
def test_requests_and_tokens_per_minute(server, options):
    assert max_prompt_tokens("p") + 1 == 66
    server.latency = 0.3
    backend(server, concurrency=64, **options).generate(["p"] * 12, Sampling(max_tokens=1))
    # Ten at once, then one a second: twelve would be under way together, were there no limit, and one, were there no
    # burst. Eleven on a machine that is too busy for the first ten to end within a second.
    assert 2 <= server.most_in_flight <= 11 and server.attempts["p"] == 12


def test_a_request_above_a_burst_takes_its_whole_share_of_the_limit(server):
    per_minute = 60 * 66  # ten requests' worth at once, then one a second
    server.latency = 0.3
    it = backend(server, concurrency=8, tokens_per_minute=per_minute)
    it.generate(["p"] * 2, Sampling(max_tokens=66 * 6 - 65))  # each as much as six of those
    assert server.most_in_flight == 1 and server.attempts["p"] == 2, "the second waits for two seconds"


def test_an_error_that_ends_a_call_does_not_wait_for_the_limits():
    with serving(rate=1.0, faults=("401",)) as server:
        with pytest.raises(InputError):  # the limits would take longer than a test may
            backend(server, requests_per_minute=6, concurrency=1).generate(["p"] * 60)
        assert sum(server.attempts.values()) == 1


@pytest.mark.parametrize("limit", [{"requests": 25}, {"tokens": 2000}, {"cost": 0.002}])
def test_a_budget_is_never_overrun(limit):
    with serving(latency=0.005, rate=0.2, faults=("500", "truncated"), usage=(60, 8)) as server:
        budget = Budget(**limit)
        it = backend(server, concurrency=16, budget=budget, prices=(1.0, 1.0))
        got = []
        with pytest.raises(BudgetExceededError, match="left, the next request may need"):
            for index, result in it.generate_each([f"prompt {i}" for i in range(400)], Sampling(max_tokens=8)):
                got.append((index, result))
        sent = sum(server.attempts.values())
        assert (
            budget.reserved.tokens == 0 and budget.reserved.cost == pytest.approx(0) and budget.spent.requests == sent
        )
        for name, most in limit.items():
            assert getattr(budget.spent, name) <= most
        if "requests" in limit:
            assert sent == 25
        # Everything that was answered was given out before the error.
        assert len([r for _, r in got if not isinstance(r, BackendError)]) == sum(server.answered.values()) > 5
        with pytest.raises(BudgetExceededError):
            it.generate(["one more"], Sampling(max_tokens=1900))


def test_reservations_that_come_back_are_used(server):
    server.latency = 0.01
    it = backend(server, budget={"tokens": 1000, "spent": {"tokens": 100}}, concurrency=16)
    assert texts(it.generate([f"p{i}" for i in range(30)], Sampling(max_tokens=200))) == [
        f"echo: p{i}" for i in range(30)
    ]
    assert it.budget.spent.tokens == 100 + 300


def test_a_budget_is_shared_by_threads(server):
    server.latency = 0.002
    budget = Budget(requests=50)
    parts = [backend(server, budget=budget, concurrency=8) for _ in range(4)]

    def work(part):
        with pytest.raises(BudgetExceededError):
            part.generate([f"p{i}" for i in range(40)])

    threads = [threading.Thread(target=work, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(server.attempts.values()) == budget.spent.requests == 50


def test_a_run_that_met_its_budget_goes_on_from_its_journal(server, tmp_path):
    prompts = [f"p{i}" for i in range(40)]
    with pytest.raises(BudgetExceededError):
        Journaled(backend(server, budget={"requests": 25}), Journal(tmp_path / "j.jsonl")).generate(prompts)
    it = Journaled(backend(server, budget={"requests": 15}), Journal(tmp_path / "j.jsonl"))
    assert texts(it.generate(prompts)) == [f"echo: p{i}" for i in range(40)]
    assert max(server.attempts.values()) == 1 and it.usage.cache_hits == 25


def test_a_budget_that_is_kept_holds_over_restarts_and_kills(server, tmp_path):
    file = tmp_path / "budget.json"
    first = Budget(requests=25)
    first.keep(file)
    assert texts(backend(server, budget=first).generate([f"p{i}" for i in range(10)])) == [
        f"echo: p{i}" for i in range(10)
    ]
    assert json.loads(file.read_text())["requests"] == first.spent.requests == 10
    first.reserve(Spending(requests=5))  # and never settled: the process was killed
    second = Budget(requests=25)
    second.keep(file)
    second.keep(file)  # once is enough
    assert second.spent.requests == 15
    with pytest.raises(BudgetExceededError):
        backend(server, budget=second, concurrency=4).generate([f"q{i}" for i in range(20)])
    assert sum(server.attempts.values()) == 20 and second.spent.requests == 25
    file.write_text("{")
    with pytest.raises(InputError, match=r"budget\.json is no record"):
        Budget(requests=1).keep(file)


def test_a_budget_that_cannot_work_is_refused():
    with pytest.raises(InputError, match="at least 0"):
        Budget(tokens=-1)
    with pytest.raises(InputError, match="needs prices"):
        OpenAIBackend("m", base_url="http://127.0.0.1:9/v1", budget={"cost": 1.0})


# --- bad arguments and secrets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "127.0.0.1:8000"}, "must be http"),
        ({"base_url": "http://me:secret@host/v1"}, "no name, password"),
        ({"base_url": "me:secret@host/v1"}, "no name, password"),
        ({"extra_body": {"max_tokens": 5000}}, "must not set max_tokens"),
        ({"max_tokens_field": "max"}, "max_tokens_field"),
        ({"prompt_style": "text"}, "chat or completion"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": 0}, "timeout"),
        ({"structured": "yes"}, "json_schema"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(InputError, match=message) as caught:
        OpenAIBackend("m", **{"base_url": "http://host/v1"} | options)
    assert "secret" not in str(caught.value)


def test_a_missing_key_is_said_before_anything_is_sent(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError, match=r"set \$OPENAI_API_KEY"):
        OpenAIBackend("m").generate(["one"])


@pytest.mark.parametrize("key", ["sk-secret\x07", "sk-s\u00e9cret"])
def test_a_key_that_cannot_be_one_is_refused_without_showing_it(monkeypatch, server, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="characters that no key has") as caught:
        backend(server).generate(["one"])
    assert "sk-" not in str(caught.value)


def test_the_key_appears_nowhere(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")  # as a file of secrets gives it
    store = {"id": "cached", "kwargs": {"inner": None, "path": str(tmp_path / "cache.db")}}
    with (
        serving(rate=0.5, faults=("400", "500"), why=f"{'x' * 230} {KEY} is wrong") as server,
        caplog.at_level(logging.DEBUG),
    ):
        it = backend(server, attempts=2)
        store["kwargs"]["inner"] = it
        results = resolve("backend", store).generate([f"p{i}" for i in range(20)])
        assert server.keys[0] == f"Bearer {KEY}"
    assert any("***" in str(result) for result in results)
    with serving(rate=1.0, faults=("401",), why=f"no such key: {KEY}") as refusing, pytest.raises(InputError) as caught:
        backend(refusing).generate(["one"])
    seen = [it.name, repr(it), str(caught.value), caplog.text, json.dumps([str(r) for r in results])]
    seen += [path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()]
    assert not any(KEY[:12] in text for text in seen)
