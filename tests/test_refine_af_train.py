"""``refine-af train`` and ``refine-af generate`` on a model with random weights: curves, resumption, data sets."""

import json
from dataclasses import replace

import pytest
from rich.console import Console
from tiny_models import build_model, build_tokenizer

from instructgym.envs.tasks.instruction.pool import held_out, load_tasks
from instructgym.experiments.refine_af import generate as refine_af_generate
from instructgym.experiments.refine_af import train as refine_af_train
from instructgym.experiments.refine_af.common import ENV_ID
from instructgym.experiments.refine_af.generate import RefineAFGenerate
from instructgym.experiments.refine_af.train import RefineAFTrain, learned
from instructgym.experiments.runs import training as token_training
from instructgym.experiments.runs.progress import OutOfTimeError
from instructgym.experiments.runs.responses import Response
from instructgym.experiments.runs.training import Run
from instructgym.llm_backends import resolve
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.tokenization import EmbeddedTokenizer
from instructgym.llm_backends.records import read_records
from instructgym.rewards.quality.linear import PRESETS

QUIET = Console(quiet=True)
SHORTER = "fine_grained_cases:annotator"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny model with room for the prompts."""
    path = tmp_path_factory.mktemp("models") / "long"
    build_model(context=1024).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "instructions.jsonl"
    rows = [{"instruction": f"Do {i}.", "is_classification": i % 3 == 0, "id": f"task_{i}"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def train(model, instructions):
    """``train(folder, **options)``: options of a small training."""

    def build(folder, **others):
        options = {
            "model": model, "instructions": instructions, "reward": SHORTER, "metrics": "vader", "updates": 3,
            "batch_size": 4, "epochs": 1, "max_tokens": 6, "context_length": 900, "lora_rank": 2, "dtype": "float32",
        }  # fmt: skip
        return RefineAFTrain(**(options | {"run_dir": str(folder)} | others))

    return build


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """A run folder of a finished training."""
    folder = tmp_path_factory.mktemp("refine-af") / "train"
    refine_af_train.run(train(folder), QUIET)
    return folder


@pytest.fixture
def generate(model, instructions, tmp_path):
    """``generate(folder, **options)``: options of a small generation by the model as it is."""

    def build(folder="generate", **others):
        options = {
            "instructions": instructions, "max_tokens": 6, "context_length": 900, "dtype": "float32",
            "run_dir": str(tmp_path / folder),
        }  # fmt: skip
        return RefineAFGenerate(**(options | ({} if "policy" in others else {"model": model}) | others))

    return build


# --- training ----------------------------------------------------------------------------------------------------


def untimed(folder):
    return [{k: v for k, v in row.items() if "time/" not in k} for row in read_records(folder / "metrics.jsonl")]


def test_a_training_logs_every_term_and_leaves_a_policy_and_a_figure(trained):
    rows = read_records(trained / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert row["rollout/reward"] == pytest.approx(row["rollout/terms/quality"]) and row["rollout/reward"] < 0
        assert -1 <= row["rollout/terms/vader"] <= 1
        assert row["rollout/terms/well_formed"] == 0, "random weights write no instance"
    assert rows[0]["train/kl"] == 0 < abs(rows[2]["train/kl"])
    assert (trained / "policy" / "policy.json").exists()
    assert (trained / "figures" / "training.png").stat().st_size > 5_000
    results = json.loads((trained / "results.json").read_text())
    assert results["counts"]["episodes"] == 12 and results["metrics"]["format_rate_last"] == 0


def test_first_and_last_updates_are_averaged():
    rows = [{"rollout/reward": float(i), "train/kl": None} for i in range(10)]
    found = learned(rows)
    assert (found["reward_first"], found["reward_last"]) == (1.0, 8.0)
    assert found["kl_first"] is found["format_rate_last"] is None


def test_a_stopped_training_goes_on_where_it_stood(train, trained, tmp_path, monkeypatch):
    parts = train(tmp_path / "parts", minutes=3.0)
    clock = iter(range(0, 10_000_000, 61))  # every look at the clock is a minute later
    with monkeypatch.context() as patched:
        patched.setattr(token_training.time, "monotonic", lambda: float(next(clock)))
        assert refine_af_train.run(parts, QUIET)["status"] == "stopped"
    assert 0 < len(untimed(tmp_path / "parts")) < 3
    refine_af_train.run(replace(parts, minutes=0.0), QUIET)
    assert untimed(tmp_path / "parts") == untimed(trained)


def test_a_finished_training_is_left_alone(train, trained, monkeypatch):
    monkeypatch.setattr(refine_af_train, "new_policy", None)
    assert refine_af_train.run(train(trained), QUIET)["counts"]["updates"] == 3


def test_scale_fills_what_is_left_open(train, tmp_path):
    open_sizes = train(tmp_path, updates=0, batch_size=0)
    assert open_sizes.sizes == (4, 16)
    assert replace(open_sizes, scale="report", batch_size=7).sizes == (80, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "large"}, "--scale must be smoke or report"),
        ({"temperature": 0.0}, "--temperature must be above 0"),
        ({"metrics": "quality"}, "--metrics are ids of other rewards"),
        ({"metrics": "no such"}, "--metrics are ids of other rewards"),
        ({"metrics": "nice"}, "unknown reward 'nice'"),
        ({"reward": "nice"}, "unknown reward 'nice'"),
        ({"context_length": 300}, "exceeds the context of 300"),
        ({"instructions": "no/such.jsonl"}, "cannot read seed file no/such.jsonl"),
        ({"format_penalty": -1.0}, "--format-penalty must not be negative"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(options, message, train, tmp_path, monkeypatch):
    monkeypatch.setattr(refine_af_train, "new_policy", None)
    with pytest.raises(InputError, match=message):
        refine_af_train.run(train(tmp_path / "run", **options), QUIET)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_makes_nothing(train, tmp_path, monkeypatch):
    monkeypatch.setattr(refine_af_train, "new_policy", None)
    assert refine_af_train.run(train(tmp_path / "run", dry_run=True), QUIET) == {}
    assert not (tmp_path / "run").exists()


# --- generation --------------------------------------------------------------------------------------------------


def test_a_trained_policy_writes_and_malformed_responses_are_counted(generate, trained, tmp_path):
    results = refine_af_generate.run(generate(policy=str(trained), reward=SHORTER), QUIET)
    rows = read_records(tmp_path / "generate" / "responses.jsonl")
    assert [row["number"] for row in rows] == list(range(12))
    assert all(row["reward"] < 0 for row in rows)
    assert results["metrics"]["format_rate"] == results["counts"]["accepted"] == 0
    assert sum(results["counts"]["rejected_by"].values()) == 12
    assert (tmp_path / "generate" / "data.jsonl").read_text() == ""


def test_generation_goes_on_behind_the_last_whole_chunk(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(refine_af_generate, "CHUNK", 4)
    refine_af_generate.run(generate("whole"), QUIET)
    whole = (tmp_path / "whole" / "responses.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "parts" / "responses.jsonl").write_text("".join(lines[:6]) + lines[6][:20])
    refine_af_generate.run(generate("parts"), QUIET)
    assert (tmp_path / "parts" / "responses.jsonl").read_text() == whole


def test_generation_stops_at_its_time_limit_and_goes_on(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(refine_af_generate, "CHUNK", 4)
    spent = iter([False, True])

    def check_time(self):
        if next(spent):
            raise OutOfTimeError

    with monkeypatch.context() as patched:
        patched.setattr(Run, "check_time", check_time)
        stopped = refine_af_generate.run(generate(minutes=2.0), QUIET)
    assert stopped["status"] == "stopped"
    assert len(read_records(tmp_path / "generate" / "responses.jsonl")) == 4
    assert not (tmp_path / "generate" / "data.jsonl").exists()
    assert refine_af_generate.run(generate(), QUIET)["status"] == "finished"
    refine_af_generate.run(generate("whole"), QUIET)
    for name in ("responses.jsonl", "data.jsonl"):
        assert (tmp_path / "generate" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_the_quality_reward_is_that_of_the_options(train):
    part = train("a", reward="quality", reward_preset="no_und", format_penalty=2.5, dtype="float32").reward_part()
    reward = resolve("reward", part)
    assert (reward.sum.weights, reward.format_reward) == (PRESETS["no_und"].weights, -2.5)
    assert part["kwargs"]["backend"]["kwargs"] == {"dtype": "float32"}
    default = resolve("reward", train("a", reward="quality").reward_part())
    assert (default.sum.weights, default.format_reward) == (PRESETS["instruction_mining"].weights, -1.0)


def test_a_policy_is_asked_as_it_was_trained(generate, trained):
    with pytest.raises(InputError, match="trained with --max-tokens"):
        refine_af_generate.run(generate(policy=str(trained), max_tokens=33), QUIET)


def test_held_out_tasks_are_neither_trained_on_nor_answered():
    tasks = load_tasks()
    hidden = {task.instruction for task in held_out(tasks, 16)[1]}
    for split, count in (("train", None), (None, 48)):
        examples = refine_af_generate.RefineAFGenerate().prompts(split, EmbeddedTokenizer())
        assert not hidden & {example.metadata["instruction"] for example in examples}
        assert count in (None, len(examples))


@pytest.fixture
def written(monkeypatch):
    """``written(texts)``: what the policy writes, by instruction; several texts are draws one after the other."""

    def script(texts):
        left = {instruction: iter(draws) for instruction, draws in texts.items()}

        def respond(policy, env_id, examples, temperature, seed, reward, **options):
            assert env_id == ENV_ID
            drawn = [next(left[e.metadata["instruction"]]) for e in examples]
            return [Response(text, "stop", None, None, 0.5, True) for text in drawn]

        monkeypatch.setattr(refine_af_generate, "respond", respond)
        monkeypatch.setattr(refine_af_generate, "LanguageModelPolicy", lambda *args, **kwargs: None)

    return script


TEXTS = {
    "Do 0.": [" Yes\nInput: Crow", " No\nInput: Cod"],
    "Do 1.": [" 1\nOutput: one", " 1\nOutput: uno"],
    "Do 2.": [" none\nOutput: two", " none\nOutput: two"],
    "Do 3.": [" Yes\nOutput: two", " Yes"],
}
KEPT = [
    ("Do 0.", "Crow", "Yes"),
    ("Do 0.", "Cod", "No"),
    ("Do 2.", "", "two"),
    ("Do 3.", "", "Yes"),
]


def test_draws_are_cleaned_together_and_exported(generate, written, tmp_path):
    written(TEXTS)
    results = refine_af_generate.run(generate(samples=2, limit=4, reward=SHORTER), QUIET)
    rows = read_records(tmp_path / "generate" / "data.jsonl")
    assert [(row["instruction"], row["input"], row["output"]) for row in rows] == KEPT
    assert rows[0] | {"id": "instructions/task_0", "source": "generated", "reward": 0.5} == rows[0]
    rejected = read_records(tmp_path / "generate" / "rejected.jsonl")
    assert sorted(row["rejected_by"] for row in rejected) == ["contradiction", "contradiction", "duplicate", "fields"]
    assert results["counts"]["rejected_by"] == {"contradiction": 2, "duplicate": 1, "fields": 1}
    metrics = results["metrics"]
    assert (metrics["acceptance_rate"], metrics["format_rate"], metrics["mean_reward"]) == (0.5, 0.875, 0.5)
    assert (metrics["with_instances"], metrics["with_input"]) == (0.75, 0.5)


def test_messages_and_seed_tasks_that_are_not_held_out(generate, written, tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    rows = [
        {"instruction": f"Seed {i}.", "instances": [{"input": "", "output": f"Answer {i}."}], "id": str(i)}
        for i in range(12)
    ]
    seeds.write_text("".join(json.dumps(row) + "\n" for row in rows))
    written(TEXTS)
    out = tmp_path / "mine.jsonl"
    options = generate(samples=2, limit=4, format="messages", seeds=str(seeds), out=str(out))
    results = refine_af_generate.run(options, QUIET)
    found = read_records(out)
    assert results["counts"]["seed_instances"] == 9 and results["counts"]["rows"] == len(found) == 13
    assert {row["source"] for row in found[:9]} == {"seed"}
    assert found[9]["messages"] == [
        {"role": "user", "content": "Do 0.\n\nCrow"},
        {"role": "assistant", "content": "Yes"},
    ]
    assert found[11]["messages"][0]["content"] == "Do 2."
    assert results["metrics"]["mean_reward"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "p", "model": "m"}, "--policy and --model exclude each other"),
        ({"policy": "no/such"}, "--policy no/such holds no policy"),
        ({"format": "csv"}, "--format must be alpaca or messages"),
        ({"out": "data.csv"}, "--out must end in .jsonl"),
        ({"samples": 0}, "--samples must be at least 1"),
        ({"reward": "nice"}, "unknown reward 'nice'"),
        ({"seeds": "no/such.jsonl"}, "cannot read seed file"),
    ],
)
def test_bad_generation_options_are_refused(options, message, generate, tmp_path, monkeypatch):
    monkeypatch.setattr(refine_af_generate, "LanguageModelPolicy", None)
    with pytest.raises(InputError, match=message):
        refine_af_generate.run(generate(**options), QUIET)
    assert not (tmp_path / "generate").exists()


def test_a_file_of_somebody_else_is_not_overwritten(generate, tmp_path):
    out = tmp_path / "theirs.jsonl"
    out.write_text("precious")
    with pytest.raises(InputError, match="was not written by this run"):
        refine_af_generate.run(generate(out=str(out)), QUIET)
    assert out.read_text() == "precious"
