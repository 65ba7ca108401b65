"""Token-level PPO, GRPO and RLOO: what carries a gradient, what an update does, checkpoints, and that they learn."""

from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import KVWriter, Logger
from tiny_models import build_model

from instructgym.agents.policy.language_model import LanguageModelPolicy
from instructgym.agents.policy.optimization import TrainingDivergedError
from instructgym.agents.policy_gradient.grpo import GRPO, RLOO
from instructgym.agents.policy_gradient.ppo import TokenPPO
from instructgym.agents.rollouts.batch import TokenBatch, collect
from instructgym.envs.process import InvalidRewardRateError
from instructgym.envs.tokens.env import TokenVectorEnv
from instructgym.envs.tokens.episode import PromptExample
from instructgym.envs.tokens.process import TokenSettings
from instructgym.llm_backends.base import Completion, Sampling
from instructgym.llm_backends.local.causal_lm import CausalLM
from instructgym.llm_backends.local.tokenization import WordTokenizer
from instructgym.llm_backends.training.adapters import LoraSettings
from instructgym.rewards import Reward, Score

WORDS = ("red", "blue", "sea", "sky", "end")
RED, BLUE, SEA, SKY, END, EOS, UNK = range(7)
EXAMPLES = [
    PromptExample("one", "red sea", "red", ("red", "blue")),
    PromptExample("two", "sky", "blue", ("red", "blue")),
    PromptExample("three", "sea sky end sea", "red", ("red", "blue")),
    PromptExample("four", "end sky red", "blue", ("red", "blue")),
]
AGENTS = [TokenPPO, GRPO, RLOO]


class Right(Reward):
    """1 for the right answer; otherwise a little for every token, so that all returns differ."""

    name = "right"

    def reward(self, samples):
        return [self.score(sample) for sample in samples]

    def score(self, sample):
        return Score(1.0 if sample.response.strip() == sample.reference else 0.03 * float(sample.token_ids.sum()))


class Moody(Right):
    """No verdict on two of the prompts."""

    def score(self, sample):
        return Score.invalid("no idea") if sample.episode_id in ("one", "three") else super().score(sample)


def make_env(n=8, group_size=1, reward=None, words=WORDS, max_tokens=4, **settings):
    return TokenVectorEnv(
        n,
        EXAMPLES,
        WordTokenizer(words=words),
        reward or Right(),
        TokenSettings(max_tokens=max_tokens, context_length=16, group_size=group_size, **settings),
    )


def make_policy(dtype="float32", rank=4, words=WORDS, scale=0.1, **options):
    """A policy whose adapters and value head are not zero."""
    tokenizer = WordTokenizer(words=words).hf
    model = build_model(vocabulary=len(tokenizer)).to(getattr(torch, dtype))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    policy = LanguageModelPolicy(
        CausalLM(model, tokenizer, name="tiny"), LoraSettings(rank=rank), dtype=dtype, **options
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return policy


class Rows(KVWriter):
    """Keeps what is logged."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append({k: v for k, v in key_values.items() if not k.startswith("time/")})

    def close(self):
        pass


def make_agent(cls=TokenPPO, env=None, policy=None, seed=0, **options):
    env = env or make_env(group_size=1 if cls is TokenPPO else 4)
    agent = cls(env, policy or make_policy(value="shared" if cls is TokenPPO else "none"), seed=seed, **options)
    agent.set_logger(Logger(folder=None, output_formats=[Rows()]))
    return agent


def rows(agent):
    return agent.logger.output_formats[0].rows


def updates(agent, count):
    for _ in range(count):
        agent.start()
        agent.update()
        agent.logger.dump(agent.num_timesteps)
    return agent


def weights(agent):
    return {name: p.detach().clone() for name, p in agent.policy.parameters().items()}


def rollout(agent):
    agent.start()
    batch, _ = collect(agent.policy, agent.env, 2, agent.sampling, 3, np.ones(agent.env.num_envs, bool))
    return batch


def gradients(agent, batch):
    """Of the batch's loss by all trained weights, without a step."""
    found, parameters = {}, agent.policy.parameters()

    def take():
        for name, parameter in parameters.items():
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            parameter.grad = None
        return 0.0

    agent.optimizer.step = take
    agent.train(batch)
    return found


def prepared(agent, batch):
    agent.score_batch(batch)
    agent.prepare(batch)
    return batch


def part(batch, episodes):
    """Some episodes of a prepared batch."""
    at, values = batch.rows(episodes), {}
    for field in fields(TokenBatch):
        value = getattr(batch, field.name)
        if field.name == "terminated" or isinstance(value, list):
            values[field.name] = [value[i] for i in episodes] if isinstance(value, list) else value[list(episodes)]
        elif isinstance(value, np.ndarray):
            values[field.name] = value[at] if len(value) else value
    return replace(batch, **values)


def assert_same(first, second, atol=1e-6, rtol=1e-4):
    assert first.keys() == second.keys() and any(tensor.any() for tensor in first.values())
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=atol, rtol=rtol, msg=lambda m, name=name: f"{name}: {m}")


# --- the ratio ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_the_ratio_before_the_first_step_is_1(dtype, tolerance, constrained):
    agent = make_agent(env=make_env(constrained=constrained), policy=make_policy(dtype), epochs=1, minibatches=1)
    batch = prepared(agent, rollout(agent))
    for episodes in batch.micro_batches(np.arange(len(batch)), agent.settings.token_budget):
        mine = part(batch, episodes)
        scores = agent.policy.score(mine.prompts, mine.responses, mine.allowed)
        ratio = np.exp(scores.logprobs.detach().numpy() - batch.logprobs[batch.rows(episodes)])
        assert np.abs(ratio - 1).max() < tolerance
    gradients(agent, batch)
    logged = agent.logger.name_to_value
    assert logged["train/approx_kl"] < tolerance**2 and logged["train/clip_fraction"] == 0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_importance_weights_are_1_where_sampler_and_training_agree(temperature):
    agent = make_agent(policy=make_policy(temperature=temperature))
    batch = prepared(agent, rollout(agent))
    np.testing.assert_allclose(batch.weights, 1.0, atol=1e-4)
    logged = agent.logger.name_to_value
    assert logged["sampler/gap_max"] < 1e-4 and logged["sampler/effective_sample_size"] == pytest.approx(1, abs=1e-4)


# --- what carries a gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", AGENTS)
def test_tokens_of_others_carry_neither_reward_nor_gradient(cls):
    agent = make_agent(cls, epochs=1, kl_coefficient=0.1)
    batch = rollout(agent)
    batch.loss_mask = np.random.default_rng(0).random(batch.tokens) < 0.6
    batch.loss_mask[batch.rows([2])] = False  # an episode without a token of the policy's own
    masked = ~batch.loss_mask
    before = gradients(agent, prepared(agent, batch))
    assert not batch.advantages[masked].any()
    batch.rewards = np.where(masked, 1e3, batch.rewards).astype(np.float32)
    assert_same(gradients(agent, prepared(agent, batch)), before, atol=0, rtol=0)
    for name in ("advantages", "returns", "values", "logprobs", "reference_logprobs", "weights"):
        if len(getattr(batch, name)):
            getattr(batch, name)[masked] += 3.0
    assert_same(gradients(agent, batch), before, atol=0, rtol=0)


@pytest.mark.parametrize("cls", AGENTS)
def test_the_gradient_of_a_ragged_batch_is_that_of_its_episodes(cls):
    agent = make_agent(cls, epochs=1, token_budget=64)
    batch = prepared(agent, rollout(agent))
    assert len(set(batch.lengths)) > 1
    whole = gradients(agent, batch)
    shares = np.full(len(batch), 1 / len(batch)) if cls is GRPO else batch.lengths / batch.tokens
    total = {name: torch.zeros_like(gradient) for name, gradient in whole.items()}
    for episode, share in enumerate(shares):
        for name, gradient in gradients(agent, part(batch, [episode])).items():
            total[name] += float(share) * gradient
    assert_same(whole, total, atol=1e-5)


def writing(responses):
    """A policy that writes given tokens."""

    def generate(prompts, *_):
        return [[Completion("", list(r), [-1.0 - i for i in range(len(r))], "stop")] for r in responses]

    return SimpleNamespace(generate=generate)


def test_empty_responses_are_left_out_and_tokens_after_the_end_are_dropped():
    env = make_env(n=4)
    env.reset(seed=0)
    written = [[], [RED, EOS, SEA, SEA], [RED], [SEA, SEA, SEA, SEA]]
    batch, statistics = collect(writing(written), env, 1, Sampling(), 0, np.ones(4, bool))
    assert [r.tolist() for r in batch.responses] == [[RED, EOS], [RED], [SEA] * 4]
    assert len(batch.rewards) == len(batch.sampler_logprobs) == len(batch.loss_mask) == batch.tokens == 7
    assert batch.sampler_logprobs.tolist() == [-1, -2, -1, -1, -2, -3, -4]
    assert np.flatnonzero(batch.rewards).tolist() == [1, 6]  # the last tokens of the episodes that ended
    assert (statistics.episodes, statistics.empty, statistics.invalid) == (4, 1, 0)


def test_the_env_says_what_ends_a_response():
    policy = make_policy()
    policy.lm.model.generation_config.eos_token_id = [EOS, SEA, SKY]  # chat models often have several
    batch = rollout(make_agent(policy=policy))
    assert batch.terminated.all() and any({SEA, SKY} & set(r[:-1].tolist()) for r in batch.responses)


def test_episodes_without_a_verdict_are_left_out():
    agent = make_agent(env=make_env(reward=Moody()), max_invalid_share=0.6)
    batch = rollout(agent)
    assert {info["episode_id"] for info in batch.infos} == {"two", "four"} and len(batch) == 8
    updates(agent, 1)
    assert rows(agent)[0]["rollout/invalid_share"] == 0.5


def test_too_many_episodes_without_a_verdict_stop_training():
    agent = make_agent(env=make_env(reward=Moody()), max_invalid_share=0.4)
    with pytest.raises(InvalidRewardRateError, match="4 of 8 episodes of update 0"):
        agent.learn(100)


# --- updates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", AGENTS)
def test_micro_batches_do_not_change_results(cls):
    after = []
    for budget in (16, 32, 4096):
        options = {"minibatches": 2, "entropy_coefficient": 0.01, "learning_rate": 1e-3}
        after.append(weights(updates(make_agent(cls, token_budget=budget, **options), 1)))
    assert_same(after[0], after[2], atol=1e-5)
    assert_same(after[1], after[2], atol=1e-5)


@pytest.mark.parametrize("cls", AGENTS)
def test_an_update_is_the_same_each_time(cls):
    first, second = (weights(updates(make_agent(cls), 2)) for _ in range(2))
    assert_same(first, second, atol=0, rtol=0)
    third = weights(updates(make_agent(cls, seed=1), 2))
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_the_learning_rate_follows_its_schedule():
    agent = make_agent(schedule="cosine", warmup=0.4, final=0.1, learning_rate=1e-3, value_learning_rate=1e-2)
    for progress, rate in [(0.0, 1e-4), (0.2, 5.5e-4), (0.4, 1e-3), (0.7, 5.5e-4), (1.0, 1e-4)]:
        agent.start()
        agent.update(progress)
        agent.logger.dump()
        assert rows(agent)[-1]["train/learning_rate"] == pytest.approx(rate)
        assert [group["lr"] for group in agent.optimizer.inner.param_groups] == pytest.approx([rate, 10 * rate])
    agent = make_agent(schedule="linear", final=0.5, learning_rate=1e-3).learn(200)
    rates = [row["train/learning_rate"] for row in rows(agent)]
    assert rates[0] == 1e-3 and len(rates) > 3 and (np.diff(rates) < 0).all() and rates[-1] >= 5e-4


def test_gradients_are_clipped_to_their_norm():
    agent = make_agent(max_grad_norm=0.01)
    seen, inner = [], agent.optimizer.inner.step

    def gradient():
        return sum(float(p.grad.square().sum()) for p in weights_of(agent) if p.grad is not None) ** 0.5

    agent.optimizer.inner.step = lambda: (seen.append(gradient()), inner())
    updates(agent, 1)
    assert max(seen) == pytest.approx(0.01, rel=1e-3)
    assert rows(agent)[0]["train/grad_norm"] > 0.02


def weights_of(agent):
    return agent.optimizer.parameters.values()


def poison(agent, steps):
    """Makes some optimiser steps meet a gradient that is not a number."""
    step, count = agent.optimizer.step, iter(range(1000))

    def poisoned():
        if next(count) in steps:
            next(p for p in weights_of(agent) if p.grad is not None).grad[0] = float("nan")
        return step()

    agent.optimizer.step = poisoned


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_and_counted():
    agent, clean = make_agent(epochs=3), make_agent(epochs=2)
    poison(agent, {1})
    for one in (agent, clean):
        updates(one, 1)
    assert rows(agent)[0]["train/skipped_steps"] == 1
    assert_same(weights(agent), weights(clean), atol=0, rtol=0)


def test_training_stops_when_no_gradient_is_finite():
    agent = make_agent(epochs=3)
    before = weights(agent)
    poison(agent, set(range(1000)))
    with pytest.raises(TrainingDivergedError, match="lower the learning rate"):
        agent.learn(100)
    assert_same(weights(agent), before, atol=0, rtol=0)


def test_epochs_end_when_the_policy_has_moved_far_enough():
    free, held = (updates(make_agent(epochs=6, learning_rate=1e-2, target_kl=t), 1) for t in (0.0, 1e-3))
    assert rows(free)[0]["train/epochs"] == 6
    assert 2 <= rows(held)[0]["train/epochs"] < 6


def test_the_kl_coefficient_adapts_to_the_kl_of_episodes():
    agent = updates(make_agent(kl_target=1e-6, kl_horizon=8, kl_coefficient=0.5), 2)
    assert [row["train/kl_coefficient"] for row in rows(agent)] == pytest.approx([0.5, 0.6])
    batch = agent.last_rollout
    kl = float((batch.logprobs - batch.reference_logprobs).sum()) / len(batch)
    assert rows(agent)[1]["train/kl"] == pytest.approx(kl, rel=1e-5)


def test_groups_are_those_of_the_copies_not_of_the_examples():
    """Ten copies in five groups of two draw from four examples: one example comes twice, and its groups stay apart."""
    agent = make_agent(RLOO, env=make_env(10, group_size=2), kl_coefficient=0.0)
    batch = prepared(agent, rollout(agent))
    members = {}
    for i, name in enumerate(batch.groups):
        members.setdefault(name, []).append(i)
    assert len(members) == 10 and {len(group) for group in members.values()} == {2}
    names = [batch.infos[group[0]]["episode_id"] for group in members.values()]
    assert len(set(names[:5])) == 4 and all(
        batch.prompts[a].tolist() == batch.prompts[b].tolist() for a, b in members.values()
    )
    returns = batch.per_episode(batch.rewards)
    firsts = np.cumsum(batch.lengths) - batch.lengths
    for a, b in members.values():
        assert batch.advantages[firsts[a]] == pytest.approx(returns[a] - returns[b], abs=1e-5)


def test_rewards_see_the_groups():
    seen = []

    class Seeing(Right):
        def reward(self, samples):
            seen.append([(sample.group, sample.episode_id) for sample in samples])
            return super().reward(samples)

    env = make_env(10, group_size=2, reward=Seeing())
    for _ in range(2):
        env.start(seed=0 if not seen else None)
        env.play([[RED, EOS]] * 10)
    first, second = ([group for group, _ in call] for call in seen)
    assert all(groups[i] == groups[i + 1] for groups in (first, second) for i in range(0, 10, 2))
    assert len(set(first)) == len(set(second)) == 5 and not set(first) & set(second)
    assert len({name for _, name in seen[0]}) == 4, "one example in two groups"


@pytest.mark.parametrize("count", [2, 3])
def test_minibatches_are_shares_of_those_of_one_process(count, monkeypatch):
    agent = make_agent(minibatches=3, epochs=2)
    places = [(reset, copy) for reset in range(2) for copy in range(7) if (reset, copy) != (1, 2)]
    alone = [[[places[i] for i in part] for part in parts] for _, parts in agent._epochs(13, places=places)]
    shares = [[place for place in places if place[1] % count == index] for index in range(count)]
    monkeypatch.setattr(agent.processes, "gather", lambda _: shares)
    together = [[[] for _ in range(3)] for _ in range(2)]
    for share in shares:
        for epoch, parts in agent._epochs(len(share), places=share):
            for part, members in zip(together[epoch], parts, strict=True):
                part += [share[i] for i in members]
    assert [[sorted(part) for part in parts] for parts in together] == [[sorted(part) for part in e] for e in alone]
    assert alone[0] != alone[1] and sorted(place for part in alone[0] for place in part) == places


@pytest.mark.parametrize("cls", AGENTS)
def test_one_extreme_token_costs_no_step(cls, monkeypatch):
    """A sampler that is wrong by a hundred nats, and a policy that has moved as far, on one token each."""
    agent = make_agent(cls, epochs=2, learning_rate=1e-3)
    score, calls = agent.score_batch, []

    def extreme(batch):
        batch.sampler_logprobs[0] -= 100
        score(batch)
        batch.logprobs[1] -= 100
        batch.reference_logprobs[2] += 100
        batch.loss_mask[3], batch.logprobs[3] = False, batch.logprobs[3] - 200
        calls.append(len(batch))

    monkeypatch.setattr(agent, "score_batch", extreme)
    with np.errstate(over="raise", invalid="raise"):
        [row] = rows(updates(agent, 1))
    assert calls and agent.optimizer.skipped == 0 and all(np.isfinite(list(row.values())))
    assert all(bool(torch.isfinite(p).all()) for p in agent.policy.parameters().values())


@pytest.mark.parametrize("cls", AGENTS)
def test_without_a_coefficient_the_reference_is_not_asked(cls, monkeypatch):
    agent = make_agent(cls, kl_coefficient=0.0)
    monkeypatch.setattr(agent.policy, "reference_logprobs", None)
    assert "train/kl" not in rows(updates(agent, 1))[0], "nothing is known of it"


def test_ppo_shapes_rewards_by_hand():
    """One episode of two tokens and one of one; gamma 0.9, lambda 0.5, coefficient 0.1, estimator k1."""
    agent = make_agent(gamma=0.9, lam=0.5, kl_coefficient=0.1, whiten_advantages=False)
    batch = part(prepared(agent, rollout(agent)), [0, 1])
    batch.responses = [np.array([RED, EOS], np.int32), np.array([RED], np.int32)]
    batch.rewards, batch.loss_mask = np.array([0, 1, 2], np.float32), np.ones(3, bool)
    batch.logprobs, batch.reference_logprobs = (
        np.array([-1, -2, -3.0], np.float32),
        np.array([-2, -1, -3.0], np.float32),
    )
    batch.values = np.array([0.5, 1.0, -1.0], np.float32)
    agent.prepare(batch)
    # Shaped rewards: -0.1 * 1, 1 + 0.1, 2. A_1 = 1.1 - 1, A_0 = -0.1 + 0.9 - 0.5 + 0.45 * 0.1; second episode: 2 + 1.
    np.testing.assert_allclose(batch.advantages, [0.345, 0.1, 3.0], atol=1e-6)
    np.testing.assert_allclose(batch.returns, [0.845, 1.1, 2.0], atol=1e-6)
    agent.settings = replace(agent.settings, whiten_advantages=True)
    agent.prepare(batch)
    assert batch.advantages.mean() == pytest.approx(0, abs=1e-6) and batch.advantages.std(ddof=1) == pytest.approx(1)
