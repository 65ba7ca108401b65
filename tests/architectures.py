"""Tiny models of every causal architecture of the installed transformers, and how closely the library reads them.

``python tests/architectures.py`` writes the table of docs/models.md.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from tiny_models import build_tokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from instructgym.agents import LanguageModelPolicy, LoraSettings
from instructgym.llm_backends import Sampling
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.causal_lm import CausalLM
from instructgym.llm_backends.local.sampling import generate

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 3_000_000
"""Parameters of the largest model that counts as tiny."""

# Names of sizes in configurations, by their tiny value. A configuration takes those that it has.
TINY = {
    1: """
        n_group topk_group n_shared_experts num_expert_groups mamba_n_groups n_groups first_k_dense_replace
        num_mem_blocks eos_token_id
    """,
    2: """
        num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_key_value_heads
        num_experts_per_tok moe_topk top_k_experts expand mamba_expand linear_num_key_heads altup_num_inputs
        type_vocab_size index_n_heads
    """,
    4: """
        num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads
        num_local_experts num_experts n_routed_experts qk_rope_head_dim conv_kernel linear_num_value_heads
        mamba_dt_rank time_step_rank laurel_rank rotary_dim rotary_ndims
    """,
    6: "v_head_dim",
    8: """
        head_dim kv_channels attention_head_dim global_head_dim qk_nope_head_dim state_size mamba_d_state
        mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim linear_key_head_dim linear_value_head_dim
        hidden_size_per_layer_input d_kv index_head_dim
    """,
    12: "qk_head_dim",
    16: """
        moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank
        kv_lora_rank chunk_size mamba_chunk_size
    """,
    32: """
        hidden_size n_embd d_model dim embedding_size word_embed_proj_dim lru_width projection_dim
        dim_model_base
    """,
    48: """
        intermediate_size ffn_dim d_ff n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim
        mlp_hidden_size
    """,
    64: "attention_window_size sliding_window window_size attention_chunk_size",
    256: "max_position_embeddings n_positions max_seq_len context_length n_ctx max_target_positions",
    320: "vocab_size vocab_size_per_layer_input",
    512: "index_topk",
    0: "num_nextn_predict_layers num_kv_shared_layers pad_token_id",
}
SIZES = {name: value for value, names in TINY.items() for name in names.split()} | {"bos_token_id": None}


def _shrunk(config):
    """The configuration with tiny sizes, set one by one, and one layer of each type that it has."""
    for name, value in SIZES.items():
        if hasattr(config, name):
            try:
                setattr(config, name, value)
            except Exception:  # computed from others
                continue
    if kinds := list(dict.fromkeys(getattr(config, "layer_types", None) or [])):
        config.num_hidden_layers = max(2, len(kinds))
        config.layer_types = (kinds * 2)[: config.num_hidden_layers]
    return config


def _configurations(model_type):
    """Tiny configurations of an architecture, by its constructor and by attributes: some fit together only one way."""
    kind = CONFIG_MAPPING[model_type]

    def by_constructor():
        defaults = kind()
        return kind(**{name: value for name, value in SIZES.items() if hasattr(defaults, name)})

    def set_one_by_one():
        config = _shrunk(kind())
        if hasattr(config, "text_config"):
            _shrunk(config.text_config)
        return config

    return by_constructor, set_one_by_one


def build(model_type):
    """A tiny model of random weights, widely spread; None if no tiny configuration of it can be built."""
    for make in _configurations(model_type):
        try:
            config = make()
            config.is_decoder = True
            with torch.device("meta"):
                shapes = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            if sum(p.numel() for p in shapes.parameters()) > LARGEST:
                continue
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1 and parameter.shape[-1] < 400:
                        parameter.normal_(std=0.25, generator=generator)
                logits = model(input_ids=torch.arange(5, 11)[None]).logits
            if logits.shape[1] == 6 and bool(logits.isfinite().all()):
                return model
        except Exception:  # sizes that do not fit together
            continue
    return None


def _alone(model, prompt, response):
    """Log-probs of a response by the plain forward pass of one row."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, :, :320].float()
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(1, torch.tensor(response)[:, None])[:, 0]


def _gap(rows, expected):
    return max(float((torch.as_tensor(row) - other).abs().max()) for row, other in zip(rows, expected, strict=True))


def measure(model_type):
    """How an architecture is read and its largest deviations in nats; a text where it is refused, None if not built."""
    model = build(model_type)
    if model is None:
        return None
    rng = np.random.default_rng(0)
    head, draw = rng.integers(4, 320, 40).tolist(), lambda n: rng.integers(4, 320, n).tolist()
    prompts = [head + draw(3), head + draw(20), draw(5), head + draw(9)]
    responses = [draw(4), draw(7), draw(3), draw(1)]
    try:
        lm = CausalLM(model, build_tokenizer(), model_type)
    except InputError as error:
        return str(error)
    found = {"reading": lm.reading}
    with torch.no_grad():
        for name, samplings in (
            ("generate", [Sampling(max_tokens=n, temperature=0) for n in (6, 3, 9, 5)]),
            ("n = 2", [Sampling(max_tokens=4, n=2, seed=3)] * 4),
        ):
            written = generate(lm, prompts, samplings, eos=frozenset())
            pairs = [(p, c) for p, completions in zip(prompts, written, strict=True) for c in completions]
            found[name] = _gap([c.logprobs for _, c in pairs], [_alone(model, p, c.token_ids) for p, c in pairs])
        expected = [_alone(model, p, r) for p, r in zip(prompts, responses, strict=True)]
        # The second time prefixes come from the cache.
        found["logprobs"] = max(_gap(lm.logprobs(prompts, responses), expected) for _ in range(2))
    try:
        policy = LanguageModelPolicy(lm, LoraSettings(rank=2), value="none", dtype="float32", device="cpu")
    except InputError as error:
        return found | {"training": str(error)}
    parameters = policy.parameters()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(parameter)))
    rows = [*zip(prompts, responses, strict=True), (prompts[0], responses[1])]
    with policy.adapter("policy"):
        expected = torch.cat([_alone(lm.model, p, r) for p, r in rows])
        plain = torch.autograd.grad(expected.sum(), list(parameters.values()), allow_unused=True)
    scores = policy.score(
        [np.array(p) for p, _ in rows], [np.array(r) for _, r in rows], [None] * 5, values=False
    ).logprobs
    mine = torch.autograd.grad(scores.sum(), list(parameters.values()), allow_unused=True)
    pairs = [(a, b) for a, b in zip(mine, plain, strict=True) if a is not None and b is not None]
    norm = sum(float(b.pow(2).sum()) for _, b in pairs) ** 0.5
    found["training"] = lm.training.reading
    found["score"] = float((scores - expected).abs().max())
    found["gradient"] = sum(float((a - b).pow(2).sum()) for a, b in pairs) ** 0.5 / max(norm, 1e-12)
    if any((a is None) != (b is None) for a, b in zip(mine, plain, strict=True)):
        found["gradient"] = float("inf")
    return found


FIGURES = ("generate", "n = 2", "logprobs", "score", "gradient")


def table():
    """The table of docs/models.md, as Markdown."""
    columns = ("model type", "reading", "training", *FIGURES)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    refused = []
    for model_type in MODEL_TYPES:
        found = measure(model_type)
        if isinstance(found, dict) and "score" in found:
            cells = [found["reading"], found["training"], *(f"{found[name]:.0e}" for name in FIGURES)]
            lines.append("| " + " | ".join([model_type, *cells]) + " |")
        elif found is not None:
            refused.append(f"- {model_type}: {found if isinstance(found, str) else found['training']}")
    return "\n".join([*lines, "", "Refused when they are opened, or when they are to be trained:", "", *refused, ""])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    page = Path(__file__).parent.parent / "docs" / "models.md"
    text = page.read_text("utf-8").split("<!-- table -->")[0] if page.exists() else ""
    page.write_text(f"{text}<!-- table -->\n{table()}", "utf-8")
