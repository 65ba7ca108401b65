"""The text of one instance: what is read, what is malformed, and why."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructgym.llm_backends.errors import InputError
from instructgym.rewards.quality.instance_format import Instance, parse_instance, parse_instance_or_reason

INSTRUCTION = "Name the capital of the country."


@pytest.mark.parametrize(
    ("text", "order", "expected"),
    [
        ("Input: France\nOutput: Paris", "input_first", Instance("France", "Paris")),
        (" France\nOutput: Paris", "input_first", "no_field"),
        ("Input: France\nOutput: Paris\n\nwhich is old", "input_first", Instance("France", "Paris\n\nwhich is old")),
        ("Input: a\nb\nOutput: c", "input_first", Instance("a\nb", "c")),
        ("INPUT : France\n  output 1: Paris\n", "input_first", Instance("France", "Paris")),
        ("Output: Paris", "input_first", Instance("", "Paris")),
        ("Input:\nOutput: Paris", "input_first", Instance("", "Paris")),
        ("Input: None.\nOutput: Paris", "input_first", Instance("", "Paris")),
        ("Input: <noinput>\nOutput:\nParis", "input_first", Instance("", "Paris")),
        ("", "input_first", "no_output"),
        ("Paris", "input_first", "no_field"),
        ("Input: France", "input_first", "no_output"),
        ("Input: France Output: Paris", "input_first", "no_output"),
        ("Input: a\nOutput: b\nOutput: c", "input_first", "fields"),
        ("Input: a\nOutput: b\nInput: c", "input_first", "fields"),
        ("Input: a\nInput: b\nOutput: c", "input_first", "fields"),
        ("Output: b\nInput: a", "input_first", "fields"),
        ("Input: a\nClass label: b", "input_first", "no_output"),
        ("Input: a\nOutput: b\nClass label: c", "input_first", "fields"),
        ("Input: a\nOutput: b\nExample 2\nInput: c\nOutput: d", "input_first", "heading"),
        ("Input: a\nOutput: b\nTask: Write.", "input_first", "heading"),
        ("Input: a\nOutput: b Output: c", "input_first", "field_inside"),
        ("Input: a\nOutput: the input: is small", "input_first", Instance("a", "the input: is small")),
        ("Input: a\nOutput:  ", "input_first", "empty_output"),
        ("Input: a  b\nOutput: a b", "input_first", "input_is_output"),
        ("Input: paris\nOutput: Paris", "input_first", Instance("paris", "Paris")),
        ("Input: a\nOutput: name the capital  of the Country", "input_first", "echo"),
        ("Input: a\nOutput: Sure. Name the capital of the country! Paris", "input_first", "echo"),
        ("Input: a\nOutput: The capital:", "input_first", "ends_with_colon"),
        ("Input: The following:\nOutput: b", "input_first", "ends_with_colon"),
        ("Class label: old\nInput: Rome", "output_first", Instance("Rome", "old")),
        ("Class label: old\nInput: Rome\nAthens", "output_first", Instance("Rome\nAthens", "old")),
        ("Class label: old", "output_first", Instance("", "old")),
        ("Class label: old\nRome", "output_first", "long_label"),
        ("Input: Rome\nClass label: old", "output_first", "fields"),
        ("Input: Rome\nOutput: old", "output_first", "no_output"),
        ("Class label: old\nInput: Rome\nClass label: new\nInput: Brasilia", "output_first", "fields"),
        ("Class label:\nInput: Rome", "output_first", "empty_output"),
        ("Class label: old\nInput: old", "output_first", "input_is_output"),
    ],
)
def test_the_table(text, order, expected):
    assert parse_instance_or_reason(text, order, INSTRUCTION) == expected
    assert parse_instance(text, order, INSTRUCTION) == (expected if isinstance(expected, Instance) else None)


def test_a_short_instruction_may_stand_in_its_output():
    assert parse_instance("Output: Say hello, he said.", instruction="Say hello.") == Instance(
        "", "Say hello, he said."
    )
    assert parse_instance_or_reason("Output: say hello", instruction="Say hello.") == "echo"
    assert parse_instance("Output: say hello") == Instance("", "say hello")


def test_an_unknown_order():
    with pytest.raises(InputError, match="unknown order 'label_first': use input_first or output_first"):
        parse_instance("Output: a", "label_first")


words = st.lists(st.sampled_from("red green blue 12 sky.".split()), min_size=1, max_size=6).map(" ".join)


@given(words, words, st.sampled_from(["input_first", "output_first"]))
def test_what_is_written_is_read_back(first, second, order):
    labels = ("Input", "Output") if order == "input_first" else ("Class label", "Input")
    found = parse_instance_or_reason(f"{labels[0]}: {first}\n{labels[1]}: {second}\n", order)
    pair = (first, second) if order == "input_first" else (second, first)
    assert found == ("input_is_output" if first == second else Instance(*pair))
