"""A tokenizer and language models of random weights, built in memory in milliseconds."""

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
