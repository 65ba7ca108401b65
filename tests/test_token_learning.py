"""Token-level agents from outside: bad input, checkpoints, learning, fine-tuning on demonstrations, acting."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from tiny_models import build_model

from instructgym.agents.policy.checkpoints import policy_from
from instructgym.agents.policy.language_model import LanguageModelPolicy
from instructgym.agents.policy.optimization import TrainingDivergedError
from instructgym.agents.policy_gradient.grpo import GRPO, RLOO
from instructgym.agents.policy_gradient.ppo import TokenPPO
from instructgym.agents.supervised.sft import SFT, TokenizedDemonstration
from instructgym.envs.tokens.env import TokenEnv, TokenVectorEnv
from instructgym.envs.tokens.episode import PromptExample
from instructgym.envs.tokens.process import TokenSettings
from instructgym.llm_backends.base import Sampling
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.causal_lm import CausalLM
from instructgym.llm_backends.local.tokenization import WordTokenizer
from instructgym.llm_backends.training.adapters import LoraSettings
from instructgym.rewards import Reward, Score

WORDS = ("red", "blue", "sea", "sky", "end")
RED, BLUE, SEA, SKY, END, EOS, UNK = range(7)
CHOICES = ("red", "blue")
EXAMPLES = [
    PromptExample("one", "red sea", "red", CHOICES),
    PromptExample("two", "sky", "blue", CHOICES),
    PromptExample("three", "sea sky end sea", "red", CHOICES),
    PromptExample("four", "end sky red", "blue", CHOICES),
]


class Right(Reward):
    """1 for the right word, a little for every further token."""

    name = "right"

    def reward(self, samples):
        return [
            Score(float(sample.response.strip() == sample.reference) + 0.1 * (len(sample.token_ids) - 1))
            for sample in samples
        ]


def make_env(n=8, group_size=1, words=WORDS, positions=16, mode="Disabled", constrained=False, max_tokens=4):
    return TokenVectorEnv(
        n,
        EXAMPLES,
        WordTokenizer(words=words, positions=positions),
        Right(),
        TokenSettings(max_tokens=max_tokens, context_length=512, group_size=group_size, constrained=constrained),
        autoreset_mode=mode,
    )


def make_policy(rank=4, dropout=0.0, seed=0, **options):
    tokenizer = WordTokenizer(words=WORDS).hf
    model = build_model(vocabulary=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    lm, lora = CausalLM(model, tokenizer, name="tiny"), LoraSettings(rank=rank, dropout=dropout)
    return LanguageModelPolicy(lm, lora, dtype="float32", seed=seed, **options)


class Rows(KVWriter):
    """Keeps what is logged, times aside."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append({"step": step} | {k: v for k, v in key_values.items() if not k.startswith("time/")})

    def close(self):
        pass


def logged(agent):
    """The agent, and the rows that it will have logged."""
    writer = Rows()
    agent.set_logger(Logger(folder=None, output_formats=[writer]))
    return agent, writer.rows


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.parameters().items()}


# --- checkpoints -------------------------------------------------------------------------------------------------

RUNS = {
    "ppo": (TokenPPO, {"minibatches": 2, "schedule": "cosine", "warmup": 0.1, "kl_target": 0.1, "kl_horizon": 50}, {}),
    "ppo, adafactor": (TokenPPO, {"optimizer": "adafactor", "learning_rate": 1e-2}, {"value": "own_adapter"}),
    "ppo, dropout": (TokenPPO, {}, {"dropout": 0.3}),
    "ppo, all weights": (TokenPPO, {"rollout_batches": 2}, {"rank": 0}),
    "grpo": (GRPO, {"schedule": "linear", "learning_rate": 1e-2}, {"value": "none"}),
    "rloo": (RLOO, {"entropy_coefficient": 0.01}, {"temperature": 0.8}),
}


def start(run, seed):
    cls, options, policy = RUNS[run]
    env = make_env(n=4, group_size=1 if cls is TokenPPO else 2)
    policy = make_policy(seed=seed, **policy)
    return logged(cls(env, policy, seed=seed, **({"learning_rate": 1e-3} | options)))


@pytest.mark.parametrize(
    ("run", "frozen"), [*((run, False) for run in RUNS), ("ppo", True), ("ppo, all weights", True)]
)
def test_a_restored_run_is_the_undisturbed_one_bit_for_bit(tmp_path, run, frozen):
    tokens = 40 * RUNS[run][1].get("rollout_batches", 1)  # three updates or more
    (whole, expected), (first, seen) = start(run, 0), start(run, 0)
    if frozen:
        for agent in (whole, first):
            with torch.no_grad():
                for parameter in agent.policy.parameters().values():
                    parameter += 0.01
            agent.policy.freeze_reference()
    torch.manual_seed(0)  # dropout draws from torch's own generator
    whole.learn(tokens)
    torch.manual_seed(0)
    first.learn(tokens, callback=lambda agent: agent.updates < 2)
    assert first.updates == 2 < whole.updates
    first.save(tmp_path / "checkpoint")
    torch.manual_seed(99)
    second, more = start(run, 5)
    second.restore(tmp_path / "checkpoint")
    second.learn(tokens)
    assert repr(seen + more) == repr(expected)  # as texts, for NaN is equal to nothing
    for name, weight in weights(whole.policy).items():
        assert torch.equal(weight, weights(second.policy)[name]), name


def test_an_agent_can_be_loaded_by_its_checkpoint_alone(tmp_path, tiny_model_path, tiny_tokenizer):
    policy = LanguageModelPolicy(tiny_model_path, LoraSettings(rank=2), dtype="float32", temperature=0.5)
    env = TokenVectorEnv(2, EXAMPLES, policy.tokenizer, Right(), TokenSettings(max_tokens=2, context_length=64))
    agent = TokenPPO(env, policy, learning_rate=1e-2).learn(4)
    agent.save(tmp_path)
    loaded = TokenPPO.load(tmp_path, env, policy_from(tmp_path / "policy", dtype="float32"))
    assert loaded.settings == agent.settings and loaded.num_timesteps == agent.num_timesteps
    texts = [c.text for [c] in agent.generate(["red sea", "sky"])]
    assert [c.text for [c] in loaded.generate(["red sea", "sky"])] == texts


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    agent = TokenPPO(make_env(), make_policy())
    agent.save(tmp_path)
    with pytest.raises(InputError, match="a checkpoint of ppo, not of grpo"):
        GRPO(make_env(group_size=2), make_policy()).restore(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        agent.restore(tmp_path / "nowhere")
    with pytest.raises(InputError, match="cannot read"):
        TokenPPO.load(tmp_path / "nowhere", make_env())
    (tmp_path / "optimizer.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="cannot read"):
        agent.restore(tmp_path)
    state = json.loads((tmp_path / "trainer.json").read_text("utf-8"))
    del state["env"]
    (tmp_path / "trainer.json").write_text(json.dumps(state)[:-9], "utf-8")
    with pytest.raises(InputError, match="cannot read"):
        agent.restore(tmp_path)


# --- learning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (TokenPPO, {"value_learning_rate": 3e-2}),
        (GRPO, {"epochs": 3}),
        (RLOO, {"epochs": 3}),
    ],
)
def test_the_right_word_is_learned(cls, options):
    grouped = {} if cls is TokenPPO else {"group_size": 8}
    env = make_env(n=32, constrained=True, max_tokens=1, **grouped)
    agent, rows = logged(cls(env, make_policy(), learning_rate=3e-3, kl_coefficient=0.01, **options))
    agent.learn(32 * 16)
    rewards = [row["rollout/reward"] for row in rows]
    assert rewards[0] < 0.6 and np.mean(rewards[-3:]) > 0.9, rewards


# --- demonstrations ----------------------------------------------------------------------------------------------


def demonstrations(constrained=False):
    tokenizer = WordTokenizer(words=WORDS)
    sets = [np.array([RED, BLUE]), np.array([EOS])] if constrained else None
    return [
        TokenizedDemonstration(
            tokenizer.encode(e.prompt), [WORDS.index(e.reference), EOS][: 1 + i % 2], sets and sets[: 1 + i % 2]
        )
        for i, e in enumerate(EXAMPLES * 4)
    ]


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_demonstrations_are_fitted(optimizer, constrained):
    policy = make_policy(value="none")
    rate = 1e-2
    trainer, rows = logged(SFT(policy, optimizer=optimizer, learning_rate=rate, batch_size=8, epochs=20))
    trainer.fit(demonstrations(constrained))
    losses = [row["train/loss"] for row in rows]
    assert len(losses) == 40 and np.mean(losses[-4:]) < 0.2 * losses[0], losses
    completions = policy.generate([d.prompt for d in demonstrations()[:4]], Sampling(max_tokens=1, temperature=0))
    assert [c.token_ids for [c] in completions] == [[RED], [BLUE], [RED], [BLUE]]


def test_micro_batches_do_not_change_what_is_fitted():
    after = []
    for budget in (1, 24, 4096):
        policy = make_policy(value="none")
        trainer, rows = logged(SFT(policy, learning_rate=1e-3, batch_size=6, token_budget=budget))
        trainer.fit(demonstrations())
        after.append(([row["train/loss"] for row in rows], weights(policy)))
    for losses, trained in after[:2]:
        np.testing.assert_allclose(losses, after[2][0], rtol=1e-5)
        for name, weight in trained.items():
            torch.testing.assert_close(weight, after[2][1][name], atol=1e-5, rtol=1e-4)


def test_fitting_goes_on_from_a_checkpoint(tmp_path):
    def trainer():
        return logged(SFT(make_policy(value="none"), learning_rate=1e-2, batch_size=5, epochs=2, schedule="cosine"))

    (whole, expected), (first, seen), (second, more) = trainer(), trainer(), trainer()
    whole.fit(demonstrations())
    first.fit(demonstrations(), callback=lambda agent: agent.steps < 3)
    first.save(tmp_path)
    second.restore(tmp_path)
    second.fit(demonstrations())
    assert len(seen) == 3 and seen + more == expected
    for name, weight in weights(whole.policy).items():
        assert torch.equal(weight, weights(second.policy)[name])


def test_the_loss_is_the_mean_over_all_response_tokens():
    trainer, rows = logged(SFT(make_policy(value="none"), batch_size=100))
    trainer.fit(demonstrations())
    prompts, responses = zip(*[(np.array(d.prompt), np.array(d.response)) for d in demonstrations()], strict=True)
    with torch.no_grad():
        scores = make_policy(value="none").score(prompts, responses, [None] * len(prompts))
    assert rows[0]["train/loss"] == pytest.approx(-float(scores.logprobs.mean()), rel=1e-5)


def test_bad_demonstrations_are_refused():
    trainer = SFT(make_policy(value="none"))
    for bad in ([], [TokenizedDemonstration([RED], [])], [TokenizedDemonstration([], [RED])]):
        with pytest.raises(InputError, match="needs demonstrations"):
            trainer.fit(bad)
    with pytest.raises(InputError, match="batch_size"):
        SFT(trainer.policy, batch_size=0)


def test_fitting_stops_when_no_gradient_is_finite():
    trainer = SFT(make_policy(value="none"), batch_size=1)
    trainer.policy.lm.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingDivergedError):
        trainer.fit(demonstrations())
    assert trainer.optimizer.skipped == 10


# --- acting ------------------------------------------------------------------------------------------------------


def test_predict_takes_observations_and_gives_tokens():
    env = make_env()
    agent = TokenPPO(env, make_policy())
    observation, _ = env.reset(seed=0)
    actions, state = agent.predict(observation, deterministic=True)
    assert state is None and actions.shape == (8,) and actions.dtype == np.int64
    for i, prompt in enumerate(env.prompts()):
        with torch.no_grad():
            logits = agent.policy.lm.model(input_ids=torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1]
        one = {key: value[i] for key, value in observation.items()}
        assert actions[i] == int(logits.argmax()) == agent.predict(one, deterministic=True)[0]
    assert isinstance(agent.predict(one)[0], int)
    env.step(agent.predict(observation)[0])
    masks = np.zeros((8, len(agent.policy.lm.tokenizer)), dtype=bool)
    masks[:, RED] = masks[:4, SEA] = True
    allowed, _ = agent.predict(observation, action_masks=masks)
    assert set(allowed[:4]) <= {RED, SEA} and set(allowed[4:]) == {RED}
    assert set(agent.predict(observation, action_masks=masks[7])[0]) == {RED}
    assert len({agent.predict(one)[0] for _ in range(20)}) > 1, "sampling draws anew at every call"


def test_generate_continues_texts_and_ids_as_in_training():
    agent = TokenPPO(make_env(max_tokens=3), make_policy())
    [[by_text], [by_ids]] = agent.generate(["red sea", [RED, SEA]])
    assert by_text.token_ids == by_ids.token_ids and 1 <= len(by_text.token_ids) <= 3
    [[longer]] = agent.generate(["red sea"], Sampling(max_tokens=9, temperature=0))
    assert len(longer.token_ids) == 9 or longer.token_ids[-1] == EOS


class Watching(BaseCallback):
    """Counts, and stops after three updates."""

    def __init__(self):
        super().__init__()
        self.told = []

    def _on_training_start(self):
        assert self.training_env is self.model.get_env()
        self.told.append("start")

    def _on_step(self):
        self.logger.record("mine", self.n_calls)
        self.told.append(self.num_timesteps)
        return self.n_calls < 3

    def _on_training_end(self):
        self.told.append("end")


def test_a_stable_baselines3_callback_is_called_after_each_update():
    agent, rows = logged(TokenPPO(make_env(), make_policy(), epochs=1))
    callback = Watching()
    assert agent.learn(10_000, callback) is agent
    assert callback.told == ["start", *[row["step"] for row in rows], "end"]
    assert [row["mine"] for row in rows] == [1, 2, 3] and agent.updates == 3
    assert rows[-1]["rollout/episodes"] == agent.episodes == 24


def test_a_function_may_stop_training():
    agent = TokenPPO(make_env(), make_policy(), epochs=1)
    seen = []
    agent.learn(10_000, lambda agent: seen.append(agent.updates) or len(seen) < 2)
    assert seen == [1, 2]
    agent.learn(agent.num_timesteps + 1, lambda agent: seen.append(agent.updates))  # None goes on
    assert seen == [1, 2, 3]
    agent.learn(agent.num_timesteps)
    assert agent.updates == 3


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (TokenPPO, {"learning_rate": 0.0}),
        (TokenPPO, {"learning_rate": float("nan")}),
        (TokenPPO, {"warmup": 1.0}),
        (TokenPPO, {"final": 1.5}),
        (TokenPPO, {"optimizer": "sgd"}),
        (TokenPPO, {"schedule": "step"}),
        (TokenPPO, {"max_grad_norm": -1.0}),
        (TokenPPO, {"epochs": 0}),
        (TokenPPO, {"minibatches": 0}),
        (TokenPPO, {"rollout_batches": 0}),
        (TokenPPO, {"token_budget": 0}),
        (TokenPPO, {"clip": 0.0}),
        (TokenPPO, {"kl_coefficient": -0.1}),
        (TokenPPO, {"entropy_coefficient": -0.1}),
        (TokenPPO, {"target_kl": -0.1}),
        (TokenPPO, {"top_k": -1}),
        (TokenPPO, {"gamma": 0.0}),
        (TokenPPO, {"lam": 1.1}),
        (TokenPPO, {"kl_estimator": "k2"}),
        (TokenPPO, {"value_clip": -0.2}),
        (TokenPPO, {"kl_horizon": 0}),
        (GRPO, {"loss_mean": "word"}),
        (RLOO, {"gamma": 0.9}),  # no setting of RLOO's
        (TokenPPO, {"colour": "red"}),
    ],
)
def test_settings_out_of_range_are_refused(cls, options):
    with pytest.raises(InputError, match=next(iter(options))):
        cls.settings_class(**options) if "colour" not in options and cls is not RLOO else cls(
            make_env(), "x", **options
        )


def test_an_env_that_does_not_fit_is_refused():
    policy = make_policy()
    for env, message in [
        (TokenEnv(EXAMPLES, WordTokenizer(words=WORDS), Right(), embedder="hashing"), "TokenEnv has no num_envs"),
        (SimpleNamespace(), "need a TokenVectorEnv"),
        (make_env(words=(*WORDS, "red2")), "give the env the model's own tokenizer"),
        (make_env(words=("red", "blue", "sea", "end", "sky")), "give the env the model's own tokenizer"),
        (make_env(mode="SameStep"), "autoreset_mode='Disabled', got 'SameStep'"),
        (make_env(positions=512), "reads 256 tokens"),
    ]:
        with pytest.raises(InputError, match=message):
            TokenPPO(env, policy)


def test_ppo_needs_values_and_the_others_groups():
    with pytest.raises(InputError, match="needs a value function"):
        TokenPPO(make_env(), make_policy(value="none"))
    for cls in (GRPO, RLOO):
        with pytest.raises(InputError, match="group_size above 1"):
            cls(make_env(n=4), make_policy()).learn(10)
