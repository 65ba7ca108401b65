"""Soft Q-learning: both losses by hand and at the optimum, what is learned, shaping, resuming."""

from itertools import product

import gymnasium
import numpy as np
import pytest
import torch
from agent_cases import logged, same, undisturbed_and_restored
from tiny_models import build_model

import instructgym  # noqa: F401  (registers the envs)
from instructgym.agents import SoftQ
from instructgym.agents.policy.language_model import POLICY, LanguageModelPolicy
from instructgym.agents.soft_q.agent import ReplayBuffer, StoredEpisode, multi_step, path_consistency, single_step
from instructgym.agents.soft_q.target_policy import TARGET, TargetPolicy, policy_logits, reference_logits
from instructgym.envs.tokens.episode import PromptExample
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.causal_lm import CausalLM
from instructgym.llm_backends.local.tokenization import WordTokenizer
from instructgym.llm_backends.training.adapters import LoraSettings
from instructgym.llm_backends.training.output_layer import ChosenLogits

TOKENIZER = WordTokenizer(words=("red", "blue", "sea", "sky", "end"), positions=64)
RED, BLUE, SEA, SKY, END, EOS, UNK = range(7)

# --- the losses ----------------------------------------------------------------------------------------------------


def test_both_losses_of_two_episodes_by_hand():
    """Of three tokens with the reward 5, and of one with the reward -1."""
    advantages = torch.tensor([-1.0, -2.0, -0.5, -3.0], requires_grad=True)
    given = torch.tensor([4.0, 3.0, 2.0, 7.0]), torch.tensor([5.0, -1.0]), [3, 1]
    # A: -1, -2, -0.5; what it should be: 3 - 4, 2 - 3, 5 - 2; and -3 for -1 - 7.
    single = single_step(advantages, *given)
    assert single.tolist() == [0.0, 1.0, 12.25, 25.0]
    # Sums of A to the end: -3.5, -2.5, -0.5; what they should be: 5 - 4, 5 - 3, 5 - 2.
    multi = multi_step(advantages, *given)
    assert multi.tolist() == [20.25, 20.25, 12.25, 25.0]
    assert path_consistency("both", advantages, *given).tolist() == [10.125, 10.625, 12.25, 25.0]
    [slopes] = torch.autograd.grad(multi.sum(), advantages, retain_graph=True)
    assert slopes.tolist() == [-9.0, -18.0, -25.0, 10.0]  # 2 x what is missing from here and from before
    [slopes] = torch.autograd.grad(single.sum(), advantages)
    assert slopes.tolist() == [0.0, -2.0, -7.0, 10.0]


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("kind", ["single", "multi", "both"])
def test_the_soft_optimal_values_have_no_loss_whoever_wrote_the_episode(kind, prior):
    """Three tokens of an alphabet of four; the values are those of backward induction, under a prior's weights."""
    rng = np.random.default_rng(0)
    paid = {path: rng.normal(0, 3) for path in product(range(4), repeat=3)}
    values, q = {}, {}
    for length in (2, 1, 0):
        for state in product(range(4), repeat=length):
            q[state] = [values.get((*state, a), paid.get((*state, a))) for a in range(4)]
            weights = np.log(rng.dirichlet(np.ones(4))) if prior else np.zeros(4)
            values[state] = float(np.logaddexp.reduce(weights + q[state]))
    paths = list(paid)
    states = [(path[:t], path[t]) for path in paths for t in range(3)]
    value = torch.tensor([values[state] for state, _ in states])
    advantage = torch.tensor([q[state][a] - values[state] for state, a in states])
    returns = torch.tensor([paid[path] for path in paths])
    losses = path_consistency(kind, advantage, value, returns, [3] * len(paths))
    assert losses.shape == (192,) and float(losses.max()) < 1e-8
    assert float(path_consistency(kind, advantage, value, returns + 0.1, [3] * len(paths)).max()) > 1e-3


# --- agents --------------------------------------------------------------------------------------------------------

PROMPTS = ("red sea", "sky", "sea sky end sea", "end sky red")
EXAMPLES = [PromptExample(prompt, prompt) for prompt in PROMPTS]


def share(samples):
    """Of "red" among the tokens of a response."""
    return [float(np.mean(sample.token_ids == RED)) for sample in samples]


def make_env(n=32, env_id="GenerateResponse", reward=share, examples=EXAMPLES, max_tokens=6, **options):
    return gymnasium.make_vec(
        f"instructgym/{env_id}-v0",
        n,
        examples=examples,
        tokenizer=TOKENIZER,
        reward=reward,
        max_tokens=max_tokens,
        context_length=32,
        **options,
    )


def make_policy(rank=4, dropout=0.0, seed=0, scale=0.0, **options):
    lm = CausalLM(build_model(vocabulary=TOKENIZER.vocabulary, context=64), TOKENIZER.hf, name="tiny")
    lora = LoraSettings(rank=rank, dropout=dropout)
    policy = LanguageModelPolicy(lm, lora, value="none", dtype="float32", seed=seed, **options)
    return moved(policy, scale)


def moved(policy, scale):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return policy


def weights(policy, name=POLICY):
    parameters = policy.trunk.parameters(name)
    if name != POLICY:
        policy.trunk.freeze(name)
    return {key: parameter.detach().clone() for key, parameter in parameters.items()}


def updates(agent, count):
    return agent.learn(10**9, lambda agent: agent.updates < count)


CASES = {
    "multi, by prompt": {"loss": "multi", "shaped_high": 20.0, "zscore": "group"},
    "published": {"prior": "none"},
    "both": {"shaped_high": 20.0},
    "reversed, unscaled": {"n": 32, "zscore": "none", "shaped_high": 30.0, "reversed_weight": 0.5, "prior": "none"},
    "single, two tokens": {"loss": "single", "max_tokens": 2, "prior": "none"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_share_of_a_word_rises(case):
    env_id = "GeneratePrompt" if case == "both" else "GenerateResponse"
    options = {"learning_rate": 1e-2, "target_rate": 0.1} | CASES[case]
    env = make_env(options.pop("n", 20), env_id, max_tokens=options.pop("max_tokens", 6))
    agent, rows = logged(SoftQ(env, make_policy(), **options))
    updates(agent, 12)
    seen = [row["rollout/reward"] for row in rows]
    assert np.mean(seen[:2]) < 0.3 and np.mean(seen[-3:]) > 0.7, seen


def test_replayed_episodes_are_learned_from():
    options = {"learning_rate": 1e-2, "target_rate": 0.1, "replay_ratio": 0.5, "replay_capacity": 60, "loss": "multi"}
    agent, rows = logged(SoftQ(make_env(), make_policy(), **options))
    updates(agent, 12)
    assert [row["train/replayed"] for row in rows] == [0] + [16] * 11 and len(agent.replay) == 60
    seen = [row["rollout/reward"] for row in rows]
    assert np.mean(seen[:2]) < 0.3 and np.mean(seen[-3:]) > 0.5, seen
    # Off-policy alone: the agent never writes the words that others were paid for.
    agent = SoftQ(
        make_env(4, reward=lambda samples: [0.0] * len(samples)), make_policy(), **options | {"zscore": "none"}
    )
    before = logprob(agent.policy)
    for _ in range(9):
        agent.replay.add([StoredEpisode([SKY], [BLUE, BLUE, EOS], 4.0, "sky")] * 60)
        updates(agent, agent.updates + 1)
    assert before < -6 and logprob(agent.policy) > -1.5


def logprob(policy):
    with torch.no_grad():
        return float(policy_logits(policy, [np.array([SKY])], [np.array([BLUE, BLUE, EOS])]).logprobs.sum())


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize(("rank", "prior"), [(0, "reference"), (4, "reference"), (4, "none")])
def test_the_gradient_is_that_of_full_logits(rank, prior, weight):
    """The gradient of an update's one step, which is taken away before it is used."""
    # The same policy three times: as it is trained, as the target has it, and as the reference has it.
    policy, target, base = (make_policy(rank=rank, scale=scale, temperature=0.7) for scale in (0.05, 0.05, 0.0))
    env = make_env(12, reward=lambda samples: [float(sample.token_ids[0]) - 2.0 for sample in samples])
    agent = SoftQ(env, policy, reversed_weight=weight, prior=prior, zscore="none", shaped_high=1.0)
    agent.start()
    moved(policy, 0.1)  # away from the target, which starts where the policy does
    mine = {}

    def take():
        mine.update({name: p.grad.clone() for name, p in policy.parameters().items() if p.grad is not None})
        agent.optimizer.inner.zero_grad()
        return 0.0

    agent.optimizer.step = take
    agent.update()
    batch, loss = agent.last_rollout, 0.0
    assert len(batch) == 12 and len(set(batch.lengths.tolist())) > 1
    for prompt, response, paid in zip(batch.prompts, batch.responses, batch.per_episode(batch.rewards), strict=True):
        (a, v), (b, w), (c, u) = (full(one, prompt, response) for one in (policy, target, base))
        b, w, c, u = (one.detach() for one in (b, w, c, u))
        if prior == "reference":
            a, v, b, w = a - c, v - u, b - c, w - u
        for share_of, (one, two) in ((1 - weight, (a, w)), (weight, (b, v))):
            for t in range(len(response)):
                following = two[t + 1] if t + 1 < len(response) else float(paid)
                loss = loss + share_of * (one[t] - (following - two[t])) ** 2 / 2
                loss = loss + share_of * (one[t:].sum() - (float(paid) - two[t])) ** 2 / 2
    (loss / 12).backward()
    theirs = {name: p.grad for name, p in policy.parameters().items() if p.grad is not None}
    assert set(mine) == set(theirs) and max(float(g.abs().max()) for g in mine.values()) > 0.1
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=2e-4, rtol=2e-3)


def full(policy, prompt, response):
    """Log-probs of the response tokens and logsumexps of their positions, from all logits."""
    with policy.adapter(POLICY) as lm:
        logits = lm.model(input_ids=torch.tensor([[*prompt.tolist(), *response.tolist()]])).logits
    logits = logits[0, len(prompt) - 1 : -1, : TOKENIZER.vocabulary] / 0.7
    values = logits.logsumexp(dim=-1)
    return logits.gather(1, torch.tensor(response.tolist())[:, None]).squeeze(1) - values, values


# --- rewards -------------------------------------------------------------------------------------------------------


def episodes(*rows):
    return [StoredEpisode([RED], [RED], value, group) for value, group in rows]


def test_returns_are_standardised_and_mapped():
    rows = episodes((1.0, "a"), (3.0, "a"), (10.0, "b"), (10.0, "b"), (6.0, "c"))

    def shaped(**options):
        return SoftQ(make_env(4), make_policy(), **options).shaped_returns(rows).tolist()

    plain = {"zscore": "none", "shaped_low": -10.0, "shaped_high": 10.0}
    assert shaped(zscore="none") == [5.0, 15.0, 50.0, 50.0, 30.0]
    assert shaped(reward_high=20.0, **plain) == [-9.0, -7.0, 0.0, 0.0, -4.0]
    # Mean 2, deviation 1; of equal ones and of one alone 0. RLPrompt maps [0, 1] onto [0, 5].
    one = 5.0 / 1.0001
    assert shaped(zscore="group") == pytest.approx([-one, one, 0.0, 0.0, 0.0])
    scores = np.array([1.0, 3.0, 10.0, 10.0, 6.0])
    assert shaped() == pytest.approx((5 * (scores - 6) / (scores.std() + 1e-4)).tolist())
    assert shaped(shaped_low=2.0)[4] == pytest.approx(2.0)


@pytest.mark.parametrize("prior", ["reference", "none"])
def test_what_is_logged_is_what_was_learned_from(prior):
    policy = make_policy(scale=0.1)
    agent, rows = logged(SoftQ(make_env(), policy, zscore="none", learning_rate=1e-12, prior=prior))
    updates(agent, 1)
    [row], batch = rows, agent.last_rollout
    with torch.no_grad():
        found = policy_logits(policy, batch.prompts, batch.responses)
    logprobs = found.logprobs
    if prior == "reference":
        theirs = reference_logits(policy, batch.prompts, batch.responses)
        found = ChosenLogits(*(one - other for one, other in zip(found, theirs, strict=True)))
        kl = logprobs - policy.reference_logprobs(batch.prompts, batch.responses, [None] * 32)
        assert row["train/advantage"] == pytest.approx(float(kl.sum()) / 32, rel=1e-3) != 0
    returns = torch.from_numpy(5.0 * batch.per_episode(batch.rewards))
    given = found.logprobs, found.logsumexps, returns, batch.lengths.tolist()
    one, many = float(single_step(*given).sum()) / 32, float(multi_step(*given).sum()) / 32
    assert row["train/single_step"] == pytest.approx(one, rel=1e-4)
    assert row["train/multi_step"] == pytest.approx(many, rel=1e-4)
    assert row["train/loss"] == pytest.approx((one + many) / 2, rel=1e-4)
    assert row["train/shaped_reward"] == pytest.approx(5 * row["rollout/reward"], rel=1e-5)
    assert row["train/q"] == pytest.approx(float(found.logits.mean()), rel=1e-3)
    assert row["train/logprob"] == pytest.approx(float(logprobs.mean()), rel=1e-4)
    assert row["train/value"] == row["train/target_value"] == pytest.approx(float(found.logsumexps.mean()), rel=1e-3)


def test_episodes_come_from_the_most_likely_tokens():
    agent = SoftQ(make_env(examples=EXAMPLES[1:2], max_tokens=1), make_policy(), top_k=2)
    assert agent.sampling.top_k == 2 and SoftQ(make_env(), make_policy()).sampling.top_k == 256
    updates(agent, 1)
    assert len(set(np.concatenate(agent.last_rollout.responses).tolist())) <= 2


# --- target, replay ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_the_target_follows_the_policy_slowly(rank):
    policy = make_policy(rank=rank)
    target, asked = TargetPolicy(policy), ([np.array([SKY])], [np.array([RED, EOS])])
    with torch.no_grad():
        start = policy_logits(policy, *asked).logprobs
        assert torch.equal(target.logits(*asked).logprobs, start)
        moved(policy, 0.2)
        assert torch.equal(target.logits(*asked).logprobs, start)
        before = [mine.clone() for mine, _ in target.pairs]
        target.follow(0.25)
        for (mine, theirs), old in zip(target.pairs, before, strict=True):
            torch.testing.assert_close(mine, 0.75 * old + 0.25 * theirs)
        assert not torch.equal(target.logits(*asked).logprobs, start)
        target.follow(1.0)
        assert torch.equal(target.logits(*asked).logprobs, policy_logits(policy, *asked).logprobs)
    assert not any(mine.requires_grad for mine, _ in target.pairs)
    assert all(p.requires_grad for p in policy.parameters().values())


def test_a_buffer_keeps_the_last_and_draws_each_once():
    buffer = ReplayBuffer(3)
    buffer.add(StoredEpisode([k], [k], float(k), "") for k in range(5))
    drawn = buffer.draw(2, np.random.default_rng(0))
    assert len({one.value for one in drawn}) == 2
    assert {one.value for one in buffer.draw(9, np.random.default_rng(0))} == {2.0, 3.0, 4.0}
    other = ReplayBuffer(3)
    other.load_state(buffer.state())
    assert other.draw(2, np.random.default_rng(0)) == drawn
    assert ReplayBuffer(3).draw(2, np.random.default_rng(0)) == []


# --- checkpoints ---------------------------------------------------------------------------------------------------

RUNS = {
    "both": {"minibatches": 2, "epochs": 2, "schedule": "cosine", "warmup": 0.1},
    "replay, dropout": {"replay_ratio": 1.5, "replay_capacity": 20, "dropout": 0.3},
    "reversed, by prompt": {"reversed_weight": 0.5, "zscore": "group", "schedule": "linear"},
    "all weights": {"rank": 0, "learning_rate": 1e-3},
}


def start_run(run, seed):
    options = {"learning_rate": 1e-2, "target_rate": 0.1} | RUNS[run]
    policy = make_policy(seed=seed, rank=options.pop("rank", 4), dropout=options.pop("dropout", 0.0))
    return logged(SoftQ(make_env(8), policy, seed=seed, **options))


@pytest.mark.parametrize("run", RUNS)
def test_a_restored_run_is_the_undisturbed_one_bit_for_bit(tmp_path, run):
    whole, second = undisturbed_and_restored(lambda seed: start_run(run, seed), tmp_path, 150, 2)
    assert same(whole.policy.parameters(), second.policy.parameters())
    for (mine, _), (theirs, _) in zip(whole.target.pairs, second.target.pairs, strict=True):
        assert torch.equal(mine, theirs)


def test_a_checkpoint_can_be_loaded_and_one_without_a_target_is_refused(tmp_path):
    agent = updates(SoftQ(make_env(8), make_policy(), learning_rate=1e-2, replay_ratio=0.5), 2)
    agent.save(tmp_path)
    loaded = SoftQ.load(tmp_path, make_env(8), make_policy())
    assert loaded.settings == agent.settings and loaded.updates == 2 and len(loaded.replay) == 16
    assert same(weights(agent.policy), weights(loaded.policy))
    assert same(weights(agent.policy, TARGET), weights(loaded.policy, TARGET))
    assert not same(
        weights(agent.policy), {k.replace(TARGET, POLICY): v for k, v in weights(loaded.policy, TARGET).items()}
    )
    (tmp_path / "policy" / TARGET / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot read a checkpoint"):
        SoftQ.load(tmp_path, make_env(8), make_policy())


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "pcl"}, "loss must be single, multi or both"),
        ({"zscore": "all"}, "zscore must be none, batch or group"),
        ({"reversed_weight": 1.5}, r"reversed_weight must be at most 1"),
        ({"target_rate": 0.0}, r"target_rate must be above 0"),
        ({"reward_low": 1.0}, "reward_low must be below reward_high"),
        ({"shaped_high": float("nan")}, "shaped_low below shaped_high"),
        ({"replay_ratio": -1.0}, "replay_ratio must be at least 0"),
        ({"replay_capacity": 0}, "replay_capacity must be at least 1"),
        ({"clip": 0.1}, "clip"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(options, message):
    with pytest.raises(InputError, match=message):
        SoftQ(make_env(4), "no-such-model", **options)


def test_a_prior_needs_a_reference_policy():
    with pytest.raises(InputError, match="this policy has none: give it one, or prior='none'"):
        SoftQ(make_env(4), make_policy(reference="none"))
    updates(SoftQ(make_env(4), make_policy(reference="none"), prior="none"), 1)


def test_a_reference_policy_is_not_taken_for_the_target():
    policy = make_policy()
    policy.freeze_reference(TARGET)
    with pytest.raises(InputError, match="a frozen adapter of this policy is called 'target' already"):
        SoftQ(make_env(4), policy)


def test_constraints_are_refused_before_a_model_is_loaded():
    examples = [PromptExample("a", "sea", "red", ("red", "blue"))]
    env = gymnasium.make_vec(
        "instructgym/GenerateLabel-v0", 2, examples=examples, tokenizer=TOKENIZER, constrained=True, context_length=32
    )
    with pytest.raises(InputError, match="make the env without constrained=True"):
        SoftQ(env, "no-such-model")
