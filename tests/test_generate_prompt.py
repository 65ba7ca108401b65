"""``instructgym/GeneratePrompt-v0``: instructions for a task, hints for one input, what they are paid, bad input."""

import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from tiny_models import build_tokenizer
from token_cases import assert_equal, plain, stepped

import instructgym  # noqa: F401
from instructgym.envs.tokens.episode import PromptExample
from instructgym.llm_backends import BackendError, ScriptedBackend, UnsupportedRequestError
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.backend import TransformersBackend
from instructgym.llm_backends.local.tokenization import LoadedTokenizer
from instructgym.rewards import FunctionReward, HintedResponse, Sample, Score

ENV_ID = "instructgym/GeneratePrompt-v0"


def by_words(prompt, completion):
    """A frozen model that reads the film's quality only where the prompt asks for it; else it says Positive."""
    positive = completion.strip() == "Positive"
    if "sentiment" not in prompt:
        return np.log(0.6 if positive else 0.4)
    good = "good film" in prompt.rpartition("Review: ")[2]
    return np.log(0.9 if positive == good else 0.1)


FROZEN = ScriptedBackend(score=by_words)


@pytest.fixture
def make(tmp_path):
    (tmp_path / "SST-2").mkdir()
    rows = [f"{('bad', 'good')[i % 2]} film {i}\t{i % 2}" for i in range(60)]
    for name in ("train", "dev"):
        (tmp_path / "SST-2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    pairs = [{"instruction": f"Name the colour of thing {i}.", "output": f"It is blue, no {i}."} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")

    def build(n=0, **kwargs):
        if kwargs.get("measure") == "rouge":
            kwargs.setdefault("data", str(tmp_path / "pairs.jsonl"))
        options = {"task": "SST-2", "data_dir": str(tmp_path), "tokenizer": "bytes", "embedder": "hashing"}
        options |= {"backend": FROZEN, "max_tokens": 40, "size": 8} | kwargs
        return (gym.make_vec(ENV_ID, num_envs=n, **options) if n else gym.make(ENV_ID, **options)).unwrapped

    return build


def ids(env, text, end=True):
    return [*env.tokenizer.encode_continuation(text), *(env.generation.eos_ids if end else ())]


def paid(env, text, **reset):
    """What a text earns and what is said at its end."""
    env.reset(**({"seed": 0} | reset))
    for token in ids(env, text):
        _, reward, terminated, _, info = env.step(token)
    assert terminated
    return reward, info


# --- an instruction for a task -----------------------------------------------------------------------------------


def test_all_episodes_continue_the_same_opening_and_differ_in_their_minibatch(make):
    env = make(minibatches=3)
    examples = env.process.examples
    assert {one.prompt for one in examples} == {
        'The instruction for telling whether a text is Positive or Negative reads: "'
    }
    assert [one.id for one in examples] == [f"SST-2/minibatch-{i}" for i in range(3)]
    minibatches = []
    env.reward.scorer.reward_each = lambda prompts, given, reward: (
        minibatches.extend(given) or [Score(0.0)] * len(given)
    )
    env.reward.reward([Sample("x", metadata=dict(one.metadata)) for one in examples])
    drawn = set(minibatches)
    assert len(drawn) == 3 and {len(set(one)) for one in drawn} == {8}
    assert env.reset(seed=0)[1]["task"] == "SST-2"


def test_a_good_instruction_is_worth_its_margin_and_its_accuracy(make):
    good, info = paid(make(), " What is the sentiment?")
    assert good == pytest.approx(200 * 0.8)
    assert info["reward_terms"]["accuracy"] == 1.0 and info["text"] == " What is the sentiment?"
    assert info["judge_calls"] == 16
    env = make(size=0)
    share = np.mean([one.label == 0 for one in env.reward.examples])  # Positive, what the model says of all
    assert paid(make(size=0), " Say anything.")[0] == pytest.approx(200 * 0.2 * share - 180 * 0.2 * (1 - share), 1e-4)
    assert paid(make(size=0, measure="accuracy"), " Say anything.")[0] == pytest.approx(share)


def test_the_same_prompt_has_the_same_score(make):
    cold = {"backend": ScriptedBackend(score=lambda p, c: -float(len(p) * 7 % 11 + len(c)))}
    for one, uncached in ((make(3), make(3)), (make(3, **cold), make(3, **cold))):
        one.reset(seed=0, options={"index": 1})
        first = one.play([ids(one, " sentiment?"), ids(one, "other"), ids(one, " sentiment?")])
        one.reset(seed=5, options={"index": 1})
        again = one.play([ids(one, "that"), ids(one, " sentiment?"), ids(one, "this")])
        scores = [first.rewards[0][-1], first.rewards[2][-1], again.rewards[1][-1]]
        assert len(set(map(float, scores))) == 1
        uncached.reward.scorer.cache = 0
        uncached.reset(seed=0, options={"index": 1})
        assert uncached.play([ids(one, " sentiment?")] * 3).rewards[1][-1] == scores[0]


def test_a_stop_at_the_line_end_and_empty_prompts(make):
    env = make()
    for text in ("", "\n", "   "):
        env.reset(seed=0)
        for token in ids(env, text):
            _, reward, terminated, _, info = env.step(token)
            if terminated:
                break
        assert (reward, terminated, info["reward_valid"]) == (-180.0, True, True)
    env.reset(seed=0)
    steps = [env.step(token) for token in ids(env, " sentiment\n", end=False)]
    assert steps[-1][2] and steps[-1][4]["finish_reason"] == "stop" and steps[-1][1] > 0


def test_the_split_decides_what_prompts_are_scored_on(make):
    texts = {split: {one.text for one in make(split=split, size=1).reward.examples} for split in ("train", "test")}
    validation = {one.text for one in make(split="validation", size=1).reward.examples}
    assert texts["train"] and validation and not texts["train"] & validation
    assert len(make(limit=12).reward.examples) == 12


# --- a hint for one input ----------------------------------------------------------------------------------------


def test_a_hint_is_scored_on_its_own_input(make):
    env = make(level="instance")
    asked = []
    env.reward.scorer.backend = ScriptedBackend(score=lambda p, c: asked.append(p) or by_words(p, c))
    example = env.process.examples[3]
    reward, info = paid(env, " mind the sentiment", options={"index": 3})
    assert reward == pytest.approx(160.0) and info["episode_id"] == example.id
    text = example.metadata["example"]["text"]
    assert example.prompt == f"{text}\nHint:"
    assert set(asked) == {asked[0]} and asked[0].startswith("Decide whether the sentiment")
    assert "\nHint: mind the sentiment\n" in asked[0] and asked[0].endswith(f"{text}\nSentiment:")
    # The manual instruction speaks of sentiment: with another one the model is lost without the hint.
    env = make(level="instance", instruction="Good or bad? {response}")
    values = [paid(env, hint, options={"index": 0})[0] for hint in (" the sentiment", " the plot")]
    assert values[0] == pytest.approx(160.0) and abs(values[1]) < 41


def answer(prompt):
    return "It is blue." if "Keywords: blue" in prompt else "I do not know."


@pytest.mark.parametrize("style", ["completion", "chat"])
def test_rouge_compares_the_answer_with_the_reference(make, style):
    seen = []
    frozen = ScriptedBackend(reply=lambda prompt: seen.append(prompt) or answer(prompt), prompt_style=style)
    env = make(level="instance", measure="rouge", backend=frozen)
    values = {hint: paid(env, hint, options={"index": 0}) for hint in (" blue", " red", "", " ")}
    assert values[" blue"][0] == pytest.approx(2 * 3 / (3 + 5)) and values[" red"][0] == 0.0
    assert values[""][0] == values[" "][0] == 0.0 and values[" red"][1]["reward_valid"]
    assert values[" blue"][1]["reference"].startswith("It is blue, no ")
    assert "Keywords" in seen[0] and "Keywords" not in seen[2] and seen[2] == seen[3]
    assert seen[0].startswith("Keywords: blue\n\nInstruction:" if style == "completion" else "Name the colour")
    assert "Keywords of the answer:" in env.process.examples[0].prompt


def test_a_failed_answer_is_no_silent_zero(make):
    frozen = ScriptedBackend(reply=lambda prompt: BackendError("the server is away"))
    reward, info = paid(make(level="instance", measure="rouge", backend=frozen), " red")
    assert reward == 0.0 and not info["reward_valid"] and info["invalid_reason"] == "the server is away"


def test_a_reference_that_rouge_cannot_read_is_refused(make, write):
    rows = [{"instruction": f"Say hello {i}.", "reference": "\u4f60\u597d"} for i in range(20)]
    folder = write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="has none of the letters a to z"):
        make(level="instance", measure="rouge", data=str(folder / "rows.jsonl"))


def test_a_hint_needs_a_reference_and_an_input():
    for sample in (Sample("x", metadata={"plain": "a", "request": "b"}), Sample("x", reference="y", metadata={})):
        with pytest.raises(InputError, match=r"needs a reference and metadata\['plain'\]"):
            HintedResponse(FROZEN).reward([sample])


# --- the contract ------------------------------------------------------------------------------------------------

LEVELS = [{"level": "task"}, {"level": "instance"}, {"level": "instance", "measure": "rouge"}]
TEXTS = [" What is the sentiment?", "", " blue\n and more", " Say it", "\n", " sentiment " * 9]


@pytest.mark.parametrize("options", LEVELS)
@pytest.mark.parametrize("mode", ["Disabled", "SameStep"])
def test_play_is_step(make, options, mode):
    frozen = ScriptedBackend(score=by_words, reply=answer)
    env, other = (make(6, autoreset_mode=mode, backend=frozen, **options) for _ in range(2))
    for seed in (3, None):
        for one in (env, other):
            one.reset(seed=seed)
        actions = [ids(env, text) for text in TEXTS]
        mask = np.ones(6, dtype=bool)
        assert_equal(env.play(actions), stepped(other, actions, mask), env, other)


@pytest.mark.parametrize("options", LEVELS[:2])
def test_play_is_step_on_a_real_model_up_to_rounding(make, tiny_model_path, options):
    """A likelihood in float32 differs by what else is in its batch: some 1e-5 nats, 200 times that as gap."""
    frozen = TransformersBackend(tiny_model_path, prompt_style="completion")
    env, other = (make(6, autoreset_mode="Disabled", backend=frozen, size=3, **options) for _ in range(2))
    for one in (env, other):
        one.reset(seed=3)
    actions = [ids(env, text) for text in TEXTS]
    played = env.play(actions)
    told = stepped(other, actions, np.ones(6, dtype=bool))
    paid = [[float(r[-1]) for r in played.rewards], [told["rewards"][i][-1] for i in range(6)]]
    np.testing.assert_allclose(*paid, rtol=0, atol=200 * 5e-5)
    assert paid[0][1] == paid[0][4] == -180.0 and np.ptp(paid[0]) > 0.1


@pytest.mark.parametrize("options", LEVELS)
def test_a_spec_survives_json(make, options):
    env = make(**({"backend": "scripted"} | options))
    again = gym.make(EnvSpec.from_json(env.spec.to_json())).unwrapped
    assert plain(env.reset(seed=4)) == plain(again.reset(seed=4))
    assert paid(env, " red", options={"index": 2})[0] == paid(again, " red", options={"index": 2})[0]


def test_the_default_builds_no_model(monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    env = gym.make(ENV_ID).unwrapped
    env.reset(seed=0)
    assert env.reward.scorer.backend.usage.calls == 0 and env.generation.max_tokens == 16


def test_the_chat_layout_asks_for_a_prompt(make):
    tokenizer = LoadedTokenizer(build_tokenizer(), "tiny", 256)
    for options in LEVELS:
        prompts = {one.prompt for one in make(tokenizer=tokenizer, layout="chat", **options).process.examples}
        assert all(prompt.startswith("<|user|>") and prompt.endswith("<|assistant|>") for prompt in prompts)
    opening = "Rate {input} as {labels}."
    env = make(level="instance", opening=opening, layout="chat", tokenizer=tokenizer)
    text = env.process.examples[0].metadata["example"]["text"]
    assert env.process.examples[0].prompt == f"<|user|>Rate {text} as Positive or Negative.</s><|assistant|>"


def test_ready_made_examples_and_another_reward(make):
    words = {"id": "words", "kwargs": {"words": ["red", "sea"]}}
    reward = FunctionReward(lambda samples: [float(len(sample.token_ids)) for sample in samples])
    env = make(task="no such task", examples=[PromptExample("a", "sea")], reward=reward, tokenizer=words, stop=())
    env.reset(seed=0)
    assert [env.step(token)[1] for token in (0, 0, 2)] == [0.0, 0.0, 3.0]


TOML = """
labels = ["bad", "good"]
verbalizers = {}
instructions = ["Well?"]
train = "films.jsonl"
"""


@pytest.mark.parametrize("level", ["task", "instance"])
@pytest.mark.parametrize("style", ["chat", "completion"])
def test_what_cannot_be_scored_is_refused_without_the_model(write, make, tiny_model_path, monkeypatch, level, style):
    monkeypatch.setattr(TransformersBackend, "lm", property(lambda self: pytest.fail("the model was loaded")))
    backend = {"id": "transformers", "kwargs": {"model": tiny_model_path, "prompt_style": style}}

    def build(words, text="a dull film", **kwargs):
        rows = [{"text": f"{text} {i}", "label": i % 2} for i in range(8)]
        write("films.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        path = write("films.toml", TOML.format(json.dumps(words))) / "films.toml"
        return make(task=str(path), level=level, backend=backend, size=2, **kwargs)

    assert build(["bad", "good"]).reward.prompt.verbalizers == ("bad", "good")
    with pytest.raises(InputError, match="'good' and 'good film' of prompt 0 cannot be told apart"):
        build(["good", "good film"])
    with pytest.raises(InputError, match=r"prompt 0 is too long: .* reads 256"):
        build(["bad", "good"], "a dull film " * 30)
    with pytest.raises(InputError, match=r"prompt 0 is too long: .* reads 256"):  # none is written that does not fit
        build(["bad", "good"], max_tokens=250)


def test_calibration_reads_the_tasks_own_content_free_inputs(make, write):
    folder = write(
        "RTE/train.tsv",
        "index\tsentence1\tsentence2\tlabel\n"
        + "".join(f"{i}\tIt rains {i}.\tIt is wet.\t{('entailment', 'not_entailment')[i % 2]}\n" for i in range(40)),
    )
    env = make(task="RTE", data_dir=str(folder), calibrate=True, size=2)
    assert env.reward.scorer.content_free[0] == "First text: N/A\nSecond text: N/A"
    assert env.reward.scorer.backend is FROZEN


class NoLogprobs(ScriptedBackend):
    supports_logprobs = False


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"level": "sentence"}, InputError, "unknown level 'sentence': use task or instance"),
        ({"measure": "f1"}, InputError, "unknown measure 'f1': use gap, accuracy or rouge"),
        ({"measure": "rouge"}, InputError, "use level='instance'"),
        ({"task": "STS-B"}, InputError, "STS-B has no labels"),
        ({"task": "none such"}, InputError, "none such"),
        ({"size": 100}, InputError, "a minibatch of 100 examples cannot be drawn from"),
        ({"minibatches": 0}, InputError, "minibatches must be at least 1, got 0"),
        ({"layout": "verse"}, InputError, "unknown layout 'verse'"),
        ({"layout": "chat"}, InputError, "no chat template"),
        ({"opening": ""}, InputError, "is empty"),
        ({"opening": "x" * 2000}, InputError, "exceeds the context"),
        ({"level": "instance", "opening": "Hint:"}, InputError, r"opening must have \{input\}, got 'Hint:'"),
        ({"level": "instance", "measure": "rouge", "opening": "Hint:"}, InputError, r"opening must have \{request\}"),
        ({"instruction": "Good or bad?"}, InputError, r"instruction must have \{response\}"),
        ({"level": "instance", "measure": "rouge", "data": "instructions"}, InputError, "has no reference answer"),
        ({"calibrate": "twice"}, InputError, "twice"),
        ({"calibrate": "batch", "level": "instance"}, InputError, "batch calibration of one example"),
        ({"calibrate": "batch", "size": 1}, InputError, "batch calibration of one example"),
        ({"backend": NoLogprobs()}, UnsupportedRequestError, "reports no log-probs"),
    ],
)
def test_bad_input_is_refused_when_the_env_is_built(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)
