"""Language models behind one batched interface, tokenizers, and sentence embeddings.

Read ``base.py`` first: it defines :class:`~instructgym.llm_backends.base.Backend`. Models in this process are in
``local``, clients of servers in ``serving``, stored replies in ``replies``, training of weights in ``training``.
``__init__.pyi`` lists the names that can be imported from here; each is loaded on first use. The tables below hold the
ids that ``backend=``, ``embedder=`` and ``tokenizer=`` take.
"""

import lazy_loader

from .parts import register_kind, register_parts

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_kind("backend", "instructgym.llm_backends.base:Backend", "instructgym.llm_backends.scripted:FunctionBackend")
register_parts(
    "backend",
    {
        "embedded": "instructgym.llm_backends.local.backend:EmbeddedBackend",
        "transformers": "instructgym.llm_backends.local.backend:TransformersBackend",
        "openai": "instructgym.llm_backends.serving.openai_backend:OpenAIBackend",
        "vllm": "instructgym.llm_backends.serving.vllm_backend:VLLMBackend",
        "vllm-server": "instructgym.llm_backends.serving.vllm_server:VLLMServerBackend",
        "cached": "instructgym.llm_backends.replies.cache:cached",
        "scripted": "instructgym.llm_backends.scripted:ScriptedBackend",
    },
)

register_kind(
    "embedder",
    "instructgym.llm_backends.local.embeddings:Embedder",
    "instructgym.llm_backends.local.embeddings:FunctionEmbedder",
)
register_parts(
    "embedder",
    {
        "minilm": "instructgym.llm_backends.local.embeddings:SentenceTransformerEmbedder",
        "sentence-transformers": "instructgym.llm_backends.local.embeddings:SentenceTransformerEmbedder",
        "hashing": "instructgym.llm_backends.local.embeddings:HashingEmbedder",
    },
)

register_kind("tokenizer", "instructgym.llm_backends.local.tokenization:Tokenizer")
register_parts(
    "tokenizer",
    {
        "embedded": "instructgym.llm_backends.local.tokenization:EmbeddedTokenizer",
        "transformers": "instructgym.llm_backends.local.tokenization:Tokenizer",
        "words": "instructgym.llm_backends.local.tokenization:WordTokenizer",
        "bytes": "instructgym.llm_backends.local.tokenization:ByteTokenizer",
    },
)
