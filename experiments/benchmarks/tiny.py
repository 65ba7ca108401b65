"""Models, tokenizers and prompts of the benchmarks, which every side of a comparison reads from the same folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...llm_backends import Tokenizer
from ...llm_backends.errors import InputError
from ...llm_backends.local.causal_lm import CausalLM
from ...llm_backends.local.loading import embedded_model_path, load_tokenizer, quiet_loading
from ...llm_backends.local.tokenization import ByteTokenizer
from ...rewards import Sample

WORDS = "river stone light bread winter garden paper music silver window harbor engine forest letter market".split()


def model_folder(model: str, scratch: Path) -> str:
    """Returns the folder of the model of a benchmark.

    Args:
        model: ``tiny`` (built in ``scratch``), ``embedded``, or a path.
        scratch: existing folder for the tiny model.
    """
    if model == "tiny":
        build_tiny(scratch / "tiny")
        return str(scratch / "tiny")
    return embedded_model_path() if model == "embedded" else os.path.abspath(model)


def build_tiny(folder: Path) -> None:
    """Writes a GPT-2 of four layers with random weights and a tokenizer of bytes, ``</s>`` and ``<pad>``."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bytes_only = ByteTokenizer().hf.backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, eos_token="</s>", pad_token="<pad>", padding_side="left", model_max_length=512
    )
    config = GPT2Config(
        vocab_size=258,
        n_positions=512,
        n_embd=256,
        n_layer=4,
        n_head=4,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=257,
    )
    with quiet_loading():
        torch.manual_seed(0)  # both sides load these weights, and every run of the benchmark has the same
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lora_targets(folder: str) -> str:
    """Returns which layers get an adapter: the attention of GPT-2, or every linear layer of another model."""
    config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    return "c_attn" if config.get("model_type") == "gpt2" else "all-linear"


def make_prompts(folder: str, count: int, length: int) -> list[str]:
    """Returns different texts of exactly ``length`` tokens, with different beginnings.

    Args:
        folder: folder of the tokenizer.
        count: number of texts.
        length: number of tokens of each text.

    Raises:
        InputError: if the tokenizer gives too few such texts.
    """
    tokenizer = load_tokenizer(folder)
    texts: dict[str, None] = {}
    for number in range(40 * count):
        words = (WORDS[(7 * number + k) % len(WORDS)] for k in range(length))
        text = f"{WORDS[number % len(WORDS)]} {number}: write about {' '.join(words)}"
        # Cut to the length. A text that does not encode to that many tokens again is left out.
        ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if len(tokenizer(text)["input_ids"]) == length and text.strip():
            texts[text] = None
        if len(texts) == count:
            return list(texts)
    raise InputError(f"the tokenizer in {folder} gave {len(texts)} of {count} prompts of {length} tokens: ask for more")


def tiny_llama(tokenizer: Tokenizer, seed: int) -> CausalLM:
    """Returns a Llama of one layer and 64 dimensions with random weights and a context of 64 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=tokenizer.vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=tokenizer.hf.eos_token_id,
        tie_word_embeddings=False,
    )
    with quiet_loading():
        torch.manual_seed(seed)
        return CausalLM(LlamaForCausalLM(config).eval(), tokenizer.hf, "tiny")


@dataclass(eq=False)
class EndlessTokenizer(Tokenizer):
    """A tokenizer without an end-of-sequence token: every response has the maximum length."""

    @cached_property
    def hf(self) -> Any:
        tokenizer = load_tokenizer(self.model)
        tokenizer.eos_token = None
        return tokenizer

    def model_end_ids(self) -> frozenset[int]:
        return frozenset()


def endless_model(folder: str, tokenizer: Tokenizer, dtype: str) -> CausalLM:
    """Returns a model on the CPU without an end-of-sequence token: every response has the maximum length."""
    lm = CausalLM.from_pretrained(folder, dtype, "cpu")
    lm.model.generation_config.eos_token_id = None
    lm.tokenizer = tokenizer.hf
    return lm


def share_of_e(samples: Sequence[Sample]) -> list[float]:
    """Returns the share of the letter e in each response, a rule reward that costs almost nothing."""
    return [sample.response.count("e") / max(len(sample.response), 1) for sample in samples]
