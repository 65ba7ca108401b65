"""Fixtures shared by all tests: a random-weights language model that is built in memory, and hypothesis' profile."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
from tiny_models import build_model, build_tokenizer

hypothesis.settings.register_profile(
    "instructgym",
    deadline=None,  # machines are shared
    derandomize=True,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("instructgym")


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    import torch

    torch.set_num_threads(1)  # the tiny models are too small to share among threads


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_lm(tiny_tokenizer):
    """A ``CausalLM`` over a random two-layer Llama with a context of 256 tokens."""
    from instructgym.llm_backends.local.causal_lm import CausalLM

    return CausalLM(build_model(), tiny_tokenizer, name="tiny")


@pytest.fixture(scope="session")
def tiny_lms(tiny_lm, tiny_tokenizer):
    """``tiny_lms(architecture)``: the same for other architectures, each built once."""
    from instructgym.llm_backends.local.causal_lm import CausalLM

    built = {"llama": tiny_lm}

    def get(architecture):
        if architecture not in built:
            built[architecture] = CausalLM(build_model(architecture), tiny_tokenizer, name=architecture)
        return built[architecture]

    return get


@pytest.fixture(scope="session")
def tiny_model_path(tiny_lm, tiny_tokenizer, tmp_path_factory):
    """A folder with the model of ``tiny_lm``, for everything that loads a model by path."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_lm.model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def write(tmp_path):
    """``write(name, content)``: a file of text or bytes below ``tmp_path``, which is returned."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return write


@pytest.fixture(scope="session")
def vllm_url(tmp_path_factory):
    """Base URL of a real vLLM server of the embedded model, called "model", for adapters of rank 8 at most.

    ``make venv-server`` makes the environment it runs in. ``$INSTRUCTGYM_VLLM_URL`` names a server that runs already.
    """
    running = os.environ.get("INSTRUCTGYM_VLLM_URL")
    if running:
        yield running
        return
    named = os.environ.get("INSTRUCTGYM_SERVER_PYTHON")
    python = Path(named or Path(__file__).parent.parent / ".venv-server" / "bin" / "python")
    if not named and not python.exists():
        pytest.skip("no .venv-server: make venv-server")
    from instructgym.llm_backends.local.loading import embedded_model_path
    from instructgym.llm_backends.serving.vllm_launch import vllm_server

    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with vllm_server(
        embedded_model_path(), log, python=str(python), max_lora_rank=8, flags=("--block-size", "32")
    ) as url:
        yield url
