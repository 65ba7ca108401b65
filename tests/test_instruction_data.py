"""Instruction data from files of every format, and the prompts made of them."""

import contextlib
import json

import pytest

from instructgym.envs.tasks.instruction.data import InstructionExample, prompt_text, read_instruction_data, request_text
from instructgym.envs.tasks.instruction.evaluation import load_evaluation_tasks
from instructgym.envs.tasks.instruction.pool import load_tasks
from instructgym.envs.tasks.instruction.seeds import load_instructions
from instructgym.envs.tasks.responses.openings import response_requests
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


# --- texts that mean: no input -----------------------------------------------------------------------------------

ABSENT = ["<noinput>", "<noInput>", " <noinput> ", "N/A", "None.", "no input", "noinput", "<No Input>", ""]


@pytest.mark.parametrize("absent", ABSENT)
def test_a_text_for_no_input_is_no_input_in_every_reader(absent, tmp_path):
    row = {"instruction": "Name a fruit.", "input": absent, "output": "Kiwi"}
    nested = {"id": "t", "instruction": "Name a fruit.", "instances": [{"input": absent, "output": "Kiwi"}]}
    flat, tasks = tmp_path / "flat.json", tmp_path / "tasks.jsonl"
    flat.write_text(json.dumps([row]), "utf-8")
    tasks.write_text(json.dumps(nested) + "\n", "utf-8")
    for path in (flat, tasks):
        [example] = read_instruction_data(path).examples
        assert request_text(example) == "Name a fruit." and example.input == ""
        assert load_instructions(path)[0].input == ""
        [task] = load_tasks(path)
        assert [instance.input for instance in task.instances] == [""]
    [evaluated] = load_evaluation_tasks(tasks, held_out_count=0)
    assert [input_text for input_text, _ in evaluated.instances] == [""]
    request = tmp_path / "request.jsonl"
    request.write_text(json.dumps(row) + "\n", "utf-8")
    openings = []
    for split in ("train", "validation", "test"):
        with contextlib.suppress(InputError):  # the one row falls into one of them
            openings += response_requests(request, split)
    assert [opening.chat for opening in openings] == ["Name a fruit."]
    context = tmp_path / "context.jsonl"
    context.write_text(json.dumps({"prompt": "Name a fruit.", "context": absent, "response": "Kiwi"}) + "\n", "utf-8")
    assert read_instruction_data(context).examples[0].input == ""


def test_what_only_looks_like_it_stays_and_so_do_outputs(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"instruction": "Count.", "input": "None of them came.", "output": "none"},
        {"instruction": "Sign?", "input": "-5", "output": "-"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert [(e.input, e.output) for e in read_instruction_data(path).examples] == [
        ("None of them came.", "none"),
        ("-5", "-"),
    ]
