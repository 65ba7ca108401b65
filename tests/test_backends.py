"""The contract of every backend, and how parts are named, resolved and shared."""

import asyncio
import copy
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_server import serving

from instructgym.llm_backends import (
    Backend,
    BackendError,
    Completion,
    ContextLengthError,
    FunctionBackend,
    Journal,
    Journaled,
    Sampling,
    ScriptedBackend,
    UnknownPartError,
    UnsupportedRequestError,
    part_ids,
    request_seed,
    resolve,
)
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local import loading as embedded
from instructgym.llm_backends.local.backend import TransformersBackend
from instructgym.llm_backends.replies.cache import Cached

SCORES = ["transformers", "scripted", "journaled", pytest.param("embedded", marks=pytest.mark.slow)]
BACKENDS = [*SCORES, "cached", "openai", "function"]
PROMPTS = ["write a short poem", "list three things about the sea", "answer", "one", "two"]


@pytest.fixture
def backend(request, tmp_path, tiny_model_path):
    """A fresh backend by id, the transformers one with the tiny model, the openai one on a scripted server."""
    transformers = {"id": "transformers", "kwargs": {"model": tiny_model_path, "prompt_style": "completion"}}
    value = {
        "transformers": transformers,
        "function": lambda prompt: f"{prompt} and so on",
    }.get(request.param, request.param)
    if request.param == "journaled":
        value = Journaled(resolve("backend", transformers), Journal(tmp_path / "journal.jsonl"))
    if request.param == "cached":
        value = {"id": "cached", "kwargs": {"inner": transformers, "path": str(tmp_path / "cache.db")}}
    if request.param != "openai":
        yield resolve("backend", value)
        return
    with serving(scripted=True, usage=None) as server:
        asked = {"model": "m", "base_url": server.url, "logprobs": True, "token_ids": True}
        yield resolve("backend", {"id": "openai", "kwargs": asked})


def outcome(result):
    return [(c.text, c.token_ids, c.finish_reason) for c in result]


# ---- every backend --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
class TestContract:
    def test_results_come_in_order_and_whole(self, backend):
        samplings = [Sampling(max_tokens=4, n=1 + i % 2, seed=i) for i in range(len(PROMPTS))]
        results = backend.generate(PROMPTS, samplings)
        assert [len(result) for result in results] == [1, 2, 1, 2, 1]
        for completion in (c for result in results for c in result):
            assert isinstance(completion, Completion)
            assert isinstance(completion.text, str)
            assert 0 < len(completion.token_ids) <= 4
            assert len(completion.logprobs) == len(completion.token_ids)
            assert completion.finish_reason in ("stop", "length")
        for prompt, sampling, result in zip(PROMPTS, samplings, results, strict=True):
            assert outcome(backend.generate([prompt], sampling)[0]) == outcome(result)

    def test_a_request_gives_the_same_result_again_and_in_any_order(self, backend):
        samplings = [Sampling(max_tokens=5, seed=i) for i in range(len(PROMPTS))]
        first = [outcome(result) for result in backend.generate(PROMPTS, samplings)]
        back = [outcome(result) for result in backend.generate(PROMPTS[::-1], samplings[::-1])]
        assert first == back[::-1]

    def test_stop_strings_are_cut(self, backend):
        (free,) = backend.generate(["write a short poem about the sea"], Sampling(max_tokens=12))[0]
        stop = next(piece for piece in (free.text[i : i + 2] for i in range(2, 20)) if "\ufffd" not in piece)
        (cut,) = backend.generate(["write a short poem about the sea"], Sampling(max_tokens=12, stop=stop))[0]
        assert cut.text == free.text[: free.text.find(stop)]
        assert cut.finish_reason == "stop"

    def test_bad_calls_are_refused_before_any_work(self, backend):
        for call in (
            lambda: backend.generate(["a", "b"], [Sampling()]),
            lambda: backend.generate(["a", ""]),
            lambda: backend.generate([[]]),
            lambda: backend.logprobs(["a"], ["b", "c"]),
            lambda: backend.logprobs(["a", ""], ["b", "c"]),
            lambda: backend.logprobs(["a"], [""]),
        ):
            with pytest.raises(ValueError):
                call()
        assert backend.usage.calls == 0

    def test_no_prompts_give_no_results(self, backend):
        assert backend.generate([]) == backend.generate([], []) == backend.logprobs([], []) == []

    def test_usage_counts(self, backend):
        assert set(backend.usage.as_dict().values()) == {0}
        results = backend.generate(PROMPTS[:3], Sampling(max_tokens=3, n=2))
        usage = copy.copy(backend.usage)
        assert (usage.calls, usage.requests, usage.errors) == (1, 3, 0)
        assert usage.completion_tokens == sum(len(c.token_ids) for result in results for c in result)
        assert usage.prompt_tokens >= 3
        backend.logprobs(["a"], ["b"])
        assert ((backend.usage - usage).calls, (backend.usage - usage).requests) == (1, 1)

    def test_async_twins_agree(self, backend):
        async def both():
            return await asyncio.gather(
                backend.agenerate(PROMPTS[:2], Sampling(max_tokens=3)),
                backend.alogprobs(PROMPTS[:2], ["x", "y z"]),
                backend.agenerate(PROMPTS[2:], Sampling(max_tokens=3)),
            )

        first, scores, rest = asyncio.run(both())
        direct = backend.generate(PROMPTS, Sampling(max_tokens=3))
        assert [outcome(result) for result in first + rest] == [outcome(result) for result in direct]
        for one, other in zip(scores, backend.logprobs(PROMPTS[:2], ["x", "y z"]), strict=True):
            if isinstance(one, BackendError):
                assert type(one) is type(other)
            else:
                np.testing.assert_allclose(one, other, atol=1e-4)

    def test_prompts_may_be_chat_messages(self, backend):
        ((completion,),) = backend.generate(
            [[{"role": "user", "content": "list three things"}]], Sampling(max_tokens=3)
        )
        assert completion.token_ids

    def test_a_live_backend_is_shared_not_copied(self, backend):
        assert copy.deepcopy({"backend": [backend]})["backend"][0] is backend
        assert resolve("backend", backend) is backend

    def test_it_says_who_it_is(self, backend):
        assert backend.name and backend.name != Backend.name
        assert backend.prompt_style in ("chat", "completion")


@pytest.mark.parametrize("backend", SCORES, indirect=True)
def test_scores_are_float32_rows_in_order(backend):
    completions = ["the sea", "a", "three things", "x", "the sea"]
    rows = backend.logprobs(PROMPTS, completions)
    assert all(row.dtype == np.float32 and row.ndim == 1 and len(row) and (row <= 0).all() for row in rows)
    for row, again in zip(rows[::-1], backend.logprobs(PROMPTS[::-1], completions[::-1]), strict=True):
        np.testing.assert_allclose(row, again, atol=1e-4)


def test_every_registered_backend_is_held_to_the_contract():
    tested = {getattr(value, "values", [value])[0] for value in BACKENDS}
    elsewhere = {"vllm": "test_vllm_backend.py", "vllm-server": "test_vllm_server.py"}  # whose batches are never alike
    assert set(part_ids("backend")) - tested <= set(elsewhere)
    assert all((Path(__file__).parent / name).exists() for name in elsewhere.values())


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_model_path):
    return TransformersBackend(tiny_model_path)


def test_a_prompt_too_long_fails_alone(tiny):
    samplings = [Sampling(max_tokens=3, seed=i) for i in range(3)]
    before = copy.copy(tiny.usage)
    results = tiny.generate(["one", [5] * 256, "two"], samplings)
    assert isinstance(results[1], ContextLengthError)
    assert "256" in str(results[1])
    assert (tiny.usage - before).errors == 1
    alone = tiny.generate(["one", "two"], [samplings[0], samplings[2]])
    assert [outcome(results[0]), outcome(results[2])] == [outcome(result) for result in alone]
    assert isinstance(tiny.generate([[5] * 300])[0], ContextLengthError)


def test_a_completion_too_long_fails_alone(tiny):
    rows = tiny.logprobs([[5] * 250, [5] * 250, "a"], ["x", "qjxz" * 9, "b"])
    assert isinstance(rows[1], ContextLengthError)
    np.testing.assert_allclose(rows[0], tiny.logprobs([[5] * 250], ["x"])[0], atol=1e-4)
    np.testing.assert_allclose(rows[2], tiny.logprobs(["a"], ["b"])[0], atol=1e-4)


def test_the_context_ends_a_completion(tiny):
    ((completion,),) = tiny.generate([[5] * 253], Sampling(max_tokens=50, seed=2))
    assert len(completion.token_ids) <= 3
    assert completion.finish_reason == "length" or completion.token_ids[-1] == 1


def test_text_and_token_prompts_of_the_same_tokens_agree(tiny):
    text = "list three things"
    chat = [{"role": "user", "content": text}]
    ids = tiny.lm.encode(text)
    forms = [text, ids, np.array(ids), tuple(ids)]
    results = tiny.generate(forms, Sampling(max_tokens=5, seed=1))
    assert len({tuple(c.token_ids) for (c,) in results}) == 1
    assert outcome(tiny.generate([chat])[0]) == outcome(tiny.generate([tiny.lm.encode(chat)])[0])


def test_generated_logprobs_are_those_of_scoring(tiny):
    prompts = [p for p in PROMPTS if p != "answer"]
    for prompt, (completion,) in zip(prompts, tiny.generate(prompts, Sampling(max_tokens=8, seed=5)), strict=True):
        (row,) = tiny.lm.logprobs([tiny.lm.encode(prompt)], [completion.token_ids])
        np.testing.assert_allclose(row, completion.logprobs, atol=1e-4)


def test_the_model_is_loaded_on_first_use_and_disturbs_no_generator(tiny_model_path, tmp_path):
    resolve("backend", {"id": "transformers", "kwargs": {"model": str(tmp_path / "nowhere")}})
    lazy = TransformersBackend(tiny_model_path, device="cpu")  # a device not used before: loads a copy of its own

    def draw(act):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        act()
        return random.random(), np.random.random(), torch.rand(1).item()

    assert draw(lambda: lazy.generate(["a"], Sampling(max_tokens=4))) == draw(lambda: None)


def test_backends_of_one_model_share_its_weights(tiny, tiny_model_path):
    assert TransformersBackend(tiny_model_path, prompt_style="completion").lm is tiny.lm


def test_prompt_tokens_are_counted(tiny):
    before = copy.copy(tiny.usage)
    tiny.generate([[5, 6, 7], [8]], Sampling(max_tokens=2, n=3))
    assert (tiny.usage - before).prompt_tokens == 4


# ---- the embedded model ---------------------------------------------------------------------------------------------


@pytest.fixture
def packaged(monkeypatch, tmp_path, tiny_lm, tiny_tokenizer):
    """A stand-in for the package of the embedded model: 'reading' its GGUF file gives the tiny model."""
    import transformers

    package = tmp_path / "package"
    package.mkdir()
    (package / embedded.GGUF_FILE).touch()
    monkeypatch.setattr(embedded, "package_folder", lambda name: package)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tiny_lm.model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tiny_tokenizer)
    return package


def test_conversion_happens_once_per_cache_folder(packaged, monkeypatch, tmp_path):
    paths = []
    for folder in ("one", "two"):
        monkeypatch.setenv("INSTRUCTGYM_CACHE", str(tmp_path / folder))
        paths.append(embedded.embedded_model_path())
        assert paths[-1].startswith(str(tmp_path / folder))
    (packaged / embedded.GGUF_FILE).unlink()  # from here on only what was converted is left
    monkeypatch.setenv("INSTRUCTGYM_CACHE", str(tmp_path / "one"))
    assert embedded.embedded_model_path() == paths[0]
    assert sorted(p.name for p in (tmp_path / "one").iterdir() if p.is_dir()) == [Path(paths[0]).name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_a_killed_conversion_leaves_no_half_model(
    packaged, monkeypatch, tmp_path, tiny_lm, tiny_tokenizer, tiny_model_path, part, error
):
    saved = {"model": tiny_lm.model, "tokenizer": tiny_tokenizer}[part]
    save = saved.save_pretrained

    def killed(path, **kwargs):
        save(path, **kwargs)
        raise error("killed")

    monkeypatch.setenv("INSTRUCTGYM_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(saved, "save_pretrained", killed)
        with pytest.raises(error):
            embedded.embedded_model_path()
    assert [p for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []
    path = Path(embedded.embedded_model_path())
    files = {p.name for p in Path(tiny_model_path).iterdir()}
    assert {p.name for p in path.iterdir()} == files


def test_what_a_kill_left_behind_is_cleared_away(packaged, monkeypatch, tmp_path, tiny_lm):
    def killed(path, **kwargs):
        Path(path).mkdir(exist_ok=True)
        (Path(path) / "model.safetensors").write_bytes(b"half")
        raise SystemExit

    monkeypatch.setenv("INSTRUCTGYM_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(tiny_lm.model, "save_pretrained", killed)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a SIGKILL leaves no time to clean up
        with pytest.raises(SystemExit):
            embedded.embedded_model_path()
    assert any(p.is_dir() for p in (tmp_path / "cache").iterdir())
    path = Path(embedded.embedded_model_path())
    assert [p for p in path.parent.iterdir() if p.is_dir()] == [path]
    assert (path / "model.safetensors").stat().st_size > 4


def test_without_its_package_the_embedded_model_comes_from_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "package_folder", lambda name: None)
    monkeypatch.setenv("INSTRUCTGYM_CACHE", str(tmp_path))
    assert embedded.embedded_model_path() == embedded.HUB_ID


@pytest.mark.slow
def test_the_embedded_model_knows_something():
    backend = resolve("backend", "embedded")
    ((completion,),) = backend.generate(["The capital of France is"], Sampling(max_tokens=3, temperature=0))
    assert "Paris" in completion.text
    likely, unlikely = backend.logprobs(["The capital of France is"] * 2, [" Paris", " cheese"])
    assert likely.sum() > unlikely.sum() + 3


# ---- scripts and functions ------------------------------------------------------------------------------------------


def test_a_scripted_backend_says_so():
    assert "scripted" in ScriptedBackend().name
    assert "no language model" in resolve("backend", "scripted").name


def test_a_script_replies_by_rule():
    by_piece = ScriptedBackend({"poem": "roses", "list": "1 2 3"})
    (poem,), (numbers,), missing = by_piece.generate(["a poem", "a list", "a song"])
    assert (poem.text, numbers.text) == ("roses", "1 2 3")
    assert isinstance(missing, BackendError) and "a song" in str(missing)
    assert by_piece.usage.errors == 1

    seeded = ScriptedBackend(lambda prompt, sampling: f"{prompt} {sampling.seed}")
    first, second = seeded.generate(["a"], Sampling(seed=4, n=2))[0]
    assert first.text == "a 4"
    assert first.text != second.text
    assert ScriptedBackend(lambda prompt: BackendError("no")).generate(["a"])[0].args == ("no",)


def test_scripted_scores_sum_to_the_rule():
    scored = ScriptedBackend(score=lambda prompt, completion: -len(prompt) - len(completion))
    (row,) = scored.logprobs(["abc"], ["two words"])
    assert row.sum() == pytest.approx(-12)


def test_a_function_is_a_backend_without_logprobs():
    backend = resolve("backend", str.upper)
    assert isinstance(backend, FunctionBackend)
    assert "upper" in backend.name
    assert backend.generate(["abc"])[0][0].text == "ABC"
    assert isinstance(backend.logprobs(["a"], ["b"])[0], UnsupportedRequestError)
    assert backend.usage.errors == 1


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("n", 0),
        ("stop", ("a", "")),
        ("stop", ""),
    ],
)
def test_parameters_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=rf"Sampling\.{field}"):
        Sampling(**{field: value})


def test_a_stop_string_may_stand_alone():
    assert Sampling(stop="END") == Sampling(stop=["END"]) == Sampling(stop=("END",))
    assert hash(Sampling(stop=["END"])) == hash(Sampling(stop="END"))


def test_request_seeds_are_stable_distinct_and_usable():
    assert request_seed(0, 1, 2, "judge") == request_seed(0, 1, 2, "judge")
    assert request_seed(0, 1, 2) == 1049679316330262186
    seeds = {request_seed(*parts) for parts in [(0, 1, 2), (0, 2, 1), (0, 12), ("0", 1, 2), (0, 1, 2, 0), ()]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert Sampling(max_tokens=3).with_seed(7) == Sampling(max_tokens=3, seed=7)


# ---- parts ----------------------------------------------------------------------------------------------------------


class Part(Backend):
    """A user's backend, found as ``module:Part``."""

    def __init__(self, colour="red", size=1):
        self.name, self.colour, self.size = "mine", colour, size

    def _generate(self, prompts, samplings):
        return [[] for _ in prompts]


LIVE = Part("green")
NUMBER = 3


def make_number(colour):
    return NUMBER


def make_function():
    return str.lower


def make_any(**kwargs):
    return Part(**kwargs)


@pytest.fixture
def here(monkeypatch):
    """The name under which this module can be imported."""
    monkeypatch.setitem(sys.modules, "users_parts", sys.modules[__name__])
    return "users_parts"


def test_a_part_by_every_name(here):
    assert isinstance(resolve("backend", "scripted"), ScriptedBackend)
    assert isinstance(resolve("backend", {"id": "scripted"}), ScriptedBackend)
    assert resolve("backend", {"id": "scripted", "kwargs": {"prompt_style": "chat"}}).prompt_style == "chat"
    assert resolve("backend", f"{here}:Part").colour == "red"
    assert resolve("backend", {"id": f"{here}:Part", "kwargs": {"colour": "blue"}}).colour == "blue"
    assert resolve("backend", f"{here}:LIVE") is LIVE
    assert resolve("backend", LIVE) is LIVE
    assert resolve("backend", f"{here}:make_function").generate(["ABC"])[0][0].text == "abc"
    assert resolve("backend", lambda prompt: "reply").generate(["a"])[0][0].text == "reply"


def test_defaults_reach_only_those_who_take_them(here):
    assert resolve("backend", f"{here}:Part", colour="blue", taste="sweet").colour == "blue"
    assert (
        resolve("backend", {"id": f"{here}:Part", "kwargs": {"colour": "red"}}, colour="blue", size=3).colour == "red"
    )
    assert resolve("backend", {"id": f"{here}:Part", "kwargs": {"colour": "red"}}, colour="blue", size=3).size == 3
    assert resolve("backend", f"{here}:make_any", colour="blue").colour == "red"
    assert resolve("backend", LIVE, colour="blue").colour == "green"


@pytest.mark.parametrize(
    "value, named",
    [
        ("gpt-5", r"unknown backend 'gpt-5'.*scripted"),
        ("no_such_module:Part", "no_such_module"),
        ("users_parts:Nothing", "users_parts:Nothing.*Nothing"),
        ("users_parts:NUMBER", "users_parts:NUMBER.*int"),
        ("users_parts:make_number", "users_parts:make_number"),
        ({"id": "users_parts:make_number", "kwargs": {"colour": 1}}, "users_parts:make_number.*int.*Backend"),
        ({"id": "scripted", "kwargs": {"flavour": 1}}, "scripted.*flavour"),
        ({"id": "scripted", "kwargs": [1]}, "kwargs"),
        ({"id": "scripted", "args": {}}, "args"),
        ({"kwargs": {}}, "id"),
        ({"id": 5}, "5"),
        (":Part", ":Part"),
        ("", "unknown backend ''"),
        (5, r"5 is no backend.*scripted.*module:factory.*callable"),
        (None, "None is no backend"),
    ],
)
def test_an_unknown_part_is_named(here, value, named):
    with pytest.raises(UnknownPartError, match=named):
        resolve("backend", value)


def test_choices_hold_a_completion(tiny_model_path):
    backend = TransformersBackend(str(tiny_model_path), prompt_style="completion")
    words = ("sea", "sea and sky", "the")
    drawn = [backend.generate(["write"], Sampling(choices=words, seed=seed))[0][0] for seed in range(12)]
    assert {completion.text for completion in drawn} <= set(words) and len({c.text for c in drawn}) > 1
    assert all(completion.finish_reason == "stop" for completion in drawn)
    with pytest.raises(UnsupportedRequestError, match="no constrained decoding"):
        ScriptedBackend().generate(["write"], Sampling(choices=words))
    with pytest.raises(ValueError, match="choices"):
        Sampling(choices=("",))


# --- replies that are none ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["\ud83d", "\udca9", "ok \udfff.", "\ud83d \ude00"])
def test_a_lone_surrogate_is_a_failed_reply(half, tmp_path):
    """In place of that request alone, whatever wraps the backend, and it is not stored."""

    def reply(prompt):
        return half if "bad" in prompt else "fine \U0001f600"

    for backend in (resolve("backend", reply), Cached(resolve("backend", reply), tmp_path / "store.sqlite")):
        for _ in range(2):
            good, bad, last = backend.generate(["a", "bad", "b"], Sampling(n=2))
            assert [completion.text for completion in good + last] == ["fine \U0001f600"] * 4
            assert isinstance(bad, BackendError) and "lone surrogate" in str(bad) and str(bad).isprintable()
        assert backend.usage.errors == 2
    assert len(backend.store) == 2


def nothing(prompt):
    """Forgets its return."""


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (nothing, "backend function nothing returned None for the prompt 'Say it.': it must return a text"),
        (lambda prompt: [prompt], r"function .*<lambda> returned \['Say it.'\]"),
        (lambda prompt, sampling: b"Say", "returned b'Say'"),
        (lambda prompt: 3, "returned 3"),
        ({"Say": None}, "returned None"),
    ],
)
def test_a_function_that_returns_no_text_is_named(function, match):
    backend = ScriptedBackend(function) if isinstance(function, dict) else resolve("backend", function)
    with pytest.raises(InputError, match=match):
        backend.generate(["Say it."])
