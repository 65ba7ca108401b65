"""Splits, limits, shots and mixtures of the language-understanding data; the hub; and files that are refused."""

import json
import sys
from types import SimpleNamespace

import pytest

from instructgym.envs.tasks.nlu.data import load_examples, load_rows
from instructgym.envs.tasks.nlu.tasks import CLOSE_TAG, OPEN_TAG, render
from instructgym.llm_backends.errors import InputError


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def sst2(rows, header="sentence\tlabel\n"):
    return header + "".join(f"{text}\t{label}\n" for text, label in rows)


# --- splits, limits, shots, mixtures -------------------------------------------------------------------------------

REVIEWS = [(f"review number {i}", i % 2) for i in range(300)]


@pytest.fixture
def reviews(write):
    write("SST-2/dev.tsv", sst2([("the dev row", 1)]))
    return write("SST-2/train.tsv", sst2([*REVIEWS, *REVIEWS[:150]]))


def test_validation_is_held_out_of_train_for_good(reviews):
    parts = {split: load_rows("SST-2", split, reviews) for split in ("train", "validation", "test")}
    texts = {split: {row["sentence"] for row in rows} for split, rows in parts.items()}
    assert not texts["train"] & texts["validation"]
    assert len(parts["train"]) + len(parts["validation"]) == 450
    assert 20 <= len(parts["validation"]) <= 70
    assert texts["test"] == {"the dev row"}
    assert load_rows("SST-2", "validation", reviews, seed=9) == parts["validation"]


def test_at_most_a_thousand_rows_are_held_out(write):
    root = write("SST-2/train.tsv", sst2([(f"review {i}", 1) for i in range(15_000)]))
    assert len(load_rows("SST-2", "validation", root)) == 1000
    assert len(load_rows("SST-2", "train", root)) == 14_000


def test_limit_is_a_reproducible_random_subset(reviews):
    small, large = (load_rows("SST-2", "train", reviews, limit=n, seed=3) for n in (40, 80))
    assert len(large) == 80
    assert large[:40] == small == load_rows("SST-2", "train", reviews, limit=40, seed=3)
    assert small != load_rows("SST-2", "train", reviews, limit=40, seed=4)
    assert 10 < sum(row["label"] == "1" for row in small) < 30


def test_limit_keeps_whole_questions(write):
    answers = [{"text": "Ann", "idx": 0, "label": 1}, {"text": "Bob", "idx": 1, "label": 0}]
    passage = {"text": "Ann won.", "questions": [{"idx": 0, "question": "Who won?", "answers": answers}]}
    questions = [{"idx": i, "passage": passage} for i in range(6)]
    root = write("MultiRC/val.jsonl", jsonl(*questions))
    assert len(load_rows("MultiRC", "test", root, limit=5)) == 4


def test_shots_are_balanced_shared_and_not_trained_on(reviews):
    train = load_examples("SST-2", "train", reviews, shots=4)
    header = train[0].prompt.rpartition("Review: ")[0]
    assert header.count("Positive </Judgement>\n") == header.count("Negative </Judgement>\n") == 2
    (test,) = load_examples("SST-2", "test", reviews, shots=4)
    assert test.prompt == f"{header}Review: the dev row\n{OPEN_TAG}"
    assert len(train) == len(load_examples("SST-2", "train", reviews)) - 4
    assert len(load_examples("SST-2", "train", reviews, shots=4, limit=7)) == 7


def test_a_set_without_training_data_takes_shots_from_its_parent(write):
    rows = "".join(f"{i}\tText {i}.\tMore {i}.\tentailment\n" for i in range(30))
    write("RTE/train.tsv", "index\tsentence1\tsentence2\tlabel\n" + rows)
    root = write("AX-b/AX-b.jsonl", jsonl({"sentence1": "All ran.", "sentence2": "Ann ran.", "label": "entailment"}))
    (example,) = load_examples("AXb", "test", root, shots=2)
    assert example.prompt.count(f"{OPEN_TAG} Yes {CLOSE_TAG}\n") == 2
    with pytest.raises(InputError, match=r"AXb is for evaluation alone: use the split 'test', and RTE to train"):
        load_rows("AXb", "train", root)


def test_a_mixture_has_the_examples_of_all(reviews, write):
    write("CoLA/train.tsv", "".join(f"gj04\t{i % 2}\t\tSentence {i}.\n" for i in range(100)))
    examples = load_examples("SST-2, CoLA,rotten-tomatoes", "train", reviews, limit=5)
    assert [e.metadata["task"] for e in examples] == ["SST-2"] * 5 + ["CoLA"] * 5 + ["rotten-tomatoes"] * 5
    assert len({e.id for e in examples}) == 15
    with pytest.raises(InputError, match="no folder 'WNLI': a mixture needs one folder per task"):
        load_examples(["SST-2", "WNLI"], "train", reviews)


def test_rotten_tomatoes_needs_no_download():
    parts = {split: load_examples("rotten-tomatoes", split) for split in ("train", "validation", "test")}
    sizes = {split: len(examples) for split, examples in parts.items()}
    assert sum(sizes.values()) == 7403 + 5405
    assert 0.78 < sizes["train"] / sum(sizes.values()) < 0.82
    assert {e.reference for e in parts["test"]} == {"Positive", "Negative"}
    assert not {e.prompt for e in parts["train"]} & {e.prompt for e in parts["test"] + parts["validation"]}


# --- the hub -------------------------------------------------------------------------------------------------------


def test_hub_rows_follow_the_same_splits(monkeypatch):
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        count = 1 if split.startswith("validation") else 100
        rows = [{"sentence1": f"a {i}", "sentence2": "b", "label": i % 2, "idx": i} for i in range(count)]
        return [*rows, {"sentence1": "", "sentence2": "b", "label": 0, "idx": count}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    train, validation, test = (load_rows("RTE", split) for split in ("train", "validation", "test"))
    assert asked == [("nyu-mll/glue", "rte", "train")] * 2 + [("nyu-mll/glue", "rte", "validation")]
    assert len(train) + len(validation) == 100
    assert len(test) == 2
    assert load_examples("RTE", "test")[0].reference == "Yes"


def test_hidden_labels_leave_no_reference(monkeypatch):
    rows = [{"premise": "a", "hypothesis": "b", "label": -1, "idx": 0}]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *args, **kwargs: rows))
    assert load_examples("AX", "test")[0].reference is None
    with pytest.raises(InputError, match="label -1 is none of MNLI"):
        load_examples("MNLI", "test")


def test_hub_failures_name_the_local_way(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match=r"^cannot load nyu-mll/glue \(qqp, train\): no route to host; .*--data-dir$"):
        load_rows("QQP", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets, or pass --data-dir"):
        load_rows("QQP", "train")


# --- bad input -----------------------------------------------------------------------------------------------------

GOOD = sst2([("fine", 1)])
BAD_FILES = [
    ("SST-2/dev.tsv", sst2([("fine", 1)], "text\tlabel\n"), r"dev.tsv row 2: SST-2 needs the column 'sentence'.*text"),
    ("SST-2/dev.tsv", sst2([("fine", 1), ("so so", 2)]), r"dev.tsv row 3: the label '2' is none of SST-2: use 1, 0"),
    ("SST-2/dev.tsv", sst2([("fine", 1), (" ", 1)]), r"dev.tsv row 3: the field 'sentence' of SST-2 is empty"),
    ("SST-2/dev.tsv", GOOD + "torn", r"dev.tsv row 3 is torn: it has 1 of 2 columns, 'label' is missing"),
    ("SST-2/dev.tsv", GOOD.encode() + b"caf\xe9\t1\n", r"dev.tsv is not UTF-8: .* at byte"),
    ("SST-2/dev.tsv", "", r"dev.tsv is empty"),
    ("SST-2/dev.tsv", "sentence\tlabel\n", r"SST-2 has no rows for the split 'test'"),
    ("SST-2/val.jsonl", '{"sentence": "fine"', r"val.jsonl row 1 is broken JSON"),
    ("SST-2/val.jsonl", "[1]\n", r"val.jsonl row 1 is a list: make it a JSON object"),
    ("SST-2/val.jsonl", '{"sentence": "\\ud800", "label": 1}\n', r"row 1: the field 'sentence' holds a lone surrogate"),
    ("SST-2/val.jsonl", '{"sentence": "fine", "label": null}\n', r"row 1: the label None is none of SST-2"),
    ("SST-2/other.tsv", GOOD, r"SST-2 has no file dev.tsv or .* for SST-2: add it or check --data-dir"),
    ("CoLA/dev.tsv", "gj04\t1\tno star\n", r"dev.tsv row 1 is torn: it has 3 of 4 columns"),
    ("STS-B/dev.tsv", "sentence1\tsentence2\tscore\na\tb\t5.5\n", r"row 2: the label '5.5' .* a number from 0 to 5"),
    (
        "MultiRC/val.jsonl",
        '{"idx": 1, "passage": {"text": "x"}}\n',
        r"row 1 is no row of MultiRC in SuperGLUE's layout",
    ),
    ("ReCoRD/val.jsonl", '{"passage": "x", "query": "y", "entities": ["z"]}\n', r"row 1: ReCoRD needs the lists"),
]


def test_a_few_torn_rows_of_a_large_file_are_left_out_and_counted(write):
    rows = [(f"fine {i}", i % 2) for i in range(3000)]
    folder = write("SST-2/dev.tsv", sst2(rows) + "torn\n\n \t1\n")
    with pytest.warns(UserWarning, match=r"2 rows of .*dev.tsv were left out; the first: .*row 3002 is torn"):
        assert len(load_rows("SST-2", "test", folder)) == 3000


def test_blank_lines_and_any_case_of_truth(write):
    rows = '{"question": "q", "passage": "p", "label": true}\n\n{"question": "r", "passage": "p", "label": "FALSE"}\n'
    examples = load_examples("BoolQ", "test", write("BoolQ/val.jsonl", rows))
    assert [example.reference for example in examples] == ["Yes", "No"]


def test_a_list_in_the_place_of_a_text_is_refused(write):
    with pytest.raises(InputError, match="'sentence' of SST-2 is a list: make it a text"):
        load_rows("SST-2", "test", write("SST-2/val.jsonl", '{"sentence": ["a", "b"], "label": 1}\n'))


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files_are_named(write, name, content, message):
    with pytest.raises(InputError, match=message) as error:
        load_examples(name.split("/")[0], "test", write(name, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tasks": "SST-3"}, "unknown task 'SST-3': use CoLA, SST-2"),
        ({"split": "dev"}, "unknown split 'dev': use train, validation or test"),
        ({"layout": "chat"}, "unknown layout 'chat': use tagged or plain"),
        ({"limit": 0}, "a limit of 0 rows"),
        ({"shots": -1}, "-1 shots"),
        ({"shots": 1000}, "too few for 1000 shots"),
        ({"tasks": "SST-2,SST-2"}, "each once"),
        ({"data_dir": "/nowhere"}, "no folder /nowhere: set --data-dir"),
    ],
)
def test_bad_requests_are_refused(reviews, kwargs, message):
    with pytest.raises(InputError, match=message):
        load_examples(**{"tasks": "SST-2", "data_dir": reviews} | kwargs)


def test_the_folder_of_another_task_is_not_read(write):
    root = write("MNLI/val.jsonl", jsonl({"premise": "a", "hypothesis": "b", "label": "neutral"}))
    with pytest.raises(InputError, match="MNLI is the folder of another task"):
        load_rows("CB", "test", root / "MNLI")
    with pytest.raises(InputError, match="lacks the field 'sentence'"):
        render("SST-2", {"text": "x"})


# --- rows without a gold label -----------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", ["-", " - ", -1, -1.0, "-1", "", None, float("nan")])
def test_rows_without_a_gold_label_are_left_out_with_one_warning(nothing, tmp_path):
    (tmp_path / "MNLI").mkdir()
    rows = [
        {"sentence1": f"A man {k}.", "sentence2": "A person.", "gold_label": nothing if k % 3 == 1 else "neutral"}
        for k in range(20)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "MNLI" / "dev_matched.jsonl").write_text(lines, "utf-8")
    with pytest.warns(
        UserWarning, match=r"7 rows of .*dev_matched\.jsonl without a gold label were left out"
    ) as caught:
        kept = load_rows("MNLI", "test", tmp_path)
    assert len(caught) == 1 and {row["label"] for row in kept} == {"neutral"}
    # The others keep their ids.
    assert [row["id"] for row in kept] == [f"test-{k}" for k in range(20) if k % 3 != 1]


def test_a_tsv_without_some_labels_and_a_file_without_any(tmp_path):
    (tmp_path / "SST-2").mkdir()
    path = tmp_path / "SST-2" / "dev.tsv"
    path.write_text("sentence\tlabel\nfine\t1\npoor\t-\nso so\t-1\n", "utf-8")
    with pytest.warns(UserWarning, match=r"2 rows .* the first: .*row 3: the label '-' is none of SST-2"):
        assert [row["sentence"] for row in load_rows("SST-2", "test", tmp_path)] == ["fine"]
    path.write_text("sentence\tlabel\nfine\t-1\npoor\t-1\n", "utf-8")
    with pytest.raises(InputError, match=r"no row of .*dev\.tsv has a gold label"):
        load_rows("SST-2", "test", tmp_path)
    path.write_text("sentence\tlabel\nfine\t1\npoor\t?\n", "utf-8")
    with pytest.raises(InputError, match=r"the label '\?' is none of SST-2"):
        load_rows("SST-2", "test", tmp_path)
