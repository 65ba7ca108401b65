"""Seed files in every format and with every defect, fixed splits, and the order in which examples are drawn."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructgym.envs.process import EpisodeSource
from instructgym.envs.tasks.instruction.seeds import Instruction, SeedFileError, load_instructions
from instructgym.llm_backends.errors import InputError

TEXTS = ["Name a bird that sings.", "Erkläre den Regen. 雨はなぜ降る?", "Say \u201chi\u201d to the sea."]
ALPACA = [{"instruction": text, "input": f"in {i}", "output": "out"} for i, text in enumerate(TEXTS)]
SELF_INSTRUCT = [
    {
        "id": f"seed_task_{i}",
        "name": "x",
        "instruction": text,
        "instances": [{"input": f"in {i}", "output": "out"}],
        "is_classification": False,
    }
    for i, text in enumerate(TEXTS)
]


def jsonl(rows, end="\n", ascii_only=False):
    return end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows) + end


@pytest.fixture
def write(tmp_path):
    def write(content, name="seeds.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# --- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("seeds.jsonl", jsonl(ALPACA)),
        ("seeds.jsonl", jsonl(ALPACA, ascii_only=True)),
        ("seeds.jsonl", jsonl(ALPACA).rstrip("\n")),
        ("seeds.jsonl", jsonl(ALPACA, end="\r\n")),
        ("seeds.jsonl", "\n \n" + jsonl(ALPACA, end="\n\n\n")),
        ("seeds.jsonl", "\ufeff" + jsonl(ALPACA)),
        ("seeds", jsonl(ALPACA)),
        ("seeds.jsonl", jsonl(SELF_INSTRUCT)),
        ("seeds.json", json.dumps(ALPACA)),
        ("alpaca.json", json.dumps(ALPACA, indent=4, ensure_ascii=False)),
        ("alpaca.json", "\ufeff\n" + json.dumps(ALPACA).replace(",", ",\r\n")),
        ("seeds", json.dumps(ALPACA)),
        ("seeds.json", json.dumps(SELF_INSTRUCT)),
    ],
)
def test_json_formats(write, name, content):
    instructions = load_instructions(write(content, name))
    assert [(i.text, i.input) for i in instructions] == [(text, f"in {n}") for n, text in enumerate(TEXTS)]
    assert len({i.id for i in instructions}) == 3
    if "seed_task" in content:
        assert instructions[1].id == "seed_task_1"


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(TEXTS),
        "\n".join(TEXTS) + "\n",
        "\r\n".join(TEXTS) + "\r\n",
        "\ufeff" + "\n\n  \n".join(TEXTS),
        "".join(f"  {text}\t\n" for text in TEXTS),
    ],
)
@pytest.mark.parametrize("name", ["seeds.txt", "seeds", "seeds.md"])
def test_plain_text_has_one_instruction_a_line(write, name, content):
    path = write(content, name)
    assert [i.text for i in load_instructions(path)] == TEXTS
    assert load_instructions(str(path)) == load_instructions(path)


def test_plain_text_may_begin_with_a_bracket(write):
    assert load_instructions(write("[Task] Name a bird.\nSing.", "seeds.txt"))[0].text == "[Task] Name a bird."


@pytest.mark.parametrize("odd", ["\u2028", "\x0b", "\x0c", "\x1c", "\x85"])
def test_odd_white_space_within_a_text_does_not_tear_its_line(write, odd):
    row = json.dumps({"instruction": f"One{odd}two."}, ensure_ascii=False)
    assert load_instructions(write(f"{row}\n{row}\n"))[0].text == f"One{odd}two."
    assert [i.text for i in load_instructions(write(f"One{odd}two.\n", "seeds.txt"))] == [f"One{odd}two."]


def test_inputs_may_be_missing_or_null(write):
    rows = [{"instruction": "A."}, {"instruction": "B.", "input": None}, {"instruction": "C.", "instances": []}]
    assert [i.input for i in load_instructions(write(jsonl(rows)))] == ["", "", ""]


def test_lists():
    assert [i.text for i in load_instructions([" One. ", Instruction("Two.", "x")])] == ["One.", "Two."]


def test_the_packages_own_seeds():
    instructions = load_instructions()
    assert len(instructions) >= 16
    assert len({i.text for i in instructions}) == len({i.id for i in instructions}) == len(instructions)
    for split in ("train", "validation", "test"):
        assert load_instructions(split=split)


# --- defects -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("seeds.jsonl", "", "is empty"),
        ("seeds.txt", " \n\r\n\t", "is empty"),
        ("seeds.txt", "\ufeff", "is empty"),
        ("seeds.json", "[]", "holds no instruction"),
        ("seeds.txt", "Erkläre".encode("latin-1"), "not UTF-8.*byte 4"),
        ("seeds.jsonl", jsonl(ALPACA).encode("utf-16"), "not UTF-8"),
        ("seeds.jsonl", jsonl(ALPACA)[:-10], "row 3 is broken JSON"),
        ("seeds.jsonl", '{"instruction": "A."}\n\n{"instr\n', "row 3 is broken JSON"),
        ("seeds.json", json.dumps(ALPACA, indent=1)[:-5], r"is broken JSON: .*line \d+"),
        ("seeds.json", '{\n "instruction": "A."\n}', "row 1 is broken JSON"),
        ("seeds.jsonl", "Name a bird.\n", "row 1 is broken JSON"),
        ("seeds.jsonl", '{"instruction": "A."}\n{"prompt": "B.", "output": "C"}', "row 2.*'instruction'.*'prompt'"),
        ("seeds.json", '[{"instruction": "A."}, {"text": "B."}]', "item 2.*'instruction'.*'text'"),
        ("seeds.json", '["Name a bird."]', "item 1 is a str: make it a JSON object"),
        ("seeds.jsonl", "5\n", "row 1 is a int: make it a JSON object"),
        ("seeds.jsonl", '{"instruction": null}', "row 1.*text field 'instruction'"),
        ("seeds.jsonl", '{"instruction": 5}', "row 1.*text field 'instruction'"),
        ("seeds.jsonl", '{"instruction": " "}', "row 1 has an empty instruction"),
        ("seeds.jsonl", "{}", "row 1.*'instruction'"),
        ("seeds.jsonl", '{"instruction": "A \\ud83d."}', "row 1.*a lone surrogate.*ud83d"),
    ],
)
def test_defects_are_named_with_file_and_place(write, name, content, message):
    path = write(content, name)
    with pytest.raises(SeedFileError, match=message) as caught:
        load_instructions(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "absent.jsonl"):
        with pytest.raises(SeedFileError, match=f"cannot read seed file {path}"):
            load_instructions(path)


@pytest.mark.parametrize("seeds", [[], [""], ["A.", "  "]])
def test_empty_lists(seeds):
    with pytest.raises(SeedFileError, match="empty"):
        load_instructions(seeds)


@given(st.binary(max_size=60))
def test_any_bytes_give_instructions_or_one_clear_error(tmp_path, content):
    for name in ("seeds.txt", "seeds.jsonl", "seeds"):
        path = tmp_path / name
        path.write_bytes(content)
        try:
            assert all(i.text.strip() for i in load_instructions(path))
        except SeedFileError as error:
            assert str(path) in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["instruction", "instances", "x"]), inner)
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_json_gives_instructions_or_one_clear_error(tmp_path, value):
    for name, content in (("seeds.json", json.dumps(value)), ("seeds.jsonl", json.dumps(value) + "\n")):
        path = tmp_path / name
        path.write_text(content)
        try:
            assert all(i.text.strip() for i in load_instructions(path))
        except SeedFileError as error:
            assert str(path) in str(error)


# --- splits ------------------------------------------------------------------------------------------------------


def test_splits_depend_on_the_text_alone():
    names, texts = ("train", "validation", "test"), [f"Instruction number {i}." for i in range(200)]
    split_of = {i.text: name for name in names for i in load_instructions(texts, name)}
    assert sorted(split_of) == sorted(texts)
    for name in names:
        fewer = [Instruction(text, input="another") for text in reversed(texts[50:])]
        assert {split_of[i.text] for i in load_instructions(fewer, name)} == {name}


def test_splits_are_about_eighty_ten_ten_and_never_change():
    texts = [f"Instruction number {i}." for i in range(1000)]
    sizes = [len(load_instructions(texts, name)) for name in ("train", "validation", "test")]
    assert sum(sizes) == 1000
    assert 760 < sizes[0] < 840 and 70 < sizes[1] < 130
    assert load_instructions(["Name a bird."], "train")  # a hash of this text, today and tomorrow
    with pytest.raises(InputError, match="none of the 1 seeds falls into the split 'test'"):
        load_instructions(["Name a bird."], "test")


def test_unknown_splits_are_refused():
    with pytest.raises(ValueError, match="unknown split 'dev': use train, validation or test"):
        load_instructions(TEXTS, "dev")


def test_ids_depend_on_text_and_input():
    assert Instruction("A.").id == Instruction("A.").id
    assert len({Instruction("A.").id, Instruction("B.").id, Instruction("A.", "x").id}) == 3
    assert Instruction("A.", id="mine").id == "mine"


# --- the order of examples ---------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(0, 2**31), st.integers(1, 4))
def test_epochs_draw_every_example_once(size, seed, epochs):
    source = EpisodeSource(size)
    source.seed(seed)
    for _ in range(epochs):
        assert sorted(source.draw() for _ in range(size)) == list(range(size))


@given(st.integers(1, 12), st.integers(0, 2**31), st.integers(0, 40))
def test_a_source_continues_from_any_point(size, seed, drawn):
    source = EpisodeSource(size)
    source.seed(seed)
    for _ in range(drawn):
        source.draw()
    state = json.loads(json.dumps(source.state_dict()))
    rest = [source.draw() for _ in range(30)]
    other = EpisodeSource(size)
    other.load_state_dict(state)
    assert [other.draw() for _ in range(30)] == rest
    source.seed(seed)
    assert [source.draw() for _ in range(drawn + 30)][drawn:] == rest


def test_epochs_and_seeds_differ_in_order():
    source = EpisodeSource(50)
    orders = []
    for seed in (0, 1):
        source.seed(seed)
        orders += [[source.draw() for _ in range(50)] for _ in range(2)]
    assert len(set(map(tuple, orders))) == 4


def test_a_source_needs_examples():
    with pytest.raises(ValueError, match="at least one"):
        EpisodeSource(0)
