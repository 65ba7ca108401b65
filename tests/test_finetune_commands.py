"""Fine-tuning and evaluation, end to end on a model with random weights."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from instructgym.agents.policy.checkpoints import policy_from
from instructgym.envs.tasks.instruction.data import InstructionExample
from instructgym.envs.tasks.instruction.evaluation import load_evaluation_tasks
from instructgym.experiments.runs import training as token_training
from instructgym.experiments.teaching import evaluate, finetune
from instructgym.experiments.teaching.evaluate import find_arms
from instructgym.experiments.teaching.finetune import demonstrations, split_rows
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.tokenization import ByteTokenizer, LoadedTokenizer
from instructgym.llm_backends.records import read_records

QUIET = Console(quiet=True)
WORDS = ["sea", "poem", "list", "short", "write", "three"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """30 rows, one of them too long and one twice, all with the same answer to each word."""
    path = tmp_path_factory.mktemp("data") / "rows.json"
    rows = [{"instruction": f"Say {w} {n}", "input": "", "output": w} for w in WORDS for n in range(5)]
    path.write_text(json.dumps([*rows, rows[0], {"instruction": "a", "output": "long " * 60}]))
    return str(path)


@pytest.fixture(scope="module")
def tune(data, tiny_model_path):
    shared = {"data": data, "model": tiny_model_path, "context_length": 64, "lora_rank": 4, "batch_size": 5}

    def build(folder, **others):
        return finetune.Finetune(run_dir=str(folder), dtype="float32", **(shared | {"epochs": 1} | others))

    return build


@pytest.fixture(scope="module")
def tuned(tune, tmp_path_factory):
    """A run with ten withheld rows that has learned its answers."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    options = tune(folder, holdout=10, limit=15, epochs=40, learning_rate=0.02, lora_rank=16, layout="plain")
    return folder, finetune.run(options, QUIET)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "user.jsonl"
    rows = [
        {"id": w, "motivation_app": "", "instruction": f"Say {w} {n}", "instances": [{"input": "", "output": w}] * 2}
        for n, w in enumerate(WORDS, start=5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def ask(tasks, tuned, tiny_model_path):
    def build(folder, **others):
        shared = {"tasks": tasks, "policy": f"ours={tuned[0]}", "max_tokens": 6, "context_length": 64}
        return evaluate.Evaluate(run_dir=str(folder), dtype="float32", **(shared | others))

    return build


def test_rows_are_trained_on_or_withheld(tuned, data):
    folder, results = tuned
    train, held = (read_records(folder / name) for name in ("train.jsonl", "held_out.jsonl"))
    assert len(train) == 15 and len(held) == 10 and not {r["id"] for r in train} & {r["id"] for r in held}
    assert set(train[0]) == {"id", "instruction", "input", "output"}
    assert all(row["output"] in WORDS for row in train + held)
    counts = results["counts"]
    assert (counts["train"], counts["held_out"], counts["unused"], counts["steps"]) == (15, 10, 5, 120)
    assert counts["dropped"] == {"too long": 1, "duplicates": 1}
    losses = [row["train/loss"] for row in read_records(folder / "metrics.jsonl")]
    assert len(losses) == 120 and results["metrics"]["loss"] < losses[0] / 10


def test_the_loss_is_on_responses_that_end(tiny_tokenizer):
    tokenizer = LoadedTokenizer(tiny_tokenizer, "tiny", 256)
    example = InstructionExample("Write", "the sea", "a poem")
    chat, plain = (demonstrations([example], layout, tokenizer)[0] for layout in ("chat", "plain"))
    assert tiny_tokenizer.decode(chat.prompt) == "<|user|>Write\n\nthe sea</s><|assistant|>"
    assert tiny_tokenizer.decode(chat.response) == "a poem</s>" and chat.response[-1] == 1
    assert tiny_tokenizer.decode(plain.prompt) == "Instruction: Write\nInput: the sea\nResponse:"
    assert tiny_tokenizer.decode(plain.response) == " a poem</s>"
    with pytest.raises(InputError, match="no chat template"):
        demonstrations([example], "chat", ByteTokenizer())


def test_rows_are_drawn_by_the_seed(tune, tmp_path):
    lengths = [10] * 50 + [65] * 7
    options = tune(tmp_path, limit=20, holdout=0.2)
    rows = split_rows(lengths, options)
    assert (len(rows.train), len(rows.held_out), rows.too_long, rows.unused) == (20, 10, 7, 20)
    assert max(rows.train + rows.held_out) < 50 and len({*rows.train, *rows.held_out}) == 30
    assert split_rows(lengths, options) == rows != split_rows(lengths, replace(options, seed=1))
    assert split_rows(lengths, replace(options, limit=40)).held_out == rows.held_out
    assert set(split_rows(lengths, replace(options, limit=10)).train) < set(rows.train), "a smaller part of the larger"
    assert split_rows(lengths, replace(options, limit=0, holdout=0.0)).train == list(range(50))


def test_a_stopped_run_goes_on_to_the_same_weights(tune, tmp_path, monkeypatch):
    finetune.run(tune(tmp_path / "whole"), QUIET)
    parts = tune(tmp_path / "parts", minutes=3.0)
    clock = iter(range(0, 10_000_000, 61))  # every look at the clock is a minute later
    with monkeypatch.context() as patched:
        patched.setattr(token_training.time, "monotonic", lambda: float(next(clock)))
        assert finetune.run(parts, QUIET)["status"] == "stopped"
    stopped_at = len(read_records(tmp_path / "parts" / "metrics.jsonl"))
    assert 0 < stopped_at < 6
    results = finetune.run(replace(parts, minutes=0.0), QUIET)
    assert results["status"] == "finished" and results["counts"]["steps"] == 6
    one, two = (policy_from(tmp_path / name / "policy").parameters() for name in ("whole", "parts"))
    assert one and all(np.array_equal(one[k].detach(), two[k].detach()) for k in one)
    before = (tmp_path / "parts" / "results.json").stat().st_mtime_ns
    assert finetune.run(parts, QUIET) == results
    assert (tmp_path / "parts" / "results.json").stat().st_mtime_ns == before


def test_data_that_changed_under_a_run_are_refused(tune, write, tmp_path, monkeypatch):
    path = write("rows.jsonl", json.dumps({"instruction": "a", "output": "b"})) / "rows.jsonl"
    options = tune(tmp_path / "run", data=str(path))
    monkeypatch.setattr(finetune, "new_policy", _broken)
    with pytest.raises(RuntimeError, match="killed"):
        finetune.run(options, QUIET)
    path.write_text(json.dumps({"instruction": "a", "output": "c"}))
    with pytest.raises(InputError, match=r"have changed since .*train.jsonl was written"):
        finetune.run(options, QUIET)


def _broken(*args, **kwargs):
    raise RuntimeError("killed")


def test_what_was_learned_shows_on_held_out_tasks(ask, tasks, tuned, tmp_path):
    results = evaluate.run(ask(tmp_path), QUIET)
    arms, counts = results["metrics"]["arms"], results["counts"]
    assert list(arms) == ["base", "ours"] and counts["tasks"] == 6 and counts["instances"] == 12
    assert counts["layout"] == "plain" and counts["seen in training"] == {"ours": 0}
    assert arms["base"]["rouge_l"] < 0.1 and arms["ours"]["rouge_l"] > 0.4
    pair = results["metrics"]["comparisons"]["ours vs base"]
    assert pair["wins"] + pair["ties"] + pair["losses"] == 6 and pair["losses"] == 0 and pair["low"] > 0
    assert pair["difference"] == pytest.approx(arms["ours"]["rouge_l"] - arms["base"]["rouge_l"])
    rows = read_records(tmp_path / "predictions.jsonl")
    assert [row["id"] for row in rows] == [f"{t.name}/{k}" for t in load_evaluation_tasks(tasks) for k in (0, 1)]
    right = [row["arms"]["ours"]["response"] == row["references"][0] for row in rows]
    assert np.mean([row["arms"]["ours"]["exact_match"] for row in rows]) == np.mean(right) > 0.4
    by_task = json.loads((tmp_path / "tasks.json").read_text())
    assert np.mean(list(by_task["ours"].values())) == pytest.approx(arms["ours"]["rouge_l"])
    assert (tmp_path / "figures" / "rouge.png").stat().st_size > 10_000


def test_an_untrained_policy_ties_with_its_base(ask, tune, tmp_path):
    finetune.run(tune(tmp_path / "run", learning_rate=1e-12, lora_rank=16, layout="plain"), QUIET)
    results = evaluate.run(ask(tmp_path / "eval", policy=str(tmp_path / "run"), max_instances=1), QUIET)
    assert results["metrics"]["comparisons"]["run vs base"]["tied"] == 1.0 and results["counts"]["instances"] == 6
    rows = read_records(tmp_path / "eval" / "predictions.jsonl")
    assert all(row["arms"]["run"]["response"] == row["arms"]["base"]["response"] != "" for row in rows)


def test_no_response_is_generated_twice(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 5)
    options = ask(tmp_path / "parts")
    asked, real = [], evaluate.respond

    def dying(policy, env_id, examples, **others):
        if len(asked) == 4:
            raise RuntimeError("killed")
        asked.append([example.id for example in examples])
        return real(policy, env_id, examples, **others)

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "respond", dying)
        with pytest.raises(RuntimeError, match="killed"):
            evaluate.run(options, QUIET)
        assert [len(ids) for ids in asked] == [5, 5, 2, 5], "all of base, then a chunk of ours"
        asked[:] = asked[:1]  # three more calls are allowed, two are needed
        evaluate.run(options, QUIET)
        assert [len(ids) for ids in asked[1:]] == [5, 2]
    evaluate.run(ask(tmp_path / "whole"), QUIET)
    one, two = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("parts", "whole"))
    assert one == two


def test_long_instances_are_dropped_for_all_arms(ask, write, tmp_path):
    rows = [
        {"id": name, "motivation_app": "", "instruction": name * n, "instances": [{"output": "sea"}]}
        for name, n in (("a", 5), ("b", 200))
    ]
    path = write("user.jsonl", "\n".join(map(json.dumps, rows))) / "user.jsonl"
    counts = evaluate.run(ask(tmp_path / "eval", tasks=str(path)), QUIET)["counts"]
    assert counts["tasks"] == counts["instances"] == 1
    assert counts["dropped"] == {"too long": 1, "tasks without an instance left": 1}


def test_requests_that_were_trained_on_are_counted(ask, tuned, write, tmp_path):
    seen = read_records(tuned[0] / "train.jsonl")[0]
    row = {"id": "a", "motivation_app": "", "instruction": seen["instruction"], "instances": [{"output": "x"}]}
    path = write("user.jsonl", json.dumps(row)) / "user.jsonl"
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    assert evaluate.run(ask(tmp_path / "eval", tasks=str(path), dry_run=True), console) == {}
    assert "ours was trained on 1 of the 1 requests" in console.export_text()
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run_dir": ""}, "--run-dir"),
        ({"data": ""}, "--data is missing"),
        ({"data": "nowhere.jsonl"}, "--data nowhere.jsonl"),
        ({"limit": 31}, "30 usable rows of 31, but --limit 31 needs as many"),
        ({"limit": 25, "holdout": 6}, "withholds 6 and leaves 24, but --limit 25"),
        ({"holdout": 30}, "leaves 0"),
        ({"holdout": 1.5}, "--holdout must be"),
        ({"context_length": 3}, "no row of .* fits --context-length 3"),
        ({"context_length": 512}, "reads 256 tokens"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"batch_size": 0}, "--batch-size"),
        ({"layout": "vicuna"}, "--layout must be chat, plain or alpaca"),
    ],
)
def test_bad_input_of_fine_tuning(tune, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(finetune, "new_policy", _broken)
    with pytest.raises(InputError, match=message):
        finetune.run(replace(tune(tmp_path / "run"), **options), QUIET)


def test_bad_input_of_evaluation(ask, tuned, tune, tmp_path, monkeypatch):
    run, chat = str(tuned[0]), tmp_path / "chat"
    finetune.run(tune(chat, limit=5), QUIET)
    for name in ("policy_from", "LanguageModelPolicy"):
        monkeypatch.setattr(evaluate, name, _broken)
    for options, message in [
        ({"policy": f"a={run},a={run}"}, "two arms called 'a'"),
        ({"policy": f"base={run}"}, "two arms called 'base'"),
        ({"policy": str(tmp_path)}, "holds no policy"),
        ({"policy": f"a={run},b={chat}"}, r"different layouts \(a in plain, b in chat\)"),
        ({"tasks": "nowhere.json"}, "nowhere.json"),
        ({"context_length": 8}, "no instance fits"),
        ({"context_length": 512}, "reads 256 tokens"),
        ({"max_tokens": 0}, "--max-tokens"),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate.run(ask(tmp_path / "eval", **options), QUIET)


def test_responses_to_other_tasks_are_refused(ask, tasks, tmp_path, write):
    path = shutil.copy(tasks, tmp_path / "copy.jsonl")
    options = ask(
        tmp_path / "eval", tasks=str(path), policy="", layout="plain", model=find_arms(ask("x").policy)[0].model
    )
    evaluate.run(options, QUIET)
    (tmp_path / "eval" / "results.json").unlink()
    path.write_text(path.read_text().replace("Say", "Sing"))
    with pytest.raises(InputError, match="answers other tasks"):
        evaluate.run(options, QUIET)
