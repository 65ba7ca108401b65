"""The token MDP, one copy: checkers, how episodes end, masks, options, what rewards are paid when, errors."""

import json
import sys
import types
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from transformers import PreTrainedTokenizerBase

from instructgym.envs.process import InvalidRewardError
from instructgym.envs.tokens.env import TokenEnv
from instructgym.envs.tokens.episode import PromptExample
from instructgym.envs.tokens.process import TokenSettings
from instructgym.llm_backends import ScriptedBackend
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.tokenization import ByteTokenizer, WordTokenizer
from instructgym.rewards import Reward, Score

WORDS = ("red", "blue", "sea", "sky", "end")
RED, BLUE, SEA, SKY, END, EOS, UNK = range(7)
EXAMPLES = [
    PromptExample("one", "red sea", "blue", ("red", "blue"), {"task": "colour", "weight": 2}),
    PromptExample("two", "blue sky sky", "red", ("red", "red sea", "sky")),
    PromptExample("three", "sea", None, ("end",), {"task": "end"}),
]


class Terminal(Reward):
    """Pays the number of tokens; keeps what it was asked."""

    name = "count"

    def __init__(self):
        self.samples, self.resets = [], 0

    def reset(self):
        self.resets += 1

    def reward(self, samples):
        self.samples += samples
        return [self.score(sample) for sample in samples]

    def score(self, sample):
        return Score(float(len(sample.token_ids)), terms={"count": float(len(sample.token_ids))})


class Causal(Terminal):
    """Pays token t its id plus t."""

    timing = "causal"

    def score(self, sample):
        split = (sample.token_ids + np.arange(len(sample.token_ids))).astype(np.float32)
        return Score(float(split.sum()), per_token=split)


class Whole(Terminal):
    """The longer the response, the more its first token is worth."""

    timing = "whole"

    def score(self, sample):
        split = np.zeros(len(sample.token_ids), np.float32)
        split[0] = len(split)
        return Score(float(split.sum()), per_token=split)


def make(examples=EXAMPLES, tokenizer=None, reward=None, observation="tokens", **settings):
    settings = {"max_tokens": 4, "context_length": 12} | settings
    return TokenEnv(
        examples,
        tokenizer or WordTokenizer(words=WORDS),
        Terminal() if reward is None else reward,
        TokenSettings(**settings),
        observation,
        embedder="hashing",
        render_mode="ansi",
    )


def play(env, actions, **reset):
    """The steps' outcomes; stops where the episode ends."""
    steps = [env.reset(**reset)]
    for action in actions:
        steps.append(env.step(action))
        if steps[-1][2]:
            break
    return steps


def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


# --- checkers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("reward", [Terminal, Causal, Whole])
@pytest.mark.parametrize("observation", ["tokens", "onehot"])
def test_both_checkers_find_nothing(observation, reward, constrained):
    from stable_baselines3.common.env_checker import check_env as check_sb3_env

    spec = EnvSpec(
        "tests/Tokens-v0",
        entry_point=TokenEnv,
        kwargs={
            "examples": EXAMPLES,
            "tokenizer": WordTokenizer(words=WORDS),
            "reward": reward(),
            "settings": TokenSettings(max_tokens=4, context_length=12, constrained=constrained),
            "observation": observation,
            "embedder": "hashing",
        },
    )
    for check in (check_env, check_sb3_env):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(gym.make(spec).unwrapped)


@pytest.mark.parametrize("observation", ["tokens", "onehot"])
@pytest.mark.parametrize("constrained", [False, True])
def test_a_random_walk_stays_within_the_contract(observation, constrained):
    env = make(observation=observation, constrained=constrained, stop=("sea sky",))
    env.action_space.seed(0)
    seen, info = env.reset(seed=0)
    reasons = set()
    for _ in range(200):
        assert env.observation_space.contains(seen)
        assert env.action_masks().dtype == bool and env.action_masks().shape == (7,)
        if constrained:
            assert info["action_mask"].dtype == np.int8
            np.testing.assert_array_equal(info["action_mask"].astype(bool), env.action_masks())
        else:
            assert "action_mask" not in info and env.action_masks().all()
        seen, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert type(reward) is float and type(terminated) is bool and truncated is False
        assert terminated == bool(info["finish_reason"])
        reasons.add(info["finish_reason"])
        if terminated:
            assert env.observation_space.contains(seen)
            seen, info = env.reset()
    assert reasons - {""} == ({"illegal", "choice"} if constrained else {"eos", "stop", "length"})


@pytest.mark.parametrize("observation", ["tokens", "onehot"])
def test_stable_baselines3_learns_from_it(observation):
    from sb3_contrib import MaskablePPO

    env = make(observation=observation, constrained=True, max_tokens=2)
    policy = "MultiInputPolicy" if observation == "tokens" else "MlpPolicy"
    model = MaskablePPO(policy, env, n_steps=16, batch_size=16, n_epochs=1, seed=0).learn(32)
    seen, _ = env.reset(seed=0)
    assert env.action_masks()[model.predict(seen, action_masks=env.action_masks())[0]]


def test_observations_are_prompt_and_response():
    [(first, info), (second, *_)] = play(make(), [SKY], options={"index": 0})
    assert info["prompt_tokens"] == 2
    assert first["ids"].tolist() == [RED, SEA] + [0] * 10
    assert second["ids"].tolist() == [RED, SEA, SKY] + [0] * 9
    assert second["mask"].tolist() == [1] * 3 + [0] * 9
    assert (second["ids"].dtype, second["mask"].dtype) == (np.int32, np.int8)
    [_, (onehot, *_)] = play(make(observation="onehot"), [SKY], options={"index": 0})
    assert onehot.tolist() == [RED, SEA, SKY] + [7] * 9


def test_infos_and_observations_are_not_shared():
    env = make(constrained=True)
    kept = play(env, [RED, SEA], seed=0, options={"index": 1})
    arrays = [array for seen, *_, info in kept for array in (*seen.values(), info["action_mask"])]
    for array in arrays:
        assert sum(np.shares_memory(array, other) for other in arrays) == 1
    for seen, *_, info in kept:
        seen["ids"][:] = 0
        info["action_mask"][:] = 0
    assert env.reset(options={"index": 1})[0]["ids"].any() and env.action_masks().any()


# --- ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "actions", "reason", "text", "steps"),
    [
        ({}, [RED, SEA, SKY, RED, RED], "length", "red sea sky red", 4),
        ({}, [RED, EOS, RED], "eos", "red", 2),
        ({}, [EOS], "eos", "", 1),
        ({"max_tokens": 1}, [EOS], "eos", "", 1),
        ({"max_tokens": 1}, [RED], "length", "red", 1),
        ({"stop": ("end",)}, [RED, END, RED], "stop", "red ", 2),
        ({"stop": ["sea sky", "end"]}, [SKY, SEA, SKY], "stop", "sky ", 3),
        ({"stop": ("sea sky", "a s")}, [SEA, SKY], "stop", "", 2),
        ({"stop": ("end",), "max_tokens": 2}, [RED, END], "stop", "red ", 2),
        ({"stop": ("absent",)}, [RED, UNK, RED, RED], "length", "red red red", 4),
    ],
)
def test_how_a_free_response_ends(settings, actions, reason, text, steps):
    reward = Terminal()
    last = play(make(reward=reward, **settings), actions)[-1]
    assert (last[4]["finish_reason"], last[4]["text"], last[4]["step"]) == (reason, text, steps)
    assert last[2:4] == (True, False) and last[1] == steps
    [sample] = reward.samples
    assert sample.response == text and sample.token_ids.tolist() == actions[:steps]
    assert sample.metadata["finish_reason"] == reason


@pytest.mark.parametrize(
    ("index", "actions", "reason", "text"),
    [
        (0, [RED], "choice", "red"),
        (0, [BLUE], "choice", "blue"),
        (0, [SKY], "illegal", "sky"),
        (0, [EOS], "illegal", ""),
        (1, [RED, EOS], "choice", "red"),
        (1, [RED, SEA], "choice", "red sea"),
        (1, [RED, RED], "illegal", "red red"),
        (1, [SKY], "choice", "sky"),
    ],
)
def test_how_a_constrained_response_ends(index, actions, reason, text):
    steps = play(make(constrained=True), actions, options={"index": index})
    info = steps[-1][4]
    assert (info["finish_reason"], info["text"]) == (reason, text)
    assert all(not step[2] for step in steps[1:-1])


def test_the_mask_follows_the_trie():
    env = make(constrained=True)
    _, info = env.reset(options={"index": 1})
    assert np.flatnonzero(info["action_mask"]).tolist() == [RED, SKY]
    info = env.step(RED)[4]
    assert np.flatnonzero(info["action_mask"]).tolist() == [SEA, EOS]
    assert env.step(SEA)[4]["action_mask"].all()  # the episode is over: no action matters


@pytest.mark.parametrize("constrained", [False, True])
def test_an_ended_episode_takes_no_step(constrained):
    env = make(constrained=constrained)
    env.reset(options={"index": 0})
    env.step(RED if constrained else EOS)
    with pytest.raises(RuntimeError, match=r"has ended.*reset\(\)"):
        env.step(RED)
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        make().step(RED)


def test_stop_strings_may_end_within_a_character():
    env = make([PromptExample("x", "é")], ByteTokenizer(), stop=("日!", "\n"), max_tokens=9)
    ids = env.tokenizer.encode_continuation("a日!b")
    [*_, (_, reward, terminated, _, info)] = play(env, ids)
    assert (info["text"], info["step"], reward, terminated) == ("a", 5, 5.0, True)


def test_a_time_limit_truncates():
    env = gym.wrappers.TimeLimit(make(), 2)
    env.reset(seed=0)
    assert env.step(RED)[2:4] == (False, False)
    assert env.step(RED)[2:4] == (False, True)


# --- rewards -----------------------------------------------------------------------------------------------------


def test_terminal_and_whole_rewards_are_paid_with_the_last_token():
    for reward in (Terminal(), Whole()):
        steps = play(make(reward=reward), [RED, SEA, EOS])[1:]
        assert [step[1] for step in steps] == [0, 0, 3]
        assert len(reward.samples) == 1


def test_causal_rewards_are_paid_with_every_token():
    reward = Causal()
    steps = play(make(reward=reward), [RED, SEA, EOS])[1:]
    assert [step[1] for step in steps] == [0, 3, 7]
    assert [sample.response for sample in reward.samples] == ["red", "red sea", "red sea"]
    assert [sample.metadata["finish_reason"] for sample in reward.samples] == ["", "", "eos"]


def test_what_a_reward_is_told():
    reward = Terminal()
    env = make(reward=reward)
    play(env, [SEA, EOS], seed=3, options={"index": 0, "prefix": "red blue"})
    [sample] = reward.samples
    assert (sample.prompt, sample.reference, sample.episode_id) == ("red sea", "blue", "one")
    assert sample.token_ids.dtype == np.int32 and sample.token_ids.tolist() == [RED, BLUE, SEA, EOS]
    assert sample.loss_mask.dtype == bool and sample.loss_mask.tolist() == [False, False, True, True]
    assert sample.metadata == {"task": "colour", "weight": 2, "choices": ("red", "blue"), "finish_reason": "eos"}
    assert EXAMPLES[0].metadata == {"task": "colour", "weight": 2}
    seed = sample.seed
    play(env, [EOS], seed=3)
    play(env, [EOS])
    assert seed == reward.samples[1].seed != reward.samples[2].seed


def test_infos():
    _, (_, info), (_, _, _, _, step), (_, _, _, _, last) = (None, *play(make(), [RED, EOS], options={"index": 0}))
    assert info == {"episode_id": "one", "index": 0, "prompt_tokens": 2, "task": "colour"}
    assert step == info | {
        "step": 1,
        "text": "",
        "finish_reason": "",
        "reward_valid": True,
        "invalid_reason": "",
        "reward_terms": {},
        "judge_calls": 0,
        "reference": None,  # not before the end, but the keys are the same at every step
    }
    told = {"step": 2, "text": "red", "finish_reason": "eos", "reward_terms": {"count": 2.0}}
    assert last == step | told | {"reference": "blue"}
    assert "task" not in make().reset(options={"index": 1})[1]
    infos = [played[-1] for index in range(3) for played in play(make(), [RED, EOS], options={"index": index})[1:]]
    assert {frozenset(info) for info in infos} == {frozenset(last)} and infos[-1]["reference"] is None
    assert [info["task"] for info in infos] == ["colour", "colour", "", "", "end", "end"]


class Moody(Terminal):
    """Has no verdict on "sky"; on "sea" it has one when asked again."""

    def score(self, sample):
        if sample.response == "sky" or (sample.response == "sea" and "attempt" not in sample.metadata):
            return Score.invalid("no idea", calls=1)
        return Score(float(len(sample.response)), calls=1)


def test_without_a_verdict_the_running_mean_is_paid():
    env, seen = make(reward=Moody()), []
    for k, token in enumerate([SKY, RED, BLUE, SKY, SEA, SKY]):
        [*_, (_, reward, _, _, info)] = play(env, [token, EOS], seed=0 if k == 0 else None)
        seen.append((reward, info["reward_valid"], info["invalid_reason"], info["judge_calls"]))
    no, yes = (False, "no idea", 2), (True, "", 1)
    assert seen == [(0.0, *no), (3.0, *yes), (4.0, *yes), (3.5, *no), (3.0, True, "", 2), (10 / 3, *no)]
    [*_, last] = play(env, [SKY, EOS], seed=0)
    assert last[1] == 0.0  # a seed makes the mean start again


def test_or_the_env_stops():
    reward = Moody()
    env = make(reward=reward, on_invalid="raise")
    env.reset(seed=0, options={"index": 1})
    env.step(SKY)
    with pytest.raises(InvalidRewardError, match="no verdict on a response to two: no idea"):
        env.step(EOS)
    assert len(reward.samples) == 1


class Broken(Reward):
    name = "mine"

    def __init__(self, timing, split):
        self.timing, self.split = timing, split

    def reward(self, samples):
        return [Score(3.0, per_token=self.split) for _ in samples]


@pytest.mark.parametrize(
    ("timing", "split", "message"),
    [
        ("causal", None, "'mine' is causal, but its score has no per_token"),
        ("whole", None, "'mine' is whole, but its score has no per_token"),
        ("causal", np.ones(2), r"'mine' has shape \(2,\), the response 1 tokens"),
        ("whole", np.ones((1, 1)), r"'mine' has shape \(1, 1\)"),
        ("causal", np.array([np.nan]), "'mine' is not finite"),
        ("whole", np.array([2.9]), "'mine' sums to 2.9, its value is 3"),
    ],
)
def test_splits_that_cannot_be_used_are_refused(timing, split, message):
    env = make(reward=Broken(timing, split))
    env.reset(seed=0)
    with pytest.raises(InputError, match=message):
        env.step(EOS)


def test_the_judge_by_default_is_the_one_that_was_passed():
    backend = ScriptedBackend()
    reward = {"id": "weighted-sum", "kwargs": {"terms": {"judge": "judge"}}}
    env = TokenEnv(EXAMPLES, WordTokenizer(words=WORDS), reward, TokenSettings(context_length=32), backend=backend)
    assert env.reward.terms["judge"].backend is backend


# --- seeds and options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constrained", [False, True])
def test_same_seed_same_story(constrained):
    def story(env, seed):
        env.action_space.seed(0)
        said = [env.reset(seed=seed)]
        for _ in range(60):
            said.append(env.step(env.action_space.sample()))
            if said[-1][2]:
                said.append(env.reset())
        return plain(said)

    one, other = make(constrained=constrained), make(constrained=constrained)
    said = story(one, 7)
    assert story(other, 7) == said == story(one, 7)
    assert story(one, 8) != said


def test_a_seed_makes_the_reward_forget_and_starts_the_order_again():
    reward = Terminal()
    env = make(reward=reward)
    order = [env.reset(seed=s)[1]["index"] for s in (5, None, None)]
    assert sorted(order) == [0, 1, 2] and reward.resets == 1
    assert [env.reset(seed=s)[1]["index"] for s in (5, None, None)] == order
    assert reward.resets == 2
    make().reset()


def test_option_index_leaves_the_order_alone():
    env, untouched = make(), make()
    order = [untouched.reset(seed=s)[1]["index"] for s in (5, None, None)]
    assert env.reset(seed=5)[1]["index"] == order[0]
    assert [env.reset(options={"index": i})[1]["episode_id"] for i in range(3)] == ["one", "two", "three"]
    assert [env.reset()[1]["index"] for _ in range(2)] == order[1:]


@pytest.mark.parametrize("prefix", [[SEA, SKY], np.array([SEA, SKY]), (SEA, SKY), "sea sky", ["sea sky"], [[SEA, SKY]]])
def test_option_prefix_is_what_was_written_so_far(prefix):
    env = make()
    seen, _ = env.reset(options={"index": 0, "prefix": prefix})
    assert seen["ids"][:5].tolist() == [RED, SEA, SEA, SKY, 0]
    info = env.step(EOS)[4]
    assert (info["step"], info["text"]) == (3, "sea sky")
    assert env.render() == "red seasea sky"


@pytest.mark.parametrize("prefix", [[], "", None, [None]])
def test_an_empty_prefix_is_no_prefix(prefix):
    assert make().reset(options={"index": 0, "prefix": prefix})[0]["mask"].sum() == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"idx": 1}, "unknown reset option 'idx'.*index"),
        ({"index": 3}, r"index'\] must be in \[0, 3\), got 3"),
        ({"index": [0, 1]}, r"one entry per copy \(1\), got 2"),
        ({"prefix": [RED] * 4}, r"already ends the episode \(length\).*max_tokens is 4"),
        ({"prefix": [RED] * 9}, r"already ends the episode \(length\)"),
        ({"prefix": [EOS]}, r"already ends the episode \(eos\)"),
        ({"prefix": "red end"}, r"already ends the episode \(stop\)"),
        ({"prefix": [7]}, r"prefix'\] must be a text or token ids.*\[0, 7\)"),
        ({"prefix": [-1]}, r"prefix'\] must be a text or token ids"),
        ({"prefix": 3}, r"prefix'\] must be a text or token ids"),
        ({"prefix": [[0.5]]}, r"prefix'\] must be a text or token ids"),
        ({"prefix": ["red", "sea"]}, r"one entry per copy \(1\), got 2"),
        ({"reset_mask": np.array([True])}, "reset_mask'.*vector"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(stop=("end",)).reset(seed=0, options=options)


def test_a_constrained_prefix_stays_within_the_choices():
    env = make(constrained=True)
    _, info = env.reset(options={"index": 1, "prefix": "red"})
    assert np.flatnonzero(info["action_mask"]).tolist() == [SEA, EOS]
    for prefix, reason in (("sky", "choice"), ("sea", "illegal")):
        with pytest.raises(ValueError, match=reason):
            env.reset(options={"index": 1, "prefix": prefix})


@pytest.mark.parametrize("action", [7, -1, 1.5, "red", None, np.array([1])])
def test_actions_outside_the_vocabulary_are_refused(action):
    env = make()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"not in Discrete\(7\)"):
        env.step(action)
    assert env.step(np.int64(3))[4]["step"] == 1


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"context_length": 1}, "context_length at least 2"),
        ({"stop": "end"}, "stop must be a tuple of non-empty texts, got 'end'"),
        ({"stop": ("",)}, "stop must be a tuple of non-empty texts"),
        ({"on_invalid": "ignore"}, "on_invalid must be one of retry, raise"),
        ({"group_size": 2}, r"group_size must divide the number of copies \(1\), got 2"),
        ({"group_size": 0}, "group_size must divide"),
        ({"examples": []}, "at least one example"),
        ({"observation": "pixels"}, "unknown observation mode 'pixels'.*tokens, onehot"),
        ({"tokenizer": "gpt"}, "unknown tokenizer 'gpt'.*words"),
        ({"reward": "nice"}, "unknown reward 'nice'"),
        (
            {"context_length": 6},
            "prompt of example 'two' has 3 tokens, with max_tokens=4 .* context of 6: shorten.*reads 64",
        ),
        ({"context_length": 99, "max_tokens": 62}, "prompt of example 'two' has 3 tokens.* context of 64"),
        ({"examples": [PromptExample("void", " ")]}, "prompt of example 'void' is empty"),
        ({"examples": [PromptExample("free", "red")], "constrained": True}, "'free' has none"),
        (
            {"examples": [PromptExample("long", "red", choices=("red sea",))], "constrained": True, "max_tokens": 1},
            "choice of example 'long' has 2 tokens.*max_tokens=1",
        ),
        (
            {"examples": [PromptExample("same", "red", choices=("cat", "dog"))], "constrained": True},
            "'same' are the same in tokens: cat, dog",
        ),
        (
            {"examples": [PromptExample("none", "red", choices=("red", " "))], "constrained": True},
            "choices of example 'none'.*none may be empty",
        ),
    ],
)
def test_bad_arguments_are_refused_with_a_clear_message(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**settings)
    assert "\n" not in str(error.value)


def test_a_reward_is_needed():
    with pytest.raises(InputError, match="reward is missing"):
        TokenEnv(EXAMPLES, "bytes", embedder="hashing")


def test_onehot_is_for_small_vocabularies():
    with pytest.raises(InputError, match=r"300 x 258 inputs, more than 65536.*context_length"):
        make(tokenizer=ByteTokenizer(), observation="onehot", context_length=300)


def test_only_prompts_that_might_not_fit_are_encoded_at_first():
    asked = []

    class Counting(WordTokenizer):
        def encode_batch(self, texts, markup=False):
            asked.extend(texts)
            return super().encode_batch(texts, markup)

    examples = [PromptExample("short", "red"), PromptExample("long", "red " * 5)]
    env = make(examples, Counting(words=WORDS))
    assert asked == ["red " * 5]
    for _ in range(3):
        env.reset(options={"index": 0})
        env.reset(options={"index": 1})
    assert asked == ["red " * 5, "red"]


def test_the_generation_spec_says_where_responses_end():
    spec = make(stop=["end"]).generation
    assert (spec.vocabulary, spec.eos_ids, spec.stop) == (7, frozenset({EOS}), ("end",))
    assert (spec.max_tokens, spec.context_length) == (4, 12)
    assert spec.tokenizer == "words:red blue sea sky end"
    assert make(tokenizer=ByteTokenizer(positions=20), context_length=1024).generation.context_length == 20


def test_a_spec_survives_json(monkeypatch):
    module = types.ModuleType("tests_of_tokens")
    module.make = lambda max_tokens=4, **kwargs: TokenEnv(
        EXAMPLES, settings=TokenSettings(max_tokens=max_tokens, context_length=12), embedder="hashing", **kwargs
    )
    module.Terminal = Terminal
    monkeypatch.setitem(sys.modules, module.__name__, module)
    gym.register("tests/Tokens-v0", entry_point="tests_of_tokens:make")  # taken back below
    try:
        tokenizer = {"id": "words", "kwargs": {"words": list(WORDS)}}
        env = gym.make("tests/Tokens-v0", max_tokens=3, tokenizer=tokenizer, reward="tests_of_tokens:Terminal")
        again = gym.make(EnvSpec.from_json(env.spec.to_json()))
        assert plain(play(again, [RED] * 9, seed=1)) == plain(play(env, [RED] * 9, seed=1))
        assert json.loads(env.spec.to_json())["kwargs"]["tokenizer"] == tokenizer
        live = gym.make("tests/Tokens-v0", tokenizer=WordTokenizer(words=WORDS), reward=Terminal())
        with pytest.raises(ValueError, match="argument 'tokenizer' holds a live WordTokenizer"):
            live.spec.to_json()
    finally:
        del gym.registry["tests/Tokens-v0"]


def test_a_step_decodes_as_much_however_long_the_response(monkeypatch):
    env = make([PromptExample("x", "a")], ByteTokenizer(), max_tokens=2000, context_length=2048, stop=("\n\n",))
    env.reset(seed=0)
    decoded, decode = [], PreTrainedTokenizerBase.decode

    def counting(self, ids, *args, **kwargs):
        decoded.append(len(ids))
        return decode(self, ids, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "decode", counting)

    def longest(steps):
        decoded.clear()
        for _ in range(steps):
            env.step(65)
        return max(decoded), len(decoded)

    early = longest(100)
    longest(1000)
    assert longest(100) == early and early[0] < 20


@pytest.mark.parametrize("ids", [("a", "a"), ("", "")])
def test_an_id_names_one_prompt(ids):
    def build(*prompts):
        return TokenEnv(
            [PromptExample(i, p) for i, p in zip(ids, prompts, strict=True)], WordTokenizer(words=WORDS), Terminal()
        )

    with pytest.raises(InputError, match=r"two examples have the id .* and different texts, 'red' and 'blue'"):
        build("red", "blue")
    assert build("red", "red").process.source.size == 2
