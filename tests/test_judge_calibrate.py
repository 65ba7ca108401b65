"""``judge calibrate``: known judges get the numbers they deserve; data, run folders, resumption, the command line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from instructgym.experiments.cli import main
from instructgym.experiments.judging import calibrate as judge
from instructgym.experiments.judging.calibrate import JudgeCalibrate, plot_calibration
from instructgym.experiments.judging.measures import Judgement, LabelledPair, count, measure, read_labelled_pairs
from instructgym.experiments.runs import folder as run_folder
from instructgym.experiments.runs.statistics import wilson
from instructgym.llm_backends import FunctionBackend, ScriptedBackend
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.records import read_records

QUIET = Console(quiet=True)
EQUALITY = Path(__file__).parent / "data" / "equality_pairs.jsonl"
PREFERENCES = [
    {"prompt": f"Question {i}?", "first": first, "second": second, "better": better}
    for i, (first, second, better) in enumerate(
        [("good", "bad", "first"), ("bad", "good thing", "second"), ("good one", "bad", "first")] * 4
    )
]
SAMENESS = [
    {"first": "sing", "second": "sing aloud now", "verdict": "Not Equal"},
    {"first": "dance", "second": "dance!", "verdict": "Equal"},
    {"first": "jump", "second": "jump twice", "verdict": "Not Equal"},
]


def shown(prompt):
    return re.findall(r"<(?:response_[ab]|first|second)>\n(.*?)\n</", prompt, re.DOTALL)


def always_a(prompt):
    return "A"


def perfect(prompt):
    return "A" if "good" in shown(prompt)[0] else "B"


def nonsense(prompt):
    return "As a language model I like both."


def perfect_equality(prompt):
    return "Equal" if any("!" in text for text in shown(prompt)) else "Not Equal"


def one_sided_equality(prompt):
    return "Not Equal" if "!" in shown(prompt)[0] or "now" in shown(prompt)[0] else "Equal"


def moody(prompt, sampling):
    return "A" if sampling.temperature == 0 or sampling.seed % 2 else "B"


def scored():
    """A judge that gives the log-odds of A: 1 for its position and 2 for the good text."""

    def score(prompt, completion):
        good = "good" in prompt.rsplit("\nA: ", 1)[1].split("\nB: ")[0]
        return -3.0 + ((1.0 + (2.0 if good else -2.0)) if completion == " A" else 0.0)

    return ScriptedBackend(score=score)


def chat(reply):
    return FunctionBackend(reply=reply, prompt_style="chat")


@pytest.fixture
def calibrate(tmp_path, monkeypatch):
    """``calibrate(backend, rows, **options)``: the results of a run on rows, and its folder."""

    def run(backend, rows=PREFERENCES, folder="run", **options):
        path = tmp_path / "pairs.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        monkeypatch.setattr(run_folder, "resolve", lambda kind, part: backend)
        chosen = JudgeCalibrate(data=str(path), run_dir=str(tmp_path / folder), **options)
        return judge.run(chosen, QUIET), tmp_path / folder

    return run


def test_a_judge_that_always_says_a_has_nothing_but_position_bias(calibrate):
    results, folder = calibrate(chat(always_a))
    metrics, counts = results["metrics"], results["counts"]
    assert (metrics["position_bias"], metrics["order_disagreement"], metrics["accuracy"]["share"]) == (1.0, 1.0, 0.0)
    assert metrics["accuracy_decided"]["share"] is None
    assert metrics["self_consistency"] == 1 and metrics["invalid_rate"] == 0
    assert (counts["ties"], counts["right"], counts["wrong"], counts["invalid"]) == (12, 0, 0, 0)
    assert {row["outcome"] for row in read_records(folder / "judgements.jsonl")} == {"tie"}


def test_a_perfect_judge(calibrate):
    results, folder = calibrate(chat(perfect))
    metrics = results["metrics"]
    assert metrics["accuracy"]["share"] == metrics["accuracy_decided"]["share"] == metrics["self_consistency"] == 1
    assert metrics["position_bias"] == metrics["order_disagreement"] == metrics["invalid_rate"] == 0
    assert 0.7 < metrics["accuracy"]["interval"][0] < metrics["accuracy"]["interval"][1] == 1
    assert "auc" not in metrics and metrics["mode"] == "verdict" and metrics["kind"] == "pairwise"
    assert metrics["baselines"]["the longer one is better"]["share"] == pytest.approx(8 / 12)  # 4 are equally long
    assert metrics["baselines"]["always 'first'"]["share"] == pytest.approx(8 / 12)
    assert results["counts"]["requests"] == 12 * (2 + 3) and results["counts"]["completion_tokens"] == 60
    assert results["counts"]["labels"] == {"first": 8, "second": 4}
    row = read_records(folder / "judgements.jsonl")[1]
    assert row["verdicts"] == ["B", "A"] and row["repeats"] == ["B"] * 3 and row["outcome"] == row["label"] == "second"
    assert (folder / "figures" / "calibration.png").stat().st_size > 1000


@pytest.mark.parametrize("rows", [PREFERENCES, SAMENESS])
def test_a_nonsense_judge_is_never_right(calibrate, rows):
    results, folder = calibrate(chat(nonsense), rows)
    metrics = results["metrics"]
    assert metrics["invalid_rate"] == 1 and metrics["accuracy"]["share"] == 0
    assert metrics["position_bias"] is metrics["order_disagreement"] is metrics["self_consistency"] is None
    assert results["counts"]["invalid"] == len(rows) and results["counts"]["invalid_repeats"] == 3 * len(rows)
    assert "not a verdict" in read_records(folder / "judgements.jsonl")[0]["why"]


def test_the_equality_judge_is_asked_in_both_orders(calibrate):
    results, _ = calibrate(chat(perfect_equality), SAMENESS)
    assert results["metrics"]["kind"] == "equality" and results["metrics"]["accuracy"]["share"] == 1
    assert results["metrics"]["position_bias"] is None and results["metrics"]["order_disagreement"] == 0
    results, folder = calibrate(chat(one_sided_equality), SAMENESS, folder="other", repeats=0)
    assert [row["outcome"] for row in read_records(folder / "judgements.jsonl")] == ["tie", "tie", "Equal"]
    assert results["metrics"]["order_disagreement"] == pytest.approx(2 / 3)
    assert results["counts"]["ties"] == 2 and results["counts"]["wrong"] == 1 and results["counts"]["requests"] == 6


def test_equal_texts_are_asked_about_nowhere(calibrate):
    rows = [{"first": "sing  now", "second": "sing now", "verdict": "Equal"}]
    results, folder = calibrate(chat(nonsense), rows)
    assert results["metrics"]["accuracy"]["share"] == 1 and results["counts"]["requests"] == 0
    assert read_records(folder / "judgements.jsonl")[0]["verdicts"] == []


def test_a_tie_is_right_where_the_label_says_so(calibrate):
    rows = [{"prompt": "?", "first": "x", "second": "y", "better": "tie"}, PREFERENCES[0]]
    results, _ = calibrate(chat(always_a), rows)
    assert results["metrics"]["accuracy"]["share"] == 0.5
    assert results["counts"]["right"] == results["counts"]["ties"] == 1


def test_likelihood_mode_reports_what_probabilities_are_worth(calibrate):
    results, folder = calibrate(scored())
    metrics = results["metrics"]
    assert metrics["mode"] == "likelihood" and metrics["self_consistency"] is None
    assert metrics["auc"] == metrics["accuracy_by_probability"]["share"] == metrics["accuracy"]["share"] == 1
    assert results["counts"]["requests"] == 12 * 4
    row = read_records(folder / "judgements.jsonl")[0]
    assert row["probability"] == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-4) and row["repeats"] == []
    assert row["log_odds"] == pytest.approx([3, -1], abs=1e-4)
    verdict, _ = calibrate(scored(), folder="verdict", mode="verdict", limit=2)
    assert verdict["metrics"]["mode"] == "verdict" and verdict["counts"]["pairs"] == 2


def test_self_consistency_is_that_of_sampled_verdicts(calibrate):
    results, _ = calibrate(chat(moody), PREFERENCES * 10, repeats=4)
    assert 0.35 < results["metrics"]["self_consistency"] < 0.65
    again, _ = calibrate(chat(moody), PREFERENCES * 10, repeats=4, folder="again")
    other, _ = calibrate(chat(moody), PREFERENCES * 10, repeats=4, folder="other", seed=1)
    assert again["metrics"] == results["metrics"] != other["metrics"]


def test_a_finished_run_is_left_alone(calibrate):
    results, folder = calibrate(chat(perfect))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again, _ = calibrate(chat(nonsense))
    assert again == results and before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="repeats=3"):
        calibrate(chat(perfect), repeats=5)
    with pytest.raises(InputError, match="pairs="):
        calibrate(chat(perfect), PREFERENCES[:5])


def test_an_interrupted_run_pays_for_no_reply_twice(calibrate, monkeypatch):
    monkeypatch.setattr(judge, "CHUNK", 3)
    asked = []

    def breaks(prompt):
        if len(asked) == 20:
            raise KeyboardInterrupt
        asked.append(prompt)
        return perfect(prompt)

    with pytest.raises(KeyboardInterrupt):
        calibrate(ScriptedBackend(reply=breaks, prompt_style="chat"))
    resumed = ScriptedBackend(reply=perfect, prompt_style="chat")
    results, folder = calibrate(resumed)
    assert resumed.usage.requests == 60 - 15  # the replies of three pairs were stored
    assert results["counts"]["requests"] == 60 and results["counts"]["replayed_replies"] == 15
    whole, other = calibrate(ScriptedBackend(reply=perfect, prompt_style="chat"), folder="whole")
    assert results["metrics"] == whole["metrics"]
    assert (folder / "judgements.jsonl").read_text() == (other / "judgements.jsonl").read_text()


def test_a_time_limit_stops_and_the_same_command_goes_on(calibrate, monkeypatch):
    monkeypatch.setattr(judge, "CHUNK", 2)
    slow = ScriptedBackend(reply=perfect, prompt_style="chat", latency=0.02)
    results, folder = calibrate(slow, minutes=1e-6)
    assert results["status"] == "stopped" and 0 < results["counts"]["pairs"] < 12
    rounds = 1
    while results["status"] == "stopped":
        results, _ = calibrate(slow, minutes=1e-6)
        rounds += 1
    assert rounds > 2 and results["counts"]["pairs"] == 12 == len(read_records(folder / "judgements.jsonl"))
    assert slow.usage.requests == 12 * 5  # none was sent twice


def test_a_dry_run_writes_nothing(calibrate, capsys):
    assert calibrate(chat(nonsense), dry_run=True)[0] == {}
    assert not calibrate(chat(nonsense), dry_run=True)[1].exists()


GOOD = {"prompt": "p", "first": "a", "second": "b", "better": "tie"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no pairs"),
        ([{"first": "a", "second": "b"}], r"row 1 must have either a field 'better'.*it has 'first', 'second'"),
        ([GOOD | {"verdict": "Equal"}], "either"),
        ([GOOD, GOOD | {"better": "A"}], r"row 2: field 'better' must be one of 'first', 'second', 'tie', got 'A'"),
        ([GOOD, {k: v for k, v in GOOD.items() if k != "second"}], "row 2: field 'second' .*it is missing"),
        ([GOOD, {k: v for k, v in GOOD.items() if k != "better"}], "row 2: field 'better' .*it is missing"),
        ([GOOD | {"prompt": 3}], "row 1: field 'prompt' .*got 3"),
        ([GOOD | {"first": " "}], "row 1: field 'first' must be a text that is not empty"),
        ([GOOD | {"first": "\ud800"}], "a lone surrogate"),
        ([{"first": "a", "second": "b", "verdict": "equal"}], "'Not Equal', 'Equal', got 'equal'"),
        ([GOOD, [1]], "row 2 is a list"),
    ],
)
def test_bad_rows_are_named_before_a_model_is_built(tmp_path, monkeypatch, rows, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(run_folder, "resolve", lambda kind, part: pytest.fail("built"))
    with pytest.raises(InputError, match=message):
        judge.run(JudgeCalibrate(data=str(path), run_dir=str(tmp_path / "run")), QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"), [(b'{"first": ', "row 1 is broken JSON"), (b"\xff\xfe", "not UTF-8"), (None, "cannot read")]
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_labelled_pairs(path)


def test_the_last_row_needs_no_line_end(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(GOOD)}\r\n\n{json.dumps(GOOD | {'first': 'é'})}".encode())
    assert [pair.first for pair in read_labelled_pairs(path)[1]] == ["a", "é"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ""}, "--data is missing"),
        ({"run_dir": ""}, "--run-dir is missing"),
        ({"repeats": 1}, "--repeats must be at least 2"),
        ({"repeats": -1}, "--repeats must not be negative"),
        ({"limit": -1}, "--limit must not be negative"),
        ({"mode": "loud"}, "--mode must be auto, verdict or likelihood, got 'loud'"),
        ({"backend": "nobody"}, "unknown backend 'nobody'"),
        ({"backend": '{"id": "openai", "kwargs": {"tone": 1}}'}, "cannot build backend 'openai'"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        judge.run(JudgeCalibrate(**({"data": str(EQUALITY), "run_dir": str(tmp_path / "run")} | options)), QUIET)


def test_likelihood_mode_needs_log_probs(calibrate):
    with pytest.raises(InputError, match="--mode likelihood needs log-probs"):
        calibrate(chat(perfect), mode="likelihood")


def test_the_command(tmp_path, capsys):
    arguments = ["judge", "calibrate", "--data", str(EQUALITY), "--backend", "scripted", "--limit", "6"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--run-dir", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert done.value.code == 0 and "equality judge, likelihood mode" in printed and "baseline" in printed
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--run-dir", str(tmp_path / "run")])
    assert done.value.code == 0 and "finished: nothing to do" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as done:
        main(["judge", "calibrate", "--data", str(tmp_path / "none"), "--run-dir", str(tmp_path / "other")])
    assert done.value.code == 2 and "cannot read --data" in capsys.readouterr().err


def test_the_list_of_judges(capsys):
    with pytest.raises(SystemExit):
        main(["judge", "list"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("judge ", "rubric-judge", "pairwise-judge", "ranking-judge"))


@given(st.integers(0, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_is_scipys(case):
    right, total = case
    low, high = wilson(right, total)
    if total:
        theirs = stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
        assert 0 <= low <= high <= 1
    else:
        assert (low, high) == (0, 1)


@given(
    st.lists(st.tuples(st.sampled_from(["first", "second", "tie"]), st.sampled_from(["first", "second", "tie", None])))
)
def test_the_counts_add_up(rows):
    judgements = [Judgement(LabelledPair("a", "b", label), outcome) for label, outcome in rows]
    counts = count(judgements)
    assert counts["right"] + counts["wrong"] + counts["ties"] + counts["invalid"] == counts["pairs"] == len(rows)
    assert min(counts[name] for name in ("right", "wrong", "ties", "invalid")) >= 0
    if rows:
        assert measure("pairwise", judgements)["accuracy"]["share"] == counts["right"] / len(rows)


def test_the_figure_takes_shares_at_the_ends(tmp_path):
    bars = {f"{k} of {n}": (k / n, *wilson(k, n)) for n in (1, 7, 72) for k in (0, n)}
    assert plot_calibration(bars, [(0.0, False), (1.0, True)], tmp_path / "a.png").exists()
    assert plot_calibration(bars, [], tmp_path / "b.png").exists()


@pytest.mark.slow
def test_calibrating_the_embedded_judge(tmp_path):
    options = JudgeCalibrate(data=str(EQUALITY), run_dir=str(tmp_path / "run"), limit=6)
    results = judge.run(options, QUIET)
    assert results["metrics"]["mode"] == "likelihood" and results["metrics"]["invalid_rate"] == 0
    assert results["counts"]["requests"] == 24 and results["counts"]["prompt_tokens"] > 500
    rows = read_records(tmp_path / "run" / "judgements.jsonl")
    assert len(rows) == 6 and all(0 < row["probability"] < 1 for row in rows)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["command"] == "judge calibrate"
