"""``instructgym/GenerateResponse-v0``: prompts and their splits, users' files, chat layout, what each token is paid."""

import json

import gymnasium as gym
import numpy as np
import pytest
from tiny_models import CHAT_TEMPLATE, build_tokenizer

import instructgym  # noqa: F401
from instructgym.envs.tasks.responses.openings import response_prompts
from instructgym.envs.tokens.episode import PromptExample
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.tokenization import LoadedTokenizer
from instructgym.rewards import FunctionReward, Reward, Score

ENV_ID = "instructgym/GenerateResponse-v0"
EXAMPLES = [PromptExample("one", "red sea"), PromptExample("two", "blue")]
WORDS = ("red", "blue", "sea", "sky")
RED, BLUE, SEA, SKY, EOS, UNK = range(6)
WORTH = np.array([1.0, -2.0, 4.0, -8.0, 16.0, -32.0], np.float32)
"""What each token id is worth: every sum of them says which they were."""


class ById(Reward):
    """Pays every token what its id is worth."""

    name = "worth"

    def __init__(self, timing):
        self.timing = timing

    def reward(self, samples):
        splits = [WORTH[sample.token_ids] for sample in samples]
        return [Score(float(split.sum()), None if self.timing == "terminal" else split) for split in splits]


def make(n=0, **kwargs):
    words = {"id": "words", "kwargs": {"words": WORDS}}
    options = {"examples": EXAMPLES, "tokenizer": words, "embedder": "hashing", "max_tokens": 5} | kwargs
    return (gym.make_vec(ENV_ID, num_envs=n, **options) if n else gym.make(ENV_ID, **options)).unwrapped


def jsonl(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
    return str(path)


def load_all(path, **options):
    """The examples of all splits that are not empty."""
    loaded = []
    for split in ("train", "validation", "test"):
        try:
            loaded += response_prompts(path, split, **options)
        except InputError as error:
            assert "falls into the split" in str(error)
    return loaded


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reviews():
    return {split: response_prompts("reviews", split) for split in ("train", "validation", "test")}


def test_reviews_are_openings_of_long_sentences_and_how_they_went_on(reviews):
    counts = set()
    for example in reviews["train"]:
        opening = example.prompt.removeprefix("Film review: ").split()
        counts.add(len(opening))
        assert example.prompt.startswith("Film review: ") and not example.prompt.endswith(" ")
        assert example.reference == example.reference.strip()
        assert len(opening) + len(example.reference.split()) >= 10
        assert example.metadata["label"] in ("fresh", "rotten")
    assert counts == {3, 4, 5, 6}


def test_reviews_are_split_into_parts_without_a_common_sentence(reviews):
    sizes = {split: len(examples) for split, examples in reviews.items()}
    total = sum(sizes.values())
    assert total > 10_000
    assert abs(sizes["train"] / total - 0.8) < 0.02 and abs(sizes["test"] / total - 0.1) < 0.01
    ids = [example.id for examples in reviews.values() for example in examples]
    assert len(set(ids)) == len(ids)
    rests = {split: {e.reference for e in examples if len(e.reference) > 60} for split, examples in reviews.items()}
    assert not rests["train"] & (rests["validation"] | rests["test"])


def test_a_smaller_limit_takes_a_part_of_a_larger_one(reviews):
    few, more = (response_prompts("reviews", "validation", limit) for limit in (20, 60))
    assert few == more[:20] and {e.id for e in more} <= {e.id for e in reviews["validation"]}
    assert few == response_prompts("reviews", "validation", 20)
    other = response_prompts("reviews", "validation", 20, seed=1)
    assert {e.id for e in other} != {e.id for e in few}


def test_instructions_have_no_references():
    examples = response_prompts("instructions", "train")
    assert len(examples) > 40 and all(e.reference is None for e in examples)
    assert examples[0].prompt.startswith("Instruction: ") and examples[0].prompt.endswith("\nResponse:")


def test_rows_of_a_file(tmp_path):
    path = jsonl(
        tmp_path / "mine.jsonl",
        {"prompt": " Say hello. ", "reference": " Hello. ", "id": 7},
        {"instruction": "Add them.", "input": "2 and 3", "output": "5"},
        "",
        {"instruction": "Sing.", "input": "", "response": None, "output": "La."},
        {"prompt": "Grüße \u2028 und mehr", "response": ""},
    )
    by_prompt = {example.prompt: example for example in load_all(path)}
    hello = by_prompt["Say hello."]
    assert (hello.id, hello.reference, hello.metadata["task"]) == ("mine/7", "Hello.", "mine")
    added = by_prompt["Instruction: Add them.\nInput: 2 and 3\nResponse:"]
    assert added.reference == "5" and added.id.startswith("mine/")
    assert by_prompt["Instruction: Sing.\nResponse:"].reference == "La."
    assert by_prompt["Grüße \u2028 und mehr"].reference is None
    assert len(by_prompt) == 4


def test_a_rows_split_depends_on_its_prompt_alone(tmp_path):
    rows = [{"prompt": f"Question {i}?", "id": i} for i in range(300)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    parts = {split: {e.prompt for e in response_prompts(path, split)} for split in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 300
    assert 200 < len(parts["train"]) < 270
    fewer = jsonl(tmp_path / "b.jsonl", *[row | {"id": 1000 + i} for i, row in enumerate(rows[:90:-1])])
    assert {e.prompt for e in response_prompts(fewer, "train")} < parts["train"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "Hi."}, '{"prompt": "torn'], "mine.jsonl row 2 is broken JSON"),
        ([{"prompt": "Hi."}, "[1]"], "mine.jsonl row 2 is a list"),
        ([{"question": "Hi."}], "mine.jsonl row 1 needs a field 'prompt' or 'instruction'; it has 'question'"),
        ([{}], "row 1 needs a field 'prompt' or 'instruction'; it has nothing"),
        ([{"prompt": "  "}], "mine.jsonl row 1: field 'prompt' must be a text that is not empty"),
        ([{"prompt": 3}], "row 1: field 'prompt' must be a text that is not empty, got 3"),
        ([{"instruction": ""}], "row 1: field 'instruction' must be a text"),
        ([{"instruction": "a", "input": ["b"]}], "row 1: field 'input' must be a text"),
        ([{"prompt": "a", "reference": 5}], "row 1: field 'reference' must be a text"),
        ([{"prompt": "a", "id": [1]}], r"row 1: field 'id' must be a text or a whole number, got \[1\]"),
        ([{"prompt": "a", "id": True}], "row 1: field 'id' must be a text or a whole number"),
        ([{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}], "row 2: field 'id' 'x' is that of .*row 1"),
        ([{"prompt": "a"}, "", {"prompt": "a"}], "row 3: field 'id' .* is that of .*row 1"),
        (['{"prompt": "half \\ud800"}'], "row 1: field 'prompt' holds a lone surrogate"),
        ([], "none of the 0 rows of .*mine.jsonl falls into the split 'train'"),
    ],
)
def test_bad_rows_are_named(rows, message, tmp_path):
    path = jsonl(tmp_path / "mine.jsonl", *rows)
    with pytest.raises(InputError, match=message) as error:
        response_prompts(path)
    assert "\n" not in str(error.value)


def test_data_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="unknown data 'review': use 'reviews', 'instructions' or a JSONL file"):
        response_prompts("review")
    with pytest.raises(InputError, match=r"cannot read .*none\.jsonl"):
        response_prompts(str(tmp_path / "none.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.jsonl is not UTF-8"):
        response_prompts(str(tmp_path / "latin.jsonl"))


# --- the chat layout ---------------------------------------------------------------------------------------------


def test_the_chat_layout_is_the_template_around_the_message():
    tokenizer = LoadedTokenizer(build_tokenizer(), "tiny", 512)
    [first, *_] = response_prompts("instructions", "train", layout="chat", tokenizer=tokenizer)
    [plain, *_] = response_prompts("instructions", "train")
    request = plain.prompt.removeprefix("Instruction: ").removesuffix("\nResponse:")
    assert first.prompt == f"<|user|>{request}</s><|assistant|>" and first.metadata["request"] == request
    assert first.id == plain.id
    env = make(data="instructions", layout="chat", tokenizer=tokenizer, examples=None, reward=ById("causal"))
    env.reset(seed=0, options={"index": 0})
    expected = tokenizer.hf.apply_chat_template(
        [{"role": "user", "content": request}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert env.process.state(0).tolist() == expected


@pytest.mark.parametrize("in_template", [False, True])
def test_a_start_token_comes_once(in_template):
    from tokenizers.processors import TemplateProcessing

    hf = build_tokenizer()
    hf.bos_token = "<pad>"
    hf.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    hf.chat_template = ("{{ bos_token }}" if in_template else "") + CHAT_TEMPLATE
    tokenizer = LoadedTokenizer(hf, "tiny", 512)
    messages = [{"role": "user", "content": "Sing."}]
    if not in_template:  # encode would put a token in front that the template does not have
        with pytest.raises(InputError, match="puts tokens around its own chat template"):
            tokenizer.chat_text(messages)
        return
    ids = tokenizer.encode(tokenizer.chat_text(messages))
    assert ids == [0, *tokenizer.encode_continuation("<|user|>Sing.</s><|assistant|>")]


def test_a_tokenizer_without_chat_template_is_refused():
    with pytest.raises(InputError, match="words:red blue sea sky has no chat template"):
        make(data="instructions", layout="chat", examples=None, reward=ById("causal"))
    with pytest.raises(InputError, match="layout 'chat' needs a tokenizer"):
        response_prompts("instructions", layout="chat")


# --- what is paid ------------------------------------------------------------------------------------------------

RESPONSE = [SEA, BLUE, RED, EOS]


def test_a_dense_reward_pays_every_token_its_own_worth_and_the_last_one_is_the_end_of_sequence():
    env = make(reward=ById("causal"))
    env.reset(seed=0)
    steps = [env.step(token) for token in RESPONSE]
    assert [step[1] for step in steps] == [4.0, -2.0, 1.0, 16.0]
    assert [step[2] for step in steps] == [False, False, False, True]
    vector = make(2, reward=ById("causal"))
    vector.reset(seed=0)
    played = vector.play([RESPONSE, [SKY] * 9])
    assert played.rewards[0].tolist() == [4.0, -2.0, 1.0, 16.0]
    assert played.rewards[1].tolist() == [-8.0] * 5
    assert [info["finish_reason"] for info in played.infos] == ["eos", "length"]


@pytest.mark.parametrize("timing", ["terminal", "whole"])
def test_a_reward_of_the_whole_response_is_paid_with_its_last_token(timing):
    env = make(1, reward=ById(timing))
    env.reset(seed=0)
    played = env.play([RESPONSE])
    assert played.rewards[0].tolist() == [0.0, 0.0, 0.0, 19.0]
    if timing == "whole":
        assert played.credit[0].tolist() == [4.0, -2.0, 1.0, 16.0]


@pytest.mark.parametrize("timing", ["causal", "terminal", "whole"])
def test_an_empty_response_is_its_end_alone(timing):
    env = make(reward=ById(timing))
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(EOS)
    assert (reward, terminated, truncated) == (16.0, True, False)
    assert (info["text"], info["finish_reason"], info["step"]) == ("", "eos", 1)


def test_the_cap_ends_a_response_without_an_end_of_sequence():
    env = make(reward=ById("causal"), max_tokens=3)
    env.reset(seed=0)
    ends = [env.step(SEA)[2] for _ in range(3)]
    assert ends == [False, False, True]
    assert env.process.episode(0).finish_reason == "length"


def test_a_stop_text_ends_a_response_and_is_no_part_of_it():
    seen = []

    def length(samples):
        seen.extend(sample.response for sample in samples)
        return [float(len(sample.response)) for sample in samples]

    for stop in ("\n", ("\n", "###")):
        env = make(
            examples=[PromptExample("a", "Say it:")],
            tokenizer="bytes",
            stop=stop,
            reward=FunctionReward(length),
            max_tokens=20,
        )
        env.reset(seed=0)
        steps = [env.step(token) for token in env.tokenizer.encode_continuation(" fine\n")]
        assert steps[-1][1:3] == (5.0, True) and steps[-1][4]["text"] == " fine"
    assert seen == [" fine"] * 2


def test_the_default_pays_the_sentiment_of_a_review():
    env = make(examples=None, tokenizer="bytes", limit=50, max_tokens=48)
    paid = {}
    for text in ("a wonderful, delightful film.", "a dull, terrible film.", ""):
        _, info = env.reset(seed=0)
        assert info["task"] == "reviews"
        steps = [env.step(token) for token in [*env.tokenizer.encode_continuation(text), *env.generation.eos_ids]]
        assert steps[-1][2] and steps[-1][4]["reward_terms"] == {"vader": steps[-1][1]}
        paid[text] = sum(step[1] for step in steps)
    good, bad, empty = paid.values()
    assert good > 0.5 and bad < -0.5 and empty == 0.0
