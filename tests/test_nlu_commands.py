"""The nlu commands in this process, on a tiny model: methods, resumption, reports, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console

from instructgym.experiments.cli import main
from instructgym.experiments.nlu import report as nlu_report
from instructgym.experiments.nlu import run as nlu
from instructgym.experiments.nlu.run import NLU
from instructgym.experiments.runs import training as token_training
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.records import read_records

QUIET = Console(quiet=True)
WORDS = "tides rain snow wind hail fog dew frost heat mist".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """SST-2's files: reviews that say good or bad."""
    folder = tmp_path_factory.mktemp("glue")
    (folder / "SST-2").mkdir()
    for name, count in (("train", 60), ("dev", 10)):
        rows = [f"{('bad', 'good')[i % 2]} {WORDS[i % 10]} {i}\t{i % 2}" for i in range(count)]
        (folder / "SST-2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return str(folder)


def options(data, folder, model, **kwargs):
    defaults = {
        "task": "SST-2", "data_dir": data, "run_dir": str(folder), "model": model, "dtype": "float32",
        "layout": "plain", "batch_size": 8, "labels": 32, "group_size": 2, "lora_rank": 2, "context_length": 256,
        "save_every": 1, "max_tokens": 8,
    }  # fmt: skip
    return NLU(**(defaults | kwargs))


@pytest.fixture(scope="module")
def undisturbed(data, tiny_model_path, tmp_path_factory):
    """``undisturbed(**options)``: the results and folder of a run that nothing stops, made once for equal options."""

    @cache
    def run(**chosen):
        folder = tmp_path_factory.mktemp("whole")
        return nlu.run(options(data, folder, tiny_model_path, **chosen), QUIET), folder

    return run


def rows_without_time(folder):
    rows = read_records(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


@pytest.mark.parametrize(
    ("method", "start"),
    [
        ("majority", "constrained"),
        ("zero-shot", "constrained"),
        ("zero-shot", "free"),
        ("few-shot", "free"),
        ("sft", "free"),
        ("sft", "constrained"),
        ("ppo", "constrained"),
        ("ppo", "sft:8"),
        ("ppo", "free"),
        ("grpo", "constrained"),
        ("rloo", "few-shot-header"),
    ],
)
def test_every_method_runs_to_its_end(tmp_path, data, tiny_model_path, method, start):
    few = {"shots": 1, "labels": 16}
    chosen = options(data, tmp_path / "run", tiny_model_path, method=method, start=start, **few)
    results = nlu.run(chosen, QUIET)
    assert results["status"] == "finished"
    for how in ("greedy", "sampled")[: 1 if method == "majority" else 2]:
        values = results["metrics"][how]["SST-2"]
        assert 0 <= values["accuracy"] <= values["format_rate"] <= 1
        assert values["format_rate"] == 1 or not chosen.constrained
    assert results["counts"]["evaluated"] == 10
    if method in nlu.AGENTS:
        rows = read_records(tmp_path / "run" / "metrics.jsonl")
        assert rows[-1]["rollout/labels"] == results["counts"]["labels"] and rows[-1]["train/learning_rate"] > 0
        assert (tmp_path / "run" / "figures" / "training.png").exists()
    again = nlu.run(options(data, tmp_path / "run", tiny_model_path, method=method, start=start, **few), QUIET)
    assert again == results


@pytest.mark.parametrize("minutes", [0.5, 3.0])
@pytest.mark.parametrize(("method", "start"), [("ppo", "sft:8"), ("grpo", "constrained"), ("sft", "free")])
def test_a_run_stopped_by_time_goes_on_where_it_stood(
    tmp_path, data, tiny_model_path, undisturbed, monkeypatch, method, start, minutes
):
    chosen = {"method": method, "start": start, "passes": 4 if method == "sft" else 1}
    whole, folder = undisturbed(**chosen)
    arguments = options(data, tmp_path / "parts", tiny_model_path, **chosen)
    clock = iter(range(0, 10_000_000, 61))  # every look at the clock is a minute later
    with monkeypatch.context() as patched:
        patched.setattr(token_training.time, "monotonic", lambda: float(next(clock)))
        arguments.minutes = minutes
        assert nlu.run(arguments, QUIET)["status"] == "stopped"
    arguments.minutes = 0.0
    parts = nlu.run(arguments, QUIET)
    assert parts["metrics"] == whole["metrics"]
    assert rows_without_time(tmp_path / "parts") == rows_without_time(folder)
    generations = [read_records(path / "generations.jsonl") for path in (tmp_path / "parts", folder)]
    assert generations[0] == generations[1]
    assert parts["counts"]["train_seconds"] > 60, "the time before the stop counts"


@pytest.mark.slow
def test_a_killed_run_gives_the_curve_of_an_undisturbed_one(tmp_path, data, tiny_model_path):
    def command(folder):
        chosen = ["--task", "SST-2", "--method", "ppo", "--data-dir", data, "--run-dir", str(folder), "--model",
                  tiny_model_path, "--dtype", "float32", "--layout", "plain", "--batch-size", "4", "--labels", "48",
                  "--context-length", "256", "--save-every", "2", "--lora-rank", "2"]  # fmt: skip
        return [sys.executable, "-m", "instructgym.experiments.cli", "nlu", *chosen]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True, env=environment)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for updates in (3, 8):
        process = subprocess.Popen(
            command(tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < updates):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(tmp_path / "killed"), check=True, capture_output=True, env=environment)
    assert rows_without_time(tmp_path / "killed") == rows_without_time(tmp_path / "whole")
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")]
    assert results[0]["metrics"] == results[1]["metrics"]


def test_a_report_gathers_runs_into_a_table_and_a_figure(tmp_path, data, tiny_model_path):
    for method, seed in (("majority", 0), ("ppo", 0), ("ppo", 1)):
        folder = tmp_path / "runs" / f"{method}-{seed}"
        nlu.run(options(data, folder, tiny_model_path, method=method, seed=seed, labels=16), QUIET)
    figures = nlu_report.run(nlu_report.NLUReport((str(tmp_path / "runs"),), str(tmp_path / "out")), QUIET)
    assert figures["SST-2"]["ppo, constrained"]["seeds"] == 2
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| SST-2 | majority | accuracy |" in text and "±" in text
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="no finished run"):
        nlu_report.run(nlu_report.NLUReport((str(tmp_path / "nowhere"),), str(tmp_path / "out")), QUIET)


def finished(folder, **options):
    folder.mkdir(parents=True)
    chosen = {"task": "SST-2", "method": "ppo", "start": "constrained", "shots": 4, "labels": 64, "seed": 0} | options
    (folder / "config.json").write_text(json.dumps({"command": "nlu", "options": chosen}))
    scored = {"SST-2": {"accuracy": 0.5, "format_rate": 1.0}}
    counts = {"labels": chosen["labels"], "evaluated": 10, "seconds": 60.0}
    results = {"status": "finished", "metrics": {"greedy": scored, "sampled": scored}, "counts": counts}
    (folder / "results.json").write_text(json.dumps(results))


def test_a_report_takes_only_seeds_for_seeds(tmp_path):
    runs = tmp_path / "runs"
    finished(runs / "a")
    finished(runs / "b", seed=1, rollouts="process")  # an option that the older run did not have
    finished(runs / "c", labels=2000)
    finished(runs / "d", method="zero-shot", labels=64)
    finished(runs / "e", method="zero-shot", labels=2000, seed=1)
    finished(tmp_path / "runs" / "a" / "ranks" / "1", method="sft")
    helper = runs / "a" / "ranks" / "1" / "results.json"
    helper.write_text(helper.read_text().replace("finished", "helper"))
    given = (str(runs / "c"), str(runs))  # a run, and a folder of runs that holds it too
    figures = nlu_report.run(nlu_report.NLUReport(given, str(tmp_path / "out")), QUIET)["SST-2"]
    seeds = {arm: row["seeds"] for arm, row in figures.items()}
    assert seeds == {"zero-shot, constrained": 2, "ppo, constrained, labels 64": 2, "ppo, constrained, labels 2000": 1}


def test_prompts_of_the_evaluation_are_measured_before_training(tmp_path, data, tiny_model_path):
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    (folder / "train.tsv").write_text((Path(data) / "SST-2" / "train.tsv").read_text())
    (folder / "dev.tsv").write_text("sentence\tlabel\nfine\t1\n" + "very " * 300 + "long\t0\n")
    for method in ("ppo", "sft", "zero-shot"):
        chosen = options(str(tmp_path / "glue"), tmp_path / method, tiny_model_path, method=method)
        with pytest.raises(InputError, match="context"):
            nlu.run(chosen, QUIET)
        assert not (tmp_path / method / "metrics.jsonl").exists()


def test_a_context_that_the_model_does_not_have(tmp_path, data, tiny_model_path):
    with pytest.raises(InputError, match=r"reads \d+ tokens: set --context-length"):
        nlu.run(options(data, tmp_path / "run", tiny_model_path, method="sft", context_length=4096), QUIET)


def test_majority_needs_no_way_to_write_a_number(tmp_path):
    folder = tmp_path / "STS-B"
    folder.mkdir()
    rows = "\n".join(f"a {i}\tb\t{i % 6}.0" for i in range(60))
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text(f"sentence1\tsentence2\tscore\n{rows}\n")
    chosen = NLU(task="STS-B", data_dir=str(tmp_path), run_dir=str(tmp_path / "run"), method="majority")
    assert nlu.run(chosen, QUIET)["metrics"]["greedy"]["STS-B"]["format_rate"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "SST-3"], "SST-3"),
        (["--start", "warm"], "--start"),
        (["--start", "sft:none"], "sft:N"),
        (["--start", "sft:64", "--method", "sft"], "--start"),
        (["--task", "STS-B"], "number"),
        (["--data-dir", "nowhere"], "nowhere"),
        (["--labels", "-1"], "--labels"),
        (["--track", "mlflow"], "tracker"),
        (["--model", "no/such/model", "--data-dir", "{data}"], "no/such/model"),
        (["--data-dir", "{data}", "--context-length", "16", "--model", "{model}", "--layout", "plain"], "context"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, data, tiny_model_path, capsys, arguments, message):
    given = [a.format(data=data, model=tiny_model_path) for a in arguments]
    if "--task" not in given:
        given += ["--task", "SST-2"]
    with pytest.raises(SystemExit) as exit_:
        main(
            ["nlu", *given, "--run-dir", str(tmp_path / "run"), "--labels", "16"][
                : None if "--labels" not in given else -2
            ]
        )
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert exit_.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_a_dry_run_loads_no_model(tmp_path, data, capsys):
    nlu.run(options(data, tmp_path / "run", "no/such/model", dry_run=True))
    assert "32 labels" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_another_configuration_is_refused_in_the_same_folder(tmp_path, data, tiny_model_path):
    nlu.run(options(data, tmp_path / "run", tiny_model_path, method="majority"), QUIET)
    with pytest.raises(InputError, match="seed"):
        nlu.run(options(data, tmp_path / "run", tiny_model_path, method="majority", seed=1), QUIET)
