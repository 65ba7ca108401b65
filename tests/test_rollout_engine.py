"""Rollouts on servers, without one: constraints, shares, failures, and what the agent does with the engine."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from instructgym.agents.policy.language_model import LanguageModelPolicy
from instructgym.agents.policy.optimization import Processes
from instructgym.agents.policy_gradient.ppo import TokenPPO
from instructgym.agents.rollouts.engine import VLLMEngine
from instructgym.envs.tokens.env import TokenVectorEnv
from instructgym.envs.tokens.episode import PromptExample
from instructgym.envs.tokens.process import TokenSettings
from instructgym.llm_backends import BackendError, Sampling
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.sampling import Choices, generate
from instructgym.llm_backends.training.adapters import LoraSettings
from instructgym.rewards import FunctionReward

NOWHERE = "http://127.0.0.1:9/v1"


class StandIn:
    """Answers as a server would, by a policy in this process."""

    def __init__(self, policy, fails=False):
        self.policy, self.fails, self.batches, self.model = policy, fails, [], ""

    def generate(self, prompts, samplings):
        self.batches.append(len(prompts))
        samplings = [samplings] * len(prompts) if isinstance(samplings, Sampling) else samplings
        choices = [Choices([[token] for token in s.allowed]) if s.allowed else None for s in samplings]
        with self.policy.adapter("policy") as lm:
            ends = samplings[0].eos
            eos = None if ends is None else frozenset(ends)
            results = [
                generate(lm, [prompt], [sampling], [choice], eos, tempered_logprobs=True)[0]
                for prompt, sampling, choice in zip(prompts, samplings, choices, strict=True)
            ]
        return [BackendError("gone"), *results[1:]] if self.fails else results


class Local(VLLMEngine):
    """An engine whose servers stand in this process."""

    def __init__(self, policy, count=1, fails=False):
        super().__init__([NOWHERE])
        self.servers = [StandIn(policy, fails) for _ in range(count)]
        self.taken = []

    def push_weights(self, policy, processes):
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
        VLLMEngine([NOWHERE]).push_weights(whole, Processes())


def test_a_server_that_is_not_there_is_said_at_once(policy):
    engine = VLLMEngine([NOWHERE])
    engine.servers[0].sender.attempts = 1
    with pytest.raises((InputError, BackendError), match="cannot be reached"):
        engine.push_weights(policy, Processes())


class Host(StandIn):
    """A whole server in this process: what :meth:`VLLMEngine.push_weights` asks one for."""

    def __init__(self, policy, ids=None, raw=False, off=0.0, names=("model",)):
        super().__init__(policy)
        self.ids, self.raw, self.off, self.names, self.full = ids, raw, off, names, False
        self.url, self.loaded = NOWHERE, []

    def models(self):
        return [{"id": name, "parent": None} for name in self.names] + [{"id": n, "parent": "m"} for n in self.loaded]

    def load_adapter(self, name, folder):
        if self.full:
            raise InputError("no room")
        assert (folder / "adapter_model.safetensors").exists()
        self.loaded.append(name)

    def unload_adapter(self, name):
        if name not in self.loaded:
            raise InputError("404: no such adapter")
        self.loaded.remove(name)

    def tokenize(self, prompts):
        return [self.ids or self.policy.lm.encode(prompt) for prompt in prompts]

    def generate(self, prompts, samplings):
        results = super().generate(prompts, samplings)
        return [[replace(c, logprobs=[-1.0])] for [c] in results] if self.raw else results

    def score(self, prompt, completion):
        with self.policy.adapter("policy") as lm:
            return lm.logprobs([prompt], [completion])[0] + self.off


def hosted(tmp_path, *hosts):
    engine = VLLMEngine([NOWHERE] * len(hosts), adapter_dir=str(tmp_path))
    engine.servers = list(hosts)
    return engine


def test_each_push_replaces_the_one_before_it_and_close_leaves_nothing(policy, tmp_path):
    host = Host(policy)
    engine = hosted(tmp_path, host)
    for number in (1, 2, 3):
        engine.push_weights(policy, Processes())
        assert len(host.loaded) == 1 and host.loaded[0].endswith(f"-{number}") and host.model == host.loaded[0]
        assert [path.name for path in tmp_path.iterdir()] == host.loaded  # a server may have to read it again
    engine.close()
    assert not host.loaded and not list(tmp_path.iterdir())
    VLLMEngine([NOWHERE]).close()  # nothing was pushed, nobody is asked


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ids": [1, 2, 3]}, "another tokenizer"),
        ({"raw": True}, "--logprobs-mode processed_logprobs"),
        ({"off": 1.0}, r"1\.00 nats per token off.*is another one"),
        ({"names": ()}, "serves no model"),
        ({"names": ("a", "b")}, "need one base model"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(policy, tmp_path, wrong, message):
    with pytest.raises(InputError, match=message):
        hosted(tmp_path, Host(policy, **wrong)).push_weights(policy, Processes())


def test_the_weights_are_checked_at_any_temperature(tiny_model_path, tmp_path):
    warm = LanguageModelPolicy(str(tiny_model_path), LoraSettings(rank=2), dtype="float32", temperature=0.5)
    hosted(tmp_path, Host(warm)).push_weights(warm, Processes())
    with pytest.raises(InputError, match="is another one"):
        hosted(tmp_path, Host(warm, off=1.0)).push_weights(warm, Processes())


def test_a_push_that_fails_on_one_server_leaves_nothing_behind(policy, tmp_path):
    first, second = Host(policy), Host(policy)
    engine = hosted(tmp_path, first, second)
    engine.push_weights(policy, Processes())
    second.full = True
    with pytest.raises(InputError, match="no room"):
        engine.push_weights(policy, Processes())
    engine.close()
    assert not first.loaded and not second.loaded and not list(tmp_path.iterdir())


def test_a_server_that_lost_the_last_adapter_gets_the_next_one(policy, tmp_path):
    host = Host(policy)
    engine = hosted(tmp_path, host)
    engine.push_weights(policy, Processes())
    host.loaded.clear()  # it was restarted
    engine.push_weights(policy, Processes())
    assert len(host.loaded) == 1
