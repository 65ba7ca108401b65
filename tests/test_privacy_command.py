"""``instructgym privacy`` on policies over a model with random weights."""

import json
import random

import pytest
from rich.console import Console

from instructgym.agents.policy.language_model import LanguageModelPolicy
from instructgym.experiments.teaching import finetune, membership, privacy
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.records import read_records
from instructgym.llm_backends.training.adapters import LoraSettings

QUIET = Console(quiet=True)
ROWS = 24
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def random_rows(seed, count=ROWS):
    rng = random.Random(seed)

    def text(words):
        return " ".join("".join(rng.choices(LETTERS, k=3)) for _ in range(words))

    return [{"instruction": text(2), "input": text(1) if i % 2 else "", "output": text(3)} for i in range(count)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fine_tuned(folder, model, epochs=1, learning_rate=1e-12):
    """The run folder of a fine-tuning on random rows, of which as many are withheld."""
    data = folder.with_name(f"{folder.name}.jsonl")
    folder.parent.mkdir(exist_ok=True)
    finetune.run(
        finetune.Finetune(
            run_dir=str(folder), data=write_rows(data, random_rows(0, 2 * ROWS)), model=model, holdout=ROWS,
            layout="plain", epochs=epochs, batch_size=8, learning_rate=learning_rate, lora_rank=8, context_length=128,
            token_budget=2048, dtype="float32",
        ),
        QUIET,
    )  # fmt: skip
    return folder


def untouched(folder, model):
    """The same with an adapter that no gradient has reached."""
    fine_tuned(folder, model)
    LanguageModelPolicy(model, LoraSettings(rank=8), dtype="float32").save(folder / "policy")
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory, tiny_model_path):
    return untouched(tmp_path_factory.mktemp("runs") / "fresh", tiny_model_path)


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory, tiny_model_path):
    return fine_tuned(tmp_path_factory.mktemp("runs") / "overfitted", tiny_model_path, 25, 2e-2)


def run(folder, **options):
    shared = {"run_dir": str(folder), "dtype": "float32", "resamples": 300}
    return privacy.run(privacy.Privacy(**(shared | options)), QUIET)


def test_members_of_an_overfitted_policy_are_found_and_of_an_untrained_one_not(tmp_path, untrained, overfitted):
    results = run(tmp_path / "run", policy=f"fresh={untrained},over={overfitted}")
    fresh, over = (results["metrics"][name] for name in ("fresh", "over"))
    found = over["attacks"]["calibrated"]
    assert found["auc"] > 0.9 and found["auc_low"] > 0.5 and "are told" in found["verdict"]
    assert over["attacks"]["loss"]["auc"] > 0.9
    ties = fresh["attacks"]["calibrated"]
    assert (ties["auc"], ties["auc_low"], ties["auc_high"]) == (0.5, 0.5, 0.5)
    for attack in ("loss", "min_k"):
        assert fresh["attacks"][attack]["auc_low"] <= 0.5 <= fresh["attacks"][attack]["auc_high"]
    assert all(found["tpr_at_1_percent_fpr"] is None and "24 non-members" in found["reason"]
               for arm in (fresh, over) for found in arm["attacks"].values())  # fmt: skip
    assert results["counts"]["over"] == {"members": ROWS, "nonmembers": ROWS, "too_long": 0}
    rows = read_records(tmp_path / "run" / "scores.jsonl")
    assert len(rows) == 4 * ROWS
    assert {row["calibrated"] for row in rows if row["policy"] == "fresh"} == {0.0}
    assert (tmp_path / "run" / "figures" / "roc.png").stat().st_size > 5_000


def test_sizes_and_lengths_that_differ_are_said(tmp_path, untrained):
    members = write_rows(tmp_path / "m.jsonl", random_rows(2))
    short = [row | {"output": row["output"][:3]} for row in random_rows(3, 12)]
    others = write_rows(tmp_path / "n.jsonl", short)
    results = run(tmp_path / "run", policy=str(untrained), members=members, nonmembers=others)
    sizes, lengths = results["metrics"]["fresh"]["warnings"]
    assert "24 members and 12 non-members" in sizes
    assert "tokens per response" in lengths and results["metrics"]["fresh"]["lengths"]["auc"] > 0.9
    even = run(tmp_path / "even", policy=str(untrained), members=members, nonmembers=others, limit=12)
    assert even["counts"]["fresh"]["members"] == 12 and len(even["metrics"]["fresh"]["warnings"]) == 1


def test_rows_that_are_too_long_are_counted(tmp_path, untrained):
    rows = random_rows(4)
    rows[3]["output"] = " ".join(["abcdefgh"] * 40)
    members = write_rows(tmp_path / "m.jsonl", rows)
    others = write_rows(tmp_path / "n.jsonl", random_rows(5))
    results = run(tmp_path / "run", policy=str(untrained), members=members, nonmembers=others)
    assert results["counts"]["fresh"] == {"members": ROWS - 1, "nonmembers": ROWS, "too_long": 1}
    with pytest.raises(InputError, match="fits 5 tokens"):
        run(tmp_path / "none", policy=str(untrained), context_length=5)


def test_a_run_that_broke_off_goes_on_and_gives_the_same_scores(tmp_path, untrained, overfitted, monkeypatch):
    both = f"fresh={untrained},over={overfitted}"
    whole = run(tmp_path / "whole", policy=both)
    monkeypatch.setattr(privacy, "CHUNK", 16)
    calls = []

    def breaking(policy, reference, rows, budget):
        calls.append(len(rows))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return membership.score_rows(policy, reference, rows, budget)

    monkeypatch.setattr(privacy, "score_rows", breaking)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", policy=both)
    path = tmp_path / "run" / "scores.jsonl"
    stored = path.read_text()
    path.write_text(stored[:-30])  # torn in its last row
    monkeypatch.setattr(privacy, "CHUNK", 16)
    results = run(tmp_path / "run", policy=both)
    # One chunk lost its last row and is scored again; of the others only those that were missing.
    assert calls == [16] * 5 + [16] * 3
    assert len(read_records(path)) == 4 * ROWS and path.read_text().startswith(stored[: stored.rindex('{"policy"')])
    for name in ("fresh", "over"):
        for attack, found in results["metrics"][name]["attacks"].items():
            assert found["auc"] == pytest.approx(whole["metrics"][name]["attacks"][attack]["auc"], abs=0.01)
    assert run(tmp_path / "run", policy=both) == results and len(calls) == 8, "finished: nothing is scored"


def test_a_time_limit_stops_cleanly_and_the_same_command_goes_on(tmp_path, untrained, monkeypatch):
    monkeypatch.setattr(privacy, "CHUNK", 16)
    assert run(tmp_path, policy=str(untrained), minutes=1e-9)["status"] == "stopped"
    assert len(read_records(tmp_path / "scores.jsonl")) == 16
    assert run(tmp_path, policy=str(untrained))["status"] == "finished"
    assert len(read_records(tmp_path / "scores.jsonl")) == 2 * ROWS


def test_scores_of_other_weights_or_rows_are_not_taken_over(tmp_path, tiny_model_path, monkeypatch):
    folder = untouched(tmp_path / "tuned", tiny_model_path)
    run(tmp_path / "run", policy=str(folder))
    (tmp_path / "run" / "results.json").unlink()
    write_rows(folder / "held_out.jsonl", random_rows(9))
    with pytest.raises(InputError, match="other weights"):
        run(tmp_path / "run", policy=str(folder))


def test_another_reference_model_than_the_base(tmp_path, untrained, tiny_model_path, tiny_lms):
    same = run(tmp_path / "same", policy=str(untrained), model=tiny_model_path)
    assert same["metrics"]["fresh"]["attacks"]["calibrated"]["auc"] == 0.5
    path = tmp_path / "gpt2"
    tiny_lms("gpt2").model.save_pretrained(path)
    tiny_lms("gpt2").tokenizer.save_pretrained(path)
    run(tmp_path / "other", policy=str(untrained), model=str(path))
    scores = [row["calibrated"] for row in read_records(tmp_path / "other" / "scores.jsonl")]
    assert len(set(scores)) > ROWS


@pytest.fixture
def no_model(monkeypatch):
    """Makes loading a model a failure of the test."""

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(privacy, "policy_from", loaded)
    monkeypatch.setattr(privacy, "LanguageModelPolicy", loaded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": ""}, "--policy"),
        ({"policy": "{root}/nowhere"}, "holds no policy"),
        ({"policy": "a={fresh},a={fresh}"}, "two arms called 'a'"),
        ({"policy": "a={fresh},b"}, "b holds no policy"),
        ({"members": "{root}/m.jsonl"}, "without --nonmembers"),
        ({"members": "{root}/m.jsonl", "nonmembers": "{root}/nowhere.jsonl"}, "cannot read --nonmembers"),
        ({"members": "{root}/m.jsonl", "nonmembers": "{root}/empty.jsonl"}, "holds no rows"),
        ({"members": "{root}/m.jsonl", "nonmembers": "{root}/m.jsonl"}, "both trained on and held out"),
        ({"members": "{root}/m.jsonl", "nonmembers": "{root}/broken.jsonl"}, "row 1: field 'output'"),
        ({"layout": "haiku"}, "--layout must be empty, chat"),
        ({"limit": -1}, "--limit"),
        ({"resamples": 0}, "--resamples"),
        ({"model": "embedded"}, "counts other tokens"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error_before_a_model_is_loaded(tmp_path, untrained, no_model, options, message):
    write_rows(tmp_path / "m.jsonl", random_rows(6))
    write_rows(tmp_path / "empty.jsonl", [])
    write_rows(tmp_path / "broken.jsonl", [{"instruction": "a", "output": " "}])
    named = {
        key: value.format(root=tmp_path, fresh=untrained) if isinstance(value, str) else value
        for key, value in options.items()
    }
    with pytest.raises(InputError, match=message) as caught:
        run(tmp_path / "run", **({"policy": str(untrained)} | named))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_without_held_out_rows_and_a_policy_without_a_layout_are_refused(tmp_path, tiny_model_path, no_model):
    folder = untouched(tmp_path / "tuned", tiny_model_path)
    (folder / "held_out.jsonl").write_text("")
    with pytest.raises(InputError, match="--holdout"):
        run(tmp_path / "run", policy=str(folder))
    (folder / "held_out.jsonl").unlink()
    with pytest.raises(InputError, match=r"held_out\.jsonl"):
        run(tmp_path / "run", policy=str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="--layout"):
        run(tmp_path / "run", policy=str(folder))


def test_dry_run_loads_and_writes_nothing(tmp_path, untrained, no_model):
    assert run(tmp_path / "run", policy=str(untrained), dry_run=True) == {}
    assert not (tmp_path / "run").exists()
