"""The official metrics against values worked out by hand, and malformed answers, which are wrong."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef

from instructgym.envs.tasks.nlu.metrics import evaluate, format_rate
from instructgym.envs.tasks.nlu.tasks import TASKS
from instructgym.envs.tokens.episode import PromptExample
from instructgym.llm_backends.errors import InputError

WORDS = {"E": "Entailment", "N": "Neutral", "C": "Contradiction", "Y": "Yes", "n": "No", "x": None, "?": "yes"}


def examples(task, references, metadata=None):
    metadata = metadata or [{"idx": i} for i in range(len(references))]
    return [
        PromptExample(
            f"{task}/{i}",
            "",
            reference,
            TASKS[task].words,
            {"task": task, "kind": TASKS[task].kind, "label": reference, **extra},
        )
        for i, (reference, extra) in enumerate(zip(references, metadata, strict=True))
    ]


def spell(letters):
    return [WORDS[letter] for letter in letters]


@pytest.mark.parametrize(
    ("task", "gold", "predicted", "expected"),
    [
        ("RTE", "YYnn", "Ynnn", {"accuracy": 3 / 4, "format_rate": 1.0}),
        ("WNLI", "YYnn", "Yxn?", {"accuracy": 2 / 4, "format_rate": 2 / 4}),
        ("MNLI", "ENCC", "ENCx", {"accuracy": 3 / 4, "format_rate": 3 / 4}),
        ("MNLI-mm", "EN", "EE", {"accuracy": 1 / 2, "format_rate": 1.0}),
        # 2 hits, 1 false alarm, 1 miss
        ("MRPC", "YYYnn", "YYnYn", {"f1": 2 / 3, "accuracy": 3 / 5, "format_rate": 1.0}),
        # malformed: a miss for a Yes, a false alarm for a No
        ("QQP", "YYYnn", "YYxxn", {"f1": 2 / 3, "accuracy": 3 / 5, "format_rate": 3 / 5}),
        ("MRPC", "nn", "nn", {"f1": 0.0, "accuracy": 1.0, "format_rate": 1.0}),
        # tp 2, tn 1, fp 1, fn 1: (2 - 1) / sqrt(3 * 3 * 2 * 2)
        ("CoLA", "YYYnn", "YYnYn", {"mcc": 1 / 6, "format_rate": 1.0}),
        ("CoLA", "YYYnn", "YYxxn", {"mcc": 1 / 6, "format_rate": 3 / 5}),
        ("CoLA", "YYnn", "xxxx", {"mcc": -1.0, "format_rate": 0.0}),
        ("CoLA", "YYnn", "YYYY", {"mcc": 0.0, "format_rate": 1.0}),
        ("AXb", "YYnn", "YYnn", {"mcc": 1.0, "format_rate": 1.0}),
        # Entailment 2/3 (one hit, one false alarm), Neutral 0, Contradiction 1
        ("CB", "ENC", "EEC", {"f1_macro": 5 / 9, "accuracy": 2 / 3, "format_rate": 1.0}),
        # Neutral is missed, and nobody gets a false alarm
        ("CB", "ENC", "ExC", {"f1_macro": 2 / 3, "accuracy": 2 / 3, "format_rate": 2 / 3}),
        # two pairs: one agrees, one does not
        ("AXg", "YYnn", "YYnY", {"accuracy": 3 / 4, "gender_parity": 1 / 2, "format_rate": 1.0}),
        ("AXg", "YYnn", "xxnn", {"accuracy": 2 / 4, "gender_parity": 1 / 2, "format_rate": 1 / 2}),
    ],
)
def test_classification(task, gold, predicted, expected):
    scores = evaluate(task, spell(predicted), examples(task, spell(gold)))
    assert scores == pytest.approx(expected)
    assert list(scores) == [*TASKS[task].metrics, "format_rate"]


def test_three_class_metrics_agree_with_scikit_learn():
    gold, predicted = spell("ENCENCEENC"), spell("ECCENNEECC")
    assert evaluate("AX", predicted, examples("AX", gold))["mcc"] == pytest.approx(matthews_corrcoef(gold, predicted))
    cb = evaluate("CB", predicted, examples("CB", gold))
    assert cb["f1_macro"] == pytest.approx(f1_score(gold, predicted, average="macro"))


def mean_f1(gold, predicted, words):
    """The definition: 2 hits / (labels + predictions), 0 for a class without either."""
    hits = {word: sum(a == b == word for a, b in zip(gold, predicted, strict=True)) for word in words}
    return np.mean([2 * hits[word] / max(gold.count(word) + predicted.count(word), 1) for word in words])


def mcc(gold, predicted):
    """The definition: correlation of one-hot rows; 0 if one side is constant."""
    words = sorted({*gold, *predicted})
    rows = [np.array([[word == w for w in words] for word in side], float) for side in (gold, predicted)]
    one, other = (row - row.mean(axis=0) for row in rows)
    scale = np.sqrt((one**2).sum() * (other**2).sum())
    return (one * other).sum() / scale if scale else 0.0


@pytest.mark.filterwarnings("error")
@given(st.lists(st.tuples(st.sampled_from("ENC"), st.sampled_from("ENCx")), min_size=1, max_size=12))
def test_scores_are_those_of_the_definitions_on_any_answers(rows):
    gold, answers = (spell(side) for side in zip(*rows, strict=True))
    predicted = [word or "" for word in answers]
    f1 = mean_f1(gold, predicted, sorted({*gold, *predicted} - {""}))
    assert evaluate("CB", answers, examples("CB", gold))["f1_macro"] == pytest.approx(f1, abs=1e-12)
    assert evaluate("AX", answers, examples("AX", gold))["mcc"] == pytest.approx(mcc(gold, predicted), abs=1e-12)
    binary = [["Yes" if word == "Entailment" else "No" for word in side] for side in (gold, predicted)]
    found = evaluate("MRPC", binary[1], examples("MRPC", binary[0]))["f1"]
    assert found == pytest.approx(mean_f1(*binary, ["Yes"]), abs=1e-12)


def test_a_malformed_answer_never_scores_like_a_right_one():
    gold = spell("ENCENC")
    right = evaluate("AX", gold, examples("AX", gold))["mcc"]
    assert right == pytest.approx(1.0)
    assert evaluate("AX", [None, *gold[1:]], examples("AX", gold))["mcc"] < right


def test_similarity():
    gold = examples("STS-B", ["1.0", "2.0", "3.0"])
    scores = evaluate("STS-B", ["1.0", "3", "2.0"], gold)
    assert scores == pytest.approx({"spearman": 0.5, "pearson": 0.5, "format_rate": 1.0})
    # 99 is clamped to 5; deviations -1, 0, 1 and -7/3, -1/3, 8/3: 5 / sqrt(2 * 38 / 3)
    assert evaluate("STS-B", ["0", "2", "99"], gold)["pearson"] == pytest.approx(5 / (2 * 38 / 3) ** 0.5)
    # malformed: 5 for a label in the lower half, 0 for one in the upper
    broken = evaluate("STS-B", [None, "2.0", "high"], gold)
    assert broken == pytest.approx(evaluate("STS-B", ["5", "2.0", "0"], gold) | {"format_rate": 1 / 3})
    assert evaluate("STS-B", ["2", "2", "2"], gold)["pearson"] == 0.0


def test_multirc_scores_answers_and_whole_questions():
    # Question 1 of paragraph 0, question 1 of paragraph 3: the same number, but not the same question.
    index = [(0, 1, 0), (0, 1, 1), (3, 1, 0), (3, 1, 1)]
    metadata = [{"idx": dict(zip(("paragraph", "question", "answer"), i, strict=True))} for i in index]
    gold = examples("MultiRC", ["True", "False", "True", "True"], metadata)
    scores = evaluate("MultiRC", ["True", "False", "True", "False"], gold)
    assert scores == pytest.approx({"f1a": 4 / 5, "em": 1 / 2, "format_rate": 1.0})
    # a malformed answer breaks its question and is a false alarm
    scores = evaluate("MultiRC", ["True", None, "True", "True"], gold)
    assert scores == pytest.approx({"f1a": 6 / 7, "em": 1 / 2, "format_rate": 3 / 4})


def test_record_takes_the_first_affirmed_candidate():
    rows = [
        (0, "Ann Lee", ["the Ann Lee!"]),
        (0, "Bob", ["the Ann Lee!"]),
        (1, "Ann", ["Ann Lee"]),
        (1, "Oslo", ["Ann Lee"]),
        (2, "Bob", ["Bob"]),
    ]
    metadata = [{"idx": {"passage": 7, "query": q}, "candidate": c, "answers": a} for q, c, a in rows]
    gold = examples("ReCoRD", ["Yes", "No", "No", "No", "Yes"], metadata)
    # Query 0 is matched but for article and mark, query 1 in one word of two, query 2 has no answer.
    scores = evaluate("ReCoRD", ["Yes", "Yes", "Yes", "No", None], gold)
    assert scores == pytest.approx({"f1": (1 + 2 / 3) / 3, "em": 1 / 3, "format_rate": 4 / 5})


def test_format_rate():
    assert format_rate(["Yes", None, "No", None]) == 0.5
    assert format_rate([]) == 0.0


def test_unusable_examples_are_refused():
    gold = examples("RTE", ["Yes", "No"])
    with pytest.raises(InputError, match="1 predictions for 2 examples"):
        evaluate("RTE", ["Yes"], gold)
    with pytest.raises(InputError, match="0 predictions for 0 examples"):
        evaluate("RTE", [], [])
    with pytest.raises(InputError, match="is of RTE: pass those of CoLA"):
        evaluate("CoLA", ["Yes", "No"], gold)
    with pytest.raises(InputError, match="'AX/0' has no label"):
        evaluate("AX", ["Neutral"], examples("AX", [None]))
    with pytest.raises(InputError, match="complete pairs"):
        evaluate("AXg", ["Yes"], examples("AXg", ["Yes"]))
    with pytest.raises(InputError, match="needs an idx with paragraph and question"):
        evaluate("MultiRC", ["True"], examples("MultiRC", ["True"]))
    with pytest.raises(InputError, match="unknown task"):
        evaluate("GLUE", ["Yes"], gold)
