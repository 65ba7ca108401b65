"""Every GLUE and SuperGLUE task on hand-written rows: prompts, words, and both file layouts."""

import json

import pytest

from instructgym.envs.tasks.nlu.data import load_examples
from instructgym.envs.tasks.nlu.tasks import (
    CLOSE_TAG,
    OPEN_TAG,
    STOPS,
    SUITES,
    TASKS,
    few_shot_header,
    render,
    response_text,
)
from instructgym.llm_backends.errors import InputError

# Task, evaluation file, header line (or "") and one row of it, filled input, right answer.
TSV = [
    ("CoLA", "dev.tsv", "", "gj04\t0\t*\tThem runs.", "Sentence: Them runs.", "No"),
    ("SST-2", "dev.tsv", "sentence\tlabel", 'a "fine film \t1', 'Review: a "fine film', "Positive"),
    (
        "MRPC",
        "dev.tsv",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "1\t7\t8\tHe left.\tHe went.",
        "First sentence: He left.\nSecond sentence: He went.",
        "Yes",
    ),
    (
        "QQP",
        "dev.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "1\t2\t3\tWhy?\tHow?\t0",
        "First question: Why?\nSecond question: How?",
        "No",
    ),
    (
        "STS-B",
        "dev.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tnews\tf\t2012\t1\tnone\tnone\tA cat.\tA dog.\t1.750",
        "First sentence: A cat.\nSecond sentence: A dog.",
        "1.8",
    ),
    (
        "MNLI",
        "dev_matched.tsv",
        "index\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\tIt rains.\tIt is wet.\tneutral\tentailment",
        "Premise: It rains.\nHypothesis: It is wet.",
        "Entailment",
    ),
    (
        "MNLI-mm",
        "dev_mismatched.tsv",
        "index\tsentence1\tsentence2\tgold_label",
        "0\tIt rains.\tIt is dry.\tcontradiction",
        "Premise: It rains.\nHypothesis: It is dry.",
        "Contradiction",
    ),
    (
        "QNLI",
        "dev.tsv",
        "index\tquestion\tsentence\tlabel",
        "0\tWho won?\tAnn won.\tentailment",
        "Question: Who won?\nSentence: Ann won.",
        "Yes",
    ),
    (
        "RTE",
        "dev.tsv",
        "index\tsentence1\tsentence2\tlabel",
        "0\tAnn ran.\tAnn won.\tnot_entailment",
        "First text: Ann ran.\nSecond text: Ann won.",
        "No",
    ),
    (
        "WNLI",
        "dev.tsv",
        "index\tsentence1\tsentence2\tlabel",
        "0\tIt fell.\tIt is down.\t1",
        "First text: It fell.\nSecond text: It is down.",
        "Yes",
    ),
    (
        "AX",
        "diagnostic.tsv",
        "index\tsentence1\tsentence2",
        "0\tCats purr.\tPets purr.",
        "Premise: Cats purr.\nHypothesis: Pets purr.",
        None,
    ),
]

MULTIRC = {
    "idx": 4,
    "passage": {
        "text": "<b>Sent 1: </b>Ann won.<br><b>Sent 2: </b>Bob lost.<br>",
        "questions": [
            {
                "idx": 9,
                "question": "Who won?",
                "answers": [{"text": "Ann", "idx": 30, "label": 1}, {"text": "Bob", "idx": 31, "label": 0}],
            }
        ],
    },
}
RECORD = {
    "idx": 5,
    "passage": {
        "text": "Ann met Bob in Oslo.\n@highlight\nAnn was glad",
        "entities": [
            {"start": 0, "end": 2},
            {"start": 8, "end": 10},
            {"start": 15, "end": 18},
            {"start": 32, "end": 34},
        ],
    },
    "qas": [{"idx": 6, "query": "@placeholder was met.", "answers": [{"start": 8, "end": 10, "text": "Bob"}]}],
}
JSONL = [
    (
        "BoolQ",
        {"question": "is ice cold", "passage": "Ice is cold.", "label": True, "idx": 0},
        "Passage: Ice is cold.\nQuestion: is ice cold",
        "Yes",
    ),
    (
        "CB",
        {"premise": "It rains.", "hypothesis": "It pours.", "label": "neutral", "idx": 0},
        "Premise: It rains.\nHypothesis: It pours.",
        "Neutral",
    ),
    (
        "COPA",
        {"premise": "I fell.", "choice1": "Ice.", "choice2": "Sun.", "question": "cause", "label": 1, "idx": 0},
        "Premise: I fell.\nOption one: Ice.\nOption two: Sun.\nAsked for: the cause",
        "Option two",
    ),
    ("MultiRC", MULTIRC, "Passage: Ann won. Bob lost.\nQuestion: Who won?\nAnswer: Ann", "True"),
    ("ReCoRD", RECORD, "Passage: Ann met Bob in Oslo. Ann was glad\nStatement: Ann was met.", "No"),
    (
        "RTE",
        {"premise": "Ann ran.", "hypothesis": "Ann moved.", "label": "entailment", "idx": 0},
        "First text: Ann ran.\nSecond text: Ann moved.",
        "Yes",
    ),
    (
        "WiC",
        {"word": "bank", "sentence1": "A bank lends.", "sentence2": "A river bank.", "label": False, "idx": 0},
        "Word: bank\nFirst sentence: A bank lends.\nSecond sentence: A river bank.",
        "Different",
    ),
    (
        "WSC",
        {
            "text": "Ann hit Bob because he lied, and he ran.",
            "target": {"span1_text": "Bob", "span1_index": 2, "span2_text": "he", "span2_index": 4},
            "label": True,
            "idx": 0,
        },
        "Text: Ann hit Bob because *he* lied, and he ran.\nPronoun: he\nWords: Bob",
        "Yes",
    ),
    (
        "AXb",
        {"sentence1": "All ran.", "sentence2": "Ann ran.", "label": "entailment", "idx": 0, "logic": "x"},
        "First text: All ran.\nSecond text: Ann ran.",
        "Yes",
    ),
    (
        "AXg",
        {"premise": "She ran.", "hypothesis": "He ran.", "label": "not_entailment", "idx": 0},
        "First text: She ran.\nSecond text: He ran.",
        "No",
    ),
]


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def check(example, task, body, word):
    header = TASKS[task].header
    assert example.prompt == f"{header}{body}\n{OPEN_TAG}"
    assert example.reference == word
    assert example.choices == TASKS[task].words
    assert example.id.startswith(f"{task}/test-")
    assert (example.metadata["task"], example.metadata["kind"]) == (task, TASKS[task].kind)
    json.dumps(dict(example.metadata))
    for choice in example.choices:
        assert f"{OPEN_TAG} {choice} {CLOSE_TAG}" in header


# --- prompts and file layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "name", "header", "row", "body", "word"), TSV, ids=[case[0] for case in TSV])
def test_tsv_layouts(write, task, name, header, row, body, word):
    folder = "MNLI" if task == "MNLI-mm" else task
    root = write(f"{folder}/{name}", f"{header}\n{row}\n" if header else f"{row}\n")
    (example,) = load_examples(task, "test", root)
    check(example, task, body, word)
    assert load_examples(task, "test", root / folder) == [example]


@pytest.mark.parametrize(("task", "row", "body", "word"), JSONL, ids=[case[0] for case in JSONL])
def test_jsonl_layouts(write, task, row, body, word):
    name = {"AXb": "AX-b/AX-b.jsonl", "AXg": "AX-g/AX-g.jsonl"}.get(task, f"{task}/val.jsonl")
    check(load_examples(task, "test", write(name, jsonl(row)))[0], task, body, word)


def test_every_task_is_in_a_suite_and_in_these_tables():
    assert set(TASKS) == {name for names in SUITES.values() for name in names}
    assert set(TASKS) == {case[0] for case in [*TSV, *JSONL]} | {"rotten-tomatoes"}
    assert len(SUITES["SuperGLUE"]) == 10


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_label_map_and_layouts_of_every_task(task):
    assert set(task.label_map.values()) == set(task.words)
    assert task.answer(-1) is task.answer(None) is task.answer("maybe") is None
    row = {name: f"  {{braces}} and\n{name} " for name in task.fields}
    header, body = render(task, row)
    assert (header, body.splitlines()[-1]) == (task.header, OPEN_TAG)
    assert all(f"{{braces}} and {name}" in body for name in task.fields)
    plain_header, plain = render(task, row, "plain")
    assert plain_header == ""
    assert plain == body.removesuffix(OPEN_TAG) + f"{task.cue}:"
    for layout, stop in STOPS.items():
        assert response_text("Yes", layout).endswith(stop)


def test_the_words_of_hub_labels():
    assert [TASKS["RTE"].answer(label) for label in (0, 1)] == ["Yes", "No"]
    assert [TASKS["WNLI"].answer(label) for label in (0, 1)] == ["No", "Yes"]
    assert [TASKS["MNLI"].answer(label) for label in (0, 1, 2)] == ["Entailment", "Neutral", "Contradiction"]
    assert [TASKS["CB"].answer(label) for label in (0, 1, 2)] == ["Entailment", "Contradiction", "Neutral"]
    assert [TASKS["STS-B"].answer(label) for label in (0, 3.26, "5.000", 5.1)] == ["0.0", "3.3", "5.0", None]


def test_few_shot_header_is_shared_and_solved():
    rows = [{"sentence": "good", "label": "1"}, {"sentence": "bad", "label": "0"}]
    assert (
        few_shot_header("SST-2", rows, "plain")
        == "Review: good\nSentiment: Positive\n\nReview: bad\nSentiment: Negative\n\n"
    )
    tagged = few_shot_header("SST-2", rows)
    assert tagged == TASKS["SST-2"].header + (
        "Review: good\n<Judgement> Positive </Judgement>\nReview: bad\n<Judgement> Negative </Judgement>\n"
    )
    with pytest.raises(InputError, match="SST-2 has the label '7'"):
        few_shot_header("SST-2", [{"sentence": "good", "label": "7"}])


def test_multirc_keeps_its_indices(write):
    first, second = load_examples("MultiRC", "test", write("MultiRC/val.jsonl", jsonl(MULTIRC)))
    assert first.metadata["idx"] == {"paragraph": 4, "question": 9, "answer": 30}
    assert (second.id, second.reference) == ("MultiRC/test-4-9-31", "False")


def test_record_asks_for_every_candidate_and_trains_on_two(write):
    root = write("ReCoRD/val.jsonl", jsonl(RECORD))
    asked = {e.metadata["candidate"]: e.reference for e in load_examples("ReCoRD", "test", root)}
    assert asked == {"Ann": "No", "Bob": "Yes", "Oslo": "No"}
    many = [
        RECORD | {"idx": i, "passage": RECORD["passage"] | {"text": RECORD["passage"]["text"] + str(i)}}
        for i in range(20)
    ]
    write("ReCoRD/train.jsonl", jsonl(*many))
    train = load_examples("ReCoRD", "train", root, seed=1)
    assert [e.reference for e in train] == ["Yes", "No"] * (len(train) // 2)
    assert {e.metadata["candidate"] for e in train if e.reference == "No"} == {"Ann", "Oslo"}
    assert train == load_examples("ReCoRD", "train", root, seed=1)
    assert train != load_examples("ReCoRD", "train", root, seed=2)
