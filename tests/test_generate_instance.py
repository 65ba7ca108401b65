"""``instructgym/GenerateInstance-v0``: prompts and their splits, files of instructions, where an instance ends."""

import json

import gymnasium as gym
import pytest
from tiny_models import build_tokenizer

import instructgym  # noqa: F401
from instructgym.envs.tasks.instruction.instance_prompts import few_shot_prompt, instance_prompts, read_response
from instructgym.envs.tasks.instruction.pool import load_tasks
from instructgym.envs.tasks.instruction.seeds import load_instructions
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.tokenization import EmbeddedTokenizer, LoadedTokenizer
from instructgym.rewards import FunctionReward
from instructgym.rewards.quality.instance_format import Instance, parse_instance

ENV_ID = "instructgym/GenerateInstance-v0"
SORT = {"instruction": "Say whether the animal is a bird or a fish.", "is_classification": True, "id": "sort"}
ASK = {"instruction": "Turn it into\na question.", "is_classification": False, "id": "ask"}
SING = {"instruction": "Sing a song.", "is_classification": None}


@pytest.fixture
def jsonl(tmp_path):
    """``jsonl(*rows)``: a file of them."""

    def write(*rows):
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return str(path)

    return write


def make(n=0, **kwargs):
    options = {"tokenizer": "bytes", "embedder": "hashing", "split": None, "reward": "vader"} | kwargs
    return (gym.make_vec(ENV_ID, num_envs=n, **options) if n else gym.make(ENV_ID, **options)).unwrapped


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["input_first", "output_first"])
def test_demonstrations_are_instances_with_and_without_input(order):
    header, *shots, asked = few_shot_prompt("Do it.", order).split("\n\n")
    assert "\n" not in header and 2 <= len(shots) <= 4
    instances = []
    for shot in shots:
        task, _, text = shot.partition("\n")
        instances.append(parse_instance(text, order, task.removeprefix("Task: ")))
    assert all(instances) and {bool(instance.input) for instance in instances} == {True, False}
    assert asked == f"Task: Do it.\n{'Input' if order == 'input_first' else 'Class label'}:"


@pytest.mark.parametrize("order", ["input_first", "output_first"])
def test_prompts_are_short(order):
    assert len(EmbeddedTokenizer().encode(few_shot_prompt("Explain why the sky is blue.", order))) < 200


def test_the_type_of_a_task_says_which_field_comes_first(jsonl):
    sort, ask, sing = instance_prompts(jsonl(SORT, ASK, SING), None)
    assert [e.metadata["order"] for e in (sort, ask, sing)] == ["output_first", "input_first", "input_first"]
    assert [e.metadata["opening"] for e in (sort, ask, sing)] == ["Class label:", "Input:", "Input:"]
    assert all(e.prompt.endswith(e.metadata["opening"]) for e in (sort, ask, sing))
    assert (sort.id, ask.id, sort.metadata["task"]) == ("mine/sort", "mine/ask", "mine")
    assert "Task: Turn it into a question.\n" in ask.prompt
    assert ask.metadata["instruction"] == ASK["instruction"]
    json.dumps([dict(e.metadata) for e in (sort, ask, sing)])


def test_splits_share_nothing_and_are_those_of_the_instructions(jsonl):
    parts = {split: instance_prompts(split=split) for split in ("train", "validation", "test")}
    ids = [example.id for examples in parts.values() for example in examples]
    assert len(ids) == len(set(ids)) == len(instance_prompts(split=None)) == len(load_tasks())
    own = jsonl(
        *({"instruction": task.instruction, "is_classification": task.is_classification} for task in load_tasks())
    )
    for split, examples in parts.items():
        assert {e.metadata["instruction"] for e in examples} == {i.text for i in load_instructions(own, split)}
    assert [e.prompt for e in instance_prompts(own, "test")] == [e.prompt for e in parts["test"]]


def test_a_smaller_limit_takes_a_part_of_a_larger_one():
    few, more = (instance_prompts(limit=limit) for limit in (5, 20))
    assert few == more[:5] != instance_prompts(limit=5, seed=1)


def test_the_chat_layout_ends_in_the_opening_of_the_answer(jsonl):
    tokenizer = LoadedTokenizer(build_tokenizer(), "tiny", 2048)
    [example] = instance_prompts(jsonl(SORT), None, layout="chat", tokenizer=tokenizer)
    assert example.prompt.startswith("<|user|>The task") and example.prompt.endswith("<|assistant|>Class label:")
    assert f"<task>\n{SORT['instruction']}\n</task>" in example.prompt


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "Hi."}], "mine.jsonl row 1 needs a text field 'instruction'"),
        ([SORT | {"is_classification": "yes"}], "row 1 needs true or false as 'is_classification', got 'yes'"),
        ([SORT, ASK | {"id": "sort"}], "mine.jsonl has the id 'sort' 2 times"),
        ([SORT, SORT | {"id": "other"}], "has the instruction 'Say whether .*' 2 times"),
        ([], "mine.jsonl is empty"),
    ],
)
def test_bad_rows_are_named(rows, message, jsonl):
    with pytest.raises(InputError, match=message):
        instance_prompts(jsonl(*rows), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "instruction"}, "unknown data 'instruction': use 'instructions' or a file"),
        ({"data": "no/such.jsonl"}, "cannot read seed file no/such.jsonl"),
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"limit": 0}, "limit of 0"),
        ({"layout": "tree"}, "unknown layout 'tree'"),
        ({"layout": "chat"}, "needs a tokenizer"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        instance_prompts(**options)


def test_an_empty_split_is_refused(jsonl):
    with pytest.raises(InputError, match=r"none of the 1 instructions of .*mine.jsonl falls into the split 'test'"):
        instance_prompts(jsonl(SORT), "test")  # falls into train


# --- episodes ----------------------------------------------------------------------------------------------------


def played(env, index, text):
    """The last step of an episode in which a text is written, and the end of sequence if it goes on."""
    env.reset(seed=0, options={"index": index})
    tokens = [*env.tokenizer.encode_continuation(text), *env.generation.eos_ids]
    for count, token in enumerate(tokens, start=1):
        _, reward, terminated, _, info = env.step(token)
        if terminated:
            return reward, info, tokens[count:]
    raise AssertionError("no end of sequence ended it")


@pytest.mark.parametrize(
    ("index", "text", "finish", "instance"),
    [
        (1, " It rains.\nOutput: Does it rain?\n\nTask: More", "stop", Instance("It rains.", "Does it rain?")),
        (1, " none\nOutput: Does it rain?", "eos", Instance("", "Does it rain?")),
        (1, " It rains.\nOutput: Does it rain?\nTask: More", "stop", Instance("It rains.", "Does it rain?")),
        (1, " It rains.\nOutput: Does it rain?\nExample 2", "stop", Instance("It rains.", "Does it rain?")),
        (0, " Bird\nInput: Crow\nClass label: Fish", "stop", Instance("Crow", "Bird")),
        (0, " Bird\nInput: Crow\n\n", "stop", Instance("Crow", "Bird")),
        (0, " Bird\n\n", "stop", Instance("", "Bird")),
        (1, " It rains.", "eos", "no_output"),
        (1, " It rains.\nOutput: Does it?\nInput: It snows.\nOutput: Does it?", "eos", "fields"),
        (1, "\n\n", "stop", "no_output"),
        (1, " It rains, and rains, " * 5, "length", "cut"),
    ],
)
def test_an_episode_is_one_instance(index, text, finish, instance, jsonl):
    seen = []

    def kept(samples):
        seen.extend(samples)
        return [3.0] * len(samples)

    env = make(data=jsonl(SORT, ASK), reward=FunctionReward(kept), max_tokens=80)
    reward, info, rest = played(env, index, text)
    [sample] = seen
    assert (reward, info["finish_reason"]) == (3.0, finish)
    assert rest == [] or finish in ("stop", "length")
    assert set(sample.metadata) >= {"instruction", "order", "opening", "finish_reason"}
    assert sample.metadata["finish_reason"] == finish
    assert read_response(sample.response, sample.metadata) == instance
    assert info["task"] == "mine" and sample.episode_id == ("mine/sort", "mine/ask")[index]


def test_copies_of_a_group_write_to_the_same_instruction_without_many_instructions(jsonl):
    env = make(6, data=jsonl(SORT, ASK), group_size=3)
    _, infos = env.reset(seed=0)
    assert len(set(infos["episode_id"][:3])) == len(set(infos["episode_id"][3:])) == 1
