"""The benchmarks of token environments and agents, on the tiny model and at the smallest sizes."""

import json
import math
import os

import numpy as np
import pytest
from fault_server import serving
from rich.console import Console

from instructgym.experiments.benchmarks import (
    backend,
    dense_reward,
    ranking,
    rollouts,
    sides,
    task_score,
    token_env,
    token_learning,
    token_ppo,
)
from instructgym.experiments.benchmarks.backend import BenchBackend
from instructgym.experiments.benchmarks.ranking import BenchRanking, make_pairs
from instructgym.experiments.benchmarks.rollouts import BenchRollouts
from instructgym.experiments.benchmarks.task_score import BenchTaskScore
from instructgym.experiments.benchmarks.tiny import build_tiny, make_prompts
from instructgym.experiments.benchmarks.token_env import BenchTokenEnv
from instructgym.experiments.benchmarks.token_ppo import BenchTokenPPO
from instructgym.experiments.benchmarks.workers.trl_environment import TRL_VERSION, installed, trl_folder
from instructgym.llm_backends import BackendError
from instructgym.llm_backends.errors import InputError
from instructgym.rewards import Reward, Sample, Score

SMALL = {"rounds": 1, "updates": 1, "batch": 4, "prompt_tokens": 12, "response_tokens": 5, "epochs": 1, "lora_rank": 2}


def quiet():
    return Console(quiet=True)


def check_form(figures, file, measures):
    assert json.loads(file.read_text()) == figures
    assert {"ours", "theirs", "ratio", "settings"} <= set(figures)
    for name in measures:
        low, middle, high = (figures["ratio"][name + end] for end in ("_min", "", "_max"))
        assert math.isfinite(middle) and 0 < low <= middle <= high
        assert figures["ours"][name] > 0 and figures["theirs"][name] > 0
    assert figures["ours"]["tokens"] == figures["theirs"]["tokens"] > 0


def trl_interpreter():
    """One with TRL, where there is one: named by the environment, or prepared by an earlier benchmark."""
    given = os.environ.get("INSTRUCTGYM_TRL_PYTHON") or str(trl_folder() / "bin" / "python")
    found = installed(given)
    return given if found is not None and found["trl"] == TRL_VERSION else None


needs_trl = pytest.mark.skipif(
    trl_interpreter() is None,
    reason=f"no environment with trl {TRL_VERSION}: 'instructgym bench ranking' prepares one, INSTRUCTGYM_TRL_PYTHON "
    "names one",
)


def test_prompts_are_different_and_of_equal_length(tmp_path):
    build_tiny(tmp_path)
    prompts = make_prompts(str(tmp_path), 40, 20)
    assert len(set(prompts)) == 40
    assert {len(prompt.encode()) for prompt in prompts} == {20}
    with pytest.raises(InputError, match="of 400 prompts of 2 tokens"):
        make_prompts(str(tmp_path), 400, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_token_ppo_against_the_floor(tmp_path, dtype):
    options = BenchTokenPPO(against="floor", dtype=dtype, json=str(tmp_path / "figures.json"), **SMALL)
    figures = token_ppo.run(options, quiet())
    check_form(figures, tmp_path / "figures.json", sides.MEASURES)
    assert figures["ours"]["tokens"] == 4 * 5
    assert figures["ours"]["computes_in"] == figures["theirs"]["computes_in"] == dtype
    assert len(figures["ours"]["rounds"]) == 1


@pytest.mark.slow
@needs_trl
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_token_ppo_against_trl(tmp_path, dtype):
    options = BenchTokenPPO(dtype=dtype, trl_python=trl_interpreter(), json=str(tmp_path / "figures.json"), **SMALL)
    figures = token_ppo.run(options, quiet())
    check_form(figures, tmp_path / "figures.json", sides.MEASURES)
    assert figures["ours"]["computes_in"] == figures["theirs"]["computes_in"] == dtype
    assert figures["settings"]["their_versions"]["trl"] == TRL_VERSION


def test_pairs_are_of_the_wanted_lengths_and_come_from_a_seed(tmp_path):
    build_tiny(tmp_path)
    pairs = make_pairs(str(tmp_path), 30, 20, 9, seed=1)
    assert pairs == make_pairs(str(tmp_path), 30, 20, 9, seed=1) != make_pairs(str(tmp_path), 30, 20, 9, seed=2)
    assert {len(pair["prompt"]) for pair in pairs} == {20}
    assert len({tuple(pair["prompt"]) for pair in pairs}) == 30
    assert {len(pair[side]) for pair in pairs for side in ("chosen", "rejected")} == {5, 6, 7, 8, 9}
    assert sum(pair["chosen"] != pair["rejected"] for pair in pairs) == 30


PAIRS = {"rounds": 1, "steps": 2, "batch": 4, "prompt_tokens": 24, "response_tokens": 9, "lora_rank": 2}


def check_ranking(figures, file, dtype):
    check_form(figures, file, sides.MEASURES)
    for side in ("ours", "theirs"):
        assert figures[side]["computes_in"] == dtype and figures[side]["steps"] == 2
        assert figures[side]["loss"] == pytest.approx(math.log(2), abs=0.02)  # two steps from the reference
    tolerance = {"float32": 1e-5, "bfloat16": 5e-3}[dtype]
    assert figures["ours"]["chosen_logprob"] == pytest.approx(figures["theirs"]["chosen_logprob"], rel=tolerance)
    assert 2 * 4 * 2 * 5 <= figures["ours"]["tokens"] <= 2 * 4 * 2 * 9


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranking_against_the_floor(tmp_path, dtype):
    options = BenchRanking(against="floor", dtype=dtype, json=str(tmp_path / "figures.json"), **PAIRS)
    check_ranking(ranking.run(options, quiet()), tmp_path / "figures.json", dtype)


@pytest.mark.slow
@needs_trl
@pytest.mark.parametrize(("dtype", "checkpointing"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_ranking_against_trl(tmp_path, dtype, checkpointing):
    file = tmp_path / "figures.json"
    more = {"checkpointing": checkpointing, "trl_python": trl_interpreter(), "json": str(file)}
    figures = ranking.run(BenchRanking(dtype=dtype, **more, **PAIRS), quiet())
    check_ranking(figures, file, dtype)
    assert figures["settings"]["their_versions"]["trl"] == TRL_VERSION


def test_token_env(tmp_path):
    options = BenchTokenEnv(
        batch=3,
        prompt_tokens=12,
        response_tokens=5,
        rounds=2,
        step_tokens=20,
        episodes=2,
        json=str(tmp_path / "f.json"),
    )
    figures = token_env.run(options, quiet())
    check_form(figures, tmp_path / "f.json", ["tokens_per_cpu_second"])
    assert figures["ours"]["tokens"] == 2 * 3 * 5
    assert 0 < figures["ours"]["play_share"] < 1
    assert figures["ours"]["steps_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 12}, "multiple of 8"),
        ({"rounds": 0}, "--rounds must be at least 1"),
        ({"trl_python": "/nowhere/python"}, "/nowhere/python: no environment with trl"),
        ({"model": "/nowhere", "against": "floor"}, "/nowhere"),
        ({"prompt_tokens": 500, "response_tokens": 64, "against": "floor"}, "make 564 tokens, the model reads 512"),
    ],
)
def test_bad_options_of_token_ppo_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        token_ppo.run(BenchTokenPPO(**SMALL | options), quiet())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 12}, r"--batch must be a multiple of --trl-pairs \(8\), got 12"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"seed": -1}, "--seed must not be negative"),
        ({"checkpointing": True, "against": "floor"}, "--checkpointing is an option of TRL"),
        ({"trl_python": "/nowhere/python"}, "/nowhere/python: no environment with trl"),
        ({"model": "/nowhere", "against": "floor"}, "/nowhere"),
        ({"prompt_tokens": 504, "against": "floor"}, "make 513 tokens, the model reads 512"),
    ],
)
def test_bad_options_of_ranking_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ranking.run(BenchRanking(**PAIRS | options), quiet())


def test_bad_options_of_token_env_are_refused():
    with pytest.raises(InputError, match="--batch must be at least 1"):
        token_env.run(BenchTokenEnv(batch=0), quiet())


def test_an_environment_that_cannot_be_prepared_is_one_error(tmp_path, monkeypatch):
    from instructgym.experiments.benchmarks.workers import trl_environment

    monkeypatch.setenv("INSTRUCTGYM_CACHE", str(tmp_path))
    monkeypatch.setattr(trl_environment.sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="name an existing one with --trl-python"):
        trl_environment.trl_python("", quiet())
    assert not (tmp_path / "trl-venv" / ".ready").exists()


@pytest.mark.slow
def test_both_learn_the_counting_task_and_ours_from_fewer_tokens(tmp_path):
    file = tmp_path / "learning.json"
    figures = token_learning.run(token_learning.BenchTokenLearning(seeds=5, json=str(file)), quiet())
    assert json.loads(file.read_text()) == figures
    assert figures["ours"]["median"] < figures["theirs"]["median"] < token_learning.CAP


def test_edits_of_the_dense_reward_task_swap_bad_words_for_good_ones():
    good = {word for i, word in enumerate(dense_reward.WORDS) if i not in dense_reward.BAD}
    pairs = dense_reward.edited_pairs(200, 3)
    assert pairs == dense_reward.edited_pairs(200, 3) != dense_reward.edited_pairs(200, 4)
    swapped = kept = 0
    for pair in pairs:
        before, after = pair.original.split(), pair.edited.split()
        assert len(before) == len(after) < dense_reward.LENGTH and set(after) <= good
        assert all(new == old or old not in good for old, new in zip(before, after, strict=True))
        swapped += sum(old not in good for old in before)
        kept += sum(old in good for old in before)
    assert swapped / (swapped + kept) == pytest.approx(0.2, abs=0.02)


def test_the_true_return_is_the_share_of_good_words_in_the_longest_response():
    good = [i for i in range(32) if i not in dense_reward.BAD]
    bad, eos = sorted(dense_reward.BAD), 32
    assert dense_reward.true_return(np.array(good[:8] * 4)) == 1.0
    assert dense_reward.true_return(np.array([*good[:4], *bad[:4], eos])) == 4 / 32
    assert dense_reward.true_return(np.array([eos])) == 0.0


def test_a_sum_at_the_end_is_the_return_of_the_reward_it_sums():
    class Ids(Reward):
        timing = "causal"

        def reward(self, samples):
            splits = [sample.token_ids.astype(np.float32) for sample in samples]
            return [Score(float(split.sum()), split, {"n": float(len(split))}) for split in splits]

    [score] = dense_reward.TerminalSum(Ids()).reward([Sample("", token_ids=np.array([3, 1, 4], np.int32))])
    assert dense_reward.TerminalSum.timing == "terminal"
    assert (score.value, score.per_token, score.terms) == (8.0, None, {"n": 3.0})


@pytest.mark.slow
def test_dense_rewards_are_learned_from_fewer_tokens_than_their_sum(tmp_path):
    file = tmp_path / "dense.json"
    figures = dense_reward.run(dense_reward.BenchDenseReward(seeds=2, first_seed=1, json=str(file)), quiet())
    assert json.loads(file.read_text()) == figures
    assert min(figures["reward_model"]["removed_auc"]) > 0.95
    assert max(figures["ours"]["tokens"]) < dense_reward.CAP
    assert figures["ratio"]["tokens"] > 1.5


def test_dense_reward_refuses_what_it_cannot_measure(tmp_path):
    with pytest.raises(InputError, match="--seeds must be at least 1"):
        dense_reward.run(dense_reward.BenchDenseReward(seeds=0), quiet())
    with pytest.raises(InputError, match=r"cannot write .* is a folder"):
        dense_reward.run(dense_reward.BenchDenseReward(json=str(tmp_path)), quiet())


def test_backend_sends_different_requests_once_and_compares_rates_with_a_bare_client(tmp_path):
    file = tmp_path / "figures.json"
    with serving(latency=0.05) as server:
        options = BenchBackend(server=server.url, requests=64, concurrency=8, rounds=1, json=str(file))
        figures = backend.run(options, quiet())
    assert json.loads(file.read_text()) == figures
    assert figures["ours"]["sent"] == figures["theirs"]["sent"] == 32 and figures["ours"]["sent_again"] == 0
    # Warm-up and one round, each with 32 different texts on both sides; no text is sent twice.
    assert len(server.attempts) == 2 * (32 + 32) and set(server.attempts.values()) == {1}
    name = "requests_per_second"
    assert figures["ratio"][name] == pytest.approx(figures["ours"][name] / figures["theirs"][name])
    assert figures["ratio"][f"{name}_min"] == figures["ratio"][name] == figures["ratio"][f"{name}_max"] > 0


def test_backend_refuses_what_it_cannot_measure():
    with pytest.raises(InputError, match="requests"):
        backend.run(BenchBackend(requests=1), quiet())
    with pytest.raises((InputError, BackendError), match="cannot be reached"):
        backend.run(BenchBackend(server="http://127.0.0.1:9/v1", requests=2, rounds=1), quiet())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch": 0}, "--batch"), ({"python": "/nowhere/python"}, "make venv-server")],
)
def test_rollouts_refuses_what_it_cannot_measure(options, message):
    with pytest.raises((InputError, OSError), match=message):
        rollouts.run(BenchRollouts(**options), quiet())


@pytest.mark.server
@pytest.mark.timeout(1800)  # minutes where the hardware computes in bfloat16, three times as long elsewhere
def test_rollouts_against_the_real_server(tmp_path, vllm_url):
    file = str(tmp_path / "figures.json")
    small = {"batch": 2, "prompt_tokens": 12, "response_tokens": 4, "lora_rank": 4, "rounds": 1}
    figures = rollouts.run(BenchRollouts(server=vllm_url, json=file, **small), quiet())
    assert figures["ours"]["tokens_per_second"] > 0 and figures["ratio"]["tokens_per_second"] > 0
    assert figures["base_model"]["tokens_per_second"] > 0


def test_task_scores(tmp_path):
    options = BenchTaskScore(
        prompts=3, examples=4, naive_prompts=2, rounds=2, batch=5, json=str(tmp_path / "figures.json")
    )
    figures = task_score.run(options, Console(quiet=True))
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert figures["largest_difference"] < 1e-3 and len(figures["ours"]["seconds_each"]) == 2
    name = task_score.MEASURE
    assert 0 < figures["ratio"][f"{name}_min"] <= figures["ratio"][name] <= figures["ratio"][f"{name}_max"]
    with pytest.raises(InputError, match="too few examples"):
        task_score.run(BenchTaskScore(examples=100_000), Console(quiet=True))
    with pytest.raises(InputError, match="--naive-prompts 8 are more than --prompts 4"):
        task_score.run(BenchTaskScore(prompts=4), Console(quiet=True))
    with pytest.raises(InputError, match="--batch must be"):
        task_score.run(BenchTaskScore(batch=0), Console(quiet=True))
