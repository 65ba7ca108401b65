"""The stages of Tuna, end to end on a model with random weights; a whole run on the embedded one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from instructgym.agents.policy.checkpoints import policy_from
from instructgym.agents.policy.language_model import LanguageModelPolicy, PolicyBackend
from instructgym.agents.preferences.lists import rank_agreement, tokenize_lists
from instructgym.envs.tasks.responses.candidates import RankedList, read_ranked_lists, write_ranked_lists
from instructgym.experiments.cli import COMMANDS
from instructgym.experiments.runs.folder import read_json
from instructgym.experiments.runs.training import OutOfTimeError, Run
from instructgym.experiments.tuna import candidates as tuna_candidates
from instructgym.experiments.tuna import evaluate as tuna_evaluate
from instructgym.experiments.tuna import rank as tuna_rank
from instructgym.experiments.tuna import train as tuna_train
from instructgym.experiments.tuna.candidates import TunaCandidates
from instructgym.experiments.tuna.evaluate import TunaEvaluate
from instructgym.experiments.tuna.ppo import TunaPPO, neighbour_pairs
from instructgym.experiments.tuna.ppo import run as ppo
from instructgym.experiments.tuna.rank import TunaRank, agreement
from instructgym.experiments.tuna.report import TunaReport
from instructgym.experiments.tuna.report import run as report
from instructgym.experiments.tuna.run import TunaRun
from instructgym.experiments.tuna.run import run as tuna
from instructgym.experiments.tuna.train import TunaTrain
from instructgym.llm_backends import BackendError, ScriptedBackend, part_ids
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.tokenization import Tokenizer
from instructgym.llm_backends.records import read_records
from instructgym.llm_backends.training.adapters import LoraSettings
from instructgym.rewards import FunctionRanker, rouge_l

QUIET = Console(quiet=True)
REQUESTS = 20
SMALL = {"dtype": "float32", "context_length": 128}


def words(prompt, sampling):
    """Of a scripted writer: some words by the request's seed; counts the requests."""
    words.asked += 1
    return " ".join(["sea"] * (1 + sampling.seed % 5)) + f" {sampling.seed % 99_991}"


words.asked = 0


def writer():
    return ScriptedBackend(reply=words)


def longest():
    """Ranks by length."""
    return FunctionRanker(lambda prompt, texts: [len(text) for text in texts])


def down(prompt, sampling):
    """Of a server that is gone at times."""
    return BackendError("the server is gone") if down.now else words(prompt, sampling)


down.now = True


def unable():
    return ScriptedBackend(reply=down)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("requests") / "rows.jsonl"
    rows = [{"instruction": f"Say {i}", "input": "x" * (i % 2), "output": "sea sea sea 7"} for i in range(REQUESTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def drawn(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "run"
    options = TunaCandidates(run_dir=str(folder), data=data, backend=f"{__name__}:writer", dtype="float32", tries=1)
    return options, tuna_candidates.run(options, QUIET)


@pytest.fixture(scope="module")
def ranked(drawn, tmp_path_factory):
    """Candidates ranked by ROUGE-L to "sea sea sea 7"."""
    folder = tmp_path_factory.mktemp("ranked") / "run"
    options = TunaRank(run_dir=str(folder), candidates=drawn[0].run_dir, ranker="ground-truth")
    return options, tuna_rank.run(options, QUIET)


@pytest.fixture(scope="module")
def trained(ranked, tiny_model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = TunaTrain(
        run_dir=str(folder),
        ranked=ranked[0].run_dir,
        model=tiny_model_path,
        epochs=12,
        learning_rate=1e-2,
        holdout=0.25,
        **SMALL,
    )
    return options, tuna_train.run(options, QUIET)


def test_candidates_are_kept_with_their_requests(drawn, data):
    options, results = drawn
    rows = read_records(f"{options.run_dir}/candidates.jsonl")
    asked = read_records(data)
    assert [(r["instruction"], r["input"], r["output"]) for r in rows] == [
        (r["instruction"], r["input"], r["output"]) for r in asked
    ]
    assert all(len(row["candidates"]) == len(row["finished"]) == 4 and all(row["finished"]) for row in rows)
    assert results["counts"]["requests"] == results["counts"]["with several"] == REQUESTS
    assert results["counts"]["candidates"] == 4 * REQUESTS and results["counts"]["failed"] == 0


def test_candidates_are_not_drawn_twice(drawn, data, tmp_path):
    """A run that is stopped goes on with the same responses, whoever else is asked in between."""
    options = replace(drawn[0], run_dir=str(tmp_path / "run"), minutes=1e-9)
    stopped = tuna_candidates.run(options, QUIET)
    assert stopped["status"] == "stopped" and not Path(options.run_dir, "candidates.jsonl").exists()
    before = words.asked
    tuna_candidates.run(replace(options, minutes=0.0), QUIET)
    rows = read_records(f"{options.run_dir}/candidates.jsonl")
    assert words.asked == before + 4 * REQUESTS and len(rows) == REQUESTS
    tuna_candidates.run(replace(options, minutes=0.0), QUIET)
    assert words.asked == before + 4 * REQUESTS
    journal = read_records(f"{options.run_dir}/journal.jsonl")
    (tmp_path / "run" / "candidates.jsonl").unlink()
    (tmp_path / "run" / "results.json").unlink()
    tuna_candidates.run(replace(options, minutes=0.0), QUIET)
    assert read_records(f"{options.run_dir}/candidates.jsonl") == rows and words.asked == before + 4 * REQUESTS
    assert read_records(f"{options.run_dir}/journal.jsonl") == journal


def test_an_outage_is_one_error_and_mended_by_a_repetition(drawn, tmp_path):
    options = replace(drawn[0], run_dir=str(tmp_path / "run"), backend=f"{__name__}:unable", limit=2)
    with pytest.raises(BackendError, match="all of 2 requests failed: the server is gone; repeat"):
        tuna_candidates.run(options, QUIET)
    with pytest.raises(InputError, match="has 'tuna candidates' finished there"):
        tuna_rank.run(TunaRank(run_dir=str(tmp_path / "ranked"), candidates=options.run_dir), QUIET)
    down.now = False
    assert tuna_candidates.run(options, QUIET)["counts"]["failed"] == 0


@pytest.fixture
def out_of_time(monkeypatch):
    """``out_of_time(n)``: from then on the time is over before the n-th piece of work."""

    def after(count):
        left = [count]

        def check(training):
            left[0] -= 1
            if not left[0]:
                raise OutOfTimeError

        monkeypatch.setattr(Run, "check_time", check)

    return after


@pytest.mark.parametrize("stage", ["candidates", "rank", "judge"])
def test_what_is_stopped_between_chunks_ends_as_what_is_not(
    stage, drawn, ranked, evaluated, tmp_path, out_of_time, monkeypatch
):
    kinds = {
        "candidates": (tuna_candidates, drawn[0], "candidates.jsonl"),
        "rank": (tuna_rank, ranked[0], "rankings.jsonl"),
        "judge": (tuna_evaluate, evaluated[0], "judged/judged.jsonl"),
    }
    module, options, name = kinds[stage]
    monkeypatch.setattr(module, "CHUNK", 4)
    again = replace(options, run_dir=str(tmp_path / "run"))
    if stage == "judge":
        shutil.copytree(f"{options.run_dir}/rouge", f"{again.run_dir}/rouge")
        config = Path(again.run_dir) / "rouge" / "config.json"
        config.write_text(config.read_text().replace(options.run_dir, again.run_dir))
    out_of_time(2)
    assert module.run(again, QUIET)["status"] == "stopped"
    assert len(read_records(f"{again.run_dir}/{name}")) == 4
    out_of_time(0)
    results = module.run(again, QUIET)
    rows = read_records(f"{again.run_dir}/{name}")
    assert results["status"] == "finished"
    assert rows == read_records(f"{options.run_dir}/{name}")


def test_rankings_keep_requests_references_and_ends(ranked, drawn):
    options, results = ranked
    lists = read_ranked_lists(f"{options.run_dir}/ranked.jsonl")
    rows = {row["id"]: row for row in read_records(f"{drawn[0].run_dir}/candidates.jsonl")}
    assert len(lists) == results["counts"]["lists"] == REQUESTS
    for one in lists:
        row = rows[one.id]
        assert one.candidates == tuple(row["candidates"]) and one.reference == row["output"]
        assert one.prompt == (f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"])
        assert one.metadata["finished"] == row["finished"]
        assert one.scores == pytest.approx([rouge_l(text, one.reference) for text in one.candidates])


def test_agreement_with_the_references():
    lists = [
        RankedList("a", "?", ("red fish", "red fish swim", "no"), (1.0, 2.0, 0.0), "red fish swim"),
        RankedList("b", "?", ("x", "y"), (1.0, 0.0)),
    ]
    found = agreement(lists)
    assert found["kendall_tau"] == pytest.approx(1.0) and found["rouge_l_best"] == pytest.approx(1.0)
    assert found["rouge_l_mean"] == pytest.approx((1 + 0.8 + 0) / 3)
    assert agreement([replace(lists[0], scores=(2.0, 1.0, 3.0))])["kendall_tau"] < 0
    assert set(agreement(lists[1:]).values()) == {None}


def test_training_ranks_withheld_candidates_as_the_ranker_does(trained):
    options, results = trained
    metrics, counts = results["metrics"], results["counts"]
    assert counts["held_out"] == 5 and counts["train"] == 15
    assert metrics["tau, held out after"] > max(metrics["tau, held out before"], 0.4)
    assert metrics["tau, trained on after"] > metrics["tau, trained on before"]
    assert len(read_records(f"{options.run_dir}/train.jsonl")) == counts["train"]
    policy_from(f"{options.run_dir}/policy")


def test_training_that_is_stopped_ends_as_one_that_is_not(trained, tmp_path):
    options = replace(trained[0], run_dir=str(tmp_path / "run"), epochs=2, loss="dpo")
    stopped = tuna_train.run(replace(options, minutes=1e-9), QUIET)
    assert stopped["status"] == "stopped"
    results = tuna_train.run(options, QUIET)
    whole = tuna_train.run(replace(options, run_dir=str(tmp_path / "whole")), QUIET)
    assert results["metrics"] == pytest.approx(whole["metrics"], abs=1e-6)


def test_a_second_stage_starts_from_the_first_and_keeps_it_as_reference(trained, tmp_path):
    first = trained[0]
    options = replace(first, run_dir=str(tmp_path / "run"), policy=first.run_dir, model="", loss="dpo", epochs=1)
    results = tuna_train.run(options, QUIET)
    assert results["metrics"]["tau, held out before"] == pytest.approx(trained[1]["metrics"]["tau, held out after"])
    settings = read_json(tmp_path / "run" / "policy" / "policy.json")
    assert settings["reference"] == "adapter:start"


def test_lists_become_tokens(tiny_model_path):
    tokenizer = Tokenizer(tiny_model_path)
    end = min(tokenizer.eos_ids)
    one = RankedList("a", "Say it", ("yes", "no " * 60, "maybe"), (1, 2, 3), "yes!", {"finished": [True, True, False]})
    [found], dropped = tokenize_lists([one], "plain", tokenizer, 60)
    assert dropped == {"candidates": 1, "references": 0, "lists": 0}
    assert found.candidates == [[*tokenizer.encode_continuation(" yes"), end], tokenizer.encode_continuation(" maybe")]
    assert list(found.scores) == [1, 3] and found.reference == [*tokenizer.encode_continuation(" yes!"), end]
    assert tokenize_lists([one], "plain", tokenizer, 8) == ([], {"candidates": 3, "references": 1, "lists": 1})
    with pytest.raises(InputError, match=r"'a': metadata 'finished' must be true or false for each of its 3"):
        tokenize_lists([replace(one, metadata={"finished": [True]})], "plain", tokenizer, 60)


def test_agreement_of_a_policy_counts_every_list_once(tiny_lm, tiny_model_path):
    policy = LanguageModelPolicy(tiny_model_path, LoraSettings(rank=2), dtype="float32")
    lists = [
        RankedList(str(i), f"Say {i}", tuple(f"{word} {i}" for word in ("sea", "poem", "list")), (1, 2, 3))
        for i in range(4)
    ]
    tokens, _ = tokenize_lists(lists, "plain", policy.tokenizer, 64)
    whole = rank_agreement(policy, tokens)
    assert whole == pytest.approx(np.mean([rank_agreement(policy, [one], token_budget=8) for one in tokens]))
    opposite = [replace(one, scores=[-score for score in one.scores]) for one in tokens]
    assert rank_agreement(policy, opposite) == pytest.approx(-whole)
    assert rank_agreement(policy, tokens, ratios=True) is None  # all ratios are 0
    assert rank_agreement(policy, [replace(one, scores=[1.0] * 3) for one in tokens]) is None


def test_neighbours_in_rank_are_pairs_and_ties_none(tiny_model_path):
    one = RankedList("a", "Say", ("b", "d", "c", "a"), (1, 0, 0, 2), metadata={"finished": [True, True, False, True]})
    pairs = neighbour_pairs([one], "plain", Tokenizer(tiny_model_path))
    assert [(p.original, p.edited, p.finished) for p in pairs] == [(" b", " a", True), (" d", " b", True)]


def test_a_policy_answers_as_a_backend(trained):
    folder = f"{trained[0].run_dir}/policy"
    policy = policy_from(folder, dtype="float32")
    backend = PolicyBackend(policy, "ours")
    prompt = [{"role": "user", "content": "Say 3"}]
    [rows] = backend.logprobs([prompt], ["sea sea"])
    ids = policy.lm.encode(prompt)
    scores = policy.score([np.array(ids, np.int32)], [np.array(policy.lm.encode_completion("sea sea"))], [None], False)
    assert rows == pytest.approx(scores.logprobs.detach().numpy(), abs=1e-4)
    [drawn] = backend.generate([prompt])
    [own] = policy.generate([ids], tuna_candidates.DiverseSampling().request(0, 0))
    assert len(drawn) == 1 and len(own) == 4
    base = PolicyBackend(LanguageModelPolicy(policy.model_name, LoraSettings(rank=2), dtype="float32"), "base")
    assert not np.allclose(base.logprobs([prompt], ["sea sea"])[0], rows, atol=1e-3)
    assert backend.name != base.name and "embedded" in part_ids("backend")


def test_ppo_learns_from_the_same_lists(ranked, trained, tmp_path):
    options = TunaPPO(
        run_dir=str(tmp_path),
        ranked=ranked[0].run_dir,
        policy=trained[0].run_dir,
        layout="plain",
        updates=2,
        batch_size=8,
        max_tokens=6,
        holdout=0.25,
        **SMALL,
    )
    results = ppo(options, QUIET)
    assert results["counts"]["updates"] == 2 and results["counts"]["episodes"] == 16
    assert results["metrics"]["reward model, accuracy"] >= 0.5
    trained_on = {row["id"] for row in read_records(tmp_path / "lists.jsonl")}
    assert len(trained_on) == 15 and trained_on == {
        row["id"] for row in read_records(f"{trained[0].run_dir}/train.jsonl")
    }
    policy_from(tmp_path / "ppo" / "policy")
    lists = read_ranked_lists(f"{ranked[0].run_dir}/ranked.jsonl")
    changed = tmp_path / "other.jsonl"
    write_ranked_lists(changed, [replace(one, scores=[-s for s in one.scores]) for one in lists])
    with pytest.raises(InputError, match="holds a run with lists="):
        ppo(replace(options, ranked=str(changed)), QUIET)


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated")
    tasks = root / "tasks.jsonl"
    rows = [{"instruction": f"Say {i}", "instances": [{"input": "", "output": "sea sea"}]} for i in range(30, 36)]
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = TunaEvaluate(
        run_dir=str(root / "evaluate"),
        tasks=str(tasks),
        held_out=0,
        policy=f"ours={trained[0].run_dir}",
        max_tokens=6,
        judge='{"id": "scored-comparison", "kwargs": {"scorer": "vader"}}',
        **SMALL,
    )
    return options, tuna_evaluate.run(options, QUIET)


def test_arms_are_judged_against_one_of_them(evaluated):
    options, results = evaluated
    rows = read_records(f"{options.run_dir}/judged/judged.jsonl")
    assert len(rows) == 6 and all(set(row["wins"]) == {"ours"} for row in rows)
    [(name, figures)] = results["metrics"]["win_rates"].items()
    assert name == "ours" and figures["win_rate"] == pytest.approx(np.mean([row["wins"]["ours"] for row in rows]))
    assert figures["judged"] == 1 and figures["win_rate_low"] <= figures["win_rate"] <= figures["win_rate_high"]
    assert set(results["metrics"]["arms"]) == {"base", "ours"}


def test_a_report_of_what_there_is(evaluated, tmp_path):
    options, results = evaluated
    (tmp_path / "evaluate").symlink_to(options.run_dir)
    found = report(TunaReport(str(tmp_path)), QUIET)
    assert found["win_rates"] == results["metrics"]["win_rates"] and found["rankings"] == {}
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| ours |" in text and (tmp_path / "report" / "arms.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="no finished evaluation"):
        report(TunaReport(str(tmp_path / "nowhere")), QUIET)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (TunaCandidates(run_dir="x"), "--data"),
        (TunaCandidates(run_dir="x", data="nowhere.jsonl"), "nowhere.jsonl"),
        (TunaCandidates(run_dir="x", data="a", temperature=0.0), "temperature"),
        (TunaCandidates(run_dir="x", data="a", policy="b", backend="openai"), "exclude"),
        (TunaRank(run_dir="x"), "--candidates"),
        (TunaRank(run_dir="x", candidates="nowhere"), "nowhere"),
        (TunaTrain(run_dir="x"), "--ranked"),
        (TunaTrain(run_dir="x", ranked="nowhere.jsonl"), "nowhere.jsonl"),
        (TunaTrain(run_dir="x", ranked="a", loss="best"), "unknown loss 'best'"),
        (TunaTrain(run_dir="x", ranked="a", loss="dpo", margin=0.1), "margin is no option of the loss dpo"),
        (TunaTrain(run_dir="x", ranked="a", policy="a", model="b"), "exclude"),
        (TunaTrain(run_dir="x", ranked="a", holdout=1.0), "--holdout"),
        (TunaEvaluate(run_dir="x", against="nobody"), "--against nobody"),
        (TunaEvaluate(run_dir="x", judge='{"id": "pairwise-judge", "kwargs": {"grade": 1}}'), "grade"),
        (TunaPPO(run_dir="x", ranked="a"), "--policy"),
        (TunaRun(run_dir="x", order="probabilistic"), "--order"),
        (TunaRun(run_dir="x", arms="tuna,best"), "'best'"),
        (TunaRun(run_dir="x", arms=","), "--arms"),
        (TunaRun(run_dir="x", scale="huge"), "--scale"),
        (TunaRun(run_dir="x", loss="dpo"), "--loss"),
        (TunaRun(run_dir="x", judge="nobody"), "nobody"),
        (TunaRun(run_dir="x", teacher="nobody"), "nobody"),
        (TunaRun(run_dir="x", teacher="openai"), "teacher|model|log-probs"),
        (TunaRank(run_dir="x", candidates="x", ranker='{"id": "contextual", "kwargs": {"backend": "embedded"}}'), "x"),
        (TunaRun(run_dir="x", seeds="nowhere.jsonl"), "nowhere.jsonl"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_bad_options_are_refused_before_anything_is_made(options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = dict(command.load() for command in COMMANDS if command.name.startswith("tuna "))
    with pytest.raises((InputError, ValueError), match=said):
        commands[type(options)](options, QUIET)
    assert not list(tmp_path.iterdir())


def test_a_ranker_with_unknown_arguments_is_refused(drawn, tmp_path):
    options = TunaRank(
        run_dir=str(tmp_path / "run"),
        candidates=drawn[0].run_dir,
        ranker='{"id": "probabilistic", "kwargs": {"gamma": 1}}',
    )
    with pytest.raises(InputError, match="gamma"):
        tuna_rank.run(options, QUIET)


@pytest.mark.parametrize("order", ["probabilistic,contextual", "contextual,probabilistic"])
def test_both_orders_of_the_chain(order, tiny_model_path, tmp_path, monkeypatch):
    """On the tiny model: which stage starts from which, and from whose candidates."""
    from instructgym.experiments.tuna import run as tuna_run

    monkeypatch.setitem(tuna_run.SIZES["smoke"], "evaluate", {"max_tokens": 4})
    teacher = json.dumps({"id": "transformers", "kwargs": {"model": tiny_model_path}})
    options = TunaRun(
        run_dir=str(tmp_path),
        scale="smoke",
        model=tiny_model_path,
        order=order,
        arms="tuna,dpo",
        teacher=teacher,
        judge=f"{__name__}:longest",
        judge_backend=teacher,
        evaluation_judge='{"id": "scored-comparison", "kwargs": {"scorer": "vader"}}',
        dtype="float32",
        held_out=4,
    )
    results = tuna(options, QUIET)
    assert set(results["arms"]) == {"base", "tuna", "dpo"}
    first, second = ("tuna-p", "contextual-tuna-p") if order.startswith("p") else ("tuna-c", "probabilistic")
    used = read_json(tmp_path / "train" / "tuna" / "config.json")["options"]
    assert used["policy"] == str(tmp_path / "train" / first) and used["ranked"] == str(tmp_path / "rank" / second)
    before = read_json(tmp_path / "train" / "dpo" / "config.json")["options"]
    assert before["policy"] == str(tmp_path / "train" / "sft") and before["loss"] == "dpo"
    assert tuna(options, QUIET) == results
    with pytest.raises(InputError, match="order"):
        other = [name for name in tuna_run.ORDERS if name != order]
        tuna(replace(options, order=other[0]), QUIET)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes where the hardware computes in bfloat16, three times as long elsewhere
def test_tuna_to_its_end_on_the_embedded_model(tmp_path):
    results = tuna(TunaRun(run_dir=str(tmp_path), scale="smoke"), QUIET)
    assert set(results["arms"]) == {"base", "sft", "tuna-p", "tuna-c", "tuna", "dpo", "ppo"}
    assert set(results["rankings"]) == {"probabilistic", "contextual", "contextual-tuna-p"}
    assert all(0 <= figures["win_rate"] <= 1 for figures in results["win_rates"].values())
