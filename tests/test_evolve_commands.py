"""The evolve commands in this process, on the scripted backend."""

import itertools
import json
import shutil

import pytest
from fault_server import serving
from rich.console import Console

from instructgym.experiments.benchmarks import edit_env
from instructgym.experiments.cli import guarded, main
from instructgym.experiments.evolve import compare as evolve_compare
from instructgym.experiments.evolve import generate as evolve_generate
from instructgym.experiments.evolve import train as evolve_train
from instructgym.experiments.runs.options import parse_part, parse_reward
from instructgym.llm_backends import Journal
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.records import read_records
from instructgym.llm_backends.serving.budget import BudgetExceededError

QUIET = Console(quiet=True)
SEEDS = [f"Explain {thing} to a beginner." for thing in "tides rain snow wind hail fog dew frost heat mist".split()]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    path = tmp_path_factory.mktemp("seeds") / "seeds.txt"
    path.write_text("\n".join(SEEDS))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, seeds):
    """A folder with a finished training, which no test changes, and its results."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(folder, seeds)


@pytest.fixture
def copied(tmp_path, trained):
    """The results of a finished training, of which ``tmp_path`` holds a copy."""
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    return trained[1]


def train(tmp_path, seeds, **kwargs):
    options = {"run_dir": str(tmp_path / "run"), "seeds": seeds, "backend": "scripted", "episodes": 16} | kwargs
    return evolve_train.run(evolve_train.EvolveTrain(**options), QUIET)


def generate(tmp_path, seeds, **kwargs):
    options = {"run_dir": str(tmp_path / "run"), "seeds": seeds, "chunk": 4} | kwargs
    return evolve_generate.run(evolve_generate.EvolveGenerate(**options), QUIET)


@pytest.mark.parametrize(
    ("algorithm", "extra"),
    [
        ("TRPO", {}),
        ("PPO", {"normalize_observation": True}),
        ("DQN", {}),
        ("A2C", {"preset": "published", "seeds": ""}),
        ("MaskablePPO", {"no_op": True}),
        ("RecurrentPPO", {}),
        ("random", {}),
        ("schedule", {}),
    ],
)
def test_train_then_generate(tmp_path, seeds, algorithm, extra):
    options = {"seeds": seeds, "algorithm": algorithm.lower(), "episodes": 8, "num_envs": 4} | extra
    results = train(tmp_path, **options)
    run = tmp_path / "run"
    assert results["status"] == "finished" and results["counts"]["timesteps"] >= 48
    episodes = read_records(run / "episodes.jsonl")
    assert len(episodes) == results["counts"]["episodes"]
    assert sum(e["rewrite_calls"] for e in episodes) <= results["counts"]["rewrite_calls"]
    assert read_records(run / "metrics.jsonl")[-1]["timesteps"] >= 42
    assert (run / "figures" / "training.png").exists()
    made = generate(tmp_path, seeds)
    rows = read_records(run / "data.jsonl")
    assert made["counts"]["accepted"] == len(rows) > 0
    assert made["counts"]["accepted"] + made["counts"]["rejected"] == len(SEEDS) * 6
    for row in rows:
        assert row["instruction"] not in SEEDS and row["output"] and row["instruction"] == row["lineage"][-1]["text"]
        assert row["lineage"][0]["operation"] == "seed" and len(row["lineage"]) <= row["step"] + 1
        texts = [edit["text"] for edit in row["lineage"]]  # the script appends: ancestors and nothing else
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        assert row["calls"]["answer"] == 1 and "scripted" in row["rewriter"]
    assert sum(made["counts"]["calls"].values()) == sum(
        sum(row["calls"].values()) for row in rows + read_records(next(run.glob("generate/*/rejected.jsonl")))
    )


def test_a_run_against_a_server_accounts_for_each_role_and_leaves_no_key(tmp_path, seeds, monkeypatch):
    key = "sk-secret-of-this-test"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")

    def answer(body):
        text = body["messages"][-1]["content"]
        return "Not Equal" if "write nothing else" in text else f"Sing {len(text)} songs of {body['seed'] % 97} words."

    with serving(text=answer) as server:
        part = {"model": "m", "base_url": server.url, "budget": {"requests": 30}}
        options = {"episodes": 8, "algorithm": "random", "num_envs": 4, "track": "wandb"}

        def start(limit):
            chosen = json.dumps({"id": "openai", "kwargs": part | {"budget": {"requests": limit}}})
            return train(tmp_path, seeds, backend=chosen, **options)

        with pytest.raises(BudgetExceededError):
            start(30)
        assert sum(server.attempts.values()) == 30
        with pytest.raises(BudgetExceededError):  # spent is spent
            start(30)
        assert sum(server.attempts.values()) == 30
        results = start(2000)  # a limit may be raised: the run goes on, and pays for nothing twice
        sent = sum(server.attempts.values())
    assert results["status"] == "finished"
    run = tmp_path / "run"
    usage = json.loads((run / "usage.json").read_text())
    assert usage["rewriter"]["requests"] > 0 and usage["judge"]["requests"] > 0 == usage["responder"]["requests"]
    assert json.loads((run / "budget-rewriter.json").read_text())["requests"] == sent
    told = usage["rewriter"]["requests"] + usage["judge"]["requests"]
    assert sent - 8 <= told <= sent, "only calls that broke off may be missing"
    assert len(Journal(run / "journal.jsonl")) == sent
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files)
    assert not [path for path in files if key.encode() in path.read_bytes()]


def test_each_budget_of_a_run_holds_over_its_starts(tmp_path, seeds):
    with serving(text=lambda body: "Not Equal" if "write nothing else" in str(body) else "Sing.") as server:

        def part(model, requests):
            kwargs = {"model": model, "base_url": server.url, "budget": {"requests": requests}}
            return json.dumps({"id": "openai", "kwargs": kwargs})

        options = {"episodes": 8, "algorithm": "random", "num_envs": 4}
        for _ in range(3):
            with pytest.raises(BudgetExceededError):
                train(tmp_path, seeds, backend=part("writer", 12), judge_backend=part("judge", 1000), **options)
    asked = [body["model"] for body in server.bodies]
    assert asked.count("writer") == 12
    for role, model in (("rewriter", "writer"), ("judge", "judge")):
        spent = json.loads((tmp_path / "run" / f"budget-{role}.json").read_text())
        assert spent["requests"] == asked.count(model)


def test_a_finished_run_changes_nothing_and_another_configuration_is_refused(tmp_path, seeds, copied):
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert train(tmp_path, seeds) == copied
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(InputError, match="episodes=16, not 8"):
        train(tmp_path, seeds, episodes=8)


def test_same_seed_same_rows_and_another_seed_other_rows(tmp_path, seeds, trained):
    for name, seed in (("b", 0), ("c", 1)):
        train(tmp_path / name, seeds, seed=seed)
    rows = [(folder / "run" / "episodes.jsonl").read_text() for folder in (trained[0], tmp_path / "b", tmp_path / "c")]
    assert rows[0] == rows[1] != rows[2]


def test_a_replayed_run_sends_no_request_again(tmp_path, seeds, copied):
    run = tmp_path / "run"
    rows, requests = (run / "episodes.jsonl").read_text(), len(Journal(run / "journal.jsonl"))
    (run / "results.json").unlink()
    (run / "episodes.jsonl").write_text(rows[: len(rows) // 2])  # torn in the middle of a row
    results = train(tmp_path, seeds)
    assert (run / "episodes.jsonl").read_text() == rows
    assert len(Journal(run / "journal.jsonl")) == requests
    assert results["counts"]["replayed_replies"] == requests


def test_a_changed_seed_file_is_another_run(tmp_path):
    seeds = tmp_path / "seeds.txt"
    seeds.write_text("\n".join(SEEDS))
    options = {"seeds": str(seeds), "algorithm": "random", "episodes": 4, "num_envs": 4}
    train(tmp_path, **options)
    seeds.write_text("\n".join([*SEEDS, "Explain lightning."]))
    with pytest.raises(InputError, match="seed_instructions"):
        train(tmp_path, **options)


def test_an_error_that_training_survived_does_not_change_the_rows_of_a_resumed_run(tmp_path, seeds):
    options = {"backend": json.dumps({"id": f"{__name__}:flaky"}), "judge_backend": "scripted", "episodes": 8}
    train(tmp_path, seeds, **options)
    run = tmp_path / "run"
    rows = (run / "episodes.jsonl").read_text()
    (run / "results.json").unlink()
    assert FAILURES
    FAILURES.clear()
    train(tmp_path, seeds, **options)
    assert (run / "episodes.jsonl").read_text() == rows


FAILURES: set[str] = set()


def flaky():
    """Every tenth request fails the first time in a process; the retry comes under another seed."""
    from instructgym.llm_backends import BackendError, ScriptedBackend, request_seed

    script = ScriptedBackend()

    def reply(prompt, sampling):
        key = f"{prompt}{sampling.seed}"
        if request_seed(key) % 10 == 0 and key not in FAILURES:
            FAILURES.add(key)
            return BackendError("connection lost")
        return script.generate([prompt], sampling)[0][0].text

    return ScriptedBackend(reply=reply)


def test_compare_ends_with_a_policy_that_does_nothing(tmp_path, seeds, monkeypatch):
    from instructgym.agents.sb3 import factory
    from instructgym.agents.sb3.baselines import BaselineAgent

    class Idle(BaselineAgent):
        def act(self, steps, masks):
            return steps * 0 + 6

    monkeypatch.setitem(factory.BASELINES, "idle", Idle)
    options = evolve_compare.EvolveCompare(
        run_dir=str(tmp_path), seeds=seeds, backend="scripted", algorithms="idle,random", repeats=1, calls=200,
        chunk=4, no_op=True,
    )  # fmt: skip
    results = evolve_compare.run(options, QUIET)
    assert results["metrics"]["idle"]["calls_per_accepted"] is None
    assert "| idle |" in (tmp_path / "table.md").read_text()


def test_generation_waits_for_the_end_of_training(tmp_path, seeds, copied):
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(InputError, match="has not ended"):
        generate(tmp_path, seeds)


def test_a_time_limit_stops_cleanly_and_the_same_command_goes_on(tmp_path, seeds, trained):
    folder, whole = trained
    slow = json.dumps({"id": "scripted", "kwargs": {"latency": 0.05}})
    stopped = train(tmp_path, seeds, backend=slow, minutes=0.01)
    assert stopped["status"] == "stopped" and stopped["counts"]["timesteps"] < whole["counts"]["timesteps"]
    train(tmp_path, seeds, backend=slow)
    expected = (folder / "run" / "episodes.jsonl").read_text()
    assert (tmp_path / "run" / "episodes.jsonl").read_text() == expected


def test_messages_and_parquet(tmp_path, seeds, copied):
    import pyarrow.parquet as pq

    generate(tmp_path, seeds, out=str(tmp_path / "chat.jsonl"), format="messages", limit=4)
    row = read_records(tmp_path / "chat.jsonl")[0]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    generate(tmp_path, seeds, out=str(tmp_path / "data.parquet"), limit=4)
    table = pq.read_table(tmp_path / "data.parquet")
    assert table.num_rows == len(read_records(tmp_path / "data.jsonl")) and "lineage" in table.column_names


def test_generation_does_not_depend_on_the_chunk_before_a_limit(tmp_path, seeds):
    train(tmp_path, seeds, algorithm="round-robin", episodes=4, num_envs=4)
    generate(tmp_path, seeds, out=str(tmp_path / "four.jsonl"), limit=4)
    generate(tmp_path, seeds, out=str(tmp_path / "all.jsonl"))
    four, everything = ([row["instruction"] for row in read_records(tmp_path / f"{n}.jsonl")] for n in ("four", "all"))
    assert everything[: len(four)] == four


def test_generate_refuses_a_file_it_did_not_write(tmp_path, seeds, copied):
    (tmp_path / "mine.jsonl").write_text('{"instruction": "precious"}\n')
    with pytest.raises(InputError, match="not written by this command"):
        generate(tmp_path, seeds, out=str(tmp_path / "mine.jsonl"))
    assert (tmp_path / "mine.jsonl").read_text() == '{"instruction": "precious"}\n'


def test_compare_gives_every_arm_the_same_budget(tmp_path, seeds):
    options = evolve_compare.EvolveCompare(
        run_dir=str(tmp_path / "cmp"), seeds=seeds, backend="scripted", algorithms="TRPO,random,schedule",
        repeats=2, calls=300, episodes=8, chunk=4,
    )  # fmt: skip
    results = evolve_compare.run(options, QUIET)
    assert set(results["metrics"]) == {"TRPO", "random", "schedule"}
    assert (tmp_path / "cmp" / "figures" / "comparison.png").exists()
    assert (tmp_path / "cmp" / "table.md").read_text().count("\n") == 5
    for arm in (tmp_path / "cmp" / "arms").iterdir():
        calls = json.loads((arm / "arm.json").read_text())["calls"]
        assert 300 - 4 * 6 * 3 < sum(calls.values()) <= 300
        assert (calls["training"] > 0) == arm.name.startswith("TRPO")
    assert evolve_compare.run(options, QUIET) == results


def test_compare_refuses_a_budget_that_covers_nothing(tmp_path, seeds):
    options = evolve_compare.EvolveCompare(run_dir=str(tmp_path), seeds=seeds, backend="scripted", calls=300)
    with pytest.raises(InputError, match="does not cover the training"):
        evolve_compare.run(options, QUIET)


def test_dry_run_writes_nothing(tmp_path, seeds):
    assert train(tmp_path, seeds, dry_run=True) == {}
    assert not (tmp_path / "run").exists()


def test_bench_edit_env_counts_calls_and_compares_equal_work(tmp_path):
    options = edit_env.BenchEditEnv(
        backend='{"id": "scripted", "kwargs": {"latency": 0.01}}', rounds=3, json=str(tmp_path / "bench.json")
    )
    figures = edit_env.run(options, QUIET)
    assert figures == json.loads((tmp_path / "bench.json").read_text())
    assert figures["ours"]["backend_calls_per_vector_step"] == {"rewriter": 1, "judge": 1}
    assert figures["settings"]["equal_texts"] == "32/32"
    assert figures["ratio"]["steps_per_second"] > 2


def test_wandb_gets_every_row_once(tmp_path, seeds, monkeypatch):
    wandb = pytest.importorskip("wandb")
    logged = []

    class Run:
        summary: dict = {}

        def log(self, row, step=None):
            logged.append(row)

        def finish(self):
            logged.append("finished")

    monkeypatch.setattr(wandb, "init", lambda **kwargs: Run())
    monkeypatch.setattr(wandb, "Image", lambda path: path)
    train(tmp_path, seeds, track="wandb", episodes=8)
    rows = [row for row in logged if isinstance(row, dict) and "timesteps" in row]
    assert rows == read_records(tmp_path / "run" / "metrics.jsonl")
    assert logged[-1] == "finished"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("judge", "judge"),
        ("judge + 0.5*diversity", {"judge": 1.0, "diversity": 0.5}),
        ("0*diversity+judge", {"diversity": 0.0, "judge": 1.0}),
    ],
)
def test_reward_option(text, expected):
    parsed = parse_reward(text)
    assert (parsed if isinstance(expected, str) else parsed["kwargs"]["weights"]) == expected


@pytest.mark.parametrize("text", ["judge +", "judge + judge", "2judge*", ""])
def test_reward_option_refuses(text):
    with pytest.raises(InputError):
        parse_reward(text)


def test_a_model_for_the_embedded_backend_means_the_general_one():
    assert parse_part("embedded", "path") == {"id": "transformers", "kwargs": {"model": "path"}}


BAD = [
    ({"seeds": "missing.txt"}, "cannot read seed file"),
    ({"algorithm": "SAC"}, "unknown algorithm 'SAC'"),
    ({"backend": "gpt-9"}, "unknown backend 'gpt-9'"),
    ({"backend": "{broken"}, "broken JSON"),
    ({"backend": '{"kwargs": {}}', "model": "x"}, "a part as JSON needs"),
    ({"backend": ".foo:bar"}, "cannot load backend"),
    ({"reward": '{"id": "judge", "kwargs": {"mode": "loud"}}'}, "unknown judge mode"),
    ({"seed": 2**32}, "--seed"),
    ({"algorithm": "PPO", "num_envs": 1, "n_steps": 1}, "at least 2 steps"),
    ({"minutes": float("nan")}, "--minutes"),
    ({"run_dir": "/proc/nowhere/run"}, "cannot write"),
    ({"backend": "no_such_module:factory"}, "no_such_module"),
    ({"reward": "applause"}, "unknown reward 'applause'"),
    ({"preset": "improved"}, "unknown preset"),
    ({"observation": "pixels"}, "unknown observation mode"),
    ({"operations": "breadth,sing"}, "unknown operation 'sing'"),
    ({"episodes": -1}, "--episodes"),
    ({"horizon": 0}, "--horizon"),
    ({"num_envs": 0}, "--num-envs"),
    ({"n_steps": 0}, "--n-steps"),
    ({"track": "paper"}, "unknown tracker"),
    ({"scale": "huge"}, "--scale"),
    ({"run_dir": ""}, "--run-dir"),
    ({"max_invalid_share": 2.0}, "--max-invalid-share"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[next(iter(bad)) + str(i) for i, (bad, _) in enumerate(BAD)])
def test_bad_options_give_one_line_and_code_2(tmp_path, seeds, capsys, bad, message):
    options = {"run_dir": str(tmp_path / "run"), "seeds": seeds, "backend": "scripted"} | bad
    code = guarded(lambda console: evolve_train.run(evolve_train.EvolveTrain(**options), console))
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()


def test_generate_without_a_policy_says_what_to_do(tmp_path, seeds):
    with pytest.raises(InputError, match="train first"):
        generate(tmp_path, seeds)


def test_a_judge_that_talks_nonsense_stops_training_with_one_line(tmp_path, seeds, capsys):
    nonsense = {"id": f"{__name__}:nonsense"}
    options = evolve_train.EvolveTrain(
        run_dir=str(tmp_path / "run"), seeds=seeds, backend="scripted", judge_backend=json.dumps(nonsense), episodes=40
    )
    import sys

    sys.modules.setdefault(__name__, sys.modules[__name__])
    assert guarded(lambda console: evolve_train.run(options, console)) == 2
    assert "had no verdict" in capsys.readouterr().err
    assert (tmp_path / "run" / "journal.jsonl").exists()


def nonsense():
    from instructgym.llm_backends import ScriptedBackend

    return ScriptedBackend(reply=lambda prompt: "Perhaps they are equal?", prompt_style="chat")


def test_command_line_exit_codes(tmp_path, seeds, capsys):
    arguments = ["evolve", "train", "--run-dir", str(tmp_path / "run"), "--seeds", seeds, "--backend", "scripted"]
    for extra, code in ((["--episodes", "8"], 0), (["--episodes", "-8"], 2), (["--episodes", "many"], 2)):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *extra])
        assert stop.value.code == code
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["envs"], "EvolveInstruction-v0"),
        (["bench", "list"], "edit-env"),
        (["bench", "edit-env", "--backend", "scripted", "--rounds", "1"], "equal texts"),
    ],
)
def test_small_commands(capsys, monkeypatch, arguments, words):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0 and words in capsys.readouterr().out


def test_interrupt_exits_with_130(capsys):
    def interrupted(console):
        raise KeyboardInterrupt

    assert guarded(interrupted) == 130
    assert "goes on" in capsys.readouterr().err
