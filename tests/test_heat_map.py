"""Heat maps of token rewards: the texts of tokens, colours, the page and the picture."""

import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructgym.experiments.fine_grained.heat_map import (
    HIGH,
    LOW,
    MIDDLE,
    HeatRow,
    color,
    color_scale,
    plot_heat_map,
    token_texts,
    write_html,
)
from instructgym.llm_backends.errors import InputError
from instructgym.llm_backends.local.tokenization import ByteTokenizer, LoadedTokenizer


class Spans(HTMLParser):
    """The tokens of a page: (text, style, title), and every tag."""

    def __init__(self):
        super().__init__()
        self.tags, self.spans, self._open = [], [], False

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._open = tag == "span" and "title" in dict(attributes)
        if self._open:
            self.spans.append(["", dict(attributes)["style"], dict(attributes)["title"]])

    def handle_endtag(self, tag):
        self._open = False

    def handle_data(self, data):
        if self._open:
            self.spans[-1][0] += data


def page(rows, tmp_path):
    parser = Spans()
    parser.feed(write_html(rows, tmp_path / "map.html").read_text("utf-8"))
    return parser


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12))
def test_token_texts_join_to_the_text(text):
    tokenizer = ByteTokenizer()
    texts = token_texts(tokenizer.encode_continuation(text), tokenizer)
    assert len(texts) == len(text.encode())
    partial = len(text.encode()) - len(text)  # the bytes of a character but its last
    assert texts.count("·") - text.count("·") == partial
    assert [t for t in texts if t != "·"] == [c for c in text if c != "·"]


def test_special_tokens_go_by_their_names(tiny_tokenizer):
    tokenizer = LoadedTokenizer(tiny_tokenizer, "tiny", 64)
    ids = [*tokenizer.encode_continuation("write a poem"), 1, *tokenizer.encode_continuation(" more"), 1]
    texts = token_texts(ids, tokenizer)
    assert "".join(texts) == "write a poem</s> more</s>" and texts[-1] == "</s>"


def test_the_map_is_centred_at_0():
    assert color(0.0, 2.0)[0] == MIDDLE.lower()
    assert color(-2.0, 2.0)[0] == color(-9.0, 2.0)[0] == LOW.lower()
    assert color(2.0, 2.0)[0] == HIGH.lower()
    assert color(2.0, 2.0)[1] == "#ffffff" and color(0.1, 2.0)[1] == "#1a1a1a"


def test_one_outlier_does_not_pale_the_rest():
    rows = [HeatRow(["x"] * 200, [1.0] * 199 + [500.0])]
    assert color_scale(rows) == pytest.approx(1.0)
    assert color_scale([HeatRow(["a"], [0.0])]) == 1.0 == color_scale([HeatRow([], [])])


def test_a_page_shows_every_token_with_its_reward(tmp_path):
    rows = [HeatRow(["a", " bad", "\n", "end"], [0.25, -1.0, 0.0, 1.0], "original"), HeatRow(["b"], [0.5])]
    parser = page(rows, tmp_path)
    assert [text for text, _, _ in parser.spans] == ["a", " bad", "⏎\n", "end", "b"]
    assert [title for _, _, title in parser.spans] == ["+0.250", "-1.000", "+0.000", "+1.000", "+0.500"]
    grounds = [re.search(r"background:(#\w{6})", style)[1] for _, style, _ in parser.spans]
    assert grounds == [color(v, 1.0)[0] for row in rows for v in row.values]
    assert parser.tags.count("section") == 2 and parser.tags.count("h2") == 1


def test_text_cannot_break_out_of_the_page(tmp_path):
    evil = '</p><script>alert("x")</script>&amp;'
    parser = page([HeatRow([evil], [1.0], title=evil)], tmp_path)
    assert parser.spans[0][0] == evil
    assert "script" not in parser.tags
    assert not re.search(r"(?:src|href)=|url\(", (tmp_path / "map.html").read_text("utf-8"))


def test_the_picture_has_the_colours_of_its_tokens(tmp_path):
    rows = [HeatRow(["goodgoodgood", " badbadbadbad"], [1.0, -1.0], "of a $title_1")]
    picture = matplotlib.image.imread(plot_heat_map(rows, tmp_path / "map.png"))[..., :3]
    lower = picture[len(picture) // 2 :]  # below the colour bar
    for name in (LOW, HIGH):
        wanted = np.array([int(name[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(lower - wanted).max(axis=-1) < 0.01).mean() > 0.005
    assert not (np.abs(picture[-3:] - 1.0) > 0.01).any()  # nothing reaches the edge


def test_long_responses_wrap(tmp_path):
    short, long = (
        matplotlib.image.imread(plot_heat_map([HeatRow(["word "] * n, [0.5] * n)], tmp_path / f"{n}.png"))
        for n in (10, 100)
    )
    assert long.shape[1] == short.shape[1] and long.shape[0] > short.shape[0] + 100
    plot_heat_map([HeatRow(["x" * 300, "日本" * 60, "\n", "e\u0301"], [1.0, -1.0, 0.5, 0.2])], tmp_path / "wide.png")


@pytest.mark.parametrize("write", [write_html, plot_heat_map])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row"),
        ([HeatRow(["a"], [])], "row 0 of the heat map has 1 tokens and 0 values"),
        ([HeatRow(["a"], [1.0]), HeatRow(["a"], [float("nan")])], "row 1 of the heat map has values that"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, write, rows, message):
    with pytest.raises(InputError, match=message):
        write(rows, tmp_path / "map")
    assert not (tmp_path / "map").exists()


def test_a_picture_of_a_book_is_refused(tmp_path):
    with pytest.raises(InputError, match="draw fewer rows, or write HTML"):
        plot_heat_map([HeatRow(["line\n"] * 401, [0.0] * 401)], tmp_path / "map.png")
