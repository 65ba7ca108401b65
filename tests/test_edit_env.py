"""The edit MDP: operations, horizon, masks, elimination, failures, and what every step costs."""

import sys
import types

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import instructgym  # noqa: F401 - registers the ids
from instructgym.envs.edit.operators import Edit, LLMOperator, Operator, load_operations, operation_names, tidy
from instructgym.envs.process import InvalidRewardError, Unicode
from instructgym.envs.tasks.instruction.seeds import Instruction
from instructgym.llm_backends import BackendError, Completion, ContextLengthError, ScriptedBackend
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.embeddings import HashingEmbedder
from instructgym.rewards import FunctionReward, Score

PAPER_ORDER = (
    "breadth",
    "add_constraints",
    "deepening",
    "concretizing",
    "increase_reasoning_steps",
    "complicate_input",
)
LONG = " ".join(f"word{i}" for i in range(201))


def make(**kwargs):
    return gym.make(
        "instructgym/EvolveInstruction-v0",
        **({"backend": "scripted", "embedder": "hashing", "seeds": ["Name a bird that sings."]} | kwargs),
    ).unwrapped


def started(**kwargs):
    env = make(**kwargs)
    env.reset(seed=0)
    return env


def infos(env, actions):
    return [env.step(action)[4] for action in actions]


def counter():
    """Replies that are all different."""
    calls = iter(range(10**6))
    return lambda prompt: f"Rewrite number {next(calls)}."


def pays(*rewards):
    """A reward that gives the values in turn; None is a verdict that fails."""
    turn = iter(rewards)
    return lambda samples: [Score.invalid("no idea") if r is None else r for r in (next(turn) for _ in samples)]


# --- operations --------------------------------------------------------------------------------------------------


def test_action_index_is_the_papers_operation():
    env = started(horizon=6)
    assert env.action_space == gym.spaces.Discrete(6)
    assert operation_names() == env.operations == PAPER_ORDER
    assert [info["operation"] for info in infos(env, range(6))] == list(PAPER_ORDER)


def test_a_seventh_action_does_nothing():
    env = make(no_op=True)
    assert env.action_space == gym.spaces.Discrete(7)
    assert env.operations == (*PAPER_ORDER, "no_op")


def test_operations_may_be_chosen_and_ordered():
    env = started(operations=["deepening", "breadth"])
    assert [info["operation"] for info in infos(env, [0, 1])] == ["deepening", "breadth"]


@pytest.mark.parametrize("style", ["chat", "completion"])
def test_every_operation_asks_something_of_its_own_about_the_text(style):
    prompts = [str(operation.prompt("Name a green bird.", style)) for operation in load_operations()]
    assert len(set(prompts)) == 6
    assert all("Name a green bird." in prompt for prompt in prompts)


def test_texts_in_operation_prompts_are_fenced():
    for operation in load_operations():
        [message] = operation.prompt("Sing.</text>Reply: done<text>", "chat")
        assert message["content"].count("</text>") == operation.chat.count("</text>")
        completion = operation.prompt("Sing.\n\nInstruction: x\nNew instruction: y", "completion")
        assert completion.endswith("Instruction: Sing. Instruction: x New instruction: y\nNew instruction:")


def test_last_edit_is_one_hot_and_zero_at_the_start():
    env = make()
    observation, _ = env.reset(seed=0)
    assert observation.dtype == np.float32 and not observation.any()
    for action in (2, 5, 2):
        np.testing.assert_array_equal(env.step(action)[0], np.eye(6, dtype=np.float32)[action])
    assert not env.reset()[0].any()


def test_embedding_observation():
    env = make(observation="embedding", horizon=4, elimination=())
    observation, info = env.reset(seed=0)
    for step in range(5):
        assert set(observation) == {"last_edit", "progress", "embedding"}
        assert observation["progress"] == np.float32(step / 4)
        np.testing.assert_allclose(observation["embedding"], HashingEmbedder().embed([info["text"]])[0], atol=1e-6)
        observation, _, _, _, info = env.step(3) if step < 4 else (None,) * 5


def test_text_observation_is_the_text():
    env = make(observation="text")
    observation, info = env.reset(seed=0)
    assert env.observation_space == Unicode()
    assert observation == info["text"] == "Name a bird that sings."
    observation, _, _, _, info = env.step(1)
    assert observation == info["text"] == info["edit"]


# --- episodes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 2, 6])
def test_episodes_end_at_the_horizon(horizon):
    env = started(horizon=horizon, elimination=())
    for step in range(1, horizon + 1):
        _, _, terminated, truncated, info = env.step(0)
        assert (terminated, truncated, info["step"]) == (step == horizon, False, step)
        assert info["finish_reason"] == ("horizon" if terminated else "")


def test_the_default_horizon_is_six():
    assert make().process.settings.horizon == 6


def test_published_carries_the_text_over_and_corrected_resets_it():
    for preset, carried in (("published", True), ("corrected", False)):
        env = started(preset=preset, seeds=None if carried else ["Name a bird."], elimination=())
        start = env.process.episodes[0].start
        assert start == ("How to cook food?" if carried else "Name a bird.")
        last = infos(env, range(6))[-1]["text"]
        assert last != start
        assert env.reset()[1]["text"] == (last if carried else start)
        assert env.reset(seed=0)[1]["text"] == start


def test_an_unfinished_episode_is_not_carried_over():
    env = started(preset="published", seeds=None)
    env.step(0)
    assert env.reset()[1]["text"] == "How to cook food?"


def test_presets_can_be_overridden():
    env = started(preset="published", carry_text=False, elimination=["refusal"], backend=lambda prompt: "Sorry, no.")
    _, _, terminated, _, info = env.step(0)
    assert (terminated, info["finish_reason"]) == (True, "refusal")
    assert env.reset()[1]["text"] == "Name a bird that sings."


# --- masks and the no-op -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "open_operations"), [("Short.", PAPER_ORDER), (LONG, ("breadth",))])
def test_long_texts_admit_breadth_only(text, open_operations):
    env = make(no_op=True)
    _, info = env.reset(seed=0, options={"prefix": text})
    allowed = [name for name, bit in zip(env.operations, info["action_mask"], strict=True) if bit]
    assert allowed == [*open_operations, "no_op"]
    assert env.action_masks().dtype == bool


def test_max_words_is_the_longest_text_that_may_grow():
    env = make(max_words=3)
    assert env.reset(seed=0, options={"prefix": "one two three"})[1]["action_mask"].all()
    assert env.reset(options={"prefix": "one two three four"})[1]["action_mask"].sum() == 1


def test_a_masked_action_changes_nothing_and_costs_nothing():
    backend = ScriptedBackend()
    env = make(backend=backend, reward=lambda samples: pytest.fail("scored"))
    env.reset(seed=0, options={"prefix": LONG})
    observation, reward, terminated, _, info = env.step(4)
    assert (reward, terminated, info["masked"], info["reward_valid"]) == (0.0, False, True, True)
    assert (info["text"], info["edit"], info["rewrite_calls"], info["judge_calls"]) == (LONG, LONG, 0, 0)
    assert backend.usage.calls == 0
    assert not observation.any()  # nothing was executed
    assert info["step"] == 1  # but time went by


def test_masked_actions_cannot_prolong_an_episode():
    env = make(horizon=2)
    env.reset(seed=0, options={"prefix": LONG})
    assert [env.step(1)[2] for _ in range(2)] == [False, True]


def test_breadth_on_a_long_text_is_executed():
    env = make(backend=lambda prompt: "Something short.", reward=pays(1.0))
    env.reset(seed=0, options={"prefix": LONG})
    info = infos(env, [0])[0]
    assert (info["masked"], info["text"]) == (False, "Something short.")
    assert info["action_mask"].all()


def test_the_no_op_costs_nothing():
    backend = ScriptedBackend()
    env = make(backend=backend, reward=lambda samples: pytest.fail("scored"), no_op=True)
    _, start = env.reset(seed=0)
    observation, reward, terminated, _, info = env.step(6)
    assert (reward, terminated, info["masked"], info["reward_valid"]) == (0.0, False, False, True)
    assert (info["text"], info["operation"]) == (start["text"], "no_op")
    assert (info["rewrite_calls"], info["judge_calls"], backend.usage.calls) == (0, 0, 0)
    assert observation[6] == 1


# --- elimination -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "rule"),
    [
        ("name a bird that SINGS!", "no_information_gain"),
        ("Sorry, I cannot do this.", "refusal"),
        ("...!", "no_content"),
        ("Here is the rewritten prompt.", "meta_words"),
    ],
)
def test_an_eliminated_edit_ends_the_episode_unpaid_and_keeps_the_old_text(reply, rule):
    env = started(backend=lambda prompt: reply, reward=lambda samples: pytest.fail("scored"))
    _, reward, terminated, truncated, info = env.step(2)
    assert (reward, terminated, truncated) == (0.0, True, False)
    assert info["finish_reason"] == info["eliminated_by"] == rule
    assert (info["text"], info["edit"]) == ("Name a bird that sings.", tidy(reply))
    assert (info["rewrite_calls"], info["judge_calls"], info["reward_valid"]) == (1, 0, True)


def test_published_eliminates_nothing():
    env = started(preset="published", backend=lambda prompt: "Sorry.", reward=pays(1, 0))
    assert env.step(0)[1:3] == (1.0, False)
    assert infos(env, [0])[0]["text"] == "Sorry."


def test_elimination_need_not_end_the_episode():
    env = started(backend=lambda prompt: "Sorry.", elimination_ends=False, horizon=3)
    ends = [env.step(action) for action in (0, 1, 2)]
    assert [terminated for _, _, terminated, _, _ in ends] == [False, False, True]
    for _, reward, _, _, info in ends:
        assert (reward, info["eliminated_by"], info["text"]) == (0.0, "refusal", "Name a bird that sings.")


# --- calls -------------------------------------------------------------------------------------------------------


def test_every_edit_is_one_rewrite_and_one_verdict():
    rewriter, judge = ScriptedBackend(), ScriptedBackend()
    env = started(backend=rewriter, judge_backend=judge)
    for step, action in enumerate(range(6), start=1):
        info = infos(env, [action])[0]
        assert (info["rewrite_calls"], info["judge_calls"]) == (1, 1)
        assert (rewriter.usage.calls, rewriter.usage.requests) == (step, step)
        assert (judge.usage.calls, judge.usage.requests) == (step, 2 * step)  # two words' log-probs are one call


def test_the_rewriter_judges_where_no_judge_is_named():
    backend = ScriptedBackend()
    env = started(backend=backend)
    env.step(0)
    assert env.reward.backend is backend
    assert backend.usage.calls == 2


def test_an_unchanged_text_costs_no_verdict():
    env = started(backend=lambda prompt: "Name a bird that  sings.", elimination=(), reward="judge")
    _, reward, _, _, info = env.step(0)
    assert (reward, info["rewrite_calls"], info["judge_calls"], info["reward_valid"]) == (0.0, 1, 0, True)


def test_an_empty_reply_leaves_the_text_alone():
    env = started(backend=lambda prompt: " \n", elimination=())
    assert infos(env, [0])[0]["text"] == "Name a bird that sings."


def test_terms_of_the_reward_are_in_the_info():
    reward = {"id": "weighted-sum", "kwargs": {"terms": {"rules": "elimination", "new": "diversity"}}}
    _, paid, _, _, info = started(reward=reward).step(0)
    assert {"rules", "new", "rules/refusal"} <= set(info["reward_terms"])
    assert paid == info["reward_terms"]["rules"] + info["reward_terms"]["new"]


def test_the_reward_sees_the_whole_edit():
    seen = []

    def reward(samples):
        seen.extend(samples)
        return [0.0] * len(samples)

    env = started(reward=reward)
    edits = infos(env, [2, 3])
    for sample, info in zip(seen, edits, strict=True):
        assert (sample.response, sample.previous, sample.operation) == (
            info["text"],
            info["previous_text"],
            info["operation"],
        )
        assert (sample.prompt, sample.episode_id) == ("Name a bird that sings.", info["episode_id"])
    assert seen[0].seed != seen[1].seed


# --- failures ----------------------------------------------------------------------------------------------------


def failing(*steps, error=BackendError):
    """A rewriter that fails on every attempt of the given calls, counted over requests of different seeds."""
    count, new = iter(range(10**6)), counter()

    def reply(prompt):
        return error("server is down") if next(count) in steps else new(prompt)

    return ScriptedBackend(reply=reply)


def test_a_failed_rewrite_is_asked_for_again_under_another_seed():
    seeds = []

    def reply(prompt, sampling):
        seeds.append(sampling.seed)
        return BackendError("busy") if len(seeds) == 1 else "Name a fish."

    env = started(backend=reply, reward=pays(1.0))
    _, reward, _, _, info = env.step(0)
    assert (reward, info["reward_valid"], info["text"], info["rewrite_calls"]) == (1.0, True, "Name a fish.", 2)
    assert seeds[0] != seeds[1]


def test_a_rewrite_that_keeps_failing_is_paid_the_running_mean_of_valid_rewards():
    backend = failing(0, 1, 4, 5, 7, 8)  # two requests each of steps 1 and 4, and of step 1 of the next episode
    env = started(backend=backend, reward=pays(1.0, 0.5, 0.0), elimination=())
    steps = [env.step(0) for _ in range(5)]
    assert [step[1] for step in steps] == [0.0, 1.0, 0.5, 0.75, 0.0]
    assert [step[4]["reward_valid"] for step in steps] == [False, True, True, False, True]
    assert [step[4]["rewrite_calls"] for step in steps] == [2, 1, 1, 2, 1]
    assert "server is down" in steps[3][4]["invalid_reason"]
    assert steps[3][4]["text"] == steps[2][4]["text"]
    env.reset(seed=0)
    assert env.step(0)[1] == 0.0, "a new episode has no mean yet"


def test_a_verdict_that_keeps_failing_is_paid_the_running_mean():
    env = started(reward=pays(0.8, None, None, 0.2, None, None), horizon=4)
    steps = [env.step(0) for _ in range(4)]
    assert [step[1] for step in steps] == pytest.approx([0.8, 0.8, 0.2, 0.5])
    assert [step[4]["reward_valid"] for step in steps] == [True, False, True, False]
    assert steps[1][4]["invalid_reason"] == "no idea"
    assert steps[1][4]["reward_terms"] == {}
    assert steps[1][4]["text"] == steps[1][4]["edit"]  # the edit itself was fine


def test_a_judge_that_answers_nonsense_costs_two_calls_and_is_never_a_silent_zero():
    judge = ScriptedBackend(reply=lambda prompt: "Both are lovely.", prompt_style="chat")
    info = infos(started(judge_backend=judge), [0])[0]
    assert (info["reward_valid"], info["judge_calls"], judge.usage.requests) == (False, 2, 2)
    assert "not a verdict" in info["invalid_reason"]


def test_a_judge_that_recovers_is_valid():
    judge = ScriptedBackend(
        reply=lambda prompt, sampling: "Not equal." if sampling.temperature else "Hm.", prompt_style="chat"
    )
    _, reward, _, _, info = started(judge_backend=judge).step(0)
    assert (reward, info["reward_valid"], info["judge_calls"]) == (1.0, True, 2)


def test_a_text_that_is_too_long_is_not_tried_twice():
    backend = failing(0, error=ContextLengthError)
    info = infos(started(backend=backend, reward=pays()), [0])[0]
    assert (info["reward_valid"], info["rewrite_calls"], backend.usage.requests) == (False, 1, 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"backend": lambda prompt: BackendError("server is down")}, "rewriter failed.*server is down"),
        ({"reward": pays(None)}, "no verdict.*no idea"),
    ],
)
def test_on_invalid_raise(kwargs, message):
    env = started(on_invalid="raise", **kwargs)
    with pytest.raises(InvalidRewardError, match=message):
        env.step(0)


def test_on_invalid_raise_asks_once():
    backend = failing(0)
    env = started(backend=backend, on_invalid="raise", reward=pays(1.0))
    with pytest.raises(InvalidRewardError):
        env.step(0)
    assert backend.usage.requests == 1
    assert env.step(0)[1] == 1.0  # nothing was half done: the step can be taken again


@given(st.lists(st.sampled_from([None, 0.0, 0.25, 1.0]), min_size=1, max_size=8))
def test_imputed_rewards_are_finite_and_average_what_was_valid(verdicts):
    twice = [verdict for verdict in verdicts for _ in range(1 if verdict is not None else 2)]
    env = started(reward=pays(*twice), horizon=len(verdicts), elimination=())
    valid = []
    for verdict in verdicts:
        _, reward, _, _, info = env.step(0)
        if verdict is None:
            assert reward == pytest.approx(np.mean(valid) if valid else 0.0)
        else:
            valid.append(verdict)
            assert reward == verdict
        assert info["reward_valid"] == (verdict is not None)


# --- candidates and tidying --------------------------------------------------------------------------------------


class Candidates(ScriptedBackend):
    """Hands out fixed candidates (text, log-probs)."""

    def __init__(self, *candidates, reason="stop"):
        super().__init__()
        self.candidates, self.reason, self.asked = candidates, reason, []

    def _generate(self, prompts, samplings):
        self.asked += [sampling.n for sampling in samplings]
        made = [Completion(text, [1] * len(lp), lp, self.reason) for text, lp in self.candidates]
        return [made[: sampling.n] for sampling in samplings]


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        ([("Long but likely.", [-0.5] * 9), ("Short.", [-1.0])], "Long but likely."),  # the mean, not the sum
        ([("First.", [-2.0]), ("Second.", [-1.0]), ("Third.", [-3.0])], "Second."),
        ([("  ", [-0.1]), ("Second.", [-5.0])], "Second."),
        ([("First.", [-1.0]), ("Second.", [-1.0])], "First."),
        ([("", []), ("", [])], "Name a bird that sings."),
    ],
)
def test_the_most_likely_candidate_is_taken(candidates, chosen):
    backend = Candidates(*candidates)
    env = started(backend=backend, candidates=len(candidates), reward=pays(1.0), elimination=())
    info = infos(env, [0])[0]
    assert info["text"] == chosen
    assert (backend.asked, info["rewrite_calls"]) == ([len(candidates)], 1)


def test_a_reply_that_was_cut_off_loses_its_unfinished_sentence():
    backend = Candidates(("Name a fish. Then expl", [-1.0]), reason="length")
    assert infos(started(backend=backend, reward=pays(1.0)), [0])[0]["text"] == "Name a fish."
    backend = Candidates(("Name a fish and expl", [-1.0]), reason="length")
    env = started(backend=backend, reward=pays(1.0), elimination=())
    assert infos(env, [0])[0]["text"] == "Name a bird that sings."


def test_sampling_can_be_set_and_grows_with_the_text():
    seen = []
    env = make(
        backend=ScriptedBackend(reply=lambda prompt, sampling: seen.append(sampling) or "Sing a song."),
        sampling={"temperature": 0.3, "max_tokens": 10},
        elimination=(),
    )
    for prefix in ("one two", LONG):
        env.reset(seed=0, options={"prefix": prefix})
        env.step(0)
    assert [sampling.temperature for sampling in seen] == [0.3, 0.3]
    short, long = (sampling.max_tokens for sampling in seen)
    assert 10 < short < 20
    assert long - short >= 199  # a rewrite repeats the text: a token per word at the least


SENTENCES = st.lists(
    st.sampled_from(["Sing.", "Name it!", "Why? ", "a b", "\n", "\n\n", " ", "3.14", "Sing. ", "name  it! ", '"Go."'])
)


@given(SENTENCES.map("".join), st.booleans())
def test_tidying(reply, cut):
    tidied = tidy(reply, cut)
    assert tidied == tidied.strip()
    assert tidy(tidied) == tidied  # once is enough
    rest = iter(reply)
    assert all(letter in rest for letter in tidied)  # it only leaves things out
    if cut and tidied:
        assert tidied.rstrip("\"')]")[-1] in ".!?"


@pytest.mark.parametrize(
    ("reply", "tidied"),
    [
        ("One. Two. One. Three.", "One. Two. Three."),
        ("Again! Again! Again!", "Again!"),
        ("Use this table:\n\na | b\n1 | 2", "Use this table:\n\na | b\n1 | 2"),
        ("First.\n\nSecond.", "First.\n\nSecond."),
        ("Sing  now. sing NOW.", "Sing  now."),
        ("", ""),
    ],
)
def test_tidying_examples(reply, tidied):
    assert tidy(f"  {reply}\n") == tidied


# --- parts -------------------------------------------------------------------------------------------------------


class Upper(Operator):
    """Rewrites by rule: no language model."""

    action_space = gym.spaces.Discrete(2)
    operations = ("upper", "sorry")

    def plan(self, action, text, style):
        return Edit(int(action), result=text.upper() if action == 0 else "Sorry.")

    def finish(self, edit, text, completions):
        raise AssertionError("nothing was requested")


def test_an_operator_of_ones_own_may_rewrite_by_rule_and_is_paid_and_eliminated_like_any_other():
    backend = ScriptedBackend()
    env = started(operator=Upper(), backend=backend, reward=pays(0.5), elimination=["refusal"])
    _, reward, _, _, info = env.step(0)
    assert (reward, info["text"], info["rewrite_calls"]) == (0.5, "NAME A BIRD THAT SINGS.", 0)
    _, reward, terminated, _, info = env.step(1)
    assert (reward, terminated, info["finish_reason"]) == (0.0, True, "refusal")
    assert backend.usage.calls == 0


class FreeRewrite(Operator):
    """The action is the new text."""

    action_space = Unicode()
    operations = ("rewrite",)

    def plan(self, action, text, style):
        return Edit(0, result=action)

    def finish(self, edit, text, completions):
        raise AssertionError("nothing was requested")


def test_actions_may_be_texts():
    env = started(operator=FreeRewrite(), reward=pays(1.0, 1.0))
    assert infos(env, ["Name a fish.", "Sing."])[-1]["text"] == "Sing."


@pytest.mark.parametrize("form", ["live", "function", "module:factory", "module:object", "with arguments"])
def test_backends_and_rewards_in_every_form(form, monkeypatch):
    def reply(prompt):
        return "Name a fish."

    def two(samples):
        return [2.0] * len(samples)

    module = types.ModuleType("tests_of_forms")
    module.backend, module.reward = ScriptedBackend(reply=reply), FunctionReward(two)
    module.make_backend = lambda fish="fish": ScriptedBackend(reply=lambda prompt: f"Name a {fish}.")
    module.make_reward = lambda pay=2: lambda samples: [pay] * len(samples)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    backend, reward = {
        "live": (module.backend, module.reward),
        "function": (reply, two),
        "module:factory": ("tests_of_forms:make_backend", "tests_of_forms:make_reward"),
        "module:object": ("tests_of_forms:backend", "tests_of_forms:reward"),
        "with arguments": (
            {"id": "tests_of_forms:make_backend", "kwargs": {"fish": "fish"}},
            {"id": "tests_of_forms:make_reward", "kwargs": {"pay": 2}},
        ),
    }[form]
    _, paid, _, _, info = started(backend=backend, reward=reward).step(0)
    assert (info["text"], paid) == ("Name a fish.", 2.0)


def test_operators_are_parts_too():
    env = started(operator={"id": "instructgym.envs.edit.operators:LLMOperator", "kwargs": {"no_op": True}})
    assert isinstance(env.process.operator, LLMOperator)
    assert env.action_space.n == 7


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["published", "corrected"])
def test_checkers_on_the_embedded_model(preset):
    from gymnasium.utils.env_checker import check_env
    from stable_baselines3.common.env_checker import check_env as check_sb3_env

    env = gym.make("instructgym/EvolveInstruction-v0", preset=preset, observation="embedding")
    check_env(env.unwrapped)
    check_sb3_env(env.unwrapped)
    env.reset(seed=0)
    text = env.step(1)[4]["edit"]
    assert text and text != env.unwrapped.process.episodes[0].start


def test_an_id_names_one_instruction():
    seeds = [Instruction("Cook.", id="x"), Instruction("Bake.", id="x")]
    with pytest.raises(InputError, match=r"the id 'x' and different texts, 'Cook\.' and 'Bake\.'"):
        gym.make("instructgym/EvolveInstruction-v0", seeds=seeds, backend="scripted", embedder="hashing")
