"""vLLM in this process, against the same model in transformers. Runs in an environment that has vLLM."""

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM lives in .venv-server: make venv-server")

from instructgym.agents.policy.language_model import LanguageModelPolicy
from instructgym.llm_backends import BackendError, ContextLengthError, Sampling, resolve
from instructgym.llm_backends.local.loading import embedded_model_path
from instructgym.llm_backends.training.adapters import LoraSettings

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

PROMPTS = ["The capital of France is", "Two and two make"]


@pytest.fixture(scope="module")
def embedded():
    return resolve("backend", {"id": "embedded", "kwargs": {"dtype": "float32"}})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    import torch

    policy = LanguageModelPolicy("embedded", LoraSettings(rank=4), dtype="float32")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter += 0.01 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("adapter")
    policy.export_adapter(folder)
    ids = [np.array(policy.lm.encode(prompt)) for prompt in PROMPTS]
    words = [np.array(policy.lm.encode_completion(text)) for text in (" Paris", " four")]
    with torch.no_grad():
        scores = policy.score(ids, words, [None, None], values=False)
    return str(folder / "policy"), scores.logprobs.tolist()


@pytest.fixture(scope="module")
def backend(adapter):
    """One engine for both: the adapter applies to the requests of a backend that names it."""
    part = {"model": embedded_model_path(), "context_length": 512, "adapter": adapter[0]}
    with_adapter = resolve("backend", {"id": "vllm", "kwargs": part})
    plain = resolve("backend", {"id": "vllm", "kwargs": part | {"adapter": ""}})
    plain.llm = with_adapter.llm
    return plain, with_adapter


def test_generation_and_scores_are_the_models(backend, embedded):
    plain, _ = backend
    sampling = Sampling(max_tokens=4, temperature=0, n=2)
    for mine, theirs in zip(plain.generate(PROMPTS, sampling), embedded.generate(PROMPTS, sampling), strict=True):
        assert len(mine) == 2 and mine[0].token_ids[0] == theirs[0].token_ids[0]
        assert mine[0].logprobs[0] == pytest.approx(theirs[0].logprobs[0], abs=0.15)
    texts = [" Paris", " four and more"]
    for mine, theirs in zip(plain.logprobs(PROMPTS, texts), embedded.logprobs(PROMPTS, texts), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=0.2)
    assert plain.usage.prompt_tokens and plain.usage.completion_tokens


def test_chat_choices_stops_and_seeds(backend):
    plain, _ = backend
    chat = [{"role": "user", "content": "Name a colour."}]
    words = ("apricot", "zeppelin")
    assert plain.generate([chat], Sampling(choices=words))[0][0].text in words
    [[stopped]] = plain.generate(PROMPTS[:1], Sampling(max_tokens=20, temperature=0, stop=("Par",)))
    assert stopped.finish_reason == "stop" and "Par" not in stopped.text
    one, two, three = (plain.generate(PROMPTS[:1], Sampling(max_tokens=8, seed=s))[0][0].text for s in (1, 1, 2))
    assert one == two != three


def test_a_prompt_over_the_context_is_an_error_in_its_place(backend):
    results = backend[0].generate(["word " * 2000, PROMPTS[0]], Sampling(max_tokens=2))
    assert isinstance(results[0], ContextLengthError) and not isinstance(results[1], BackendError)


def test_the_adapter_is_applied(backend, adapter):
    plain, with_adapter = backend
    words = [" Paris", " four"]
    mine = [float(row.sum()) for row in with_adapter.logprobs(PROMPTS, words)]
    base = [float(row.sum()) for row in plain.logprobs(PROMPTS, words)]
    np.testing.assert_allclose(mine, adapter[1], atol=0.3)
    assert max(abs(a - b) for a, b in zip(mine, base, strict=True)) > 0.05
    assert with_adapter.name != plain.name
