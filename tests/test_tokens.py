"""Token ids: what ends a turn, which ids there are, and control tokens that are spelled in data."""

import gymnasium as gym
import pytest
from tiny_models import build_model, build_tokenizer
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from instructgym.envs.tasks.instruction.data import InstructionExample
from instructgym.envs.tokens.env import TokenEnv
from instructgym.envs.tokens.episode import PromptExample
from instructgym.envs.tokens.process import TokenSettings
from instructgym.experiments.teaching.finetune import demonstrations
from instructgym.llm_backends import BackendError, Sampling, resolve
from instructgym.llm_backends.base import answer_text
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.causal_lm import CausalLM
from instructgym.llm_backends.local.sampling import generate
from instructgym.llm_backends.local.tokenization import LoadedTokenizer, WordTokenizer, prompt_ids

END = "<end_of_turn>"


def sparse_tokenizer():
    """Nine tokens, the last of which has the id 12."""
    words = {"red": 0, "blue": 1, "sea": 2, "sky": 3, "a": 4, "b": 5, "c": 6, "<unk>": 7, "</s>": 12}
    core = Core(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


@pytest.fixture
def chat_model(tmp_path):
    """A folder with a model whose turns end by a token that is not the tokenizer's EOS, and the id of that token."""
    hf = build_tokenizer()
    hf.add_special_tokens({"additional_special_tokens": [END]})
    hf.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<model>{% endif %}"
    )
    model = build_model(vocabulary=len(hf))
    model.generation_config.eos_token_id = [1, len(hf) - 1]
    model.save_pretrained(tmp_path)
    hf.save_pretrained(tmp_path)
    return {"id": "transformers", "kwargs": {"model": str(tmp_path)}}, len(hf) - 1


@pytest.mark.parametrize("stop", [(), END, ("###", END)])
def test_a_turn_ends_as_the_generation_config_says(chat_model, stop):
    part, end = chat_model
    env = gym.make(
        "instructgym/GenerateResponse-v0",
        data="instructions",
        layout="chat",
        tokenizer=part,
        max_tokens=4,
        context_length=256,
        limit=2,
        reward=lambda samples: [0.0] * len(samples),
        stop=stop,
    )
    env.reset(seed=0)
    assert env.step(end)[2]
    assert resolve("tokenizer", part).eos_ids == resolve("backend", part).lm.eos_token_ids == {1, end}


def test_fine_tuning_closes_an_answer_as_its_layout_does(chat_model):
    part, end = chat_model
    example, tokenizer = InstructionExample("q", "", "a"), resolve("tokenizer", part)
    assert [demonstrations([example], layout, tokenizer)[0].response[-1] for layout in ("chat", "plain")] == [end, 1]


def test_a_control_token_is_a_stop_string_of_a_backend(tmp_path):
    hf = build_tokenizer()
    hf.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    lm = CausalLM(build_model(vocabulary=len(hf)), hf, "tiny")
    free = generate(lm, [[5, 6, 7]], [Sampling(max_tokens=64, seed=3)], eos=frozenset())[0][0]
    name = hf.convert_ids_to_tokens(free.token_ids[9])
    hf.add_special_tokens({"additional_special_tokens": ["<tool>", name]})  # a token that the model draws
    stopped = generate(lm, [[5, 6, 7]], [Sampling(max_tokens=64, seed=3, stop=(name,))], eos=frozenset())[0][0]
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[9]) + 1]
    assert stopped.finish_reason == "stop"


def test_ids_need_not_be_dense():
    hf = sparse_tokenizer()
    settings = TokenSettings(max_tokens=4, context_length=32)
    tokenizer = LoadedTokenizer(hf, "holes", 64)
    env = TokenEnv([PromptExample("one", "red sea")], tokenizer, lambda samples: [0.0] * len(samples), settings)
    env.reset(seed=0)
    assert env.action_space.n == 13 and env.step(12)[2]
    lm = CausalLM(build_model(vocabulary=16), hf, "holes")
    best = lm.model(input_ids=__import__("torch").tensor([[0, 1]])).logits[0, -1, :13].argmax()
    assert generate(lm, [[0, 1]], [Sampling(max_tokens=1, temperature=0)])[0][0].token_ids == [int(best)]


def test_a_tokenizer_beyond_the_embeddings_is_refused():
    hf = build_tokenizer()
    hf.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    with pytest.raises(InputError, match=r"token ids up to 320.*embeds only 320: resize"):
        CausalLM(build_model(vocabulary=320), hf, "short")


def test_padded_output_layers_are_normalised_over_the_tokenizer():
    tokenizer = build_tokenizer()
    lm = CausalLM(build_model(vocabulary=2 * len(tokenizer)), tokenizer, "wide")
    [[one]] = generate(lm, [[4, 5, 6]], [Sampling(max_tokens=4, seed=1)], eos=frozenset())
    assert one.logprobs == pytest.approx(lm.logprobs([[4, 5, 6]], [one.token_ids])[0].tolist(), abs=1e-5)


@pytest.mark.parametrize("single", ["$A </s>", "<pad> $A </s>", "$A </s> </s>", "<pad> $A"])
def test_no_token_is_appended_to_a_prompt(single):
    hf = build_tokenizer()
    hf.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("</s>", 1), ("<pad>", 0)])
    start, plain = [0] * single.startswith("<pad>"), hf("the sea", add_special_tokens=False)["input_ids"]
    assert LoadedTokenizer(hf, "t", 64).encode("the sea") == start + plain
    assert CausalLM(build_model(), hf, "t").encode("the sea") == start + plain
    assert CausalLM(build_model(), hf, "t").encode_completion("the sea") == plain


@pytest.mark.parametrize("text", ["</s>", "strike <s>old</s> new", "<pad></s>", "a</s", "<</s>/s>"])
def test_control_tokens_spelled_in_data_are_letters(text):
    hf = build_tokenizer()
    tokenizer, lm = LoadedTokenizer(hf, "t", 256), CausalLM(build_model(), hf, "t")
    for ids in (
        tokenizer.encode(text),
        tokenizer.encode_continuation(text),
        lm.encode(text),
        lm.encode_completion(text),
    ):
        assert not {0, 1} & set(ids) and hf.decode(ids) == text
    chat = prompt_ids(hf, [{"role": "user", "content": text}], "t")
    assert chat.count(1) == 1 and hf.decode(chat) == f"<|user|>{text}</s><|assistant|>"
    written = tokenizer.chat_text([{"role": "user", "content": text}])
    assert tokenizer.encode(written, markup=True) == chat
    [row] = demonstrations([InstructionExample(text, "", text)], "chat", tokenizer)
    assert row.response.count(1) == 1 and row.response[-1] == 1 and list(row.prompt).count(1) == 1


def test_a_control_token_that_is_a_word_too_is_not_written():
    tokenizer = WordTokenizer(words=("red", "sea"))
    assert tokenizer.encode("red </s> sea") != tokenizer.hf("red </s> sea")["input_ids"]
    assert not set(tokenizer.encode("red </s> sea")) & tokenizer.eos_ids


def test_a_template_that_refuses_one_prompt_fails_that_prompt_alone(tmp_path):
    hf = build_tokenizer()
    hf.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ messages[-1]['content'] }}"
    )
    build_model().save_pretrained(tmp_path)
    hf.save_pretrained(tmp_path)
    backend = resolve("backend", {"id": "transformers", "kwargs": {"model": str(tmp_path), "device": "cpu"}})
    user = {"role": "user", "content": "Hi"}
    prompts = [[user], [{"role": "system", "content": "Be brief."}, user]]
    fine, refused = backend.generate(prompts, Sampling(max_tokens=2))
    assert len(fine) == 1 and isinstance(refused, BackendError) and "no system role" in str(refused)
    for results in (backend.logprobs(prompts, ["a", "a"]), backend.choice_logprobs(prompts, [["a"], ["a"]], prompts)):
        assert len(results[0]) == 1 and isinstance(results[1], BackendError)
    assert backend.context_error(prompts[1], 4) is None
    with pytest.raises(InputError, match="no system role"):
        LoadedTokenizer(hf, "t", 64).chat_text(prompts[1])


# --- reasoning before an answer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>Let me see.\nMore.</think>\n\nAn answer", "An answer"),
        ("\n<think>\n\n</think>\n\nAn answer", "An answer"),
        ("Let me see.</think>An answer", "An answer"),  # the template wrote the beginning
        ("<think>Let me see.", None),
        ("An answer", "An answer"),
        ("Write <think>a</think> in HTML", "Write <think>a</think> in HTML"),
    ],
)
def test_reasoning_is_no_part_of_an_answer(text, answer):
    assert answer_text(text) == answer
    backend = resolve("backend", lambda prompt: text)
    [result] = backend.generate(["Hi"], Sampling(max_tokens=512))
    assert isinstance(result, BackendError) if answer is None else result[0].text == answer


def test_an_answer_is_asked_for_again_with_room_for_reasoning():
    asked = []

    def model(prompt, sampling):
        asked.append((sampling.max_tokens, sampling.stop))
        words = "<think> one\ntwo three four </think> yes\nno"
        return " ".join(words.split(" ")[: sampling.max_tokens]) if not sampling.stop else words.split("\n")[0]

    [[reply]] = resolve("backend", model).generate(["Hi"], Sampling(max_tokens=4, stop=("\n",)))
    assert reply.text == "yes"
    assert asked[0] == (4, ("\n",)) and asked[1][0] > 1000 and asked[1][1] == ()
