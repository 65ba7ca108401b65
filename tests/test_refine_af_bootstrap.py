"""``refine-af bootstrap``: rows and counts on scripted models, resumption after SIGKILL, refusals, budgets, time."""

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from fault_server import serving
from rich.console import Console
from scripted_tasks import bootstrapping, sentence
from test_resume import command, journal_keys, run_with_kills

from instructgym.envs.tasks.instruction.pool import InstructionPool, held_out, load_tasks
from instructgym.experiments.cli import main
from instructgym.experiments.refine_af import bootstrap as refine_af_bootstrap
from instructgym.experiments.refine_af.bootstrap import Bootstrapper, RefineAFBootstrap
from instructgym.experiments.runs.progress import Deadline
from instructgym.llm_backends import BackendError, Completion, Journal, ScriptedBackend
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.records import read_records
from instructgym.llm_backends.serving.budget import BudgetExceededError
from instructgym.rewards import rouge_l
from instructgym.rewards.quality.instance_format import Instance

QUIET = Console(quiet=True)
FILES = ("instructions", "instances", "rejected")


def bootstrap(folder, **kwargs):
    options = {"run_dir": str(folder), "backend": "scripted_tasks:bootstrapping", "target": 20, "batch": 3} | kwargs
    return refine_af_bootstrap.run(RefineAFBootstrap(**options), QUIET)


def rows_of(folder):
    return {name: read_records(Path(folder) / f"{name}.jsonl") for name in FILES}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bootstrap") / "run"
    return folder, bootstrap(folder)


def test_rows_and_counts_of_a_run(finished):
    folder, results = finished
    rows = rows_of(folder)
    tasks, instances, rejected = (rows[name] for name in FILES)
    counts, metrics = results["counts"], results["metrics"]
    assert results["status"] == "finished"
    assert counts["instructions"] == len(tasks) == 20 and counts["instances"] == len(instances) > 0
    by_stage = {kind: Counter(row["rejected_by"] for row in rejected if row["stage"] == kind[:-1])
                for kind in ("instructions", "instances")}  # fmt: skip
    assert counts["rejected_by"] == by_stage
    assert {"too_short", "blocked_word"} <= set(by_stage["instructions"])
    assert {"contradiction", "empty_output", "duplicate"} <= set(by_stage["instances"])
    assert metrics["acceptance_rate"] == pytest.approx(20 / (20 + by_stage["instructions"].total()))
    assert metrics["instances_per_instruction"] == len(instances) / 20
    assert 0 < metrics["classification_share"] < 1 and metrics["mean_similarity"] < 0.7
    types = {row["id"]: row["is_classification"] for row in tasks}
    for row in instances:
        assert list(row)[:3] == ["instruction", "input", "output"]
        assert (row["output"] in ("calm", "rough")) == types[row["task_id"]] == row["is_classification"]
    assert read_records(folder / "metrics.jsonl")[-1]["instances"] == len(instances)


def test_no_two_instructions_are_alike_and_the_file_is_a_pool(finished):
    folder, _ = finished
    texts = [row["instruction"] for row in rows_of(folder)["instructions"]]
    seeds = load_tasks()
    for i, text in enumerate(texts):
        assert max(rouge_l(text, other) for other in [*(s.instruction for s in seeds), *texts[:i]]) <= 0.7 + 1e-9
    shown, held = held_out(seeds, 16)
    assert [
        task.instruction for task in InstructionPool(shown, held, path=folder / "instructions.jsonl").machine
    ] == texts


def test_a_finished_run_changes_nothing(finished):
    folder, results = finished
    before = {name: (folder / f"{name}.jsonl").read_bytes() for name in FILES}
    assert bootstrap(folder)["counts"] == results["counts"]
    assert before == {name: (folder / f"{name}.jsonl").read_bytes() for name in FILES}
    with pytest.raises(InputError, match="holds a run with target=20"):
        bootstrap(folder, target=21)


def test_held_out_seeds_are_never_shown(tmp_path, monkeypatch):
    _, held = held_out(load_tasks(), 16)
    asked = []
    monkeypatch.setattr(
        "scripted_tasks.reply", lambda prompt, sampling, inner=sys.modules["scripted_tasks"].reply: (
            asked.append(prompt), inner(prompt, sampling))[1]
    )  # fmt: skip
    bootstrap(tmp_path / "run")
    lists = [prompt for prompt in asked if prompt.endswith("\n9.")]
    assert lists and not any(task.instruction in prompt for task in held for prompt in lists)
    machine = [row["instruction"] for row in rows_of(tmp_path / "run")["instructions"]]
    shown = [sum(f". {text}\n" in prompt for text in machine) for prompt in lists]
    assert shown[:3] == [0, 0, 0] and set(shown[3:]) == {2}


class Answers(ScriptedBackend):
    """Replies in turn, whatever is asked: texts, errors, or completions as they are."""

    def __init__(self, *replies, style="completion"):
        super().__init__(reply=lambda prompt: next(self.replies), score=lambda prompt, text: -len(text))
        self.replies, self.prompt_style = iter(replies), style

    def _complete(self, prompt, sampling):
        text = self._text(prompt, sampling)
        return [text] if isinstance(text, Completion) else text if isinstance(text, BackendError) else [ended(text)]


def ended(text, reason="stop"):
    return Completion(text, [1], [-1.0], reason)


SEEDS = load_tasks()


def bootstrapper(*replies, style="completion", **settings):
    backend = Answers(*replies, style=style)
    return Bootstrapper(InstructionPool(SEEDS), backend, backend, RefineAFBootstrap(batch=len(replies), **settings))


@pytest.mark.parametrize("keep_cut", [False, True])
def test_replies_that_failed_or_were_cut_are_counted(keep_cut):
    long = ended(" Weigh a sack of wool.\n10. Mend every torn sail with", "length")
    replies = (" Count every ship in the harbour.", BackendError("server on fire"), long)
    found = bootstrapper(*replies, keep_cut=keep_cut).instructions(0, 100)
    assert [row["instruction"] for row in found.accepted] == [
        "Count every ship in the harbour.", *(["Weigh a sack of wool."] if keep_cut else []),
    ]  # fmt: skip
    assert {row["rejected_by"] for row in found.rejected} == {"backend_failed", "cut"}
    assert found.rejected[0]["error"] == "server on fire" and found.rejected[0]["request"] == 1


def test_a_chat_models_list_starts_with_its_number():
    class Chat(Answers):
        _logprobs = ScriptedBackend.__mro__[1]._logprobs

    backend = Chat("Here:\n9. Count every ship in the harbour.", "1. Weigh a sack of wool.", "Perhaps.", style="chat")
    maker = Bootstrapper(InstructionPool(SEEDS), backend, backend, RefineAFBootstrap(batch=2))
    found = maker.instructions(0, 100)
    assert [row["instruction"] for row in found.accepted] == ["Count every ship in the harbour."]
    assert found.accepted[0]["is_classification"] is None and "Perhaps" in found.accepted[0]["task_type_error"]
    assert [row["rejected_by"] for row in found.rejected] == ["no_items"]
    assert [row["rejected_by"] for row in maker.instances(found.accepted).rejected] == ["no_task_type"]


def test_the_pool_takes_no_more_than_the_target():
    items = " Count every ship.\n10. Weigh a sack of wool.\n11. Mend one torn sail."
    assert len(bootstrapper(items).instructions(0, 2).accepted) == 2


def task(text, label):
    return {"id": text, "instruction": text, "is_classification": label}


def test_instances_by_order_and_what_is_dropped():
    maker = bootstrapper(
        "Input: a\nOutput: b\nInput: c\nOutput: d",
        ended(" x\nInput: p\nClass label: y\nInput: q", "length"),
        BackendError("gone"),
        "",
        "Output: Sing now",
    )
    found = maker.instances(
        [
            task("Do it.", False),
            task("Is it?", True),
            task("Fail.", False),
            task("Void.", False),
            task("sing now", False),
        ]
    )
    made = [(row["instruction"], Instance(row["input"], row["output"])) for row in found.accepted]
    assert made == [("Do it.", Instance("a", "b")), ("Do it.", Instance("c", "d")), ("Is it?", Instance("p", "x"))]
    assert [(row["instruction"], row["rejected_by"]) for row in found.rejected] == [
        ("Is it?", "cut"), ("Fail.", "backend_failed"), ("Void.", "no_instances"), ("sing now", "echo"),
    ]  # fmt: skip


def test_a_model_that_repeats_itself_ends_the_run_with_what_there_is(tmp_path):
    part = json.dumps({"id": "scripted", "kwargs": {"reply": {"\n9.": " Count every ship in the harbour.",
                                                              "Task:": "Output: twelve"}}})  # fmt: skip
    results = bootstrap(tmp_path / "run", backend=part, patience=2)
    assert results["status"] == "finished"
    assert (results["counts"]["instructions"], results["counts"]["target"]) == (1, 20)
    assert results["counts"]["rejected_by"]["instructions"] == {"rouge": 8}  # three batches of three, one accepted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "--batch must be at least 1"),
        ({"patience": 0}, "--patience must be at least 1"),
        ({"rouge_threshold": 1.5}, "--rouge-threshold must be at most 1"),
        ({"top_p": 0.0}, "--top-p must be above 0"),
        ({"temperature": -1.0}, "--temperature must not be negative"),
        ({"backend": "nobody"}, "nobody"),
        ({"seeds": "missing.jsonl"}, "cannot read seed file missing.jsonl"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        bootstrap(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_too_few_seeds_are_refused(tmp_path):
    (tmp_path / "seeds.txt").write_text("\n".join(sentence(1, i) for i in range(8)))
    with pytest.raises(InputError, match="cannot hold 2 of 8 tasks out"):
        bootstrap(tmp_path / "run", seeds=str(tmp_path / "seeds.txt"))
    assert bootstrap(tmp_path / "run", seeds=str(tmp_path / "seeds.txt"), held_out=0, dry_run=True) == {}


def test_a_budget_stops_the_run_and_a_higher_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")

    def answer(body):
        text = body["messages"][-1]["content"]
        if "<tasks>" in text:
            return f"9. {sentence(body['seed'] % 2**31, 0)}"
        return "No" if "<instruction>" in text else "Output: done"

    with serving(text=answer) as server:

        def start(limit):
            part = {"model": "m", "base_url": server.url, "budget": {"requests": limit}}
            return bootstrap(tmp_path / "run", target=8, backend=json.dumps({"id": "openai", "kwargs": part}))

        with pytest.raises(BudgetExceededError):
            start(10)
        results = start(200)
        assert results["counts"]["instances"] == 8 and results["counts"]["replayed_replies"] == 10
        spent = json.loads((tmp_path / "run" / "budget-instructions.json").read_text())
        assert spent["requests"] == sum(server.attempts.values())
        usage = json.loads((tmp_path / "run" / "usage.json").read_text())
        assert usage["instances"]["requests"] == 8


def test_a_time_limit_stops_cleanly_and_the_same_command_goes_on(tmp_path, finished):
    folder = tmp_path / "run"
    part = json.dumps({"id": "scripted_tasks:bootstrapping", "kwargs": {"latency": 0.05}})
    stops = 0
    while (results := bootstrap(folder, backend=part, minutes=0.001))["status"] == "stopped":
        stops += 1
        assert stops < 30
    assert stops > 1
    assert rows_of(folder) == rows_of(finished[0])
    assert results["counts"]["rejected_by"] == finished[1]["counts"]["rejected_by"]


def test_a_time_limit_does_not_count_what_is_replayed(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 60))
    monkeypatch.setattr("instructgym.experiments.runs.progress.time.monotonic", lambda: next(clock))
    journal = Journal(tmp_path / "journal.jsonl")
    limit = Deadline(2, journal)
    assert [limit.reached() for _ in range(3)] == [False] * 3  # nothing was asked: minutes 0 to 2
    journal.put({"key": "reply"})
    assert [limit.reached() for _ in range(2)] == [False, True]  # the piece that began at minute 2 was paid for
    assert not Deadline(0, journal).reached()


def test_the_command_line(tmp_path, capsys):
    arguments = ["--run-dir", str(tmp_path / "run"), "--backend", "scripted", "--target", "3"]
    for extra, text in ((["--dry-run"], "would ask scripted"), ([], "3 of 3"), ([], "nothing to do")):
        with pytest.raises(SystemExit) as ended:
            main(["refine-af", "bootstrap", *arguments, *extra])
        assert ended.value.code == 0 and text in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        main(["refine-af", "filters"])
    assert "blocked_word" in capsys.readouterr().out


def test_requests_do_not_depend_on_the_batch_around_them():
    def asked(size):
        seen = []
        backend = bootstrapping()
        backend.reply = lambda prompt, sampling: seen.append((prompt, sampling)) or ""
        maker = Bootstrapper(InstructionPool(SEEDS), backend, backend, RefineAFBootstrap(seed=5, batch=size))
        maker.instructions(3, 10)
        maker.instances([task("Do it.", False)])
        return seen

    assert asked(2)[:2] == asked(5)[:2] and asked(2)[-1] == asked(5)[-1]
    assert asked(2)[-1][1].temperature == 0, "instances are decoded greedily"


@pytest.mark.slow
def test_a_killed_run_gives_the_rows_of_an_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    part = json.dumps({"id": "scripted_tasks:bootstrapping", "kwargs": {"latency": 0.15}})

    def start(folder):
        return command("refine-af", "bootstrap", "--run-dir", str(folder), "--backend", part, "--target", "40",
                       "--batch", "3")  # fmt: skip

    bootstrap(whole, backend=part, target=40)
    sizes = run_with_kills(start(killed), killed / "journal.jsonl", 2, random.Random(3))
    assert sizes == sorted(sizes) and sizes[0] > 0
    for name in FILES:
        assert (killed / f"{name}.jsonl").read_text() == (whole / f"{name}.jsonl").read_text()
    keys = journal_keys(killed / "journal.jsonl")
    assert len(set(keys)) == len(keys) and set(keys) == set(journal_keys(whole / "journal.jsonl"))
