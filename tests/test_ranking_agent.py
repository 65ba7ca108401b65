"""The ranking agent: that a rule is learned from ranks, one core with offline training, resuming, what is refused."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from agent_cases import logged, same, undisturbed_and_restored
from tiny_models import build_model

import instructgym  # noqa: F401  (registers the envs)
from instructgym.agents.policy.language_model import LanguageModelPolicy
from instructgym.agents.policy.optimization import TrainingDivergedError
from instructgym.agents.preferences.agent import RankingAgent
from instructgym.agents.preferences.trainer import RankingTrainer, TokenizedRankedList
from instructgym.envs.tokens.episode import PromptExample
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.causal_lm import CausalLM
from instructgym.llm_backends.local.tokenization import WordTokenizer
from instructgym.llm_backends.training.adapters import LoraSettings
from instructgym.rewards import RankReward, Reward, Score

TOKENIZER = WordTokenizer(words=("red", "blue", "sea", "sky", "end"), positions=64)
RED, BLUE, SEA, SKY, END, EOS, UNK = range(7)
PROMPTS = ("red sea", "sky", "sea sky end sea", "end sky red")
EXAMPLES = [PromptExample(prompt, prompt, "blue sky blue") for prompt in PROMPTS]


def share(samples):
    """Of "red" among the tokens of a response."""
    return [float(np.mean(sample.token_ids == RED)) for sample in samples]


def make_env(n=16, group_size=4, reward=share, examples=EXAMPLES, max_tokens=6, **options):
    return gymnasium.make_vec(
        "instructgym/GenerateResponse-v0",
        n,
        examples=examples,
        tokenizer=TOKENIZER,
        reward=reward,
        max_tokens=max_tokens,
        context_length=32,
        group_size=group_size,
        **options,
    )


def make_policy(rank=4, dropout=0.0, seed=0, **options):
    lm = CausalLM(build_model(vocabulary=TOKENIZER.vocabulary, context=64), TOKENIZER.hf, name="tiny")
    return LanguageModelPolicy(
        lm, LoraSettings(rank=rank, dropout=dropout), value="none", dtype="float32", seed=seed, **options
    )


def weights(policy):
    return {name: parameter.detach().clone() for name, parameter in policy.parameters().items()}


def updates(agent, count):
    return agent.learn(10**9, lambda agent: agent.updates < count)


def trained_on(agent):
    """The ranked lists of one update, as the agent's trainer gets them."""
    lists, check = [], agent.trainer.check
    agent.trainer.check = lambda ranked, name: lists.append(ranked) or check(ranked, name)
    updates(agent, agent.updates + 1)
    return lists


def reds(agent):
    """The share of "red" in the last episodes."""
    return float(np.mean(np.concatenate(agent.last_rollout.responses) == RED))


def logprob(policy, prompt, response, own=True):
    given = [np.array(prompt)], [np.array(response)], [None]
    with torch.no_grad():
        return float((policy.score(*given).logprobs if own else policy.reference_logprobs(*given)).sum())


# --- what is learned -----------------------------------------------------------------------------------------------


def by_red(prompt, candidates):
    return [float(np.mean([word == "red" for word in one.split()])) if one.split() else 0.0 for one in candidates]


CASES = {
    "tuna": ("tuna", {"imitate": "best"}),
    "tuna, a ranker": ("tuna", {"imitate": "best", "reward": RankReward(by_red)}),
    "dpo": ("dpo", {"epochs": 2, "minibatches": 2, "learning_rate": 5e-3}),
    "lipo_lambda": ("lipo_lambda", {}),
    "sppo": ("sppo", {"beta": 0.02, "refresh_reference": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_share_of_a_word_rises(case):
    loss, options = CASES[case]
    options = {"learning_rate": 1e-2} | options
    env = make_env(32, reward=options.pop("reward", share))
    agent, seen = RankingAgent(env, make_policy(), loss=loss, **options), []
    agent.learn(10**9, lambda agent: seen.append(reds(agent)) or agent.updates < 10)
    assert np.mean(seen[:2]) < 0.3 and np.mean(seen[-3:]) > 0.8, seen


def test_spin_moves_towards_the_references():
    policy = make_policy()
    asked = [TOKENIZER.encode(prompt) for prompt in PROMPTS], [BLUE, SKY, BLUE, EOS]
    before = [logprob(policy, prompt, asked[1]) for prompt in asked[0]]
    agent, rows = logged(RankingAgent(make_env(), policy, loss="spin", learning_rate=1e-2, refresh_reference=2))
    updates(agent, 20)
    after = [logprob(policy, prompt, asked[1]) for prompt in asked[0]]
    assert max(before) < -7 and min(after) > -1, (before, after)
    # The opponent is the policy itself in every second update.
    assert [row["train/loss"] == pytest.approx(np.log(2), abs=1e-3) for row in rows[:6]] == [True, False] * 3
    assert [abs(row["train/kl"]) < 1e-3 for row in rows[:6]] == [True, False] * 3


# --- one core ------------------------------------------------------------------------------------------------------


def ranked_lists(count):
    rng, lists = np.random.default_rng(0), []
    for _ in range(count):
        drawn = [rng.integers(0, END + 1, 4) for _ in range(rng.integers(1, 5))]
        scores = [float((one == BLUE).sum()) for one in drawn]
        prompt, candidates = rng.integers(0, END + 1, 3).tolist(), [[*one.tolist(), EOS] for one in drawn]
        lists.append(TokenizedRankedList(prompt, candidates, scores=scores, reference=[BLUE, EOS]))
    return lists


OFFLINE = {"learning_rate": 1e-2, "batch_size": 3, "epochs": 2, "schedule": "cosine", "token_budget": 60}


@pytest.mark.parametrize("loss", ["tuna", "dpo"])
def test_fit_is_the_training_of_the_trainer(loss):
    trainer, expected = logged(RankingTrainer(make_policy(), seed=4, loss=loss, **OFFLINE))
    agent, rows = logged(RankingAgent(make_env(), make_policy(), seed=4, loss=loss, **OFFLINE))
    start = weights(agent.policy)
    trainer.fit(ranked_lists(10))
    assert agent.fit(ranked_lists(10)) is agent
    assert rows == expected and len(rows) == 8
    assert same(weights(trainer.policy), weights(agent.policy)) and not same(start, weights(agent.policy))


def test_an_update_is_a_step_of_the_trainer_on_the_lists_of_its_samples():
    agent, rows = logged(RankingAgent(make_env(), make_policy(), imitate="all", mle_weight=0.5, learning_rate=1e-2))
    updates(agent, 1)
    batch, groups = agent.last_rollout, {}
    for i, info in enumerate(batch.infos):
        groups.setdefault(info["episode_id"], []).append(i)
    assert len(batch) == 16 and sorted(groups) == sorted(PROMPTS)
    lists = [
        TokenizedRankedList(
            TOKENIZER.encode(name),
            [batch.responses[i].tolist() for i in members],
            scores=[float(np.mean(batch.responses[i] == RED)) for i in members],
            reference=[BLUE, SKY, BLUE, EOS],
        )
        for name, members in groups.items()
    ]
    lists = [one for one in lists if len(set(one.scores)) > 1]
    trainer, expected = logged(
        RankingTrainer(make_policy(), imitate="all", mle_weight=0.5, learning_rate=1e-2, batch_size=16)
    )
    trainer.fit(lists)
    for name in ("loss", "ranking_loss", "mle_loss", "accuracy", "margin", "pairs", "grad_norm"):
        assert rows[0][f"train/{name}"] == pytest.approx(expected[0][f"train/{name}"], rel=1e-4), name
    assert rows[0]["train/lists_without_pairs"] == 4 - len(lists) and rows[0]["train/mle_loss"] > 0
    for name, weight in weights(trainer.policy).items():
        torch.testing.assert_close(agent.policy.parameters()[name].detach(), weight, atol=1e-4, rtol=1e-3)


def test_references_are_written_as_episodes_are():
    examples = [PromptExample("one", "sky", "blue sky blue sea sea sea sea")]
    env = make_env(4, examples=examples, max_tokens=4)
    lists = trained_on(RankingAgent(env, make_policy(), reference_opening=" end "))
    assert [one.reference for one in lists] == [[END, BLUE, SKY, BLUE]]
    lists = trained_on(RankingAgent(env, make_policy(), loss="dpo"))
    assert [one.reference for one in lists] == [None]  # no use for it


def test_a_reference_behind_a_chat_template_has_no_blank_before_it(tiny_lm):
    """The template ends where the answer begins; a text to continue is followed by a blank."""
    policy = LanguageModelPolicy(tiny_lm, LoraSettings(rank=2), value="none", dtype="float32")
    for prompt, opening in (("Say it", " "), ("<user>Say it\n", "")):
        examples = [PromptExample("one", prompt, "the sea")]
        env = gymnasium.make_vec(
            "instructgym/GenerateResponse-v0",
            2,
            examples=examples,
            tokenizer=policy.tokenizer,
            reward=lambda samples: [float(len(sample.response)) for sample in samples],
            max_tokens=8,
            context_length=64,
            group_size=2,
        )
        [one] = trained_on(RankingAgent(env, policy))
        assert list(one.reference[:-1]) == policy.tokenizer.encode_continuation(f"{opening}the sea")


def test_samples_of_two_rollouts_are_two_lists():
    """A ranker's places are among the samples that it saw together."""
    env = make_env(4, examples=EXAMPLES[:1], reward=RankReward(by_red))
    agent = RankingAgent(env, make_policy(), imitate="best", rollout_batches=2)
    lists = trained_on(agent)
    assert len(agent.last_rollout) == 8 and agent.last_rollout.resets == [0] * 4 + [1] * 4
    assert [len(one.candidates) for one in lists] == [4, 4]


def test_the_schedule_spans_all_of_learn():
    agent, rows = logged(RankingAgent(make_env(), make_policy(), loss="dpo", epochs=2, schedule="cosine", final=0.0))
    agent.learn(400)
    steps, done = np.array([row["rollout/length"] * 16 for row in rows]), 0.0
    assert len(rows) > 3
    for row, tokens in zip(rows, steps, strict=True):
        assert row["train/learning_rate"] == pytest.approx(1e-4 * 0.5 * (1 + np.cos(np.pi * done / 400)), rel=1e-5)
        done += tokens


def test_kl_is_that_to_the_reference_policy():
    policy = make_policy()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    agent, rows = logged(RankingAgent(make_env(), policy, loss="dpo", learning_rate=1e-12))
    lists = [one for one in trained_on(agent) if len(set(one.scores)) > 1]
    both = [[logprob(policy, o.prompt, c, own) for o in lists for c in o.candidates] for own in (True, False)]
    assert rows[0]["train/kl"] == pytest.approx(np.mean(both[0]) - np.mean(both[1]), rel=1e-3) and len(lists) > 1
    assert abs(rows[0]["train/kl"]) > 0.05


# --- ties, invalid episodes ----------------------------------------------------------------------------------------


class Verdicts(Reward):
    """By prompt, what it says of the samples of a group, in order, 0 where nothing is given; None is no verdict."""

    name = "verdicts"

    def __init__(self, values):
        self.values = values

    def reward(self, samples):
        given = {prompt: iter(values) for prompt, values in self.values.items()}
        values = [next(given.get(sample.episode_id, iter(())), 0.0) for sample in samples]
        return [Score.invalid("no idea") if value is None else Score(value) for value in values]


NONE = (None,) * 4


@pytest.mark.parametrize("loss", ["tuna", "tuna_released", "dpo", "ipo", "sppo", "lipo_lambda"])
@pytest.mark.parametrize("values", [{}, {"red sea": (*NONE[1:], 1.0), "sky": NONE}])
def test_ties_and_samples_alone_give_no_push(loss, values):
    env = make_env(reward=Verdicts(values))
    agent, rows = logged(RankingAgent(env, make_policy(), loss=loss, max_invalid_share=0.5, learning_rate=1e-2))
    start = weights(agent.policy)
    updates(agent, 2)
    assert same(start, weights(agent.policy))
    lists = 3 if values else 4  # of one prompt there is no valid sample
    assert [(row["train/pairs"], row["train/lists_without_pairs"]) for row in rows] == [(0, lists)] * 2
    assert all(np.isfinite(value) for row in rows for value in row.values())


def test_samples_without_a_verdict_are_no_candidates():
    env = make_env(reward=Verdicts({"red sea": (None, 0.5, 0.0, 0.0), "sky": NONE}))
    agent, rows = logged(RankingAgent(env, make_policy(), max_invalid_share=0.4, learning_rate=1e-2))
    start = weights(agent.policy)
    updates(agent, 1)
    assert rows[0]["train/pairs"] == 2 and rows[0]["train/lists_without_pairs"] == 2
    assert all(np.isfinite(value) for value in rows[0].values()) and not same(start, weights(agent.policy))


class Split(Reward):
    """0.1 for every response, split over its tokens: its float32 sums depend on their number."""

    name, timing = "split", "whole"

    def reward(self, samples):
        lengths = [len(sample.token_ids) for sample in samples]
        return [Score(0.1, per_token=np.full(n, 0.1 / n, np.float32)) for n in lengths]


def test_returns_that_differ_by_rounding_are_ties():
    agent, rows = logged(RankingAgent(make_env(reward=Split()), make_policy(), loss="dpo"))
    updates(agent, 1)
    batch = agent.last_rollout
    assert len(set(batch.per_episode(batch.rewards.astype(np.float64)))) > 1
    assert rows[0]["train/pairs"] == 0


def test_an_update_without_a_finite_gradient_is_an_error():
    agent = RankingAgent(make_env(), make_policy(), loss="dpo")
    start = weights(agent.policy)
    for parameter in agent.policy.parameters().values():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingDivergedError, match="no optimiser step of update 0 had a finite gradient"):
        updates(agent, 1)
    assert same(start, weights(agent.policy))


# --- checkpoints ---------------------------------------------------------------------------------------------------

RUNS = {
    "tuna": {"minibatches": 2, "epochs": 2, "schedule": "cosine", "warmup": 0.1},
    "dpo, dropout": {"loss": "dpo", "dropout": 0.3, "epochs": 2},
    "spin, refreshed": {"loss": "spin", "refresh_reference": 2, "schedule": "linear"},
    "sppo, all weights": {"loss": "sppo", "refresh_reference": 1, "rank": 0, "learning_rate": 1e-3},
}


def start_run(run, seed):
    options = {"learning_rate": 1e-2} | RUNS[run]
    policy = make_policy(seed=seed, rank=options.pop("rank", 4), dropout=options.pop("dropout", 0.0))
    return logged(RankingAgent(make_env(8), policy, seed=seed, **options))


@pytest.mark.parametrize("run", RUNS)
def test_a_restored_run_is_the_undisturbed_one_bit_for_bit(tmp_path, run):
    whole, second = undisturbed_and_restored(lambda seed: start_run(run, seed), tmp_path, 220, 3)
    assert same(weights(whole.policy), weights(second.policy))


def test_an_offline_training_goes_on_and_does_not_disturb_learn(tmp_path):
    def start():
        return logged(RankingAgent(make_env(8), make_policy(), loss="dpo", **OFFLINE))

    whole, expected = start()
    updates(whole.fit(ranked_lists(10)), 2)
    first, seen = start()
    first.fit(ranked_lists(10), lambda agent: agent.trainer.steps < 5)
    first.save(tmp_path / "fit")
    second, more = start()
    second.restore(tmp_path / "fit")
    second.fit(ranked_lists(10))
    second.save(tmp_path / "learn")
    third, last = start()
    third.restore(tmp_path / "learn")
    updates(third, 2)
    assert seen + more + last == expected and len(seen) == 5 and len(more) == 3
    assert same(weights(whole.policy), weights(third.policy))
    third.save(tmp_path / "end")
    again, rows = start()
    again.restore(tmp_path / "end")
    again.fit(ranked_lists(10))  # anew: the one before is over
    assert len(rows) == 8


def test_a_training_that_has_ended_is_not_gone_on_with(tmp_path):
    """The next one, on other lists, is trained as if both were in one process."""
    together, expected = logged(RankingAgent(make_env(8), make_policy(), loss="dpo", **OFFLINE))
    together.fit(ranked_lists(10)).fit(ranked_lists(6))
    agent, seen = logged(RankingAgent(make_env(8), make_policy(), loss="dpo", **OFFLINE))
    agent.fit(ranked_lists(10)).save(tmp_path)
    again, more = logged(RankingAgent.load(tmp_path, make_env(8), make_policy()))
    again.fit(ranked_lists(6))
    assert len(seen) == 8 and len(more) == 4 and seen + more == expected
    assert same(weights(together.policy), weights(again.policy))


def test_a_checkpoint_can_be_loaded_and_is_not_one_of_the_trainer(tmp_path):
    agent = updates(RankingAgent(make_env(8), make_policy(), loss="spin", refresh_reference=1), 2)
    agent.save(tmp_path)
    loaded = RankingAgent.load(tmp_path, make_env(8), make_policy())
    assert (
        loaded.settings == agent.settings and loaded.updates == 2 and same(*map(weights, (agent.policy, loaded.policy)))
    )
    with pytest.raises(InputError, match="a checkpoint of ranking_agent, not of ranking"):
        RankingTrainer(make_policy()).restore(tmp_path)


# --- what is refused -----------------------------------------------------------------------------------------------

BARE = [replace(EXAMPLES[0], reference=None), *EXAMPLES[1:]]


@pytest.mark.parametrize(
    ("options", "env", "message"),
    [
        ({}, {"group_size": 1}, "ranking_agent compares samples of one prompt: make the env with group_size above 1"),
        ({}, {"examples": BARE}, "the loss tuna needs reference responses .* imitate or mle_weight=0"),
        ({"loss": "dpo", "mle_weight": 0.1}, {"examples": BARE}, "the loss dpo needs reference responses"),
        ({"loss": "spin"}, {"examples": BARE}, "the loss spin needs reference responses .* or take another loss$"),
        ({"refresh_reference": 1}, {}, "refresh_reference: the loss tuna compares with no reference policy"),
        ({"loss": "dpo", "refresh_reference": -1}, {}, "refresh_reference must be at least 0"),
        ({"loss": "dpo", "margin": 0.1}, {}, "margin is no option of the loss dpo"),
        ({"minibatches": 0}, {}, "minibatches must be at least 1"),
        ({"clip": 0.1}, {}, "clip"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(options, env, message):
    with pytest.raises(InputError, match=message):
        RankingAgent(make_env(**env), "no-such-model", **options)


@pytest.mark.parametrize("options", [{"mle_weight": 0.0}, {"imitate": "best"}, {"imitate": "all"}, {"loss": "dpo"}])
def test_what_needs_no_references_is_taken_without_them(options):
    agent, rows = logged(RankingAgent(make_env(examples=BARE), make_policy(), **options))
    updates(agent, 1)
    assert rows[0]["train/pairs"] > 0


def test_a_reference_policy_must_be_there():
    with pytest.raises(InputError, match="compares with a reference policy, this policy has none"):
        RankingAgent(make_env(), make_policy(reference="none"), loss="dpo")
