"""Who writes text: language models behind one batched contract, and sentence embeddings."""

from .base import (
    Backend,
    BackendError,
    Completion,
    ContextLengthError,
    Message,
    Prompt,
    Sampling,
    UnsupportedRequestError,
    Usage,
    request_seed,
)
from .local.embeddings import Embedder, FunctionEmbedder
from .local.tokenization import Tokenizer, not_a_function
from .parts import UnknownPartError, part_ids, register_kind, register_part, resolve
from .replies.journal import Journal, Journaled
from .scripted import FunctionBackend, ScriptedBackend

__all__ = [
    "Backend",
    "BackendError",
    "Completion",
    "ContextLengthError",
    "Embedder",
    "Journal",
    "Journaled",
    "Message",
    "Prompt",
    "Sampling",
    "ScriptedBackend",
    "Tokenizer",
    "UnknownPartError",
    "UnsupportedRequestError",
    "Usage",
    "part_ids",
    "register_part",
    "request_seed",
    "resolve",
]

register_kind("backend", Backend, FunctionBackend)
register_part("backend", "embedded", "instructgym.llm_backends.local.embedded:EmbeddedBackend")
register_part("backend", "transformers", "instructgym.llm_backends.local.backend:TransformersBackend")
register_part("backend", "openai", "instructgym.llm_backends.serving.openai_backend:OpenAIBackend")
register_part("backend", "vllm", "instructgym.llm_backends.serving.vllm_backend:VLLMBackend")
register_part("backend", "vllm-server", "instructgym.llm_backends.serving.vllm_server:VLLMServerBackend")
register_part("backend", "cached", "instructgym.llm_backends.replies.cache:cached")
register_part("backend", "scripted", "instructgym.llm_backends.scripted:ScriptedBackend")

register_kind("embedder", Embedder, FunctionEmbedder)
register_part("embedder", "minilm", "instructgym.llm_backends.local.embeddings:SentenceTransformerEmbedder")
register_part(
    "embedder", "sentence-transformers", "instructgym.llm_backends.local.embeddings:SentenceTransformerEmbedder"
)
register_part("embedder", "hashing", "instructgym.llm_backends.local.embeddings:HashingEmbedder")

register_kind("tokenizer", Tokenizer, not_a_function)
register_part("tokenizer", "embedded", "instructgym.llm_backends.local.tokenization:EmbeddedTokenizer")
register_part("tokenizer", "transformers", "instructgym.llm_backends.local.tokenization:Tokenizer")
register_part("tokenizer", "words", "instructgym.llm_backends.local.tokenization:WordTokenizer")
register_part("tokenizer", "bytes", "instructgym.llm_backends.local.tokenization:ByteTokenizer")
