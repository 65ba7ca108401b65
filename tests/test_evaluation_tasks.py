"""Held-out tasks from files of three formats."""

import json

import pytest

from instructgym.envs.tasks.instruction.evaluation import EvaluationTask, load_evaluation_tasks
from instructgym.envs.tasks.instruction.pool import held_out, load_tasks
from instructgym.llm_backends.errors import InputError

NATURAL = {
    "Contributors": ["A"],
    "Categories": ["Word Relation"],
    "Definition": ["Give a rhyme."],
    "Positive Examples": [],
    "Instances": [{"id": "1", "input": "sea", "output": ["tree", " bee ", "tree"]}, {"input": "", "output": "log"}],
}


def test_super_natural_instructions(write):
    folder = write("tasks/task002_rhyme.json", json.dumps(NATURAL))
    write("tasks/task001_rhyme.json", json.dumps(NATURAL | {"Definition": "Rhyme!"}))
    write("tasks/README.json", "{}")
    first, second = load_evaluation_tasks(folder / "tasks")
    assert second == EvaluationTask("task002_rhyme", "Give a rhyme.", (("sea", ("tree", "bee")), ("", ("log",))))
    assert (first.name, first.instruction) == ("task001_rhyme", "Rhyme!")
    assert load_evaluation_tasks(folder / "tasks" / "task002_rhyme.json") == [second]
    write("test_tasks.txt", "task002_rhyme\n\n")
    assert load_evaluation_tasks(folder / "tasks", names=folder / "test_tasks.txt") == [second]
    write("test_tasks.txt", "task002_rhyme\ntask003\n")
    with pytest.raises(InputError, match=r"1 tasks that .* has not, the first is 'task003'"):
        load_evaluation_tasks(folder / "tasks", names=folder / "test_tasks.txt")


def test_user_oriented_instructions_are_all_taken(write):
    rows = [
        {"id": f"u{i}", "motivation_app": "Mail", "instruction": "Do it.", "instances": [{"input": "x", "output": "y"}]}
        for i in range(6)
    ]
    path = write("user.jsonl", "\n".join(map(json.dumps, rows))) / "user.jsonl"
    tasks = load_evaluation_tasks(path)
    assert [task.name for task in tasks] == [f"u{i}" for i in range(6)]
    assert tasks[0] == EvaluationTask("u0", "Do it.", (("x", ("y",)),))


def seeds(count):
    return [
        {"id": f"s{i}", "instruction": f"Do {i}.", "instances": [{"input": "", "output": f"{i}"}]} for i in range(count)
    ]


def test_of_seed_tasks_those_are_taken_that_bootstrapping_keeps_out(write):
    path = write("seeds.jsonl", "\n".join(map(json.dumps, seeds(175)))) / "seeds.jsonl"
    tasks = load_evaluation_tasks(path)
    assert [task.name for task in tasks] == [task.id for task in held_out(load_tasks(path), 40)[1]]
    assert len(load_evaluation_tasks(path, held_out_count=0)) == 175
    packaged = load_evaluation_tasks()
    assert [task.name for task in packaged] == [task.id for task in held_out(load_tasks(), 16)[1]]
    assert len(load_evaluation_tasks(held_out_count=0)) == 64
    write("few.json", json.dumps(seeds(3)))
    with pytest.raises(InputError, match="too few to hold any out"):
        load_evaluation_tasks(path.with_name("few.json"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("task1.json", NATURAL | {"Definition": []}, "'Definition' must be"),
        ("task1.json", NATURAL | {"Definition": [""]}, "'Definition' must be a text that is not empty"),
        ("task1.json", NATURAL | {"Instances": []}, "'Instances' is empty"),
        ("task1.json", NATURAL | {"Instances": [{"input": "a", "output": []}]}, "instance 1: field 'output'"),
        ("task1.json", NATURAL | {"Instances": [{"input": "a", "output": ["b", " "]}]}, "instance 1: field 'output'"),
        ("task1.json", NATURAL | {"Instances": [3]}, "instance 1 is a int"),
        ("task1.json", {"Instances": []}, "no task of Super-NaturalInstructions"),
        ("seeds.json", [{"instruction": f"Do {i}."} for i in range(12)], "needs 'instances' with an 'output'"),
        ("user.jsonl", {"motivation_app": "", "id": "a", "instruction": "b", "instances": []}, "row 1: field 'instanc"),
        ("user.jsonl", {"motivation_app": "", "instruction": "b"}, "row 1: field 'id'"),
    ],
)
def test_defects_of_task_files(write, name, content, message):
    path = write(name, json.dumps(content)) / name
    with pytest.raises(InputError, match=message):
        load_evaluation_tasks(path)


def test_names_that_repeat_and_folders_without_tasks(write):
    row = {"motivation_app": "", "id": "a", "instruction": "b", "instances": [{"output": "c"}]}
    path = write("user.jsonl", "\n".join([json.dumps(row)] * 2)) / "user.jsonl"
    with pytest.raises(InputError, match="2 tasks called 'a'"):
        load_evaluation_tasks(path)
    with pytest.raises(InputError, match=r"holds no task\*\.json"):
        load_evaluation_tasks(path.parent)
