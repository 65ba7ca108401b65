"""The pool of instructions: seeds, demonstrations, filters, the gate, parsing of lists, state on disk."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructgym.envs.tasks.instruction.pool import (
    FILTERS,
    InstructionPool,
    Task,
    dropped_by,
    held_out,
    instruction_prompt,
    load_tasks,
    normalized,
    parse_numbered,
    task_type_prompt,
)
from instructgym.envs.tasks.instruction.seeds import SeedFileError
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.records import read_records
from instructgym.rewards.quality.instance_format import Instance
from instructgym.rewards.texts.rouge import RougeGate

THINGS = "tides rain snow wind hail fog dew frost heat mist".split()
SEEDS = [Task(f"Tell {THINGS[i]} {THINGS[-i]} and {i} birds.", id=f"seed_{i}") for i in range(10)]


# --- filters -------------------------------------------------------------------------------------------------------

WORDY = " ".join(["word"] * 150)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "empty"),
        ("  \n ", "empty"),
        ("Name one bird.", "too_short"),
        ("Name one singing bird.", None),
        (WORDY, None),
        (f"{WORDY} more", "too_long"),
        ("Describe the image in words.", "blocked_word"),
        ("Describe the IMAGES in words.", "blocked_word"),
        ("Describe how imagery works best.", None),
        ("Say what a mapmaker does.", None),
        ("Fill in the map, please.", "blocked_word"),
        ("Sort the files by size.", "blocked_word"),
        ("Draw a bird that sings.", "blocked_word"),
        ("Plot the sales of May.", "blocked_word"),
        ("Explain the plotting of novels.", None),
        ("Go to the market today.", "blocked_word"),
        ("Where do birds go today?", None),
        ("Show graphs of two functions.", "blocked_word"),
        ("Paint pictures of the sea.", "blocked_word"),
        ("write a program that sorts.", "write_program"),
        ("Write a Program that sorts.", "write_program"),
        ("Write a programme for a concert.", "write_program"),  # as in Self-Instruct: the first letters decide
        ("Write a poem about programs.", None),
        ("- name a singing bird", "punctuation_first"),
        ('"Quoted" words come from where?', "punctuation_first"),
        ("Über wen reden die Leute?", "non_ascii_first"),
        ("鳥の名前を 一つ 教えて ください", "non_ascii_first"),
        ("1 and 1 make what?", None),
        ("Say naïve words in French.", None),
    ],
)
def test_filters(text, rule):
    assert dropped_by(normalized(text)) == rule


def test_every_rule_has_a_name_of_its_own_and_a_reason():
    assert len({rule.name for rule in FILTERS}) == len(FILTERS) and all(rule.reason for rule in FILTERS)


def test_normalizing_collapses_white_space_and_raises_the_first_letter_only():
    assert normalized("  name\t a NASA\n mission ") == "Name a NASA mission"


# --- numbered lists ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "continues", "items"),
    [
        (" Name a bird.\n10. Sing.", True, ["Name a bird.", "Sing."]),
        ("9. Name a bird.\n10. Sing.", False, ["Name a bird.", "Sing."]),
        ("Sure:\n\n9) Name a bird.\n10) Sing.\n\nAnything else?", False, ["Name a bird.", "Sing."]),
        ("9 . Name\n   a bird.\n10. Sing.", False, ["Name a bird.", "Sing."]),
        ("9. Name a bird.\n\n10. Sing.\n", False, ["Name a bird.", "Sing."]),
        ("9. Name a bird.\n11. Sing.", False, ["Name a bird."]),  # a number is missing
        ("9. Name a bird.\n1. Sing.\n10. Dance.", False, ["Name a bird."]),
        ("9. Name a bird.\n\n1. Sing.\n10. Dance.", False, ["Name a bird."]),
        ("1. Name a bird.\n2. Sing.", False, []),
        ("Name a bird.", False, []),
        ("", True, [""]),
        (" \n10. Sing.", True, ["", "Sing."]),
        ("9. Add 3.5 and 10.5 now.", False, ["Add 3.5 and 10.5 now."]),
        ("9. Add\n3.5 and 4.", False, ["Add 3.5 and 4."]),
        ("\n".join(f"{n}. Item." for n in range(9, 20)), False, ["Item."] * 7),  # 9 to 15
    ],
)
def test_numbered_lists(reply, continues, items):
    assert parse_numbered(reply, continues=continues) == items


@given(st.lists(st.from_regex(r"[A-Za-z][a-z ,]{0,20}[a-z]", fullmatch=True), min_size=1, max_size=7), st.booleans())
def test_a_written_list_is_read_back(items, continues):
    text = "\n".join(f"{n}. {item}" for n, item in enumerate(items, start=9))
    read = parse_numbered(text.removeprefix("9.") if continues else text, continues=continues)
    assert read == [" ".join(item.split()) for item in items]


# --- tasks and held-out seeds --------------------------------------------------------------------------------------


def test_tasks_in_self_instructs_format(tmp_path):
    row = {
        "id": "seed_task_0",
        "name": "rhyme",
        "instruction": "Find a rhyme.",
        "instances": [{"input": "sea", "output": "tree"}],
        "is_classification": False,
    }
    path = tmp_path / "seeds.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({"instruction": "Sing.", "input": "x", "output": "la"}) + "\n")
    first, second = load_tasks(path)
    assert first == Task("Find a rhyme.", (Instance("sea", "tree"),), False, "seed_task_0", "rhyme")
    assert first.row() == row
    assert second.instances == (Instance("x", "la"),) and second.is_classification is None and second.id


def test_the_packages_seeds_are_tasks():
    tasks = load_tasks()
    assert len(tasks) == len({task.name for task in tasks}) == len({task.id for task in tasks}) == 64
    assert sum(task.is_classification is True for task in tasks) == 12
    assert all(len(task.instances) == 1 and task.instances[0].output for task in tasks)
    assert sum(bool(task.instances[0].input) for task in tasks) == 32
    gate = RougeGate(0.7)
    assert all(gate.add_if_new(task.instruction) for task in tasks), "the gate would keep none of them out"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "A.", "instances": {}}, "row 1 needs a list 'instances'"),
        ({"instruction": "A.", "instances": [{"input": "x"}]}, "row 1 has an instance without a text field 'output'"),
        ({"instruction": "A.", "is_classification": "no"}, "row 1 needs true or false as 'is_classification'"),
        ({"text": "A."}, "row 1 needs a text field 'instruction'"),
    ],
)
def test_defects_of_task_files(tmp_path, row, message):
    path = tmp_path / "seeds.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(SeedFileError, match=message):
        load_tasks(path)


def test_held_out_seeds_are_a_matter_of_their_texts():
    tasks = load_tasks()
    shown, held = held_out(tasks)
    assert len(held) == 40 and len(shown) == len(tasks) - 40
    assert sorted(task.id for task in shown + held) == sorted(task.id for task in tasks)
    backwards = held_out(tasks[::-1])[1]
    assert {task.id for task in backwards} == {task.id for task in held}
    assert {task.id for task in held_out(tasks, 10)[1]} < {task.id for task in held}
    assert held_out(tasks, 0) == (tasks, [])
    # Fixed for good: a changed hash would leak seeds of earlier runs into prompts.
    assert held_out(SEEDS, 2)[1] == [SEEDS[i] for i in (0, 4)]
    with pytest.raises(ValueError, match="so many must be left"):
        held_out(tasks, len(tasks) - 7)


# --- the pool ------------------------------------------------------------------------------------------------------


def test_demonstrations_are_six_seeds_and_two_machine_made_tasks_fewer_early():
    shown, held = held_out(SEEDS, 2)
    pool = InstructionPool(shown, held)
    machine = ["Count every ship in the harbour.", "Sing about old ropes and sails.", "Weigh a sack of wool."]
    for made in range(4):
        seen, orders = set(), set()
        for seed in range(60):
            tasks = pool.demonstrations(seed)
            assert tasks == pool.demonstrations(seed)
            ids = [task.id for task in tasks]
            seen.update(ids)
            orders.add(tuple(task in pool.machine for task in tasks))
            assert len(set(ids)) == 8 and sum(task in pool.machine for task in tasks) == min(made, 2)
        assert not seen & {task.id for task in held}
        assert seen == {task.id for task in [*shown, *pool.machine]}
        assert made == 0 or len(orders) > 5  # machine-made tasks stand anywhere
        if made < 3:
            assert pool.try_add(machine[made]).rejected_by is None


def test_what_enters_the_pool_and_what_does_not():
    shown, held = held_out(SEEDS, 2)
    pool = InstructionPool(shown, held)
    found = pool.try_add("count every  ship in the harbour.")
    assert (found.instruction, found.rejected_by, found.id) == (
        "Count every ship in the harbour.",
        None,
        "machine_task_0",
    )
    again = pool.try_add("Count every ship in this harbour.")
    assert again.rejected_by == "rouge" and again.nearest == found.instruction
    assert again.similarity == pytest.approx(5 / 6)
    assert pool.try_add(held[0].instruction).rejected_by == "rouge"  # an evaluation task must not come back
    assert pool.try_add("Draw every ship in the bay.").rejected_by == "blocked_word"
    assert [task.instruction for task in pool.machine] == ["Count every ship in the harbour."]


def test_seven_of_ten_words_pass_and_eight_do_not():
    seeds = [*SEEDS[:7], Task("One two three four five six seven eight nine ten")]
    assert InstructionPool(seeds).try_add("One two three four five six seven k l m").rejected_by is None
    assert InstructionPool(seeds).try_add("One two three four five six seven eight l m").rejected_by == "rouge"
    assert InstructionPool(seeds, threshold=0.8).try_add("One two three four five six seven eight l m").id


def test_a_pool_on_disk_goes_on_after_a_torn_line(tmp_path):
    path = tmp_path / "pool.jsonl"
    pool = InstructionPool(SEEDS, path=path)
    for text in ("Count every ship in the harbour.", "Sing about old ropes and sails."):
        assert pool.try_add(text).rejected_by is None
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "machine_task_2", "instr')
    again = InstructionPool(SEEDS, path=path)
    assert path.read_bytes() == whole
    assert again.machine == pool.machine and again.demonstrations(3) == pool.demonstrations(3)
    assert again.try_add("Sing about old ropes and nails.").rejected_by == "rouge"
    assert again.try_add("Weigh a sack of wool.").id == "machine_task_2"
    assert [row["id"] for row in read_records(path)] == [f"machine_task_{i}" for i in range(3)]
    assert load_tasks(path) == again.machine
    path.write_text('{"id": 1}\n')
    with pytest.raises(InputError, match="line 1 needs a text field 'instruction'"):
        InstructionPool(SEEDS, path=path)


@pytest.mark.parametrize(
    ("seeds", "options", "message"),
    [(SEEDS[:7], {}, "shows 8 tasks, got 7 seeds"), (SEEDS, {"threshold": 0.0}, "threshold must be in")],
)
def test_bad_pools_are_refused(seeds, options, message):
    with pytest.raises(ValueError, match=message):
        InstructionPool(seeds, **options)


# --- prompts -------------------------------------------------------------------------------------------------------


def test_prompts_show_the_demonstrations_in_order():
    tasks = [*SEEDS[:7], Task("Sort these:\n\nlines </tasks> now:")]
    prompt = instruction_prompt("completion", tasks)
    assert prompt.endswith("\n8. Sort these: lines </tasks> now\n9.")
    assert parse_numbered(prompt, first=1, last=9) == [t.instruction for t in SEEDS[:7]] + [
        "Sort these: lines </tasks> now",
        "",
    ]
    [message] = instruction_prompt("chat", tasks)
    assert "from 9 to 15" in message["content"] and "with 7 new" in message["content"]
    assert message["content"].count("</tasks>") == 1
    assert "3. Tell snow" in message["content"]


def test_the_task_type_is_a_strict_yes_or_no():
    prompt = task_type_prompt()
    assert [prompt.parse(reply) for reply in (" Yes", "YES.", "no", "Maybe", "Yes and no")] == [
        True,
        True,
        False,
        None,
        None,
    ]
    assert {shot[-1] for shot in prompt.demonstrations} == {"Yes", "No"}
