"""Minimal edits: labels per token against a plain dynamic programme, their cost, and files of pairs."""

import json
import random
import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.tokenization import WordTokenizer
from instructgym.rewards.learned import edits
from instructgym.rewards.learned.edits import (
    EditedPair,
    EditLabels,
    edit_labels,
    edit_statistics,
    read_pairs,
    write_pairs,
)

tokens = st.lists(st.integers(0, 4), max_size=14)


def plain(original, edited):
    """The textbook table and its backtrace: match, else D, then A, then S."""
    n, m = len(original), len(edited)
    cost = [[i + j if not i * j else 0 for j in range(m + 1)] for i in range(n + 1)]
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            step = original[i - 1] != edited[j - 1]
            cost[i][j] = min(cost[i - 1][j] + 1, cost[i][j - 1] + 1, cost[i - 1][j - 1] + step)
    before, after, i, j = ["U"] * n, ["U"] * m, n, m
    while i or j:
        if i and j and original[i - 1] == edited[j - 1]:
            i, j = i - 1, j - 1
        elif i and cost[i - 1][j] + 1 == cost[i][j]:
            i -= 1
            before[i] = "D"
        elif j and cost[i][j - 1] + 1 == cost[i][j]:
            j -= 1
            after[j] = "A"
        else:
            i, j = i - 1, j - 1
            before[i] = after[j] = "S"
    return EditLabels("".join(before), "".join(after)), cost[n][m]


def edited_text(length, share, seed):
    """A text of token ids and an edit of it: deletions, additions and substitutions at a share of the places."""
    rng = random.Random(seed)
    original = [rng.randrange(400) for _ in range(length)]
    edited = []
    for token in original:
        kind = rng.choice("DAS") if rng.random() < share else "U"
        edited += {"U": [token], "D": [], "A": [rng.randrange(400), token], "S": [rng.randrange(400)]}[kind]
    return original, edited


@pytest.mark.parametrize(
    ("original", "edited", "before", "after"),
    [
        ("ABCD", "AXCDE", "USUU", "USUUA"),
        ("AB", "BA", "UD", "AU"),
        ("A", "AA", "U", "AU"),
        ("AA", "A", "DU", "U"),
        ("", "AB", "", "AA"),
        ("AB", "", "DD", ""),
        ("", "", "", ""),
        ("AB", "AB", "UU", "UU"),
        ("AB", "CD", "SS", "SS"),
        ("kitten", "sitting", "SUUUSU", "SUUUSUA"),
    ],
)
def test_fixtures(original, edited, before, after):
    assert edit_labels(original, edited) == EditLabels(before, after)


@given(tokens, tokens)
def test_labels_are_those_of_the_plain_table(original, edited):
    wanted, distance = plain(original, edited)
    assert edit_labels(original, edited) == wanted and wanted.distance == distance


@given(st.lists(st.integers(0, 4), max_size=60), st.lists(st.integers(0, 4), max_size=60))
def test_a_table_in_blocks_says_the_same(original, edited):
    whole, edits.WHOLE_TABLE = edits.WHOLE_TABLE, 0
    try:
        blocks = edit_labels(original, edited)
    finally:
        edits.WHOLE_TABLE = whole
    assert blocks == plain(original, edited)[0]


@pytest.mark.parametrize("share", [0.02, 0.2, 0.8])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_texts_around_the_size_of_a_machine_word(length, share):
    original, edited = edited_text(length, share, length)
    assert edit_labels(original, edited) == plain(original, edited)[0]


@given(tokens, tokens)
def test_unchanged_tokens_are_the_same_on_both_sides(original, edited):
    labels = edit_labels(original, edited)
    kept = [token for token, gone in zip(original, labels.removed, strict=True) if not gone]
    assert kept == [token for token, new in zip(edited, labels.written, strict=True) if not new]
    assert labels.original.count("S") == labels.edited.count("S")
    assert set(labels.original) <= set("UDS") and set(labels.edited) <= set("UAS")


@given(tokens)
def test_a_copy_has_no_changes(original):
    labels = edit_labels(original, list(original))
    assert (labels.distance, labels.edits, labels.removed.sum(), labels.written.sum()) == (0, 0, 0, 0)


def test_masks_and_counts():
    labels = edit_labels("the dull plot of a film".split(), "well the bright lively plot of film".split())
    assert (labels.original, labels.edited) == ("USUUDU", "AUSAUUU")
    assert labels.removed.tolist() == [False, True, False, False, True, False] and labels.removed.dtype == bool
    assert labels.written.tolist() == [True, False, True, True, False, False, False]
    assert (labels.distance, labels.edits) == (4, 3)
    assert edit_labels("ABCD", "AXYD").edits == 1


def test_long_texts_take_little_memory():
    original, edited = edited_text(5_000, 0.3, 1)
    original[::2] = range(1_000, 3_500)  # most tokens are distinct
    tracemalloc.start()
    try:
        labels = edit_labels(original, edited)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(labels.original) == 5_000 and labels.distance > 1_000
    assert peak < 4e6


# --- files of pairs ------------------------------------------------------------------------------------------------


ROW = {"prompt": "p", "original": "a b", "edited": "a c"}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def test_rows_become_pairs(tmp_path):
    rows = [
        ROW | {"id": "one", "finished": False, "metadata": {"k": [1]}},
        {"prompt": "", "original_output": "x\u2028y", "revised_output": "x é"},
        {**ROW, "edited": " "},
        {**ROW, "edited": ""},
        {**ROW, "edited": "a b\n"},
        {**ROW, "original": ""},
    ]
    pairs = read_pairs(write(tmp_path / "pairs.jsonl", *rows))
    assert pairs[0] == EditedPair("p", "a b", "a c", "one", False, {"k": [1]})
    assert (pairs[1].original, pairs[1].edited, pairs[1].finished) == ("x\u2028y", "x é", True)
    assert len(pairs) == 2 and len(pairs[1].id) == 12
    assert pairs.dropped == {"empty edit": 2, "unchanged": 1, "empty original": 1}
    written = tmp_path / "new" / "copy.jsonl"
    write_pairs(written, pairs)
    again = read_pairs(written)
    assert again == pairs and again.dropped == {} and not list(written.parent.glob("*.part"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "p", "original": "a"},
            "row 2 needs the text field 'edited' or 'revised_output'; it has 'prompt',",
        ),
        ({"original": "a", "edited": "b"}, "row 2 needs the text field 'prompt'"),
        (ROW | {"edited": 3}, "row 2: the field 'edited' is a int: make it a text"),
        ({"prompt": "p", "original_output": None, "edited": "b"}, "the field 'original_output' is a NoneType"),
        (ROW | {"finished": 1}, "the field 'finished' is a int: make it true or false"),
        (ROW | {"metadata": []}, "the field 'metadata' is a list: make it an object"),
        (ROW | {"edited": "\ud800"}, "row 2: the field 'edited' holds a lone surrogate"),
        ("[1]", "row 2 is a list: make it a JSON object"),
        ('{"prompt": ', "row 2 is broken JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_pairs(write(tmp_path / "pairs.jsonl", ROW, row, ROW))
    assert "pairs.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_a_bad_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the pairs .*none\.jsonl: No such file"):
        read_pairs(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(InputError, match=r"latin\.jsonl is not UTF-8.*byte 12"):
        read_pairs(tmp_path / "latin.jsonl")
    with pytest.raises(InputError, match=r"holds no pair to learn from \(1 unchanged\)"):
        read_pairs(write(tmp_path / "same.jsonl", ROW | {"edited": "a b"}))
    with pytest.raises(InputError, match=r"no pair to learn from \(it is empty"):
        read_pairs(write(tmp_path / "empty.jsonl"))


def test_statistics():
    tokenizer = WordTokenizer(words=("a", "b", "c", "d", "e"))
    pairs = [
        EditedPair("", "a b c d", "a e c d"),
        EditedPair("", "a b", "a b c", finished=False),
        EditedPair("", "a b", "b"),
        EditedPair("", "a b c d", "e b c e a"),
    ]
    assert edit_statistics(pairs, tokenizer) == pytest.approx(
        {
            "pairs": 4,
            "original_tokens": 3.0,
            "edited_tokens": 3.25,
            "removed_share": 4 / 12,
            "written_share": 5 / 13,
            "edits": 5 / 4,
            "distance": 6 / 4,
            "insertions_only": 1 / 4,
            "deletions_only": 1 / 4,
            "first_changed": 1 / 4,
            "finished": 3 / 4,
        }
    )
    with pytest.raises(InputError, match="no pairs to describe"):
        edit_statistics([], tokenizer)
