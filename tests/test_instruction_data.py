"""Instruction data from files of every format, and the prompts made of them."""

import json

import pytest

from instructgym.envs.tasks.instruction.data import InstructionExample, prompt_text, read_instruction_data, request_text
from instructgym.experiments.evolve.generate import write_parquet
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.tokenization import LoadedTokenizer

ALPACA = [
    {"instruction": "Add.", "input": "1, 2", "output": "3"},
    {"instruction": "Sing. ", "input": "", "output": " la\u2028la\n"},
]
READ = [("Add.", "1, 2", "3"), ("Sing.", "", "la\u2028la")]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def triples(data):
    return [(e.instruction, e.input, e.output) for e in data.examples]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.jsonl", lines(ALPACA)),
        ("data.jsonl", "\ufeff" + lines(ALPACA).rstrip()),
        ("data.json", json.dumps(ALPACA, indent=1)),
        ("data.json", lines(ALPACA)),
        ("dolly.jsonl", lines({"instruction": r["instruction"], "context": r["input"], "response": r["output"]}
                              for r in ALPACA)),
        ("seed_tasks.jsonl", lines({"id": "s", "name": "n", "instruction": r["instruction"], "is_classification": True,
                                    "instances": [{"input": r["input"], "output": r["output"]}]} for r in ALPACA)),
    ],
)  # fmt: skip
def test_formats_of_text_files(write, name, text):
    data = read_instruction_data(write(name, text) / name)
    assert triples(data) == READ and data.duplicates == 0
    again = read_instruction_data(write("other.jsonl", lines(ALPACA)) / "other.jsonl")
    assert [e.id for e in data.examples] == [e.id for e in again.examples], "an id is a matter of the texts alone"


def test_all_instances_of_a_task_and_duplicates(write):
    instances = [{"input": "a", "output": "b"}, {"input": "", "output": "c"}, {"input": "a", "output": "b "}]
    rows = [{"instruction": "Go on.", "instances": instances}, {"instruction": "Go on.", "input": None, "output": "c"}]
    data = read_instruction_data(write("tasks.jsonl", lines(rows)) / "tasks.jsonl")
    assert triples(data) == [("Go on.", "a", "b"), ("Go on.", "", "c")] and data.duplicates == 2


def test_messages_are_the_rows_that_they_were_made_of(write):
    rows = [
        {"messages": [{"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"}]},
        ALPACA[0],
    ]
    data = read_instruction_data(write("mixed.jsonl", lines(rows)) / "mixed.jsonl")
    assert triples(data) == [("Add.\n\n1, 2", "", "3")] and data.duplicates == 1


def test_parquet_as_evolve_generate_writes_it(write):
    folder = write("data.jsonl", lines(row | {"reward_terms": {"a": 1.0}} for row in ALPACA))
    write_parquet(folder / "data.jsonl", folder / "data.parquet")
    assert triples(read_instruction_data(folder / "data.parquet")) == READ
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    write("chat.jsonl", lines([{"messages": chat, "reward_terms": {}}]))
    write_parquet(folder / "chat.jsonl", folder / "chat.parquet")
    assert triples(read_instruction_data(folder / "chat.parquet")) == [("Hi", "", "Ho")]
    write("broken.parquet", b"PAR1 no")
    for name in ("broken.parquet", "absent.parquet"):
        with pytest.raises(InputError, match=f"cannot read --data .*{name}"):
            read_instruction_data(folder / name, "--data")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "A.", "output": ""}, "row 2: field 'output' must be a text that is not empty, got \"\""),
        ({"instruction": "A."}, "row 2: field 'output' .* it is missing"),
        ({"instruction": " ", "output": "b"}, "row 2: field 'instruction'"),
        ({"text": "A."}, "row 2: field 'instruction' .* it is missing"),
        ({"instruction": "A.", "input": 3, "output": "b"}, "row 2: field 'input'"),
        ({"instruction": "A.", "output": "\ud800"}, "row 2: field 'output' holds a lone surrogate"),
        ({"instruction": "A.", "instances": []}, "row 2: field 'instances'"),
        ({"instruction": "A.", "instances": [{"output": "b"}, {"output": ""}]}, "row 2 instance 2: field 'output'"),
        ({"messages": "Hi"}, "row 2: field 'messages' must be a list"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, r"row 2: field 'messages' must hold .*\['user'\]"),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]},
            "row 2 message 2: field 'content'",
        ),
        ([1], "row 2 is a list"),
    ],
)
def test_defects_are_named_with_row_and_field(write, row, message):
    path = write("data.jsonl", lines([ALPACA[0]]) + json.dumps(row)) / "data.jsonl"
    with pytest.raises(InputError, match=message):
        read_instruction_data(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.jsonl", "", "holds no rows"),
        ("empty.json", "[]", "holds no rows"),
        ("broken.json", "[{", "broken JSON"),
        ("items.json", "[1]", "item 1 is a int"),
        ("latin.jsonl", b"\xff", "not UTF-8"),
    ],
)
def test_files_that_cannot_be_used(write, name, text, message):
    with pytest.raises(InputError, match=message):
        read_instruction_data(write(name, text) / name, "--data")


def test_prompts_of_each_layout(tiny_tokenizer):
    with_input, without = InstructionExample("Add {x}.", "1", "2"), InstructionExample("Sing.", "", "la")
    assert request_text(with_input) == "Add {x}.\n\n1" and request_text(without) == "Sing."
    tokenizer = LoadedTokenizer(tiny_tokenizer, "tiny", 256)
    assert prompt_text(with_input, "chat", tokenizer) == "<|user|>Add {x}.\n\n1</s><|assistant|>"
    assert prompt_text(with_input, "plain") == "Instruction: Add {x}.\nInput: 1\nResponse:"
    alpaca = prompt_text(without, "alpaca")
    assert alpaca.startswith("Below is an instruction that describes a task. Write a response")
    assert alpaca.endswith("request.\n\n### Instruction:\nSing.\n\n### Response:")
    assert "further context. Write" in prompt_text(with_input, "alpaca") and "### Input:\n1\n" in prompt_text(
        with_input, "alpaca"
    )
    with pytest.raises(InputError, match="needs a tokenizer"):
        prompt_text(without, "chat")
    with pytest.raises(InputError, match="unknown layout 'vicuna'"):
        prompt_text(without, "vicuna")
