"""``instructgym serve-check`` against servers that can do everything, servers that only pretend to, and no server."""

import io
import itertools
import json
import re
import socket
from types import SimpleNamespace

import pytest
from fault_server import serving
from imitated_vllm import ImitatedVLLM
from rich.console import Console

from instructgym.experiments.cli import main
from instructgym.experiments.serving import check as serve_check
from instructgym.experiments.serving.check import TITLES, ServeCheck, suggest
from instructgym.llm_backends import resolve
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.serving import speed as server_speed
from instructgym.llm_backends.serving.openai_backend import OpenAIBackend
from instructgym.llm_backends.serving.probe import CAPABILITIES, Capability, ServerProbe
from instructgym.llm_backends.serving.speed import Speed, measure_speed, probe_prompts, recommended
from instructgym.llm_backends.serving.vllm_server import VLLMServerBackend

KEY = "sk-secret-of-the-tests"


def probed(server, **options):
    return ServerProbe(server.url, **options).run()


def answers(found):
    return {name: capability.answer for name, capability in found.capabilities.items()}


def check(server, **options):
    console = Console(width=100, record=True, file=io.StringIO())
    findings = serve_check.run(ServeCheck(base_url=server.url, **({"requests": 0} | options)), console)
    return findings, console.export_text()


def speed(concurrency, tokens, errors=0, seconds=1.0):
    return Speed(concurrency, 8, seconds, tokens, errors, 0.1, 0.2)


# --- capabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["chat", "completion"])
def test_a_vllm_server_has_everything(style):
    with serving(vllm=ImitatedVLLM(), usage=None) as server:
        found = probed(server, style=style)
    assert answers(found) == dict.fromkeys(CAPABILITIES, "yes"), found.capabilities
    assert (found.model, found.software, found.style, found.context_length) == ("m", "vllm", style, 512)
    assert set(TITLES) == set(CAPABILITIES)


def test_what_a_server_only_pretends_to_do_is_no():
    # It takes every field, answers an echo, and copies it n times.
    with serving(usage=None) as server:
        found = probed(server)
    assert answers(found) == dict.fromkeys(CAPABILITIES, "no") | {
        "chat": "yes",
        "completions": "yes",
        "logprobs": "yes",
        "token_ids": "yes",
        "prompt_ids": "unknown",  # without /tokenize nobody knows which ids to send
        "allowed_tokens": "unknown",
        "processed_logprobs": "unknown",
        "end_tokens": "unknown",
    }
    assert found.capabilities["n"].why == "3 copies of one completion"
    assert "no choice" in found.capabilities["structured_vllm"].why


def test_a_server_that_ignores_ids_and_limits_is_found_out():
    class Liar(ImitatedVLLM):
        def complete(self, body):
            kept = {name: body[name] for name in ("max_tokens", "temperature", "prompt", "messages") if name in body}
            return super().complete(kept)

        def prompt_logprobs(self, ids):
            return [None] + [{str(token): {"logprob": -1.0}} for token in ids[1:]]

        def ids(self, body):
            return list(str(body.get("prompt")).encode())

    with serving(vllm=Liar(), usage=None) as server:
        found = probed(server)
    shown = [name for name, answer in answers(found).items() if answer == "yes"]
    assert shown == ["chat", "completions", "logprobs", "token_ids", "tokenize", "given_logprobs", "adapters"]
    assert found.capabilities["allowed_tokens"].why == "another token was written"
    assert found.capabilities["prompt_ids"].why == "ids and their text are continued in different ways"


def test_log_probs_are_counted_against_the_tokens_that_were_written():
    with serving(usage=(7, 5), text=lambda body: "only three words") as server:
        found = probed(server)
    assert found.capabilities["logprobs"] == Capability("no", "3 log-probs of 5 tokens")
    assert found.capabilities["token_ids"] == Capability("no", "3 token ids of 5 tokens")


@pytest.mark.parametrize(
    ("kind", "capability", "lacks"),
    [
        ({"processed": False}, "processed_logprobs", "--logprobs-mode processed_logprobs"),
        ({"adapters": "off"}, "adapters", "--enable-lora"),
        ({"adapters": "no endpoint"}, "adapters", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"),
    ],
)
def test_the_missing_flag_is_named(kind, capability, lacks):
    with serving(vllm=ImitatedVLLM(**kind), usage=None) as server:
        findings, screen = check(server)
    refused = [name for name, one in findings["server"]["capabilities"].items() if one["answer"] != "yes"]
    assert refused == [capability]
    [missing] = findings["settings"]["rollouts_lack"]
    assert missing.startswith(lacks) and not findings["settings"]["rollouts"]
    assert "not on this server" in screen


def test_a_model_that_wants_max_completion_tokens():
    class Newer(ImitatedVLLM):
        def complete(self, body):
            return super().complete(body | {"max_tokens": body["max_completion_tokens"]})

    with serving(vllm=Newer(), usage=None) as server:
        server.refuses = "max_tokens"
        found = probed(server)
    assert found.max_tokens_field == "max_completion_tokens" and found.can("chat", "n", "seed")


def test_plain_completions_are_the_style_of_a_server_without_chat():
    with serving(vllm=ImitatedVLLM(), usage=None) as server:
        server.refuses = "messages"
        assert probed(server).style == "completion"
        with pytest.raises(InputError, match="answers no request to model 'm': chat: answered 400"):
            probed(server, style="chat")


# --- no server -----------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_one_error(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(SystemExit) as end:
        main(["serve-check", "--base-url", url])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1 and "cannot be reached" in printed


@pytest.mark.parametrize("listed", [("m",), None])
@pytest.mark.parametrize("status", ["401", "403"])
def test_a_refused_key_is_one_error_without_the_key(status, listed, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", KEY)
    said = rf"answered {status}.*the key comes from \$OTHER_KEY"
    with serving(rate=1.0, faults=(status,), models=listed, why=KEY) as server, pytest.raises(InputError) as error:
        probed(server, key_variable="OTHER_KEY", model="m")
    assert re.search(said, str(error.value))
    assert KEY not in str(error.value)


def test_a_server_that_does_not_answer_in_time_is_one_error():
    slow = serving(rate=1.0, faults=("slow",), slow=2.0)
    with slow as server, pytest.raises(InputError, match=r"gave no answer within 0\.2 s"):
        probed(server, timeout=0.2)


def test_a_request_that_fails_for_another_reason_is_unknown():
    with serving(vllm=ImitatedVLLM(), usage=None) as server:
        server.fails = "structured_outputs"
        found = probed(server)
    assert found.capabilities["structured_vllm"].answer == "unknown"
    assert "answered 500" in found.capabilities["structured_vllm"].why
    assert found.can("structured_json_schema")


def test_a_server_that_dies_of_a_request_is_one_error():
    class Dying(ImitatedVLLM):
        def complete(self, body):
            if "structured_outputs" in body:
                server.rate, server.faults = 1.0, ("drop",)
                raise ConnectionAbortedError
            return super().complete(body)

    with serving(vllm=Dying(), usage=None) as server, pytest.raises(InputError, match="asked for structured_vllm"):
        probed(server)


@pytest.mark.parametrize(
    ("models", "message"), [(("a", "b"), "serves 2 models: a, b; name one"), (None, "does not list its models")]
)
def test_a_model_has_to_be_named_where_the_list_leaves_it_open(models, message):
    with serving(models=models) as server:
        with pytest.raises(InputError, match=message):
            probed(server)
        assert probed(server, model="a").model == "a"


# --- speed ---------------------------------------------------------------------------------------------------------


def test_speed_is_measured_at_each_concurrency(monkeypatch):
    # Every look at the clock is a second later: one before and after each request, and before and after each level.
    ticks = itertools.count()
    clock = SimpleNamespace(time_ns=lambda: 0, perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr(server_speed, "time", clock)
    with serving(latency=0.05, usage=(9, 4)) as server:
        most = []

        def backend(level):
            most.append(server.most_in_flight)
            server.most_in_flight = 0
            return OpenAIBackend("m", server.url, concurrency=level)

        speeds = measure_speed(backend, [1, 4], 8, 5, 4)
        most.append(server.most_in_flight)
        prompts = [body["messages"][0]["content"] for body in server.bodies]
    assert len(set(prompts)) == len(prompts) == 1 + 2 * 8  # a prompt that was read before would be answered faster
    assert all(len(prompt.split()) == 5 for prompt in prompts)
    assert [one.completion_tokens for one in speeds] == [32, 32] and not any(one.errors for one in speeds)
    assert most[-2:] == [1, 4]
    assert [one.seconds for one in speeds] == [17, 17] and speeds[0].median_latency == speeds[0].p95_latency == 1
    assert speeds[0].tokens_per_second == 32 / 17 and speeds[0].requests_per_second == 8 / 17
    assert 1 <= speeds[1].median_latency <= speeds[1].p95_latency


def test_errors_are_counted_and_have_no_latency():
    with serving(rate=1.0, faults=("500", "401")) as server:
        [one] = measure_speed(lambda level: OpenAIBackend("m", server.url, attempts=1), [2], 4, 5, 4)
    assert one.errors == 4 and one.median_latency is None and "answered" in one.error
    assert recommended([one]) is None


def test_prompts_are_different_and_the_same_under_one_salt():
    assert probe_prompts(3, 6, "a") == probe_prompts(3, 6, "a") != probe_prompts(3, 6, "b")


def test_the_smallest_concurrency_near_the_best_is_recommended():
    assert recommended([speed(1, 10), speed(4, 91), speed(16, 100)]) == 4
    assert recommended([speed(1, 10), speed(4, 80), speed(16, 100)]) == 16
    assert recommended([speed(1, 10), speed(4, 50), speed(16, 100, errors=1)]) == 4
    assert recommended([speed(1, 0, seconds=4.0), speed(4, 0)]) == 4  # requests, where no tokens are counted


# --- what to set, screen and file ----------------------------------------------------------------------------------


def test_the_screen_and_the_file_of_a_server_that_has_everything(tmp_path):
    file = tmp_path / "new" / "found.json"
    with serving(vllm=ImitatedVLLM(), usage=None) as server:
        findings, screen = check(server, requests=4, concurrency="1,2", max_tokens=4, json=str(file))
        bodies = server.bodies
    assert json.loads(file.read_text()) == findings
    assert all(len(line) <= 100 for line in screen.splitlines()) and len(screen.splitlines()) < 45
    assert bodies[-1]["ignore_eos"] is True and bodies[-1]["max_tokens"] == 4
    settings = findings["settings"]
    assert settings["judge_mode"] == "likelihood"
    assert settings["rollouts"] == f"--rollouts vllm --servers {server.url}" and settings["rollouts"] in screen
    built = resolve("backend", settings["backend"])
    assert isinstance(built, VLLMServerBackend) and built.url == server.url and built.prompt_style == "chat"
    assert built.sender.concurrency == settings["concurrency"] in (1, 2)


def test_the_settings_of_a_server_that_can_little():
    with serving(usage=None) as server:
        findings, screen = check(server, key_variable="OTHER_KEY")
    settings = findings["settings"]
    assert settings["judge_mode"] == "verdict" and settings["concurrency"] is None
    assert "tokenizer (missing)" in settings["rollouts_lack"] and "token ids in (not known)" in screen
    built = resolve("backend", settings["backend"])
    assert type(built) is OpenAIBackend and built.key_variable == "OTHER_KEY" and not built.supports_choices
    assert built.ask_logprobs and built.ask_token_ids


def test_structured_output_by_json_schema_is_set_where_vllms_own_is_missing():
    with serving(vllm=ImitatedVLLM(), usage=None) as server:
        found = probed(server)
    found.capabilities["structured_vllm"] = found.capabilities["given_logprobs"] = Capability("no")
    spec = suggest(found, [speed(8, 10)]).backend
    wanted = {"logprobs": True, "token_ids": True, "structured": "json_schema", "concurrency": 8}
    assert spec == {
        "id": "openai",
        "kwargs": {"model": "m", "base_url": found.base_url, "prompt_style": "chat"} | wanted,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": "1,x"}, "--concurrency must be positive integers"),
        ({"concurrency": "0"}, "--concurrency must be positive integers"),
        ({"concurrency": "32", "requests": 4}, "--requests 4 cannot fill --concurrency 32"),
        ({"max_tokens": 0}, "--max-tokens must be at least 1"),
        ({"base_url": ""}, "base URL is missing"),
        ({"base_url": "127.0.0.1:80"}, "base_url must be http"),
        ({"timeout": 0.0}, "timeout must be above 0"),
        ({"json": "/"}, "cannot write /"),
    ],
)
def test_bad_options_are_refused_before_anything_is_sent(options, message):
    with pytest.raises(InputError, match=message):
        serve_check.run(ServeCheck(**({"base_url": "http://127.0.0.1:9/v1"} | options)), Console(quiet=True))


def test_prompts_longer_than_the_context_are_refused():
    message = "make 632 tokens, more than the 512 of 'm'"
    with serving(vllm=ImitatedVLLM(), usage=None) as server, pytest.raises(InputError, match=message):
        check(server, requests=16, prompt_tokens=600)


# --- the real thing ------------------------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.timeout(1800)  # minutes where the hardware computes in bfloat16, three times as long elsewhere
def test_a_real_vllm_server_has_everything(vllm_url):
    options = ServeCheck(base_url=vllm_url, requests=2, concurrency="1,2", max_tokens=4)
    findings = serve_check.run(options, Console(quiet=True))
    capabilities = findings["server"]["capabilities"]
    answers = {name: one["answer"] for name, one in capabilities.items()}
    answers.pop("seed")  # on a busy server the batch, and with it the rounding in bfloat16, is never twice the same
    assert set(answers.values()) == {"yes"} and set(capabilities) == set(CAPABILITIES), capabilities
    assert findings["settings"]["rollouts"] == f"--rollouts vllm --servers {vllm_url}"
    assert [one["completion_tokens"] for one in findings["speed"]] == [8, 8]
