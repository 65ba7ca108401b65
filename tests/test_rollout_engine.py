"""Rollouts on servers, without one: constraints, shares, failures, and what the agent does with the engine."""

import numpy as np
import pytest
import torch

from instructgym.agents.distributed import Processes
from instructgym.agents.language_model import LanguageModelPolicy, LoraSettings
from instructgym.agents.ppo import TokenPPO
from instructgym.agents.rollout_engine import VLLMEngine
from instructgym.envs.tasks.prompt_examples import PromptExample
from instructgym.envs.token_process import TokenSettings
from instructgym.envs.token_vector_env import TokenVectorEnv
from instructgym.llm_backends import BackendError, Sampling
from instructgym.llm_backends.choices import Choices
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.sampling import generate
from instructgym.rewards import FunctionReward

NOWHERE = "http://127.0.0.1:9/v1"


class StandIn:
    """Answers as a server would, by a policy in this process."""

    def __init__(self, policy, fails=False):
        self.policy, self.fails, self.batches, self.model = policy, fails, [], ""

    def generate(self, prompts, samplings):
        self.batches.append(len(prompts))
        choices = [Choices([[token] for token in s.allowed]) if s.allowed else None for s in samplings]
        with self.policy.adapter("policy") as lm:
            ends = samplings[0].eos
            eos = None if ends is None else frozenset(ends)
            results = [
                generate(lm, [prompt], [sampling], [choice], eos, tempered=True)[0]
                for prompt, sampling, choice in zip(prompts, samplings, choices, strict=True)
            ]
        return [BackendError("gone"), *results[1:]] if self.fails else results


class Local(VLLMEngine):
    """An engine whose servers stand in this process."""

    def __init__(self, policy, count=1, fails=False):
        super().__init__([NOWHERE])
        self.servers = [StandIn(policy, fails) for _ in range(count)]
        self.taken = []

    def take(self, policy, processes):
        self.taken.append({n: p.detach().clone() for n, p in policy.parameters().items()})


@pytest.fixture
def policy(tiny_model_path):
    torch.manual_seed(0)
    policy = LanguageModelPolicy(str(tiny_model_path), LoraSettings(rank=2), dtype="float32")
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter += 0.2 * torch.randn_like(parameter)
    return policy


PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
TRIE = Choices([[20], [21, 22, 23], [21, 22, 24], [21, 25]])


@pytest.mark.parametrize("servers", [1, 3])
def test_free_episodes_are_those_of_the_policy(policy, servers):
    sampling = [Sampling(max_tokens=6, temperature=0.7, seed=i) for i in range(4)]
    mine = policy.generate(PROMPTS, sampling, eos=frozenset([1]))
    theirs = Local(policy, servers).generate(PROMPTS, sampling, eos=frozenset([1]))
    for [a], [b] in zip(mine, theirs, strict=True):
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_greedy_episodes_under_constraints_are_those_of_the_policy(policy):
    sampling, choices = Sampling(max_tokens=6, temperature=0.0), [TRIE, None, TRIE, TRIE]
    mine = policy.generate(PROMPTS, sampling, choices, frozenset([1]))
    theirs = Local(policy, 2).generate(PROMPTS, sampling, choices, frozenset([1]))
    for [a], [b] in zip(mine, theirs, strict=True):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_drawn_episodes_under_constraints_follow_the_policys_distribution(policy):
    count = 400
    sampling = [Sampling(max_tokens=6, seed=i) for i in range(count)]
    rows = Local(policy).generate([PROMPTS[0]] * count, sampling, [TRIE] * count, frozenset([1]))
    drawn = {}
    for [row] in rows:
        assert TRIE.complete(row.token_ids) and len(row.logprobs) == len(row.token_ids)
        drawn.setdefault(tuple(row.token_ids), []).append(sum(row.logprobs))
    for total in drawn.values():  # each response has one probability, and is drawn as often
        assert np.ptp(total) < 1e-4
        assert abs(len(total) / count - np.exp(total[0])) < 0.1
    assert sum(np.exp(total[0]) for total in drawn.values()) == pytest.approx(1, abs=0.02)


def test_a_forced_token_is_not_asked_for(policy):
    engine = Local(policy)
    [[row]] = engine.generate([PROMPTS[0]], Sampling(max_tokens=4), [Choices([[20, 21, 22]])])
    assert row.token_ids == [20, 21, 22] and row.logprobs == [0, 0, 0] and row.finish_reason == "stop"
    assert engine.servers[0].batches == []


def test_the_cap_ends_a_choice_that_is_longer(policy):
    [[row]] = Local(policy).generate([PROMPTS[0]], Sampling(max_tokens=2), [Choices([[20, 21, 22]])])
    assert row.token_ids == [20, 21] and row.finish_reason == "length"


def test_prompts_are_shared_out_evenly(policy):
    engine = Local(policy, 3)
    engine.generate(PROMPTS, Sampling(max_tokens=2))
    assert [server.batches for server in engine.servers] == [[2], [1], [1]]


def test_a_request_that_fails_for_good_is_an_error(policy):
    with pytest.raises(BackendError, match="gone"):
        Local(policy, fails=True).generate(PROMPTS, Sampling(max_tokens=2))


def test_the_agent_hands_its_weights_over_before_each_rollout_and_weights_the_gap(policy):
    engine = Local(policy)
    env = TokenVectorEnv(
        4,
        [PromptExample(str(i), "red sea") for i in range(4)],
        policy.tokenizer,
        FunctionReward(lambda samples: [float(len(s.response)) for s in samples]),
        TokenSettings(max_tokens=4, context_length=32),
    )
    agent = TokenPPO(env, policy, engine=engine, learning_rate=0.01, importance_cap=1.5)
    gaps = []

    def after(agent):
        gaps.append(agent.logger.name_to_value["sampler/gap_mean"])
        return agent.updates < 2

    agent.learn(10**6, after)
    assert len(engine.taken) == 2 and max(gaps) < 1e-4
    assert any(not torch.equal(a, b) for a, b in zip(engine.taken[0].values(), engine.taken[1].values(), strict=True))
    assert agent.last_rollout.weights.max() <= 1.5


@pytest.mark.parametrize(
    ("arguments", "message"), [({"urls": []}, "list of base URLs"), ({"urls": NOWHERE}, "list of base URLs")]
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        VLLMEngine(**arguments)


def test_a_policy_without_adapters_is_refused(tiny_model_path):
    whole = LanguageModelPolicy(str(tiny_model_path), LoraSettings(rank=0), dtype="float32")
    with pytest.raises(InputError, match="LoRA rank"):
        VLLMEngine([NOWHERE]).take(whole, Processes())


def test_a_server_that_is_not_there_is_said_at_once(policy):
    engine = VLLMEngine([NOWHERE])
    engine.servers[0].sender.attempts = 1
    with pytest.raises((InputError, BackendError), match="cannot be reached"):
        engine.take(policy, Processes())
