"""A real vLLM server: completions, given texts, choices, judges, adapters, and rollouts of PPO on it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import KVWriter, Logger

import instructgym  # noqa: F401
from instructgym.agents.policy.language_model import LanguageModelPolicy
from instructgym.agents.policy_gradient.ppo import TokenPPO
from instructgym.agents.rollouts.engine import VLLMEngine
from instructgym.envs.tokens.episode import PromptExample
from instructgym.llm_backends import BackendError, ContextLengthError, Sampling, resolve
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.serving.vllm_server import TokenSampling, VLLMServerBackend
from instructgym.llm_backends.training.adapters import LoraSettings
from instructgym.rewards import EqualityJudge, PairwiseJudge, RubricJudge, Sample

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

REVIEWS = [
    ("A warm and funny film.", "Positive"),
    ("Dull from start to end.", "Negative"),
    ("I loved every minute.", "Positive"),
    ("A waste of time.", "Negative"),
]
EXAMPLES = [
    PromptExample(str(i), f"Review: {text}\nSentiment:", answer, ("Positive", "Negative"))
    for i, (text, answer) in enumerate(REVIEWS)
]


@pytest.fixture(scope="module")
def embedded():
    return resolve("backend", {"id": "embedded", "kwargs": {"dtype": "float32"}})


@pytest.fixture
def server(vllm_url):
    return VLLMServerBackend("model", vllm_url, prompt_style="completion")


# --- backend -----------------------------------------------------------------------------------------------------


def test_greedy_completions_and_their_log_probs_are_the_models(server, embedded):
    prompts, sampling = ["The capital of France is", "Two and two make"], Sampling(max_tokens=4, temperature=0)
    for [mine], [theirs] in zip(server.generate(prompts, sampling), embedded.generate(prompts, sampling), strict=True):
        assert mine.token_ids[0] == theirs.token_ids[0]
        assert mine.logprobs[0] == pytest.approx(theirs.logprobs[0], abs=0.15)
        assert len(mine.token_ids) == len(mine.logprobs) == 4 and mine.finish_reason == "length"


def test_given_texts_are_scored(server, embedded):
    prompts, texts = ["The capital of France is"] * 3, [" Paris", " Rome", " a big city"]
    for mine, theirs in zip(server.logprobs(prompts, texts), embedded.logprobs(prompts, texts), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=0.2)


def test_chat_messages_are_scored_under_the_models_template(vllm_url, embedded):
    chat = [{"role": "user", "content": "Name a colour."}]
    server = VLLMServerBackend("model", vllm_url)
    [mine], [theirs] = server.logprobs([chat], ["Blue"]), embedded.logprobs([chat], ["Blue"])
    np.testing.assert_allclose(mine, theirs, atol=0.2)
    [text] = server.logprobs(["Name a colour."], ["Blue"])  # in chat form a text is what the user says
    np.testing.assert_allclose(mine, text, atol=0.05)


def test_choices_hold_completions(server):
    words = (" apricot", " zeppelin")
    results = server.generate(["The capital of France is"] * 4, [Sampling(choices=words, seed=i) for i in range(4)])
    assert {completion.text for [completion] in results} <= set(words)


def test_token_ids_go_in_and_out_and_ends_belong_to_them(server):
    [ids] = server.tokenize(["The capital of France is"])
    stop = TokenSampling(max_tokens=20, temperature=0, stop=("Par",), eos=())
    [[completion]] = server.generate([ids], stop)
    assert completion.finish_reason == "stop" and "Par" not in completion.text and completion.token_ids
    first = completion.token_ids[0]
    [[ended]] = server.generate([ids], TokenSampling(max_tokens=20, temperature=0, eos=(first,)))
    assert ended.token_ids == [first] and ended.finish_reason == "stop"
    [[only]] = server.generate([ids], TokenSampling(max_tokens=1, allowed=(3,)))
    assert only.token_ids == [3] and only.logprobs[0] == pytest.approx(0, abs=1e-4)


def test_the_same_seed_draws_the_same(server):
    one, two, three = (server.generate(["Once upon a time"], Sampling(max_tokens=8, seed=s))[0][0] for s in (1, 1, 2))
    assert one.text == two.text != three.text


def test_a_prompt_over_the_context_is_an_error_in_its_place(server):
    results = server.generate(["word " * 3000, "fine"], Sampling(max_tokens=2))
    assert isinstance(results[0], ContextLengthError) and not isinstance(results[1], BackendError)


# --- environments and judges -------------------------------------------------------------------------------------


def test_an_edit_env_steps_against_it(vllm_url):
    part = {"id": "vllm-server", "kwargs": {"model": "model", "base_url": vllm_url, "prompt_style": "completion"}}
    env = gym.make("instructgym/EvolveInstruction-v0", backend=part, judge_backend=part)
    env.reset(seed=0)
    texts = []
    for action in (0, 1):
        *_, reward, terminated, truncated, info = env.step(action)
        texts.append(info["text"])
        assert np.isfinite(reward) and not truncated
        if terminated:
            break
    assert all(texts)
    env.close()


@pytest.mark.parametrize(
    "judge",
    [
        EqualityJudge,
        PairwiseJudge,
        RubricJudge,
    ],
)
def test_judges_read_log_probs_from_it(server, judge):
    sample = Sample("Name a bird that cannot fly.", "Name one.", reference="Sing.", previous="Name a bird.")
    [score] = judge(server, mode="likelihood").reward([sample])
    assert score.valid and np.isfinite(score.value)


def test_verdicts_are_held_to_the_answers(vllm_url):
    chat = VLLMServerBackend("model", vllm_url)
    samples = [Sample(f"Name a bird, then {i} fish.", previous="Name a bird.") for i in range(4)]
    assert all(score.valid for score in EqualityJudge(chat, mode="verdict").reward(samples))


# --- adapters and rollouts ---------------------------------------------------------------------------------------


class Rows(KVWriter):
    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values))

    def close(self):
        pass


def agent_on(url, policy, **options):
    env = gym.make_vec(
        "instructgym/GenerateLabel-v0",
        num_envs=4,
        examples=EXAMPLES,
        tokenizer=policy.tokenizer,
        layout="plain",
        **options,
    )
    return TokenPPO(env, policy, engine=VLLMEngine([url]), learning_rate=1e-3, kl_coefficient=0.0, epochs=1)


@pytest.mark.parametrize("constrained", [True, False])
def test_ppo_with_rollouts_on_it(vllm_url, constrained):
    policy = LanguageModelPolicy("embedded", LoraSettings(rank=4), dtype="float32")
    agent, rows = agent_on(vllm_url, policy, constrained=constrained, max_tokens=4), Rows()
    agent.set_logger(Logger(folder=None, output_formats=[rows]))
    probe = VLLMServerBackend("", vllm_url, prompt_style="completion")
    scores = []

    def look(agent):
        probe.model = agent.engine.servers[0].model
        scores.append(float(probe.logprobs([EXAMPLES[0].prompt], [" Positive"])[0].sum()))
        return agent.updates < 3

    agent.learn(10**6, look)
    agent.engine.push_weights(policy, agent.processes)
    look(agent)
    assert agent.engine.pushes == 4
    gaps = [row["sampler/gap_mean"] for row in rows.rows]
    assert len(gaps) == 3 and 0 < max(gaps) < 0.3, "server and policy are not of one mind"
    assert all(0.9 < row["sampler/effective_sample_size"] <= 1 for row in rows.rows)
    assert len({round(score, 3) for score in scores}) > 1, "the pushed adapters change nothing"
    prompt, word = policy.lm.encode(EXAMPLES[0].prompt), policy.tokenizer.encode_continuation(" Positive")
    with torch.no_grad():
        mine = policy.score([np.array(prompt)], [np.array(word)], [None], values=False)
    assert float(mine.logprobs.sum()) == pytest.approx(scores[-1], abs=0.3)
    agent.engine.close()
    assert not [model for model in probe.models() if agent.engine._run in model["id"]]


def test_a_server_of_another_model_is_refused(vllm_url, tiny_model_path):
    policy = LanguageModelPolicy(str(tiny_model_path), LoraSettings(rank=4), dtype="float32")
    from instructgym.agents.policy.optimization import Processes

    with pytest.raises(InputError, match=r"load_lora_adapter|another tokenizer|adapters need"):
        VLLMEngine([vllm_url]).push_weights(policy, Processes())


def test_a_rank_above_the_servers_is_refused(vllm_url):
    from instructgym.agents.policy.optimization import Processes

    policy = LanguageModelPolicy("embedded", LoraSettings(rank=32), dtype="float32")
    with pytest.raises(InputError, match="max-lora-rank"):
        VLLMEngine([vllm_url]).push_weights(policy, Processes())


def test_two_processes_train_against_it(vllm_url, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "instructgym.experiments.cli", "nlu", "--scale", "smoke", "--labels", "8"]
    command += ["--batch-size", "4", "--lora-rank", "4", "--layout", "plain", "--eval-limit", "4", "--method", "ppo"]
    command += ["--rollouts", "vllm", "--servers", vllm_url, "--run-dir", str(tmp_path / "run")]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    common |= {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    finally:  # one that waits for a process which has failed
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)[-2000:]
    results = json.loads(Path(tmp_path / "run" / "results.json").read_text("utf-8"))
    assert results["status"] == "finished" and results["counts"]["updates"] == 2
