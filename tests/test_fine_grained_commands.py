"""The stages of the fine-grained experiment, end to end on a model with random weights."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from instructgym.agents.policy.checkpoints import policy_from
from instructgym.envs.tokens.episode import PromptExample
from instructgym.experiments.fine_grained import edit as fine_grained_edit
from instructgym.experiments.fine_grained import evaluate as fine_grained_evaluate
from instructgym.experiments.fine_grained import ppo as fine_grained_ppo
from instructgym.experiments.fine_grained import report as fine_grained_report
from instructgym.experiments.fine_grained import reward as fine_grained_reward
from instructgym.experiments.fine_grained import run as fine_grained_run
from instructgym.experiments.fine_grained import sft as fine_grained_sft
from instructgym.experiments.fine_grained.common import ENV_ID
from instructgym.experiments.fine_grained.evaluate import wilson_win_rate
from instructgym.experiments.runs import training as token_training
from instructgym.experiments.runs.responses import respond
from instructgym.llm_backends import request_seed
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.records import read_records
from instructgym.rewards import RewardModel

QUIET = Console(quiet=True)
JUDGE = json.dumps({"id": "scored-comparison", "kwargs": {"scorer": {"id": "fine_grained_cases:annotator"}}})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"{a} {b}", "response": f"{b} {a}"} for a in "abcdefghij" for b in "klmnopqrstuvwxyz0123"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def small(data):
    """Options of every stage, by class; the run folder and what a stage reads are left to the test."""
    shared = {"data": data, "max_tokens": 6, "context_length": 64, "dtype": "float32"}

    def build(stage, folder, **others):
        sizes = {
            fine_grained_sft.FineGrainedSFT: {"demonstrations": 16, "batch_size": 8, "lora_rank": 2},
            fine_grained_edit.FineGrainedEdit: {
                "limit": 40,
                "annotator": "fine_grained_cases:annotator",
                "editor": "fine_grained_cases:editor",
                "max_changed": 1.0,
            },
            fine_grained_reward.FineGrainedRewardModel: {"epochs": 1, "batch_size": 8, "lora_rank": 2},
            fine_grained_ppo.FineGrainedPPO: {
                "updates": 2, "batch_size": 8, "epochs": 1, "judge": "fine_grained_cases:annotator"
            },
            fine_grained_evaluate.FineGrainedEvaluate: {
                "limit": 12, "judge": JUDGE, "measures": "fine_grained_cases:annotator"
            },
        }  # fmt: skip
        return stage(**(shared | sizes[stage] | {"run_dir": str(folder)} | others))

    return build


@pytest.fixture(scope="module")
def made(tmp_path_factory, small, tiny_model_path):
    """A folder with a supervised policy, its evaluation, pairs, and a reward model of either level."""
    root = tmp_path_factory.mktemp("fine-grained")
    fine_grained_sft.run(small(fine_grained_sft.FineGrainedSFT, root / "sft", model=tiny_model_path), QUIET)
    fine_grained_edit.run(small(fine_grained_edit.FineGrainedEdit, root / "edit", policy=str(root / "sft")), QUIET)
    evaluation = fine_grained_evaluate.FineGrainedEvaluate
    fine_grained_evaluate.run(small(evaluation, root / "evaluate", policy=str(root / "sft"), arm="sft"), QUIET)
    for level, pairs in (("token", "edits"), ("sequence", "preferences")):
        options = small(
            fine_grained_reward.FineGrainedRewardModel,
            root / level,
            model=tiny_model_path,
            level=level,
            pairs=str(root / "edit" / f"{pairs}.jsonl"),
        )
        fine_grained_reward.run(options, QUIET)
    return root


def ppo_options(small, made, folder, level="token", **others):
    models = {"policy": str(made / "sft"), "reward_model": str(made / level)}
    return small(fine_grained_ppo.FineGrainedPPO, folder, **(models | others))


def test_stages_leave_pairs_and_reward_models(made):
    rows = read_records(made / "edit" / "responses.jsonl")
    assert len(rows) == 40 and all(row["scores"][0] <= row["scores"][1] for row in rows)
    for row in read_records(made / "edit" / "edits.jsonl"):
        assert row["edited"] == row["original"][:-1]
    for row in read_records(made / "edit" / "preferences.jsonl"):
        assert len(row["edited"]) < len(row["original"]), "the annotator prefers the shorter one"
    results = json.loads((made / "token" / "results.json").read_text())
    assert {"accuracy", "removed_auc", "margin"} <= set(results["metrics"])
    assert (made / "token" / "figures" / "tokens.png").stat().st_size > 5_000
    assert "<html" in (made / "token" / "figures" / "tokens.html").read_text()


@pytest.mark.parametrize(
    ("level", "form"), [("token", "auto"), ("token", "whole"), ("token", "terminal"), ("sequence", "auto")]
)
def test_ppo_and_evaluation_by_each_reward(made, small, tmp_path, level, form):
    results = fine_grained_ppo.run(ppo_options(small, made, tmp_path / "ppo", level, form=form, arm="a"), QUIET)
    assert results["counts"]["updates"] == 2
    check_scale(small, made, tmp_path, level, form)
    rows = read_records(tmp_path / "ppo" / "metrics.jsonl")
    assert rows[0]["train/kl"] == pytest.approx(0.0, abs=1e-5), "the start is the reference"
    assert {"rollout/terms/proxy", "rollout/terms/judge"} <= set(rows[0])
    assert json.loads((tmp_path / "ppo" / "scale.json").read_text())["scale"] > 0
    stage = fine_grained_evaluate.FineGrainedEvaluate
    shutil.copytree(made / "evaluate", tmp_path / "eval" / "sft")
    against = str(tmp_path / "eval" / "sft")
    options = small(stage, tmp_path / "eval" / "ppo", policy=str(tmp_path / "ppo"), against=against, arm="a", seed=1)
    metrics = fine_grained_evaluate.run(options, QUIET)["metrics"]
    assert 0 <= metrics["win_rate"] <= 1 and metrics["judged"] == 1.0
    check_kl(tmp_path, made, metrics["kl"])
    figures = fine_grained_report.run(fine_grained_report.FineGrainedReport(str(tmp_path)), QUIET)
    assert figures["arms"]["a"]["seeds"] == 1 and "win_rate" not in figures["arms"]["sft"]
    assert (tmp_path / "report" / "curves.png").exists()


def check_scale(small, made, tmp_path, level, form):
    """Returns of the start's responses have mean 0 and deviation 1 under the stored scale."""
    stored = json.loads((tmp_path / "ppo" / "scale.json").read_text())
    options = ppo_options(small, made, tmp_path / "other", level, form=form)
    policy = options.load(made / "sft" / "policy")
    model = RewardModel.load(made / level / "model", policy.trunk, dtype="float32")
    part = fine_grained_ppo.scaled_reward(model, form, **stored)
    assert part.timing == {"auto": "causal" if level == "token" else "terminal", "whole": "whole"}.get(form, "terminal")
    examples = options.prompts("unlabelled", policy.model_name)[:128]
    drawn = respond(policy, ENV_ID, examples, options.temperature, 0, reward=part, **options.env_options())
    returns = np.array([response.reward for response in drawn])
    assert returns.std() == pytest.approx(1.0, abs=1e-3) and abs(returns.mean()) < 1e-3


def check_kl(tmp_path, made, found):
    """KL to the start, by the two policies' own log-probs."""
    rows = read_records(tmp_path / "eval" / "ppo" / "responses.jsonl")
    trained = policy_from(tmp_path / "ppo" / "policy", temperature=0.7, dtype="float32")
    start = policy_from(made / "sft" / "policy", temperature=0.7, dtype="float32")
    again = respond(
        trained, ENV_ID, examples_of(rows), 0.7, request_seed(1, "responses", 0), reward=lambda s: [0.0] * len(s),
        max_tokens=6, context_length=64,
    )  # fmt: skip
    assert [one.text for one in again] == [row["response"] for row in rows]
    arguments = [r.prompt_ids for r in again], [r.token_ids for r in again], [None] * len(again)
    with torch.no_grad():
        gap = trained.score(*arguments, values=False).logprobs - start.score(*arguments, values=False).logprobs
    assert found == pytest.approx(float(gap.sum()) / len(rows), abs=1e-4) and found != 0


def examples_of(rows):
    return [PromptExample(row["id"], row["prompt"]) for row in rows]


def test_a_stopped_ppo_goes_on_where_it_stood(made, small, tmp_path, monkeypatch):
    whole = ppo_options(small, made, tmp_path / "whole", updates=3)
    fine_grained_ppo.run(whole, QUIET)
    parts = replace(whole, run_dir=str(tmp_path / "parts"), minutes=3.0)
    clock = iter(range(0, 10_000_000, 61))  # every look at the clock is a minute later
    with monkeypatch.context() as patched:
        patched.setattr(token_training.time, "monotonic", lambda: float(next(clock)))
        assert fine_grained_ppo.run(parts, QUIET)["status"] == "stopped"
    fine_grained_ppo.run(replace(parts, minutes=0.0), QUIET)
    curves = [read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert len(curves[0]) == 3
    for one, two in zip(*curves, strict=True):
        assert {k: v for k, v in one.items() if "time/" not in k} == {k: v for k, v in two.items() if "time/" not in k}


def test_edits_go_on_behind_the_last_whole_chunk(made, small, tmp_path, monkeypatch):
    monkeypatch.setattr(fine_grained_edit, "CHUNK", 16)
    stage = fine_grained_edit.FineGrainedEdit
    fine_grained_edit.run(small(stage, tmp_path / "whole", policy=str(made / "sft")), QUIET)
    whole = (tmp_path / "whole" / "responses.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("config.json", "responses.jsonl"):
        (parts / name).write_text((tmp_path / "whole" / name).read_text())
    (parts / "responses.jsonl").write_text("".join(lines[:20]) + lines[20][:30])  # a chunk, and a torn one
    fine_grained_edit.run(small(stage, parts, policy=str(made / "sft")), QUIET)
    assert (parts / "responses.jsonl").read_text() == whole


@pytest.mark.parametrize(
    ("command", "stage"),
    [
        (fine_grained_edit, fine_grained_edit.FineGrainedEdit),
        (fine_grained_evaluate, fine_grained_evaluate.FineGrainedEvaluate),
    ],
)
def test_rows_stop_at_the_time_limit(made, small, tmp_path, command, stage):
    options = small(stage, tmp_path / "run", policy=str(made / "sft"), minutes=1e-9)
    assert command.run(options, QUIET)["status"] == "stopped"


def test_a_smoke_run_goes_through_all_stages(data, tmp_path, tiny_model_path, monkeypatch):
    sizes = {kind: size | {"max_tokens": 6} for kind, size in fine_grained_run.SIZES["smoke"].items()}
    monkeypatch.setitem(fine_grained_run.SIZES, "smoke", sizes)
    options = fine_grained_run.FineGrainedRun(
        run_dir=str(tmp_path), scale="smoke", model=tiny_model_path, data=data, max_changed=1.0, dtype="float32",
        annotator="fine_grained_cases:annotator", editor="fine_grained_cases:editor",
        arms="sequence-preferences,sequence-edits,token-edits,token-whole,figa",
    )  # fmt: skip
    figures = fine_grained_run.run(options, QUIET)
    assert set(figures["arms"]) == {
        "sft",
        "sequence-preferences",
        "sequence-edits",
        "token-edits",
        "token-whole",
        "figa",
    }
    assert len(figures["reward_models"]) == 3 and "kl" in figures["arms"]["figa"]
    before = (tmp_path / "ppo" / "token-edits-0" / "results.json").stat().st_mtime_ns
    again = fine_grained_run.run(options, QUIET)
    assert again == figures and (tmp_path / "ppo" / "token-edits-0" / "results.json").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes where the hardware computes in bfloat16, three times as long elsewhere
def test_a_smoke_run_on_the_embedded_model(tmp_path):
    figures = fine_grained_run.run(fine_grained_run.FineGrainedRun(run_dir=str(tmp_path), scale="smoke"), QUIET)
    arms = {"sft", "sequence-preferences", "sequence-edits", "token-edits"}
    assert set(figures["arms"]) == arms and (tmp_path / "report" / "curves.png").stat().st_size > 20_000
    edits = read_records(tmp_path / "edit" / "edits.jsonl")
    assert edits and all(row["original"][:1] == row["edited"][:1] != "" for row in edits), "spacing is kept"
    for name in arms - {"sft"}:
        rows = read_records(tmp_path / "ppo" / f"{name}-0" / "metrics.jsonl")
        assert len(rows) == 2 and rows[0]["train/kl"] == pytest.approx(0.0, abs=1e-3)


def refusals(made):
    sft, edit = fine_grained_sft.FineGrainedSFT, fine_grained_edit.FineGrainedEdit
    reward, ppo = fine_grained_reward.FineGrainedRewardModel, fine_grained_ppo.FineGrainedPPO
    evaluate = fine_grained_evaluate.FineGrainedEvaluate
    policy, pairs = str(made / "sft"), str(made / "edit" / "edits.jsonl")
    return [
        (sft, {"run_dir": ""}, "--run-dir"),
        (sft, {"epochs": 0}, "--epochs"),
        (sft, {"data": "nowhere.jsonl"}, "nowhere"),
        (edit, {}, "--policy is missing"),
        (edit, {"policy": str(made / "edit")}, "holds no policy"),
        (edit, {"policy": policy, "editor": "unknown"}, "editor"),
        (edit, {"policy": policy, "editor": "fine_grained_cases:nothing"}, "none of 40 responses was edited"),
        (reward, {}, "--pairs is missing"),
        (reward, {"pairs": pairs, "loss": "sequence_bt"}, "--loss sequence_bt"),
        (reward, {"pairs": pairs, "limit": 1}, "too few"),
        (ppo, {"policy": policy}, "--reward-model is missing"),
        (ppo, {"policy": policy, "reward_model": policy}, "holds no reward model"),
        (ppo, {"policy": policy, "reward_model": str(made / "sequence"), "form": "whole"}, "token-level"),
        (evaluate, {"policy": policy, "against": policy}, "is no run of"),
        (evaluate, {"policy": policy, "measures": "vader, win"}, "--measures are ids"),
        (ppo, {"policy": policy, "reward_model": str(made / "token"), "lam": 1.5}, "--lam"),
        (edit, {"policy": policy, "max_changed": 7.0}, "max_changed"),
        (edit, {"policy": policy, "context_length": 6}, "context"),
    ]


@pytest.mark.parametrize("case", range(18))
def test_bad_input_is_refused(made, small, tmp_path, tiny_model_path, case):
    stage, options, message = refusals(made)[case]
    if stage in (fine_grained_sft.FineGrainedSFT, fine_grained_reward.FineGrainedRewardModel):
        options = {"model": tiny_model_path} | options
    module = {
        fine_grained_sft.FineGrainedSFT: fine_grained_sft,
        fine_grained_edit.FineGrainedEdit: fine_grained_edit,
        fine_grained_reward.FineGrainedRewardModel: fine_grained_reward,
        fine_grained_ppo.FineGrainedPPO: fine_grained_ppo,
        fine_grained_evaluate.FineGrainedEvaluate: fine_grained_evaluate,
    }[stage]
    with pytest.raises(InputError, match=message):
        module.run(small(stage, tmp_path / "run", **options), QUIET)


def test_a_reference_that_answered_otherwise_is_refused(made, small, tmp_path):
    stage, policy = fine_grained_evaluate.FineGrainedEvaluate, str(made / "sft")
    for change, message in (({"temperature": 1.0}, "--temperature 0.7, not 1.0"), ({"limit": 14}, "2 more|1 more")):
        with pytest.raises(InputError, match=message):
            options = small(stage, tmp_path / "run", policy=policy, against=str(made / "evaluate"), **change)
            fine_grained_evaluate.run(options, QUIET)


def test_responses_without_a_verdict_are_ranked_by_nobody(made, small, tmp_path):
    options = small(
        fine_grained_edit.FineGrainedEdit,
        tmp_path / "edit",
        policy=str(made / "sft"),
        annotator="fine_grained_cases:undecided",
    )
    counts = fine_grained_edit.run(options, QUIET)["counts"]
    rows = read_records(tmp_path / "edit" / "responses.jsonl")
    unranked = sum(row["scores"] is None for row in rows)
    assert 0 < unranked < len(rows) and counts["dropped"]["no verdict of the annotator"] == unranked
    assert all(row["edited"] is None for row in rows if row["scores"] is None)


def test_win_rates_count_ties_by_halves_and_leave_out_what_was_not_judged():
    found = wilson_win_rate([1.0, 0.5, 0.0, 1.0, None])
    assert found["win_rate"] == pytest.approx(0.625) and found["ties"] == 0.25 and found["judged"] == 0.8
    assert 0.15 < found["win_rate_low"] < 0.3 and 0.9 < found["win_rate_high"] < 0.95
    assert wilson_win_rate([1.0] * 3)["win_rate_low"] < 0.5, "three wins are no certainty"
    with pytest.raises(InputError, match="no verdict"):
        wilson_win_rate([None])
