"""The stages behind the making of data: fine-tuning at equal size, evaluation, attacks, the report; and whole runs."""

import json
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
from rich.console import Console

from instructgym.experiments.evolve.run import EvolveRun
from instructgym.experiments.evolve.run import run as evolve
from instructgym.experiments.refine_af.run import RefineAFEvaluate, RefineAFFinetune, RefineAFReport, RefineAFRun
from instructgym.experiments.refine_af.run import run as refine_af
from instructgym.experiments.runs import training
from instructgym.experiments.runs.folder import read_json
from instructgym.experiments.runs.study import run_study
from instructgym.experiments.teaching import run as teaching
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.records import append_lines, read_records

QUIET = Console(quiet=True)


def finish(folder, **counts):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"status": "finished", "metrics": {}, "counts": counts}))


def write_data(root, arm, count):
    """The data set of an arm, and what the stages before it leave."""
    finish(root / arm, responses=2 * count, rows=count)
    finish(root / "train", episodes=40)
    finish(root / "bootstrap")
    (root / "bootstrap" / "journal.jsonl").write_text("{}\n" * 1600)
    rows = [{"instruction": f"say {i}", "input": "", "output": f"{arm} {i}"} for i in range(count)]
    append_lines(root / arm / "data.jsonl", rows)


def small(root, model, kind=RefineAFFinetune, **others):
    tasks = root / "tasks.jsonl"
    if not tasks.exists():
        rows = [{"instruction": f"do {i}", "instances": [{"input": "", "output": f"done {i}"}]} for i in range(3)]
        tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "model": model,
        "tasks": str(tasks),
        "sft_layout": "plain",
        "sft_epochs": 1,
        "scale": "smoke",
        "dtype": "float32",
    }
    return kind(run_dir=str(root / "run"), **given | others)


def finetune(options):
    return run_study(options, QUIET)


def evaluate(options):
    return run_study(RefineAFEvaluate(**asdict(options)), QUIET)


def report(options):
    return run_study(RefineAFReport(**asdict(options)), QUIET)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tiny_model_path):
    """An experiment whose stages have finished: 12 rows of one arm, 20 of the other."""
    root = tmp_path_factory.mktemp("taught")
    write_data(root / "run", "self-instruct", 20)
    write_data(root / "run", "refine-af", 12)
    options = small(root, tiny_model_path)
    finetune(options)
    evaluate(options)
    return options, report(options)


def test_arms_train_on_equally_many_rows(taught):
    options, results = taught
    for arm in ("self-instruct", "refine-af"):
        run = options.root / "finetune" / f"{arm}-0"
        assert [len(read_records(run / name)) for name in ("train.jsonl", "held_out.jsonl")] == [9, 3]
        assert results["arms"][arm]["rows"] == 9


def test_the_report_compares_with_the_base_and_with_the_first_arm(taught):
    options, results = taught
    assert list(results["arms"]) == ["base", "self-instruct", "refine-af"]
    assert set(results["comparisons"]) == {"self-instruct vs base", "refine-af vs base", "refine-af vs self-instruct"}
    tasks = read_json(options.root / "evaluate" / "tasks.json")
    for arm, name in (("base", "base"), ("refine-af", "refine-af-0")):
        assert results["arms"][arm]["rouge_l"][0] == pytest.approx(np.mean(list(tasks[name].values())))
    pair = results["comparisons"]["refine-af vs self-instruct"]
    assert pair["won"] + pair["tied"] + pair["lost"] == pytest.approx(1)
    low, area, high = (results["arms"]["refine-af"]["auc"][i] for i in (1, 0, 2))
    assert 0 <= low <= area <= high <= 1
    assert results["arms"]["base"]["auc"] is None
    text = (options.root / "report" / "report.md").read_text()
    assert "refine-af against self-instruct" in text
    assert "| refine-af | 1,600 | 40 | 24 | 12 |" in text and "| self-instruct | 1,600 | 0 | 40 | 20 |" in text
    assert (options.root / "report" / "taught.png").stat().st_size > 5000


def test_seeds_are_averaged_task_by_task(taught, tmp_path):
    options, _ = taught
    tasks = read_json(options.root / "evaluate" / "tasks.json")
    metrics = read_json(options.root / "evaluate" / "results.json")
    for arm in ("self-instruct", "refine-af"):
        tasks[f"{arm}-1"] = {name: 1.0 for name in tasks["base"]}
        metrics["metrics"]["arms"][f"{arm}-1"] = {"rouge_l": 1.0, "exact_match": 1.0}
    root = tmp_path / "run"
    (root / "evaluate").mkdir(parents=True)
    (root / "evaluate" / "tasks.json").write_text(json.dumps(tasks))
    (root / "evaluate" / "results.json").write_text(json.dumps(metrics))
    for arm in ("self-instruct", "refine-af"):
        write_data(root, arm, 12)
    results = report(small(tmp_path, options.model, sft_seeds=2))
    first = np.mean(list(tasks["refine-af-0"].values()))
    assert results["arms"]["refine-af"]["rouge_l"][0] == pytest.approx((first + 1) / 2)
    assert results["arms"]["refine-af"]["seeds"] == pytest.approx([first, 1.0])
    assert results["arms"]["refine-af"]["auc"] is None  # nobody attacked


def test_a_finished_stage_is_kept(taught, monkeypatch):
    options, _ = taught
    monkeypatch.setattr("instructgym.experiments.teaching.finetune.new_policy", None)
    for module in ("evaluate", "privacy"):
        monkeypatch.setattr(f"instructgym.experiments.teaching.{module}.LanguageModelPolicy", None)
        monkeypatch.setattr(f"instructgym.experiments.teaching.{module}.policy_from", None)
    written = {path: path.read_bytes() for path in options.root.glob("*/**/*.json*")}
    assert {"finetune", "evaluate"} <= {path.relative_to(options.root).parts[0] for path in written}
    finetune(options)
    evaluate(options)
    assert {path: path.read_bytes() for path in options.root.glob("*/**/*.json*")} == written


def test_a_run_that_is_out_of_time_goes_on(tmp_path, tiny_model_path, monkeypatch):
    options = small(tmp_path, tiny_model_path, minutes=5.0)
    for arm in ("self-instruct", "refine-af"):
        write_data(options.root, arm, 12)
    models, clock = [], time.monotonic
    real, passed = teaching.finetune, 0.0
    monkeypatch.setattr(training.time, "monotonic", lambda: clock() + passed)

    def slow(stage, console):
        nonlocal passed
        models.append(stage.run_dir)
        assert 0 < stage.minutes <= 5
        results = real(stage, console)
        passed += 300
        return results

    monkeypatch.setattr(teaching, "finetune", slow)
    assert finetune(options) == {"status": "stopped"}
    assert len(models) == 1
    monkeypatch.setattr(teaching, "finetune", real)
    finetune(replace(options, minutes=0.0))
    assert sorted(path.parent.name for path in options.root.glob("finetune/*/results.json")) == [
        "refine-af-0",
        "self-instruct-0",
    ]


def test_missing_or_small_data_are_refused_before_training(tmp_path, tiny_model_path):
    options = small(tmp_path, tiny_model_path)
    with pytest.raises(InputError, match="bootstrap is not finished"):
        finetune(options)
    write_data(options.root, "self-instruct", 20)
    write_data(options.root, "refine-af", 5)
    with pytest.raises(InputError, match="refine-af has 5"):
        finetune(options)
    with pytest.raises(InputError, match=r"self-instruct-0 is not finished: .* 'finetune' first"):
        evaluate(options)
    assert not (options.root / "finetune").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"run_dir": ""}, "--run-dir"),
        ({"scale": "huge"}, "--scale"),
        ({"run_dir": "a,b"}, "comma"),
        ({"withheld": 1.0}, "--withheld"),
        ({"minutes": -1.0}, "--minutes"),
        ({"size": 3}, "--size"),
        ({"held_out": 0}, "--held-out"),
        ({"sft_learning_rate": 0.0}, "--sft-learning-rate"),
        ({"tasks": "nowhere.json"}, "nowhere.json"),
        ({"sft_epochs": 0}, "--sft-epochs"),
        ({"seeds": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"algorithm": "random"}, "baseline"),
        ({"reward": "judge + judge"}, "--reward"),
        ({"backend": "{"}, "JSON"),
    ],
)
def test_bad_options_of_a_whole_run_are_refused(tmp_path, changed, said):
    with pytest.raises(InputError, match=said):
        evolve(EvolveRun(**{"run_dir": str(tmp_path / "run"), "dry_run": True} | changed), QUIET)
    assert not (tmp_path / "run").exists()


def test_held_out_tasks_make_no_data(tmp_path):
    options = EvolveRun(run_dir=str(tmp_path / "run"), held_out=5)
    options.prepare()
    shown = {row["instruction"] for row in read_records(options.stages()[0].options.seeds)}
    asked = {task.instruction for task in options.evaluation_tasks}
    assert (len(shown), len(asked), len(shown & asked)) == (59, 5, 0)
    first, *_ = RefineAFRun(run_dir=str(tmp_path / "r"), held_out=5).stages()
    assert first.options.held_out == 5


def test_other_held_out_tasks_are_refused_in_a_folder_that_has_some(taught):
    options, _ = taught
    other = options.root.parent / "other.jsonl"
    other.write_text(json.dumps({"instruction": "else", "instances": [{"input": "", "output": "x"}]}) + "\n")
    with pytest.raises(InputError, match="evaluation_tasks"):
        report(replace(options, tasks=str(other)))


def test_rows_that_resemble_an_evaluation_task_are_left_out(tmp_path, tiny_model_path):
    options = small(tmp_path, tiny_model_path, withheld=0.0)
    for arm in ("self-instruct", "refine-af"):
        write_data(options.root, arm, 10)
    append_lines(options.root / "refine-af" / "data.jsonl", [{"instruction": "do 1", "input": "", "output": "mine"}])
    finetune(options)
    trained = read_records(options.root / "finetune" / "refine-af-0" / "train.jsonl")
    assert len(trained) == 10 and "do 1" not in {row["instruction"] for row in trained}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes where the hardware computes in bfloat16, three times as long elsewhere
def test_evolve_to_its_end_on_the_embedded_model(tmp_path):
    results = evolve(EvolveRun(run_dir=str(tmp_path), scale="smoke"), QUIET)
    assert set(results["arms"]) == {"base", "random", "TRPO"}
    assert results["costs"]["TRPO"]["training"] > 0 == results["costs"]["random"]["training"]
    assert evolve(EvolveRun(run_dir=str(tmp_path), scale="smoke"), QUIET) == results


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes where the hardware computes in bfloat16, three times as long elsewhere
def test_refine_af_to_its_end_on_the_embedded_model(tmp_path):
    results = refine_af(RefineAFRun(run_dir=str(tmp_path), scale="smoke"), QUIET)
    assert set(results["arms"]) == {"base", "self-instruct", "refine-af"}
    rows = read_records(tmp_path / "train" / "metrics.jsonl")
    assert rows[0]["train/kl"] == pytest.approx(0, abs=1e-3)
    assert 0 <= results["arms"]["refine-af"]["rouge_l"][0] <= 1
