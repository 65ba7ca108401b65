"""Reward models: which hidden state scores which token, saving and loading, and what their rewards pay in an env."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from tiny_models import build_model

from instructgym.agents.policy.language_model import LanguageModelPolicy
from instructgym.agents.supervised.sft import SFT, TokenizedDemonstration
from instructgym.envs.tokens.env import TokenEnv, TokenVectorEnv
from instructgym.envs.tokens.episode import PromptExample
from instructgym.envs.tokens.process import TokenSettings
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.causal_lm import CausalLM
from instructgym.llm_backends.local.tokenization import ByteTokenizer, WordTokenizer
from instructgym.llm_backends.training.adapters import LoraSettings
from instructgym.rewards import Sample, WeightedSum
from instructgym.rewards.learned.reward_model import ADAPTER, RewardModel
from instructgym.rewards.learned.token_reward import SequenceReward, TokenReward

WORDS = ("red", "blue", "sea", "sky", "end")
RED, BLUE, SEA, SKY, END, EOS, UNK = range(7)
PROMPTS = [np.array(p, np.int32) for p in ([RED, BLUE], [SEA], [END, SKY, SEA, BLUE, RED])]
RESPONSES = [np.array(r, np.int32) for r in ([BLUE, EOS], [RED, SKY, SKY, SEA], [END])]
EXAMPLES = [PromptExample("one", "red sea"), PromptExample("two", "sky sky end"), PromptExample("three", "blue")]


def tiny(architecture="llama", words=WORDS):
    tokenizer = WordTokenizer(words=words).hf
    model = build_model(architecture, vocabulary=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return CausalLM(model, tokenizer, name="tiny")


def moved(model, scale=0.3, seed=0):
    """The same model with other trained weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters().values():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def build(lm=None, rank=4, level="token", **options):
    return RewardModel(lm or tiny(), LoraSettings(rank=rank), level, dtype="float32", **options)


def close(mine, theirs, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(mine), np.asarray(theirs), atol=tolerance, rtol=0)


# --- the model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [0, 10])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mistral-sliding"])
def test_a_token_is_scored_by_the_state_after_it(architecture, header):
    model = moved(build(tiny(architecture)))
    prompts = [np.concatenate([np.full(header, SKY, np.int32), p]) for p in PROMPTS]
    for prompt, response, row in zip(prompts, RESPONSES, model.score(prompts, RESPONSES), strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        with torch.no_grad(), model.trunk.active(ADAPTER) as lm:
            states = lm.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        assert row.dtype == np.float32
        close(row, (states[len(prompt) :] @ model.head.weight[0]).detach())


def test_a_reward_depends_on_its_own_token_and_on_none_after_it():
    model = moved(build())
    [whole] = model.score(PROMPTS[1:2], RESPONSES[1:2])
    for t in range(4):
        other = RESPONSES[1].copy()
        other[t] = END
        [changed] = model.score(PROMPTS[1:2], [other])
        close(changed[:t], whole[:t])
        assert abs(changed[t] - whole[t]) > 0.01
        [prefix] = model.score(PROMPTS[1:2], [RESPONSES[1][: t + 1]])
        close(prefix, whole[: t + 1], 1e-4)


def test_a_response_that_ends_is_paid_for_ending():
    model = moved(build())
    [short], [ended], [going] = (
        model.score(PROMPTS[:1], [np.array(r, np.int32)]) for r in ([BLUE], [BLUE, EOS], [BLUE, SKY])
    )
    assert len(ended) == len(short) + 1
    close(ended[:1], short)
    assert abs(ended[1] - going[1]) > 0.01


def test_micro_batches_do_not_change_scores():
    model = moved(build())
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 5, rng.integers(1, 9)).astype(np.int32) for _ in range(20)]
    responses = [rng.integers(0, 6, rng.integers(1, 9)).astype(np.int32) for _ in range(20)]
    together, apart = (model.score(prompts, responses, token_budget=n) for n in (10**6, 1))
    for number, (one, two) in enumerate(zip(together, apart, strict=True)):
        close(one, two)
        close(one, model.score(prompts[number : number + 1], responses[number : number + 1])[0])
    flat = model.rewards(prompts, responses)
    assert flat.requires_grad
    close(flat.detach(), np.concatenate(together))


def test_at_level_sequence_the_last_token_counts():
    token, sequence = moved(build()), moved(build(level="sequence"))
    last = [row[-1] for row in token.score(PROMPTS, RESPONSES)]
    assert [row.shape for row in sequence.score(PROMPTS, RESPONSES)] == [(1,)] * 3
    close(sequence.sequence_scores(PROMPTS, RESPONSES), last)
    close(token.sequence_scores(PROMPTS, RESPONSES), [row.mean() for row in token.score(PROMPTS, RESPONSES)])
    assert sequence.rewards(PROMPTS, RESPONSES).shape == (3,)


def test_signed_probabilities_reach_their_ends():
    model = moved(build())
    raw = np.concatenate(model.score(PROMPTS, RESPONSES))
    model.transform = "signed-probability"
    close(np.concatenate(model.score(PROMPTS, RESPONSES)), 2 / (1 + np.exp(-raw)) - 1, 1e-6)
    with torch.no_grad():
        model.head.weight *= 50
    assert np.abs(np.concatenate(model.score(PROMPTS, RESPONSES))).max() > 0.95


def test_a_new_model_scores_zero_and_has_gradients():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = build()
    assert torch.equal(torch.get_rng_state(), before)
    assert not np.concatenate(model.score(PROMPTS, RESPONSES)).any()
    moved(model).rewards(PROMPTS, RESPONSES).sum().backward()
    trained = model.parameters()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert {name for name in trained if not name.startswith("reward_head.")} == {
        name for name, p in model.lm.model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([[RED], []], [[RED], [RED]], "row 1: a reward model needs a prompt"),
        ([[RED]], [[]], "row 0"),
        ([[RED] * 200], [[RED] * 57], r"200 \+ 57 tokens, tiny reads 256"),
        ([[RED]], [[7]], r"token ids 0 to 7.*vocabulary is \[0, 7\)"),
        ([[RED]], [[-1]], "token ids -1"),
    ],
)
def test_what_it_cannot_read_is_refused(prompts, responses, message):
    arrays = [[np.array(row, np.int32) for row in rows] for rows in (prompts, responses)]
    with pytest.raises(InputError, match=message):
        build().score(*arrays)


def test_an_unknown_level_is_refused():
    with pytest.raises(InputError, match="token or sequence"):
        build(level="word")


# --- saving and loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "level"), [(4, "token"), (4, "sequence"), (0, "token")])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, rank, level):
    model = moved(build(rank=rank, level=level), 0.1)
    model.loss, model.transform, model.free_level, model.mean, model.std = "x", "signed-probability", True, 0.25, 2.0
    model.save(tmp_path)
    other = RewardModel.load(tmp_path, tiny(), dtype="float32")
    for mine, theirs in zip(model.score(PROMPTS, RESPONSES), other.score(PROMPTS, RESPONSES), strict=True):
        assert np.array_equal(mine, theirs)
    assert other.settings() == model.settings()
    assert all(path.suffix in (".json", ".safetensors", ".md", "") for path in tmp_path.rglob("*"))


def test_a_model_from_a_folder_is_loaded_by_its_name(tmp_path, tiny_model_path):
    model = moved(RewardModel(tiny_model_path, LoraSettings(rank=2), dtype="float32"))
    model.save(tmp_path)
    close(
        np.concatenate(RewardModel.load(tmp_path, dtype="float32").score(PROMPTS, RESPONSES)),
        np.concatenate(model.score(PROMPTS, RESPONSES)),
    )


def test_files_that_do_not_fit_are_refused(tmp_path):
    model = build()
    model.save(tmp_path)
    with pytest.raises(InputError, match="pass another place of it as model="):
        RewardModel.load(tmp_path)  # "tiny" is no path
    with pytest.raises(InputError, match=r"reads the tokens of 'tiny' \(vocabulary 7\).*vocabulary 8"):
        RewardModel.load(tmp_path, tiny(words=(*WORDS, "more")))
    with pytest.raises(InputError, match="reads the tokens of"):  # as many, but others
        RewardModel.load(tmp_path, tiny(words=(*WORDS[:-1], "other")))
    with pytest.raises(InputError, match="other layers"):
        RewardModel.load(tmp_path, tiny("gpt2"))
    with pytest.raises(InputError, match="level=token"):
        build(level="sequence").restore(tmp_path)
    with pytest.raises(InputError, match="lora="):
        build(rank=8).restore(tmp_path)
    head = tmp_path / "reward_head.safetensors"
    head.write_bytes(head.read_bytes()[:20])
    with pytest.raises(InputError, match="cannot read a reward model"):
        build().restore(tmp_path)
    (tmp_path / "reward_model.json").write_text(json.dumps(model.settings() | {"lora": {"size": 4}}), "utf-8")
    with pytest.raises(InputError, match=r"cannot read a reward model.*size"):
        RewardModel.load(tmp_path, tiny())
    (tmp_path / "reward_model.json").write_text(json.dumps({"model": "tiny"}), "utf-8")
    with pytest.raises(InputError, match=r"lacks .*tokenizer"):
        RewardModel.load(tmp_path, tiny())
    with pytest.raises(InputError, match="cannot read a reward model"):
        TokenReward(str(tmp_path / "nowhere"))


# --- one trunk ---------------------------------------------------------------------------------------------------


def policy_scores(policy):
    with torch.no_grad():
        scores = policy.score(PROMPTS, RESPONSES, [None] * 3)
    return torch.cat([scores.logprobs, scores.values, policy.reference_logprobs(PROMPTS, RESPONSES, [None] * 3)])


@pytest.mark.parametrize("policy_first", [True, False])
def test_policy_and_reward_model_share_a_trunk(policy_first):
    def policy_on(lm):
        return moved(LanguageModelPolicy(lm, LoraSettings(rank=4), dtype="float32"), seed=1)

    apart = policy_scores(policy_on(tiny())), moved(build(rank=2)).score(PROMPTS, RESPONSES)
    lm = tiny()
    if policy_first:
        policy = policy_on(lm)
        model = moved(build(policy.trunk, rank=2))
    else:
        model = moved(build(lm, rank=2))
        policy = policy_on(model.trunk)
    close(policy_scores(policy), apart[0], 1e-6)
    close(np.concatenate(model.score(PROMPTS, RESPONSES)), np.concatenate(apart[1]), 1e-6)

    before = model.score(PROMPTS, RESPONSES)
    SFT(policy, learning_rate=0.01, batch_size=2, epochs=3).fit(
        [TokenizedDemonstration([i, 1], [2, 5]) for i in range(4)]
    )
    assert (policy_scores(policy) - apart[0]).abs().max() > 0.05
    assert all(map(np.array_equal, model.score(PROMPTS, RESPONSES), before))
    mine = policy_scores(policy)
    moved(model, seed=3)
    assert torch.equal(policy_scores(policy), mine)


def test_adding_a_reward_model_leaves_a_policy_in_training_alone(tmp_path):
    lm = tiny()
    policy = moved(LanguageModelPolicy(lm, LoraSettings(rank=4), dtype="float32"))
    trained = policy.parameters()
    model = moved(build(lm))
    assert all(parameter.requires_grad for parameter in trained.values())
    policy.freeze_reference()
    assert policy.frozen_adapters() == ["sft"]
    policy.save(tmp_path)
    assert not (tmp_path / ADAPTER).exists()
    assert all(parameter.requires_grad for parameter in model.parameters().values())


def test_a_trunk_is_not_shared_with_one_who_trains_all_of_it():
    lm = tiny()
    build(lm)
    with pytest.raises(InputError, match="has an adapter 'reward' already"):
        build(lm)
    with pytest.raises(InputError, match="shared with reward, so policy cannot train all its weights"):
        LanguageModelPolicy(lm, LoraSettings(rank=0))
    whole = LanguageModelPolicy(tiny(), LoraSettings(rank=0), reference="none")
    with pytest.raises(InputError, match="all weights of tiny are trained by policy"):
        build(whole.trunk)


# --- rewards -----------------------------------------------------------------------------------------------------


def make_env(reward, cls=TokenVectorEnv, tokenizer=None):
    copies = (3,) if cls is TokenVectorEnv else ()
    settings = TokenSettings(max_tokens=4, context_length=16)
    return cls(*copies, EXAMPLES, tokenizer or WordTokenizer(words=WORDS), reward, settings)


@pytest.mark.parametrize("form", ["causal", "whole"])
def test_stepping_pays_what_playing_pays(form):
    model, responses = moved(build()), [*RESPONSES[:2], np.array([END, EOS], np.int32)]
    reward = TokenReward(model, form, scale=0.5)
    env, single = make_env(reward), make_env(reward, TokenEnv)
    env.reset(seed=0)
    prompts = [p.astype(np.int32) for p in env.prompts()]
    due = [0.5 * row / (len(row) if form == "whole" else 1) for row in model.score(prompts, responses)]
    played = env.play([r.tolist() for r in responses])
    for i, response in enumerate(responses):
        [index] = [k for k, e in enumerate(EXAMPLES) if env.process.tokenizer.encode(e.prompt) == prompts[i].tolist()]
        single.reset(seed=0, options={"index": index})
        steps = [single.step(int(token))[1] for token in response]
        close(steps, due[i] if form == "causal" else [0.0] * (len(response) - 1) + [due[i].sum()], 1e-4)
        close(played.rewards[i], steps, 1e-4)
        if form == "whole":
            close(played.credit[i], due[i])


def test_terms_say_the_mean_and_the_worst_token():
    model = moved(build())
    env = make_env(TokenReward(model, scale=2.0))
    env.reset(seed=0)
    raw = model.score([p.astype(np.int32) for p in env.prompts()], RESPONSES)
    terms = env.play([r.tolist() for r in RESPONSES]).infos
    assert [t["reward_terms"]["mean"] for t in terms] == pytest.approx([float(r.mean()) for r in raw], abs=1e-5)
    assert [t["reward_terms"]["min"] for t in terms] == pytest.approx([float(r.min()) for r in raw], abs=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_sequence_reward_is_paid_at_the_end(level):
    model = moved(build(level=level))
    env = make_env(SequenceReward(model, scale=3.0))
    env.reset(seed=0)
    prompts = [p.astype(np.int32) for p in env.prompts()]
    rewards = env.play([r.tolist() for r in RESPONSES]).rewards
    scores = 3.0 * model.sequence_scores(prompts, [np.asarray(r) for r in RESPONSES])
    # The first two end by themselves; the third is not over and gets nothing.
    assert [len(r) for r in rewards] == [2, 4, 1]
    close([rewards[0][-1], rewards[1][-1]], scores[:2])
    assert not rewards[0][:-1].any() and not rewards[1][:-1].any() and not rewards[2].any()


def sample(ids, prompt="red sea"):
    return Sample("", prompt=prompt, token_ids=np.array(ids, np.int32))


def test_centring_takes_the_price_off_length():
    model = moved(build())
    model.mean = 0.4
    plain, centred = (TokenReward(model, center=c).reward([sample([RED, SEA])])[0] for c in (False, True))
    close(centred.per_token, plain.per_token - 0.4)
    assert centred.value == pytest.approx(plain.value - 0.8, abs=1e-6)
    assert centred.terms == plain.terms
    whole, off = (TokenReward(model, "whole", center=c).reward([sample([RED, SEA])])[0] for c in (True, False))
    assert whole.value == pytest.approx(off.value - 0.4, abs=1e-6)
    assert TokenReward(model).offset == 0.0
    model.free_level = True
    assert TokenReward(model).offset == TokenReward(model, center=True).offset == pytest.approx(0.4)
    model.mean = None
    assert TokenReward(model).offset == 0.0
    with pytest.raises(InputError, match="needs a trained reward model"):
        TokenReward(model, center=True)


def test_a_response_without_tokens_has_no_verdict():
    scores = TokenReward(moved(build())).reward([sample([]), sample([RED])])
    assert [score.valid for score in scores] == [False, True]
    assert not TokenReward(build()).reward([sample([])])[0].valid


def test_a_sample_without_token_ids_is_refused():
    with pytest.raises(InputError, match="use it in a token env"):
        TokenReward(build()).reward([Sample("red")])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"form": "later"}, "causal or whole"), ({"scale": float("nan")}, "scale must be finite")],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        TokenReward(build(), **options)


def test_a_sequence_model_has_no_token_rewards():
    with pytest.raises(InputError, match="use the reward sequence-reward"):
        TokenReward(build(level="sequence"))


def test_an_env_of_another_tokenizer_is_refused_before_anything_is_loaded(tmp_path):
    build().save(tmp_path)
    reward = TokenReward(str(tmp_path))  # its model, called "tiny", could not even be loaded
    make_env(reward)
    for other in (WordTokenizer(words=(*WORDS[:-1], "other")), ByteTokenizer()):
        with pytest.raises(InputError, match="use one tokenizer for both"):
            make_env(reward, tokenizer=other)
        with pytest.raises(InputError, match="use one tokenizer for both"):
            make_env(WeightedSum({"mine": reward}), tokenizer=other)


def test_an_env_takes_a_saved_model_by_its_folder(tmp_path, tiny_model_path):
    model = moved(RewardModel(tiny_model_path, LoraSettings(rank=2), dtype="float32"))
    model.save(tmp_path)
    env = gym.make_vec(
        "instructgym/GenerateLabel-v0",
        num_envs=2,
        examples=[PromptExample("one", "write a short poem")],
        tokenizer={"id": "transformers", "kwargs": {"model": tiny_model_path}},
        reward={"id": "token-reward", "kwargs": {"model": str(tmp_path), "dtype": "float32"}},
        max_tokens=3,
        context_length=64,
    ).unwrapped
    env.reset(seed=0)
    prompts, responses = [p.astype(np.int32) for p in env.prompts()], [[5, 6, 7], [8, 1]]
    raw = model.score(prompts, [np.array(r) for r in responses])
    close(np.concatenate(env.play(responses).rewards), np.concatenate(raw))
