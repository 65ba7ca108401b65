"""The task score of prompts: likelihoods, calibration, caching, refusals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from score_cases import EXAMPLES, WORDS, scripted

from instructgym.llm_backends import BackendError
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.backend import TransformersBackend
from instructgym.llm_backends.local.shared_prefix import choice_logprobs, shared_length
from instructgym.llm_backends.replies.journal import Journal, Journaled
from instructgym.llm_backends.scripted import FunctionBackend
from instructgym.rewards import Demonstration, LabelledExample, TaskPrompt, TaskScorer
from instructgym.rewards.prompt_scoring.scorer import normalised, without_bias
from instructgym.rewards.prompt_scoring.task_prompt import longest_examples

PROMPTS = [
    TaskPrompt("Is it any good?", verbalizers=WORDS),
    TaskPrompt("Is it any good?", (Demonstration("so slow", 1), Demonstration("lovely", 0)), WORDS),
    TaskPrompt("List the mood.", (Demonstration("lovely", 0),), WORDS),
    TaskPrompt("It was", verbalizers=WORDS, template="{demonstrations}{input} {instruction}", block="{text}"),
]


@pytest.fixture
def backend(tiny_model_path):
    return TransformersBackend(tiny_model_path, prompt_style="completion")


def one_by_one(backend, prompts, examples):
    """Every likelihood as a request of its own."""
    return np.array(
        [
            [
                [float(backend.logprobs(["".join(p.render(e.text))], [f" {word}"])[0].sum()) for word in p.verbalizers]
                for e in examples
            ]
            for p in prompts
        ]
    )


def test_parts_of_a_prompt():
    plain, shown, _, last = PROMPTS
    assert plain.render("dull") == ("Is it any good?\n\nInput: ", "dull\nAnswer:")
    assert "".join(shown.render("{instruction}")) == (
        "Is it any good?\n\nInput: so slow\nAnswer: bad\n\nInput: lovely\nAnswer: good\n\nInput: {instruction}\nAnswer:"
    )
    assert last.render("dull") == ("dull ", "It was")  # what all prompts share for one input
    assert "".join(TaskPrompt("", (Demonstration("lovely", 0),), WORDS).render("x")).startswith("Input: lovely\n")
    assert plain.text == "Is it any good?\n\nInput: {text}\nAnswer: good | bad"


def test_likelihoods_are_those_of_single_requests(backend):
    found = TaskScorer(backend).label_logprobs(PROMPTS, EXAMPLES)
    assert found.shape == (4, 3, 2) and found.dtype == np.float32
    np.testing.assert_allclose(found, one_by_one(backend, PROMPTS, EXAMPLES), atol=2e-4)


@pytest.mark.parametrize("style", ["chat", "completion"])
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3", "mistral-sliding", "gemma3-mixed"])
def test_other_architectures_and_forms(tiny_lms, tmp_path, style, architecture):
    lm = tiny_lms(architecture)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    backend = TransformersBackend(str(tmp_path), prompt_style=style)
    found = TaskScorer(backend).label_logprobs(PROMPTS, EXAMPLES)
    for p, prompt in enumerate(PROMPTS[:2]):
        texts = ["".join(prompt.render(example.text)) for example in EXAMPLES]
        asked = [[{"role": "user", "content": text}] if style == "chat" else text for text in texts]
        lead = " " if style == "completion" else ""
        for label, word in enumerate(WORDS):
            want = [float(backend.logprobs([one], [lead + word])[0].sum()) for one in asked]
            np.testing.assert_allclose(found[p, :, label], want, atol=3e-4)


@given(
    picked=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    shown=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    cache=st.sampled_from([0, 3, 100]),
)
def test_a_score_depends_on_prompt_and_example_alone(tiny_model_path, picked, shown, cache):
    backend = TransformersBackend(tiny_model_path, prompt_style="completion")
    whole = TaskScorer(backend, cache=0).label_logprobs(PROMPTS, EXAMPLES)
    scorer = TaskScorer(backend, cache=cache)
    for _ in range(2):
        part = scorer.label_logprobs([PROMPTS[i] for i in picked], [EXAMPLES[i] for i in shown])
        np.testing.assert_allclose(part, whole[np.ix_(picked, shown)], atol=2e-4)


def test_what_was_asked_before_does_not_change_the_last_digit(backend):
    first = TaskScorer(backend, cache=0).label_logprobs(PROMPTS, EXAMPLES)
    backend.logprobs(["".join(PROMPTS[1].render(example.text)) for example in EXAMPLES] * 2, ["x"] * 6)
    np.testing.assert_array_equal(TaskScorer(backend).label_logprobs(PROMPTS, EXAMPLES), first)


def test_a_shared_beginning_is_read_once(backend, monkeypatch):
    lm = backend.lm
    read = []
    original = lm.forward
    monkeypatch.setattr(lm, "forward", lambda ids, *rest, **kw: read.append(ids.shape) or original(ids, *rest, **kw))
    prompts = [[9] * 40 + [10 + i, 20, 30] for i in range(6)]
    choices = [[[5], [6]]] * 6
    found = choice_logprobs(lm, prompts, [40] * 6, choices)
    assert sum(rows * columns for rows, columns in read) == 40 + 6 * 3  # one forward per input, none per label
    whole = choice_logprobs(lm, prompts, [0] * 6, choices)
    np.testing.assert_allclose(found, whole, atol=2e-4)


def test_choices_without_heads_are_those_of_logprobs(backend):
    prompts = ["".join(PROMPTS[1].render(example.text)) for example in EXAMPLES]
    found = np.array(backend.choice_logprobs(prompts, [[" good", " bad"]] * 3))
    assert backend.usage.requests == 6
    np.testing.assert_allclose(found, TaskScorer(backend).label_logprobs(PROMPTS[1:2], EXAMPLES)[0], atol=2e-4)
    assert backend.choice_logprobs([], []) == []
    for bad in ((["x"], [[]], None), (["x"], [["a", ""]], None), ([""], [["a"]], None), (["x"], [["a"]], [])):
        with pytest.raises(ValueError, match="choice_logprobs needs"):
            backend.choice_logprobs(*bad)


def test_a_policy_scores_with_its_own_weights(tiny_model_path):
    from instructgym.agents import LanguageModelPolicy, LoraSettings
    from instructgym.agents.policy.language_model import PolicyBackend
    from instructgym.llm_backends.local.causal_lm import CausalLM

    lm = CausalLM.from_pretrained(tiny_model_path)
    policy = LanguageModelPolicy(lm, LoraSettings(rank=2), dtype="float32", seed=0)
    weights = [value for name, value in policy.lm.model.named_parameters() if "lora_B" in name]
    for value in weights:
        value.data.fill_(0.05)
    backend = PolicyBackend(policy, "now")
    texts, choices, heads = zip(
        *[("".join(PROMPTS[1].render(e.text)), ["good", "bad"], PROMPTS[1].render(e.text)[0]) for e in EXAMPLES],
        strict=True,
    )
    found = backend.choice_logprobs(texts, choices, heads)
    np.testing.assert_allclose(found, backend.choice_logprobs(texts, choices), atol=2e-4)
    plain = TransformersBackend(tiny_model_path).choice_logprobs(texts, choices, heads)
    assert weights and np.abs(np.array(found) - np.array(plain)).max() > 0.01


def test_shared_length_stops_where_tokens_differ():
    assert shared_length([1, 2, 3, 4], [1, 2, 9]) == 2
    assert shared_length([1, 2], [1, 2]) == 1  # something is left to read
    assert shared_length([1, 2], []) == 0


def test_nothing_is_asked_twice(backend):
    scorer = TaskScorer(backend)
    first = scorer.score(PROMPTS[:2] * 2, EXAMPLES)
    asked = backend.usage.requests
    assert asked == 2 * 3 * 2
    again = scorer.score(PROMPTS[:2], EXAMPLES[::-1])
    assert backend.usage.requests == asked
    assert [result.calls for result in first + again] == [6] * 6  # a logical count
    np.testing.assert_array_equal(first[0].logprobs, again[0].logprobs[::-1])
    scorer.score(PROMPTS[:3], EXAMPLES, calibrate=True)
    assert backend.usage.requests == asked + 3 * 2 + 3 * 3 * 2  # the third prompt, and content-free inputs of all


def test_a_journal_answers_after_a_restart(backend, tmp_path):
    first = TaskScorer(Journaled(backend, Journal(tmp_path / "journal.jsonl"))).label_logprobs(PROMPTS, EXAMPLES)
    asked = backend.usage.requests
    again = TaskScorer(Journaled(backend, Journal(tmp_path / "journal.jsonl"))).label_logprobs(PROMPTS, EXAMPLES)
    assert backend.usage.requests == asked
    np.testing.assert_array_equal(first, again)


def test_results_by_hand():
    table = {"warm": {"good": np.log(0.3), "bad": np.log(0.1)}, "dull": {"good": np.log(0.06), "bad": np.log(0.04)}}
    (result,) = TaskScorer(scripted(table)).score(PROMPTS[:1], EXAMPLES[:2])
    assert result.accuracy == 0.5 and result.predictions.tolist() == [0, 0] and result.calls == 4
    np.testing.assert_allclose(result.probabilities, [[0.75, 0.25], [0.6, 0.4]], atol=1e-6)
    np.testing.assert_allclose(result.gaps, [0.5, -0.2], atol=1e-6)
    assert result.failures() == "Input: dull / predicted good, right bad"
    assert result.failures(0) == ""


def test_failures_begin_with_the_most_confident():
    table = {
        "warm": {"good": -3.0, "bad": -1.0},
        "dull": {"good": -1.0, "bad": -5.0},
        "sea": {"good": -2.0, "bad": -1.9},
    }
    (result,) = TaskScorer(scripted(table)).score(PROMPTS[:1], EXAMPLES)
    assert [line.split(" /")[0] for line in result.failures(2).split("\n")] == ["Input: dull", "Input: a warm film"]


def test_calibration_by_hand():
    # Content-free inputs say "good" with 0.7 on average: 0.6 is then evidence of "bad".
    table = {
        "warm": {"good": np.log(0.9), "bad": np.log(0.1)},
        "dull": {"good": np.log(0.6), "bad": np.log(0.4)},
        "N/A": {"good": np.log(0.8), "bad": np.log(0.2)},
        "[MASK]": {"good": np.log(0.6), "bad": np.log(0.4)},
        "": {"good": np.log(0.35), "bad": np.log(0.15)},
    }
    scorer = TaskScorer(scripted(table), calibrate=True)
    (result,) = scorer.score(PROMPTS[:1], EXAMPLES[:2])
    assert result.accuracy == 1.0 and result.calls == 2 * 2 + 3 * 2
    np.testing.assert_allclose(result.probabilities[1], np.array([0.6 / 0.7, 0.4 / 0.3]) / (0.6 / 0.7 + 0.4 / 0.3))
    (raw,) = scorer.score(PROMPTS[:1], EXAMPLES[:2], calibrate=False)
    assert raw.accuracy == 0.5
    np.testing.assert_array_equal(raw.logprobs, result.logprobs)
    (batch,) = scorer.score(PROMPTS[:1], EXAMPLES[:2], calibrate="batch")
    np.testing.assert_allclose(batch.probabilities[1, 0], (0.6 / 0.75) / (0.6 / 0.75 + 0.4 / 0.25))


@given(st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0), st.floats(-30, 0)), min_size=1, max_size=6))
def test_calibration_takes_off_what_does_not_depend_on_the_input(rows):
    rows = np.array(rows)
    shifted = rows + np.array([3.0, -1.0, 0.5])
    np.testing.assert_allclose(
        np.exp(without_bias(normalised(rows), normalised(rows)[:1])[0]), np.full(3, 1 / 3), atol=1e-6
    )
    np.testing.assert_allclose(
        np.exp(without_bias(shifted, shifted[:1])), np.exp(without_bias(rows, rows[:1])), atol=1e-6
    )


def refused(message, prompts=PROMPTS[:1], examples=EXAMPLES, **kwargs):
    with pytest.raises(InputError, match=message):
        TaskScorer(scripted({"": {}}), **kwargs).score(prompts, examples)


def test_bad_prompts_and_examples_are_refused():
    refused("prompts and examples, got 0 and 3", prompts=[])
    refused("prompt 0 is empty", [TaskPrompt(" \n", verbalizers=WORDS)])
    refused("has 0 verbalizers", [TaskPrompt("Say it.")])
    refused("verbalizer 1 of prompt 0 is empty", [TaskPrompt("Say it.", verbalizers=("good", " "))])
    refused("'good' and 'good' of prompt 0 are the same", [TaskPrompt("Say it.", verbalizers=("good", "good"))])
    refused("'good' and 'good film' .* goes on", [TaskPrompt("Say it.", verbalizers=("good", "good film"))])
    refused("prompt 1 has 3 verbalizers", [PROMPTS[0], TaskPrompt("Say it.", verbalizers=("x", "y", "z"))])
    refused("example 'd' has the label 2", examples=[LabelledExample("d", "text", 2)])
    refused("example 'd' has no text", examples=[LabelledExample("d", " ", 1)])
    refused("no {demonstrations}", [TaskPrompt("x", (Demonstration("y", 0),), WORDS, "{instruction}{input}")])
    for label in (-1, 2):
        shown = (Demonstration("y", label),)
        refused(f"demonstration 0 of prompt 0 has the label {label}", [TaskPrompt("x", shown, WORDS)])
    refused("UTF-8 cannot encode", [TaskPrompt("half an emoji: \ud83d", verbalizers=WORDS)])
    refused("verbalizer 0 of prompt 0 has blanks around it: use 'bad'", [TaskPrompt("x", verbalizers=("bad ", "good"))])
    refused("unknown calibration", calibrate="contextal")
    refused("batch calibration of one", examples=EXAMPLES[:1], calibrate="batch")
    refused("cache must be", cache=-1)
    refused("content_free must be a list", content_free=())
    with pytest.raises(InputError, match=r"must have \{input\} once"):
        TaskPrompt("x", verbalizers=WORDS, template="{instruction}")
    with pytest.raises(BackendError, match="reports no log-probs"):
        TaskScorer(FunctionBackend(lambda prompt: "yes"))


def test_tokens_are_checked_before_the_model_is_loaded(backend, monkeypatch):
    monkeypatch.setattr(TransformersBackend, "lm", property(lambda self: pytest.fail("the model was loaded")))
    with pytest.raises(InputError, match=r"'go' and 'good' .* goes on"):  # bytes where the vocabulary has no word
        TaskScorer(backend).score([TaskPrompt("x", verbalizers=("go", "good"))], EXAMPLES)


def test_verbalizers_of_no_token(backend, monkeypatch):
    monkeypatch.setattr(TransformersBackend, "completion_ids", lambda self, texts: [[5], []])
    with pytest.raises(InputError, match="verbalizer 'bad' is no token"):
        TaskScorer(backend).score(PROMPTS[:1], EXAMPLES)


def test_the_longest_in_tokens_need_not_be_the_longest_in_bytes():
    texts = ["plain " * 50, "short", "\u597d" * 60]
    examples = [LabelledExample(str(i), text, 0) for i, text in enumerate(texts)]
    assert [one.id for one in longest_examples(examples)] == ["0", "2"]
    assert [one.id for one in longest_examples(examples[:2])] == ["0"]


def test_a_prompt_over_the_context_names_its_tokens(backend):
    with pytest.raises(InputError, match=r"prompt 1 is too long: .* 1283 tokens, .* reads 256"):
        TaskScorer(backend).score([PROMPTS[0], TaskPrompt("word " * 250, verbalizers=WORDS)], EXAMPLES)
    assert backend.usage.requests == 0


def test_what_was_answered_before_a_failure_is_kept(tiny_model_path):
    class Failing(TransformersBackend):
        down = True

        def _choice_logprobs(self, prompts, choices, heads):
            rows = super()._choice_logprobs(prompts, choices, heads)
            return [*rows[:-1], BackendError("the line is down")] if self.down else rows

    backend = Failing(tiny_model_path, prompt_style="completion")
    scorer = TaskScorer(backend)
    with pytest.raises(BackendError, match="line is down"):
        scorer.score(PROMPTS[:1], EXAMPLES)
    backend.down = False
    scorer.score(PROMPTS[:1], EXAMPLES)
    assert backend.usage.requests == 6 + 2 and backend.usage.errors == 2


def test_a_chat_prompt_is_measured_without_the_model(tiny_model_path, monkeypatch):
    backend = TransformersBackend(tiny_model_path)
    assert backend.prompt_style == "chat"
    prompts = [TaskPrompt("word " * n, verbalizers=WORDS) for n in (1, 60)]
    tokens = len(backend.lm.encode([{"role": "user", "content": "".join(prompts[1].render("dull"))}], check=False))
    monkeypatch.setattr(TransformersBackend, "lm", property(lambda self: pytest.fail("the model was loaded")))
    scorer = TaskScorer(backend)
    room = max(map(len, backend.completion_ids(WORDS)))
    scorer.check(prompts[:1], EXAMPLES[:2])
    with pytest.raises(InputError, match=f"prompt 1 is too long: .* {tokens + room} tokens, .* reads 256"):
        scorer.check(prompts, EXAMPLES[1:2])
