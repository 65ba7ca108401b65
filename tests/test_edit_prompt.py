"""EditPrompt: masks are impossible edits and nothing else, rewards are score changes, and every operator's edits."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

import instructgym  # noqa: F401 - registers the ids
from instructgym.agents.baselines import RandomAgent
from instructgym.envs.process import InvalidRewardError
from instructgym.envs.prompt_operators import PhraseEdits, PromptEdits
from instructgym.envs.sb3 import make_sb3_env
from instructgym.envs.spaces import Unicode
from instructgym.envs.tasks.phrases import join_phrases, split_phrases
from instructgym.envs.tasks.prompt_drafts import DraftContext, PromptDraft
from instructgym.envs.tasks.prompt_tasks import PromptTask
from instructgym.llm_backends import BackendError, ContextLengthError, ScriptedBackend
from instructgym.rewards import Demonstration, LabelledExample, Sample, TaskGain, TaskPrompt, TaskScorer

ENV_ID = "instructgym/EditPrompt-v0"
EDITS = (
    "rephrase",
    "shorten",
    "add_constraint",
    "add_demonstration",
    "swap_demonstrations",
    "drop_demonstration",
    "swap_verbalizers",
    "no_op",
)
REPHRASE, ADD, SWAP, DROP, WORDS, NO_OP = (
    EDITS.index(n)
    for n in ("rephrase", "add_demonstration", "swap_demonstrations", "drop_demonstration", "swap_verbalizers", "no_op")
)
DELETE, EXCHANGE, ADD_BACK, NOTHING = range(4)
LONG = "Read the review, then decide whether it is good or bad."
OPERATORS = ("edits", "phrases", "free-text")


def task(count=40, instructions=(LONG, "Is it good?"), words=("Negative", "Positive")):
    examples = tuple(LabelledExample(f"t/{i}", f"a {('bad', 'good')[i % 2]} film {i}", i % 2) for i in range(count))
    return PromptTask("films", words, words, tuple(instructions), train=examples)


def likelihoods(prompt, completion):
    """A model that reads better the more films it has seen, and best with the words bad and good."""
    shown = prompt.count("film") - 1
    right = "good" if "good film" in prompt.split("\n\n")[-1] else "bad"
    word = completion.strip().casefold()
    says = {"negative": "bad", "positive": "good", "terrible": "bad", "great": "good"}.get(word, word)
    clear = 0.3 * shown + 0.5 * (word in ("bad", "good")) - 0.02 * len(prompt.split("\n\n")[0].split())
    return (clear if says == right else -clear) - 5.0


def scripted(**kwargs):
    return TaskScorer(ScriptedBackend(score=likelihoods), **kwargs)


def arguments(**kwargs):
    return {
        "task": task(),
        "backend": "scripted",
        "embedder": "hashing",
        "scorer": scripted(),
        "batch_size": 6,
    } | kwargs


def make(**kwargs):
    return gym.make(ENV_ID, **arguments(**kwargs)).unwrapped


def vector(n=3, mode="SameStep", **kwargs):
    return gym.make_vec(ENV_ID, num_envs=n, autoreset_mode=mode, **arguments(**kwargs))


def started(seed=0, prefix=None, **kwargs):
    env = make(**kwargs)
    env.reset(seed=seed, options={"prefix": prefix} if prefix is not None else None)
    return env


def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def draw(env, rng):
    """A random action, also where the action space is text."""
    space = env.action_space
    if isinstance(space, Unicode):
        return ["", "Good or bad?", "...", f"Say what you feel about it {rng.integers(9)}."][rng.integers(4)]
    return int(rng.integers(space.n)) if isinstance(space, gym.spaces.Discrete) else rng.integers(space.nvec)


def play(env, draws=0, steps=20, **reset):
    rng, said = np.random.default_rng(draws), [plain(env.reset(**reset))]
    for _ in range(steps):
        said.append(plain(env.step(draw(env, rng))))
        if said[-1][2]:
            said.append(plain(env.reset()))
    return said


# --- the contract ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observation", ["last_edit", "embedding", "text"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_checkers_find_nothing(operator, observation):
    from stable_baselines3.common.env_checker import check_env as check_sb3_env

    env = make(operator=operator, observation=observation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)
        if observation != "text" and operator != "free-text":
            check_sb3_env(env)


def test_the_default_loads_no_model_before_its_first_use(monkeypatch):
    from instructgym.llm_backends.transformers_backend import TransformersBackend

    monkeypatch.setattr(TransformersBackend, "lm", property(lambda self: 1 / 0))
    env = gym.make(f"instructgym:{ENV_ID}", limit=64)
    assert env.action_space == gym.spaces.Discrete(8)
    assert env.unwrapped.operations == EDITS
    with pytest.raises(ZeroDivisionError):
        env.reset(seed=0)


def test_a_spec_survives_json_and_live_parts_are_named():
    kwargs = {"backend": "scripted", "embedder": "hashing", "limit": 40, "scorer": {"backend": "scripted"}}
    env = gym.make(ENV_ID, **kwargs, operator={"id": "edits", "kwargs": {"operations": ["shorten"]}})
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert env.unwrapped.operations == ("shorten", "no_op")
    assert play(again.unwrapped, seed=4, steps=8) == play(env.unwrapped, seed=4, steps=8)
    for argument in ("task", "scorer"):
        with pytest.raises(ValueError, match=f"argument '{argument}' holds a live"):
            gym.make(ENV_ID, **(kwargs | {argument: arguments()[argument]})).spec.to_json()


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_seed_restores_everything(operator):
    env, other = make(operator=operator), make(operator=operator)
    said = play(env, seed=7)
    assert play(other, seed=7) == said
    assert play(env, seed=7) == said
    assert play(env, seed=8) != said
    assert play(env, seed=None) != said


def test_the_minibatch_stays_for_the_episode_and_shares_no_input_with_the_demonstrations():
    env = started(horizon=8)
    examples = env.process.episodes[0].examples
    assert len({example.id for example in examples}) == 6
    for _ in range(7):
        shown = {one.text for one in env.step(ADD)[4]["prompt"].demonstrations}
        assert env.process.episodes[0].examples is examples
        assert not shown & {example.text for example in examples}
    assert len(shown) == 4
    env.reset()
    assert env.process.episodes[0].examples != examples


def test_the_embedding_observation_shows_what_is_possible():
    env = make(operator="phrases", observation="embedding")
    for seen, info in (env.reset(seed=0), env.step(np.array([DELETE, 0]))[::4]):
        assert set(seen) == {"last_edit", "progress", "embedding", "action_mask"}
        np.testing.assert_array_equal(seen["action_mask"], info["action_mask"])


def test_start_instructions_come_in_epochs_and_by_option():
    env = make()
    assert {env.reset(seed=0)[1]["prompt"].instruction, env.reset()[1]["prompt"].instruction} == {LONG, "Is it good?"}
    assert env.reset(options={"index": 1})[1]["prompt"].instruction == "Is it good?"
    assert env.reset(options={"prefix": "Well?"})[1]["prompt"].instruction == "Well?"
    whole = TaskPrompt("Well?", (Demonstration("a bad film", 0),), ("bad", "good"))
    assert env.reset(options={"prefix": whole})[1]["prompt"] == whole
    for wrong in ("  ", 5, TaskPrompt("Well?", (), ("bad", ""))):
        with pytest.raises(ValueError, match=r"prefix|verbalizer 1 of prompt 0 is empty"):
            env.reset(options={"prefix": wrong})


# --- rewards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["gap", "accuracy"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_rewards_add_up_to_the_gain_over_the_start(operator, metric):
    env, rng = make(operator=operator, metric=metric, horizon=9), np.random.default_rng(1)
    for seed in range(5):
        _, info = env.reset(seed=seed)
        start, paid, ended = info["score"], 0.0, False
        assert info["start_score"] == start
        while not ended:
            _, reward, ended, _, info = env.step(draw(env, rng))
            paid += reward
            assert info["start_score"] == start
            assert paid == pytest.approx(info["score"] - start, abs=1e-9)


@pytest.mark.parametrize("cache", [0, 1000])
def test_the_score_is_that_of_the_prompt_on_the_minibatch(cache):
    env, rng = started(scorer=scripted(cache=cache), horizon=9), np.random.default_rng(0)
    fresh, seen = scripted(), {}
    for _ in range(9):
        info = env.step(draw(env, rng))[4]
        [result] = fresh.score([info["prompt"]], env.process.episodes[0].examples)
        assert info["score"] == pytest.approx(result.gaps.mean(), abs=1e-7)
        assert info["feedback"] == result.failures(4)
        assert seen.setdefault(info["prompt"], info["score"]) == info["score"]


def test_calibrated_scores_are_paid_too():
    info = started(scorer=scripted(calibrate=True)).step(ADD)[4]
    assert info["task_calls"] == (6 + 3) * 2


def test_failures_are_told_as_text():
    env = started(scorer=TaskScorer(ScriptedBackend(score=lambda p, c: -1.0 - ("Pos" in c))), failures=2, batch_size=30)
    info = env.step(ADD)[4]
    lines = info["feedback"].split("\n")
    assert len(lines) == 2
    assert all("good film" in line and "predicted Negative, right Positive" in line for line in lines)
    assert env.reset(seed=3)[1]["feedback"]
    assert started(failures=0).step(ADD)[4]["feedback"] == ""


def test_every_call_of_the_task_model_is_counted_once():
    scorer = scripted()
    env = make(scorer=scorer)
    _, info = env.reset(seed=0)
    assert (info["task_calls"], scorer.backend.usage.requests) == (12, 12)
    assert env.step(ADD)[4]["task_calls"] == 12  # the start is not paid for again
    assert scorer.backend.usage.requests == 24
    assert env.step(NO_OP)[4]["task_calls"] == 0
    back = env.step(DROP)[4]
    assert (back["task_calls"], back["judge_calls"]) == (12, 12)  # a logical count: the cache answered
    assert scorer.backend.usage.requests == 24
    assert back["score"] == info["score"]


def test_the_gain_as_a_reward_of_its_own():
    gain = TaskGain(scripted(), metric="accuracy")
    examples = task().train[:8]
    metadata = {"prompt": TaskPrompt(LONG, (), ("bad", "good")), "examples": examples, "previous_score": 0.25}
    [score] = gain.reward([Sample("", metadata=metadata)])
    assert score.value == pytest.approx(score.terms["accuracy"] - 0.25)
    assert set(score.terms) == {"task-gain", "score", "accuracy", "gap"} and score.calls == 16


@pytest.mark.parametrize("calibrate", [False, "contextual", "batch"])
def test_prompts_on_examples_of_their_own_score_as_alone(calibrate):
    prompts = [TaskPrompt(text, (), words) for text in (LONG, "Well?") for words in (("bad", "good"), ("no", "yes"))]
    batches = [task().train[start : start + 3 + start] for start in range(4)]
    scorer = scripted(calibrate=calibrate)
    results = scorer.score_each(prompts, batches)
    assert scorer.backend.usage.calls == 1
    for prompt, batch, result in zip(prompts, batches, results, strict=True):
        [alone] = scripted(calibrate=calibrate).score([prompt], batch)
        np.testing.assert_array_equal(result.probabilities, alone.probabilities)
        assert (result.accuracy, result.calls, result.examples) == (alone.accuracy, alone.calls, alone.examples)
    with pytest.raises(ValueError, match="4 prompts need as many lists of examples, got 1"):
        scorer.score_each(prompts, batches[:1])


# --- failures ----------------------------------------------------------------------------------------------------


def flaky(fails):
    """A scorer whose model does not serve the prompts of which ``fails`` is true."""

    def score(prompt, completion):
        return float("nan") if fails(prompt) else likelihoods(prompt, completion)

    return TaskScorer(ScriptedBackend(score=score))


def test_a_prompt_without_a_score_is_paid_the_mean_and_not_taken_over():
    env = started(scorer=flaky(lambda prompt: prompt.count("film") == 3))
    _, first, _, _, before = env.step(ADD)
    _, reward, _, _, info = env.step(ADD)
    assert (reward, info["reward_valid"]) == (first, False)
    assert "not all finite" in info["invalid_reason"]
    assert (info["prompt"], info["text"], info["score"]) == (before["prompt"], before["text"], before["score"])
    assert info["edit"] != info["text"]
    assert info["task_calls"] == 24  # asked twice
    assert env.step(WORDS)[4]["reward_valid"]


def test_a_failure_is_one_copys_own():
    env = vector(scorer=flaky(lambda prompt: prompt.count("film") == 2 and "Is it" in prompt))
    env.reset(seed=0, options={"index": [0, 1, 0]})
    infos = env.step([ADD] * 3)[4]
    assert infos["reward_valid"].tolist() == [True, False, True]


def test_a_start_without_a_score_is_an_error():
    env = make(scorer=flaky(lambda prompt: True))
    with pytest.raises(InvalidRewardError, match=r"start prompt could not be scored: .*not all finite"):
        env.reset(seed=0)
    env = started(scorer=flaky(lambda prompt: prompt.count("film") > 1), on_invalid="raise")
    with pytest.raises(InvalidRewardError, match="no verdict on copy 0"):
        env.step(ADD)


def test_a_rewriter_that_fails_leaves_the_prompt_alone():
    env = started(backend=lambda prompt: BackendError("server is down"))
    before = env.process.episodes[0].document
    _, _, _, _, info = env.step(REPHRASE)
    assert (info["rewrite_failed"], info["prompt"], info["task_calls"]) == (True, before.prompt, 0)


@pytest.mark.parametrize("reply", ["", LONG])
def test_an_unchanged_instruction_costs_no_score(reply):
    env = started(backend=lambda prompt: reply, prefix=LONG)
    _, reward, _, _, info = env.step(REPHRASE)
    assert (reward, info["masked"], info["rewrite_calls"], info["task_calls"]) == (0.0, False, 1, 0)


# --- the context -------------------------------------------------------------------------------------------------


class Short(ScriptedBackend):
    """A model that reads 34 words."""

    def context_error(self, prompt, max_tokens):
        words = len(str(prompt).split()) + max_tokens
        return ContextLengthError(f"{words} words, 34 are read") if words > 34 else None


def test_edits_that_exceed_the_context_are_impossible_or_undone():
    short = TaskScorer(Short(score=likelihoods))
    env = started(scorer=short, prefix=LONG, task=task(words=("No", "Yes")), backend=lambda p: "word " * 40, horizon=9)
    while env.action_masks()[ADD]:
        info = env.step(ADD)[4]
        assert not info["masked"]
    assert 0 < len(info["prompt"].demonstrations) < 4
    assert env.action_masks()[[REPHRASE, DROP, NO_OP]].all()
    _, reward, ended, _, after = env.step(REPHRASE)  # how long it gets is not known before
    assert (reward, ended, after["eliminated_by"], after["masked"]) == (0.0, False, "context", False)
    assert (after["prompt"], after["task_calls"]) == (info["prompt"], 0)
    with pytest.raises(ValueError, match=r"prompt 0 is too long: 4\d\d words"):
        make(scorer=short, instructions=["word " * 400])


# --- masks are impossible edits and nothing else -----------------------------------------------------------------


@settings(max_examples=30)
@given(seed=st.integers(0, 2**16), operator=st.sampled_from(["edits", "phrases"]), most=st.integers(0, 3))
def test_an_unmasked_action_changes_the_prompt_and_a_masked_one_never_does(seed, operator, most):
    rng = np.random.default_rng(seed)
    env = make(operator=operator, horizon=25, max_demonstrations=most, pool_size=2)
    _, info = env.reset(seed=seed)
    sizes = np.atleast_1d(getattr(env.action_space, "nvec", getattr(env.action_space, "n", 0)))
    for _ in range(24):
        before = info
        possible = np.split(before["action_mask"].astype(bool), np.cumsum(sizes)[:-1])
        assert all(part.any() for part in possible)
        values = [int(rng.integers(size)) for size in sizes]
        allowed = all(part[value] for part, value in zip(possible, values, strict=True))
        _, reward, _, _, info = env.step(values[0] if operator == "edits" else np.array(values))
        assert info["masked"] == (not allowed)
        changed = info["prompt"] != before["prompt"]
        assert changed == (allowed and info["operation"] != "no_op")
        assert changed == (info["text"] != before["text"])
        if not changed:
            assert (reward, info["rewrite_calls"], info["task_calls"]) == (0.0, 0, 0)


def allowed(operator, draft):
    mask = operator.mask(draft)
    return {name for name, bit in zip(operator.operations, mask, strict=False) if bit}


def test_what_the_mask_of_edits_depends_on():
    edits, always = PromptEdits(), {"rephrase", "shorten", "add_constraint", "no_op"}
    a, b, c = (Demonstration(text, 0) for text in "abc")
    words = (("bad", "good"), ("no", "yes"))

    def can(*shown, pool=(), sets=words[:1], **context):
        prompt = TaskPrompt("Well?", shown, words[0])
        return allowed(edits, PromptDraft(prompt, DraftContext(pool, sets, **context))) - always

    assert can() == set()
    assert can(a) == {"drop_demonstration"}
    assert can(a, b) == {"drop_demonstration", "swap_demonstrations"}
    assert can(a, a) == {"drop_demonstration"}
    assert can(pool=(a,)) == {"add_demonstration"}
    assert can(a, pool=(a,)) == {"drop_demonstration"}
    assert can(a, b, pool=(c,), max_demonstrations=2) == {"drop_demonstration", "swap_demonstrations"}
    assert can(sets=words) == {"swap_verbalizers"}
    assert can(sets=words[1:]) == {"swap_verbalizers"}
    assert can(sets=(), pool=(a, b), fits=lambda prompt: False) == set()
    assert can(pool=(a, b), fits=lambda prompt: b in prompt.demonstrations) == {"add_demonstration"}


def test_what_the_mask_of_phrases_depends_on():
    phrases, draft = PhraseEdits(3), PromptDraft(TaskPrompt("One, two, three, four.", (), ("bad", "good")))
    assert phrases.mask(draft).tolist() == [1, 1, 0, 1, 1, 1, 1]
    for left in (3, 2, 1):
        draft = phrases.plan(np.array([DELETE, 0]), draft, "chat").result
        assert phrases.mask(draft).tolist()[4:] == [True] * left + [False] * (3 - left)
    assert allowed(phrases, draft) == {"add_back", "no_op"}
    same = PromptDraft(TaskPrompt("One, One,", (), ("bad", "good")))
    assert allowed(phrases, same) == {"delete", "no_op"}


def test_a_masked_text_changes_nothing():
    env = started(operator="free-text", prefix=LONG)
    for text in ("", " .. ", "\ud800"):
        _, reward, _, _, info = env.step(text)
        assert (reward, info["masked"], info["prompt"].instruction) == (0.0, True, LONG)
    assert env.action_masks().tolist() == [True]


# --- what the edits do -------------------------------------------------------------------------------------------


def test_edits_of_demonstrations_and_verbalizers():
    env = started(horizon=9)
    one = env.step(ADD)[4]["prompt"].demonstrations
    two = env.step(ADD)[4]["prompt"].demonstrations
    assert two[:1] == one and len(two) == 2
    assert env.step(SWAP)[4]["prompt"].demonstrations == two[::-1]
    [left] = env.step(DROP)[4]["prompt"].demonstrations
    assert left in two
    words = [env.step(WORDS)[4]["prompt"].verbalizers for _ in range(4)]
    assert words == [("negative", "positive"), ("bad", "good"), ("terrible", "great"), ("Negative", "Positive")]


def test_packaged_verbalizers_follow_the_order_of_the_labels():
    env = started(task=task(words=("Positive", "Negative")))
    assert [env.step(WORDS)[4]["prompt"].verbalizers for _ in range(2)][1] == ("good", "bad")


def test_demonstrations_are_drawn_by_the_episodes_seed():
    def shown(seed):
        return started(seed=seed).step(ADD)[4]["prompt"].demonstrations

    assert shown(1) == shown(1)
    assert len({shown(seed) for seed in range(8)}) > 3


@pytest.mark.parametrize("style", ["chat", "completion"])
def test_llm_edits_ask_for_the_instruction_alone(style):
    asked = []
    backend = ScriptedBackend(reply=lambda prompt: asked.append(prompt) or "Well, is it?", prompt_style=style)
    env = started(backend=backend, prefix=LONG)
    env.step(ADD)
    for action in range(3):
        env.reset(options={"prefix": LONG})
        info = env.step(action)[4]
        assert info["prompt"].instruction == "Well, is it?"
    assert len(set(asked)) == 3 and all(LONG in prompt and "film 1" not in prompt for prompt in asked)


def test_phrase_edits():
    env = started(operator="phrases", prefix=LONG, horizon=9)
    a, b, c, d = split_phrases(LONG)
    assert (a, b, c, d) == ("Read the review,", "then decide", "whether it is good", "or bad.")
    for action, expected in [
        ((DELETE, 1), (a, c, d)),
        ((EXCHANGE, 0), (c, a, d)),
        ((EXCHANGE, 2), (d, a, c)),
        ((DELETE, 2), (d, a)),
        ((ADD_BACK, 0), (d, c, a)),
        ((NOTHING, 0), (d, c, a)),
        ((ADD_BACK, 2), (d, c, a, b)),
    ]:
        info = env.step(np.array(action))[4]
        assert (info["prompt"].instruction, info["masked"]) == (join_phrases(expected), False)
    assert not env.action_masks()[ADD_BACK]


@given(
    st.text(alphabet="ab ,.?\n", max_size=60) | st.lists(st.sampled_from([*"xy", "and", "of,", "with"])).map(" ".join)
)
def test_phrases_are_the_text_again(text):
    phrases = split_phrases(text)
    assert join_phrases(phrases).split() == text.split()
    assert all(phrases)


def test_free_text_is_the_instruction_or_what_to_change():
    env = started(operator="free-text")
    assert env.step(" Good or bad? ")[4]["prompt"].instruction == "Good or bad?"
    assert env.step("Good or bad?")[4]["task_calls"] == 0
    asked = []
    backend = ScriptedBackend(reply=lambda prompt: asked.append(prompt) or "Well?")
    env = started(operator={"id": "free-text", "kwargs": {"by": "llm"}}, backend=backend, prefix=LONG)
    info = env.step("Irony was missed.")[4]
    assert (info["prompt"].instruction, info["rewrite_calls"], info["masked"]) == ("Well?", 1, False)
    assert asked[0].endswith(f"Instruction: {LONG}\nChange: Irony was missed.\nNew instruction:")
    assert not env.step("")[4]["masked"] and "Change: Make it clearer." in asked[1]


# --- the vector form ---------------------------------------------------------------------------------------------


def row(batched, i):
    """Copy i's info out of a vector env's."""
    return {
        key: row(value, i) if isinstance(value, dict) else plain(value[i])
        for key, value in batched.items()
        if not key.startswith("_") and batched[f"_{key}"][i]
    }


@pytest.mark.parametrize("operator", ["edits", "phrases"])
def test_copy_i_is_a_single_env_seeded_with_s_plus_i(operator):
    kwargs = {"operator": operator, "instructions": [LONG]}
    env, singles = vector(mode="Disabled", **kwargs), [make(**kwargs) for _ in range(3)]
    _, infos = env.reset(seed=5)
    assert [row(infos, i) for i in range(3)] == [plain(one.reset(seed=5 + i)[1]) for i, one in enumerate(singles)]
    rng = np.random.default_rng(0)
    for _ in range(6):
        actions = [draw(one, rng) for one in singles]
        _, rewards, _, _, infos = env.step(np.array(actions))
        for i, one in enumerate(singles):
            _, reward, _, _, info = one.step(actions[i])
            assert (reward, plain(info)) == (rewards[i], row(infos, i))


def test_a_vector_step_is_one_call_per_role():
    scorer, rewriter = scripted(), ScriptedBackend()
    env, rng = vector(n=8, scorer=scorer, backend=rewriter, mode=AutoresetMode.NEXT_STEP), np.random.default_rng(0)
    env.reset(seed=0)
    assert scorer.backend.usage.calls == 1
    for _ in range(20):
        before = scorer.backend.usage.calls, rewriter.usage.calls
        env.step(rng.integers(8, size=8))
        assert scorer.backend.usage.calls - before[0] <= 1 and rewriter.usage.calls - before[1] <= 1
    assert scorer.backend.usage.requests > 500


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"task": "no-such-task"}, "unknown task 'no-such-task'"),
        ({"task": "STS-B"}, "STS-B has no labels"),
        ({"task": PromptTask("bare", ("a", "b"), ("a", "b"), ("Well?",))}, "split 'train' of bare was not loaded"),
        ({"instructions": []}, "no prompt to start from"),
        ({"instructions": ["Well?", " "]}, "instructions must be a list of non-empty texts"),
        ({"instructions": "Well?"}, "instructions must be a list of non-empty texts"),
        ({"verbalizers": []}, "verbalizers must be a list of lists"),
        ({"verbalizers": ["bad", "good"]}, "verbalizers must be a list of lists"),
        ({"verbalizers": [["bad", "good", "odd"]]}, "one word per label"),
        ({"verbalizers": [["bad", "good"], ["bad", "bad luck"]]}, "cannot be told apart"),
        ({"verbalizers": [["bad", "good"], ["", "good"]]}, "is empty"),
        ({"operator": "shuffle"}, "unknown prompt-operator 'shuffle'.*phrases"),
        ({"operator": {"id": "edits", "kwargs": {"operations": ["breadth"]}}}, "unknown operation 'breadth'.*rephrase"),
        ({"operator": {"id": "edits", "kwargs": {"candidates": 0}}}, "candidates must be at least 1"),
        ({"operator": {"id": "phrases", "kwargs": {"positions": 0}}}, "positions must be at least 1"),
        ({"operator": {"id": "free-text", "kwargs": {"by": "me"}}}, "'caller' or 'llm', got 'me'"),
        ({"scorer": "embedded"}, "'embedded' is no scorer"),
        ({"scorer": {"model": "x"}}, "cannot build a task scorer from.*model"),
        ({"metric": "loss"}, "unknown metric 'loss': use gap, accuracy"),
        ({"failures": -1}, "failures must be at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 41}, "batch_size of 41 is more than the 40 training examples"),
        ({"max_demonstrations": -1}, "max_demonstrations must be at least 0"),
        ({"horizon": 0}, "horizon must be at least 1"),
        ({"on_invalid": "ignore"}, "on_invalid must be one of"),
        ({"elimination": ["length"]}, "unknown elimination rule"),
        ({"observation": "pixels"}, "unknown observation mode"),
        ({"backend": "gpt"}, "unknown backend 'gpt'"),
    ],
)
def test_bad_input_is_one_clear_error(kwargs, message):
    for build in (make, vector):
        with pytest.raises(ValueError, match=message) as caught:
            build(**kwargs)
        assert "\n" not in str(caught.value)


def test_actions_outside_the_space_are_refused():
    for operator, actions in (("edits", (8, -1)), ("phrases", (np.array([0, 16]), 3)), ("free-text", (3,))):
        env = started(operator=operator)
        for action in actions:
            with pytest.raises(ValueError, match="is not in"):
                env.step(action)
    with pytest.raises(TypeError, match="temprature"):
        make(temprature=1)


# --- agents ------------------------------------------------------------------------------------------------------


def mean_gain(agent, env, steps):
    """Mean gain of an episode."""
    observation, paid, episodes = env.reset(), 0.0, 0
    for _ in range(steps):
        masks = np.stack(env.env_method("action_masks"))
        actions, _ = agent.predict(observation, action_masks=masks)
        observation, rewards, dones, _ = env.step(actions)
        paid, episodes = paid + rewards.sum(), episodes + dones.sum()
    return paid / episodes


@pytest.mark.parametrize(
    ("operator", "observation"),
    [({"id": "edits", "kwargs": {"operations": EDITS[3:7]}}, "last_edit"), ("phrases", "embedding")],
)
def test_maskable_ppo_beats_random(operator, observation):
    from instructgym.agents.factory import make_agent

    kwargs = arguments(operator=operator, observation=observation, horizon=4, instructions=[LONG], batch_size=4)
    env = make_sb3_env(ENV_ID, 8, **kwargs)
    random_gain = mean_gain(RandomAgent(env, seed=0), env, 40)
    agent = make_agent("MaskablePPO", env, seed=0, n_steps=8, learning_rate=5e-3)
    agent.learn(64 * 10)
    env.seed(99)
    assert mean_gain(agent, env, 40) > random_gain + 0.08
