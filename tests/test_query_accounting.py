"""Query accounting on runs of the evolve commands with the scripted backend."""

import io
import json
import shutil

import pytest
from rich.console import Console

from instructgym.experiments.evolve import generate as evolve_generate
from instructgym.experiments.evolve import queries as query_accounting
from instructgym.experiments.evolve import train as evolve_train
from instructgym.experiments.evolve.queries import accounting, accounting_table
from instructgym.llm_backends import Journal
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.records import read_records

QUIET = Console(quiet=True)
SEEDS = [f"Explain {thing} to a beginner." for thing in "tides rain snow wind hail fog dew frost heat mist".split()]


def train(folder, algorithm="random", **options):
    seeds = folder.parent / "seeds.txt"
    seeds.parent.mkdir(parents=True, exist_ok=True)
    seeds.write_text("\n".join(SEEDS))
    shared = {"run_dir": str(folder), "seeds": str(seeds), "backend": "scripted", "episodes": 8}
    return evolve_train.run(evolve_train.EvolveTrain(**(shared | {"algorithm": algorithm} | options)), QUIET)


def generate(folder, **options):
    shared = {"run_dir": str(folder), "seeds": str(folder.parent / "seeds.txt"), "chunk": 4}
    return evolve_generate.run(evolve_generate.EvolveGenerate(**(shared | options)), QUIET)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of a learner with two data sets, the second one of 4 of the 10 seeds."""
    folder = tmp_path_factory.mktemp("accounts") / "run"
    trained = train(folder, "TRPO")
    return folder, trained, [generate(folder), generate(folder, out=str(folder / "few.jsonl"), limit=4)]


def replies(account):
    """Replies of models behind an account's calls: a judge by likelihoods scores both answers of each verdict."""
    return account["all_calls"] + account["calls"]["judge"]


def test_calls_are_those_of_rows_and_journal(made):
    folder, trained, generated = made
    account = accounting(folder)
    training = account["training"]
    assert training["calls"]["rewrite"] == trained["counts"]["timesteps"] and training["calls"]["answer"] == 0
    assert replies(training) == len(Journal(folder / "journal.jsonl"))
    assert account["learner"] and account["horizon"] == 6
    for results, name in zip(generated, ("data", "few"), strict=True):
        key, one = next((k, v) for k, v in account["datasets"].items() if k.startswith(name))
        rows = read_records(folder / f"{name}.jsonl")
        dropped = read_records(folder / "generate" / key / "rejected.jsonl")
        assert one["rows"] == len(rows) == results["counts"]["accepted"] > 0
        for kind in ("rewrite", "judge", "answer"):
            assert one["calls"][kind] == sum(row["calls"].get(kind, 0) for row in rows + dropped)
        assert replies(one) == len(Journal(folder / "generate" / key / "journal.jsonl"))
        assert {role: used["requests"] for role, used in one["sent"].items()} == {
            "rewriter": one["calls"]["rewrite"], "judge": 2 * one["calls"]["judge"], "responder": one["calls"]["answer"]
        }  # fmt: skip
    accounts = [training, *account["datasets"].values()]
    assert account["total"]["all_calls"] == sum(one["all_calls"] for one in accounts)
    sent = [one["sent"]["rewriter"]["requests"] for one in accounts]
    assert account["total"]["sent"]["rewriter"]["requests"] == sum(sent) > sent[0]


def test_ratios_by_hand(made):
    account = accounting(made[0])
    few = next(one for name, one in account["datasets"].items() if name.startswith("few"))
    assert few["seeds"] == 4 and few["evol_instruct_calls"] == 4 * 6 * 3
    assert few["calls"]["rewrite"] == 4 * 6
    assert few["ratio"] == pytest.approx(few["all_calls"] / 72) and few["ratio"] <= 1
    assert few["calls_per_row"] == pytest.approx(few["all_calls"] / few["rows"])
    assert few["ratio_per_row"] == pytest.approx(few["all_calls"] / few["rows"] / 3)
    with_training = few["all_calls"] + account["training"]["all_calls"]
    assert few["ratio_with_training"] == pytest.approx(with_training / 72)
    assert few["ratio_per_row_with_training"] == pytest.approx(with_training / few["rows"] / 3)
    assert json.loads(json.dumps(account)) == account


def test_dropping_costs_what_the_dropped_rows_cost(tmp_path):
    """With a threshold that drops nearly everything, the calls per row go up and no answer is paid for."""
    train(tmp_path / "run", episodes=4, num_envs=4)
    generate(tmp_path / "run", limit=5)
    generate(tmp_path / "run", out=str(tmp_path / "run" / "strict.jsonl"), rouge_threshold=0.01, limit=5)
    account = accounting(tmp_path / "run")
    assert not account["learner"]
    strict, data = (account["datasets"][name] for name in sorted(account["datasets"], reverse=True))
    assert strict["rows"] < data["rows"] and strict["calls"]["answer"] < data["calls"]["answer"]
    assert strict["calls"]["rewrite"] == data["calls"]["rewrite"]
    assert strict["rows"] == 0 and strict["calls_per_row"] is None and strict["ratio_per_row"] is None
    assert strict["ratio"] == pytest.approx(strict["all_calls"] / 90)


def test_a_replayed_run_has_the_same_calls_and_sent_nothing_again(tmp_path):
    train(tmp_path / "run", episodes=4, num_envs=4)
    before = accounting(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    train(tmp_path / "run", episodes=4, num_envs=4)
    assert accounting(tmp_path / "run") == before


def test_table_shows_every_data_set(made):
    text = io.StringIO()
    console = Console(file=text, width=200)
    account = query_accounting.run(query_accounting.QueryAccounting(str(made[0])), console)
    shown = text.getvalue()
    few = next(one for name, one in account["datasets"].items() if name.startswith("few"))
    assert "TRPO" in shown and f"{few['calls_per_row']:.2f}" in shown and f"{100 * few['ratio']:.1f}%" in shown
    assert accounting_table(account).row_count == 2 + 2 * 2


def test_folders_without_an_ended_run_are_refused(tmp_path, made):
    with pytest.raises(InputError, match="--run-dir is missing"):
        query_accounting.run(query_accounting.QueryAccounting(), QUIET)
    with pytest.raises(InputError, match="no run of 'evolve train'"):
        accounting(tmp_path)
    shutil.copytree(made[0], tmp_path / "run")
    next((tmp_path / "run" / "generate").glob("*/results.json")).unlink()
    with pytest.raises(InputError, match=r"generation in .* has not ended"):
        accounting(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(InputError, match=r"training in .* has not ended"):
        accounting(tmp_path / "run")
