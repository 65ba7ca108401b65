"""Learned scorers of quality: UniEval and reward models, on tiny random models that are loaded as real ones are."""

import pytest
import torch
from tiny_models import CORPUS, build_tokenizer

from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.loading import ModelLoadError
from instructgym.rewards import HubRewardModel, Sample, UniEval


def save(model, path, tokenizer=None):
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    (tokenizer or word_tokenizer()).save_pretrained(path)
    return str(path)


def word_tokenizer(special=("Yes", "No"), eos=True):
    """One token per word of the questions and of ours; others are unknown. ``</s>`` ends a text, as in T5."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = "question: Is this a natural coherent understandable response: response history: red green blue".split()
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *special, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if eos:
        core.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def unieval_path(tmp_path_factory):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return save(T5ForConditionalGeneration(config), tmp_path_factory.mktemp("models") / "t5")


def test_unieval_is_yes_against_no_at_the_first_position(unieval_path):
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    samples = [Sample("red"), Sample("green blue red red red", "blue"), Sample("red")]
    values = {a: UniEval(a, unieval_path).reward(samples) for a in ("naturalness", "understandability", "coherence")}
    model = T5ForConditionalGeneration.from_pretrained(unieval_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(unieval_path)
    for aspect, scores in values.items():
        for sample, score in zip(samples, scores, strict=True):
            text = UniEval(aspect, unieval_path).question(sample)
            ids = tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                logits = model(input_ids=ids["input_ids"], decoder_input_ids=torch.tensor([[0]])).logits[0, 0]
            yes, no = (logits.softmax(0)[tokenizer.convert_tokens_to_ids(word)] for word in ("Yes", "No"))
            assert score.value == pytest.approx(float(yes / (yes + no)), abs=1e-5)
    assert len({round(row[0].value, 4) for row in values.values()}) == 3


def test_unieval_questions():
    sample = Sample("red </s> blue", "green {response}")
    coherent = UniEval("coherence").question(sample)
    assert "coherent response given the dialogue history?" in coherent
    assert coherent.endswith("</s> response: red < /s> blue </s> dialogue history: green {response}\n\n")
    assert "green" not in UniEval("naturalness").question(sample) + UniEval("understandability").question(sample)
    assert coherent.count("</s>") == 2


def test_unieval_reads_long_texts_up_to_its_limit(unieval_path):
    one, other = UniEval("coherence", unieval_path).reward(
        [Sample("red", "blue " * 2000), Sample("red", "blue " * 3000)]
    )
    assert one.value == pytest.approx(other.value, abs=1e-6)


def test_unieval_refuses_what_is_none(tmp_path, unieval_path, tiny_model_path):
    from transformers import T5ForConditionalGeneration

    with pytest.raises(ValueError, match=r"unknown aspect .*coherence"):
        UniEval("wit", unieval_path)
    with pytest.raises(ModelLoadError, match="nowhere"):
        UniEval(model=str(tmp_path / "nowhere")).reward([Sample("a")])
    with pytest.raises(ModelLoadError, match="Seq2SeqLM"):
        UniEval(model=tiny_model_path).reward([Sample("a")])
    wordless = save(
        T5ForConditionalGeneration.from_pretrained(unieval_path), tmp_path / "t", word_tokenizer(("Ja", "Nein"))
    )
    with pytest.raises(InputError, match="no token for 'Yes'"):
        UniEval(model=wordless).reward([Sample("a")])


def reward_model(path, labels=1, chat=True, pad=True):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=labels,
        pad_token_id=0 if pad else None,
        bos_token_id=None,
        eos_token_id=1,
    )
    tokenizer = build_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    if not pad:
        tokenizer.pad_token = None
    return save(LlamaForSequenceClassification(config), path, tokenizer)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("pad", [True, False])
def test_a_reward_model_from_a_folder_gives_its_logit(tmp_path, chat, pad):
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    path = reward_model(tmp_path / "rm", chat=chat, pad=pad)
    samples = [Sample("a poem", "write"), Sample("List three things. " + CORPUS[0], "sea"), Sample("x" * 80, "y")]
    one, other, long = HubRewardModel(path).reward(samples)
    assert not long.valid and "reads 64" in long.feedback
    model, tokenizer = LlamaForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    for sample, score in zip(samples, (one, other), strict=False):
        text = (
            f"<|user|>{sample.prompt}</s><|assistant|>{sample.response}</s>"
            if chat
            else sample.prompt + sample.response
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        if not chat:  # two texts are tokenised apart
            ids = torch.tensor([tokenizer(sample.prompt)["input_ids"] + tokenizer(sample.response)["input_ids"]])
        with torch.no_grad():
            assert score.value == pytest.approx(float(model(input_ids=ids).logits[0, 0]), abs=1e-4)
    assert one.value != other.value


def test_reward_models_that_are_none(tmp_path, tiny_model_path, write):
    with pytest.raises(ModelLoadError, match="2 labels, a reward model has one"):
        HubRewardModel(reward_model(tmp_path / "two", labels=2)).reward([Sample("a")])
    folder = write("oasst/config.json", '{"model_type": "gpt_neox_reward_model"}') / "oasst"
    with pytest.raises(ModelLoadError, match=r"OpenAssistant's reward models .* class that transformers has not"):
        HubRewardModel(str(folder)).reward([Sample("a")])


def test_a_language_model_without_a_trained_head_is_refused(tmp_path, tiny_lm, tiny_tokenizer):
    import json

    tiny_lm.model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}))
    with pytest.raises(ModelLoadError, match=r"lacks the weights \['score.weight'\], which would be random"):
        HubRewardModel(str(tmp_path)).reward([Sample("a")])
