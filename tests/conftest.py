"""Fixtures shared by all tests: a random-weights language model that is built in memory, and hypothesis' profile."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "instructgym",
    deadline=None,  # machines are shared
    derandomize=True,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("instructgym")

CORPUS = [
    "write a short poem about the sea",
    "Answer: naïve café, 日本語のテキスト",
    "### Instruction:\nList three things.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer():
    """A byte-level BPE of 320 tokens, so that some tokens are words and others a fraction of a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(architecture="llama", vocabulary=320, context=256):
    """A two-layer model with random weights, spread widely so that no two next-token distributions look alike."""
    import torch
    import transformers

    common = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    config = {
        "llama": lambda: transformers.LlamaConfig(**common),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=vocabulary,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=context,
            bos_token_id=None,
            eos_token_id=1,
        ),
        "qwen3": lambda: transformers.Qwen3Config(head_dim=16, **common),
        "mistral-sliding": lambda: transformers.MistralConfig(sliding_window=8, **common),
        "gemma3-mixed": lambda: transformers.Gemma3TextConfig(
            head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"], **common
        ),
    }[architecture]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    return model


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
