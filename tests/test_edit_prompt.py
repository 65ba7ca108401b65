"""EditPrompt: the contract of environments, rewards that are score changes, failures, the vector form, agents."""

import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from prompt_cases import (
    ADD,
    DELETE,
    DROP,
    EDITS,
    ENV_ID,
    LONG,
    NO_OP,
    OPERATORS,
    REPHRASE,
    WORDS,
    arguments,
    draw,
    likelihoods,
    make,
    plain,
    play,
    scripted,
    started,
    task,
    vector,
)

import instructgym  # noqa: F401 - registers the ids
from instructgym.agents.sb3.baselines import RandomAgent
from instructgym.agents.sb3.factory import make_sb3_env
from instructgym.envs.process import InvalidRewardError
from instructgym.envs.tasks.prompt_search.tasks import PromptTask
from instructgym.llm_backends import BackendError, ContextLengthError, ScriptedBackend
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.backend import TransformersBackend
from instructgym.rewards import Demonstration, Sample, TaskGain, TaskPrompt, TaskScorer
from instructgym.rewards.prompt_scoring.scorer import CallLimitError, LimitedScorer

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
    monkeypatch.setattr(TransformersBackend, "lm", property(lambda self: 1 / 0))
    env = gym.make(f"instructgym:{ENV_ID}", limit=64)
    assert env.action_space == gym.spaces.Discrete(8)
    assert env.unwrapped.operations == EDITS
    with pytest.raises(ZeroDivisionError):
        env.reset(seed=0)


@pytest.mark.parametrize("style", ["chat", "completion"])
def test_a_model_by_path_is_not_loaded_to_build_an_env(tiny_model_path, monkeypatch, style):
    monkeypatch.setattr(TransformersBackend, "lm", property(lambda self: pytest.fail("the model was loaded")))
    backend = {"id": "transformers", "kwargs": {"model": tiny_model_path, "prompt_style": style}}
    env = make(scorer={"backend": backend}, instructions=["Good?"])
    assert env.process.reward.scorer.backend.prompt_style == style
    with pytest.raises(InputError, match=r"prompt 0 is too long: .* reads 256"):
        make(scorer={"backend": backend}, instructions=["word " * 60])


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


def test_equal_texts_are_one_input():
    films = task(12)
    twice = replace(films, train=films.train + tuple(replace(one, id=f"{one.id}b") for one in films.train))
    for seed in range(4):
        episode = started(seed=seed, task=twice).process.episodes[0]
        pool = [one.text for one in episode.document.context.pool]
        assert len(set(pool)) == len(pool) > 0
        assert not set(pool) & {example.text for example in episode.examples}


def test_no_example_is_scored_with_its_own_answer_in_the_prompt():
    films = task(8)
    shown = [Demonstration(one.text, one.label) for one in films.train]
    for seed in range(6):
        episode = started(seed=seed, task=films, prefix=TaskPrompt(LONG, shown[:2], ("a", "b"))).process.episodes[0]
        assert {one.text for one in episode.examples} == {one.text for one in shown[2:]}
        assert not episode.document.context.pool
    env = make(task=films)
    first, *_ = env.reset(seed=0)[1], env.step(NO_OP)
    with pytest.raises(InputError, match="batch_size of 6 is more than the 5 training examples that the prompt does"):
        env.reset(options={"prefix": TaskPrompt(LONG, shown[:3], ("a", "b"))})
    assert env.step(NO_OP)[4]["step"] == 2 and env.process.episodes[0].document.prompt == first["prompt"]


def test_the_draw_for_prompts_without_demonstrations_is_what_it_was():
    for prefix in (None, "Well?"):
        episode = started(seed=3, prefix=prefix).process.episodes[0]
        assert [one.id for one in episode.examples] == [f"t/{i}" for i in (12, 17, 19, 21, 31, 32)]
        assert [one.text[-2:] for one in episode.document.context.pool[:4]] == ["34", " 2", "28", " 3"]


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
    asked = {"backend": ScriptedBackend(score=likelihoods), "calibrate": True}
    films = replace(task(), content_free=("a film", "", "N/A", "-"))
    env = started(task=films, scorer=asked)
    assert env.process.reward.scorer.content_free == films.content_free
    assert env.step(ADD)[4]["task_calls"] == (6 + 4) * 2
    assert started(task=films, scorer=asked | {"content_free": ["N/A"]}).step(ADD)[4]["task_calls"] == (6 + 1) * 2


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
    asked = {"calibrate": calibrate, "content_free": ["a film", "N/A"]}
    scorer = scripted(**asked)
    results = scorer.score_each(prompts, batches)
    assert scorer.backend.usage.calls == 1
    for prompt, batch, result in zip(prompts, batches, results, strict=True):
        [alone] = scripted(**asked).score([prompt], batch)
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
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        env.step(NO_OP)
    env = started(scorer=flaky(lambda prompt: prompt.count("film") > 1), on_invalid="raise")
    with pytest.raises(InvalidRewardError, match="no verdict on copy 0"):
        env.step(ADD)


class Brief(ScriptedBackend):
    """A model that reads 200 letters."""

    def context_error(self, prompt, max_tokens):
        return ContextLengthError("too long") if len(prompt) > 200 else None


@pytest.mark.parametrize("n", [0, 2])
def test_a_refused_reset_leaves_the_episodes_as_they_were(n):
    kwargs = {"scorer": TaskScorer(Brief(score=likelihoods)), "instructions": ["Well?"]}
    env = vector(n, mode="Disabled", **kwargs) if n else make(**kwargs)
    env.reset(seed=0)
    before = list(env.process.episodes)
    for long in (LONG * 4, TaskPrompt(LONG * 4, (), ("bad", "good"))):
        with pytest.raises(InputError, match="prompt 0 is too long"):
            env.reset(options={"prefix": [LONG, long] if n else long})
        assert all(now is one for now, one in zip(env.process.episodes, before, strict=True))


def test_a_reset_that_fails_leaves_no_episode_without_a_score():
    env = make(scorer=LimitedScorer(15, ScriptedBackend(score=likelihoods)))
    env.reset(seed=0)
    with pytest.raises(CallLimitError):
        env.reset()
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        env.step(NO_OP)


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


def test_copies_on_a_real_model_are_single_envs_up_to_rounding(tiny_model_path):
    """Scores of float32 differ by what else is in a batch: some 1e-5 nats of a log-prob, as much of a gap at most."""
    backend = TransformersBackend(tiny_model_path, prompt_style="completion")
    kwargs = {"instructions": ["Good?"], "batch_size": 3, "max_demonstrations": 2, "horizon": 4}
    for cache in (0, 1000):
        kwargs |= {"scorer": {"backend": backend, "cache": cache}}
        env, singles = vector(mode="Disabled", **kwargs), [make(**kwargs) for _ in range(3)]
        starts = env.reset(seed=5)[1]["score"]
        told = [one.reset(seed=5 + i)[1]["score"] for i, one in enumerate(singles)]
        np.testing.assert_allclose(starts, told, rtol=0, atol=5e-5)
        for action in (ADD, WORDS, ADD, DROP):
            _, rewards, _, _, infos = env.step(np.full(3, action))
            steps = [one.step(action) for one in singles]
            assert [info["prompt"] for *_, info in steps] == list(infos["prompt"])
            np.testing.assert_allclose(rewards, [step[1] for step in steps], rtol=0, atol=1e-4)
        assert len(set(starts)) == 3 and np.ptp(rewards) > 1e-3


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
        (
            {"operator": {"id": "free-text", "kwargs": {"by": "me"}}},
            "unknown writer of free text 'me'",
        ),
        ({"scorer": "embedded"}, "'embedded' is no scorer"),
        ({"scorer": {"model": "x"}}, "cannot build a task scorer from.*model"),
        ({"metric": "loss"}, "unknown metric 'loss': use gap or accuracy"),
        ({"failures": -1}, "failures must be at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 41}, "batch_size of 41 is more than the 40 training examples"),
        ({"max_demonstrations": -1}, "max_demonstrations must be at least 0"),
        (
            {"batch_size": 1, "scorer": {"backend": "scripted", "calibrate": "batch"}},
            "batch calibration of one example",
        ),
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
    from instructgym.agents.sb3.factory import make_agent

    kwargs = arguments(operator=operator, observation=observation, horizon=4, instructions=[LONG], batch_size=4)
    env = make_sb3_env(ENV_ID, 8, **kwargs)
    random_gain = mean_gain(RandomAgent(env, seed=0), env, 40)
    agent = make_agent("MaskablePPO", env, seed=0, n_steps=8, learning_rate=5e-3)
    agent.learn(64 * 10)
    env.seed(99)
    assert mean_gain(agent, env, 40) > random_gain + 0.08
