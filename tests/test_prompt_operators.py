"""Operators on prompts: masks are impossible edits and nothing else, and what every edit does."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_cases import (
    ADD,
    ADD_BACK,
    DELETE,
    DROP,
    EXCHANGE,
    LONG,
    NO_OP,
    NOTHING,
    REPHRASE,
    SWAP,
    WORDS,
    likelihoods,
    make,
    started,
    task,
)

from instructgym.agents.sb3.baselines import random_actions
from instructgym.envs.prompt_edit.drafts import DraftContext, PromptDraft, join_phrases, split_phrases
from instructgym.envs.prompt_edit.operators import PhraseEdits, PromptEdits
from instructgym.llm_backends import ContextLengthError, ScriptedBackend
from instructgym.rewards import Demonstration, LabelledExample, TaskPrompt, TaskScorer

SHOWN = (Demonstration("a new film", 0), Demonstration("a good old film", 1))

# --- the context -------------------------------------------------------------------------------------------------


class Short(ScriptedBackend):
    """A model that reads 34 words."""

    def context_error(self, prompt, max_tokens):
        words = len(str(prompt).split()) + max_tokens
        return ContextLengthError(f"{words} words, 34 are read") if words > 34 else None


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_fits_fits_all_examples(split):
    films = task(words=("No", "Yes"))
    long = LabelledExample("long", "a good film that " + "goes on and " * 3 + "on", 1)
    films = replace(films, **{split: (*getattr(films, split), long)})
    scorer = TaskScorer(Short(score=likelihoods))
    for seed in range(3):
        env = started(seed=seed, task=films, scorer=scorer, prefix="Well?")
        while env.action_masks()[ADD]:
            prompt = env.step(ADD)[4]["prompt"]
        assert 0 < len(prompt.demonstrations) < 4
        scorer.check([prompt], [long])
    with pytest.raises(ValueError, match="prompt 0 is too long"):
        make(task=films, scorer=scorer, instructions=["word " * 20])


def test_the_context_is_asked_about_one_example_per_prompt(monkeypatch):
    asked = []
    monkeypatch.setattr(Short, "context_error", lambda self, prompt, room: asked.append(prompt))
    env = started(scorer=TaskScorer(Short(score=likelihoods)))
    asked.clear()
    env.action_masks()
    assert 0 < len(asked) < 5  # a demonstration, a set of verbalizers


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
@given(
    seed=st.integers(0, 2**16),
    operator=st.sampled_from(["edits", "phrases"]),
    most=st.integers(0, 3),
    start=st.sampled_from([None, *(TaskPrompt("", SHOWN[:count], ("bad", "good")) for count in (1, 2))]),
)
def test_an_unmasked_action_changes_the_prompt_and_a_masked_one_never_does(seed, operator, most, start):
    rng = np.random.default_rng(seed)
    env = make(operator=operator, horizon=25, max_demonstrations=most, pool_size=2)
    _, info = env.reset(seed=seed, options={"prefix": start})
    sizes = np.atleast_1d(getattr(env.action_space, "nvec", getattr(env.action_space, "n", 0)))
    for _ in range(24):
        before = info
        possible = np.split(before["action_mask"].astype(bool), np.cumsum(sizes)[:-1])
        assert all(part.any() for part in possible)
        values = [int(rng.integers(size)) for size in sizes]
        allowed = all(part[value] for part, value in zip(possible, values, strict=True))
        _, reward, _, _, info = env.step(values[0] if operator == "edits" else np.array(values))
        assert (info["masked"], info["eliminated_by"]) == (not allowed, "")
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
    lines = PromptDraft(TaskPrompt("Judge\n\nit", (), ("bad", "good")))  # one phrase, and white space
    assert allowed(phrases, lines) == {"no_op"}


def test_without_an_instruction_there_is_nothing_to_rewrite_and_nothing_to_delete():
    draft = PromptDraft(TaskPrompt("", SHOWN[:1], ("bad", "good")))
    assert allowed(PromptEdits(), draft) == {"no_op"}
    assert PhraseEdits(3).mask(draft).tolist() == [0, 0, 0, 1, 1, 0, 0]
    for operator in ("edits", "phrases"):
        env = started(operator=operator, prefix=draft.prompt, pool_size=0, task=task(words=("bad", "good")))
        action = random_actions(np.random.default_rng(0), env.action_masks()[None], env.action_space)[0]
        info = env.step(action)[4]
        assert not info["masked"] and info["text"]


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


def test_which_one_is_dropped_depends_on_seed_and_step():
    shown = tuple(Demonstration(f"a new film {i}", 0) for i in range(4))
    prompt = TaskPrompt(LONG, shown, ("bad", "good"))

    def left(seed):
        env = started(seed=seed, prefix=prompt)
        return tuple(env.step(DROP)[4]["prompt"].demonstrations for _ in range(3))

    assert left(0) == left(0)
    stories = {left(seed) for seed in range(8)}
    assert len({story[0] for story in stories}) > 1 and len(stories) > 4


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


@pytest.mark.parametrize("reply", ["", "half an emoji: \ud83d"])
def test_a_rewrite_that_cannot_be_used_leaves_the_prompt(reply):
    env = started(backend=lambda prompt: reply)
    info = env.step(REPHRASE)[4]
    assert info["prompt"].instruction == LONG and info["task_calls"] == 0
    assert info["reward_valid"] == (reply == "")  # half a character is a failed request


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
