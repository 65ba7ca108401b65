"""Heat maps of token rewards over the text of the tokens, as an HTML page or a PNG picture."""

from __future__ import annotations

import html
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.cells import cell_len, chop_cells

from ...llm_backends.errors import InputError
from ...llm_backends.local.tokenization import Tokenizer

LOW, MIDDLE, HIGH = "#B2182B", "#F7F7F7", "#2166AC"
"""Colours of the lowest value, 0 and the highest value: red below 0, blue above (ColorBrewer's RdBu, which colour-blind
readers can distinguish)."""

TITLE = "Token rewards"
"""Title of page and picture."""

WIDTH = 96
"""Columns of a line in a picture."""

LONGEST = 400
"""Maximum number of lines of a picture."""


@dataclass(frozen=True)
class HeatRow:
    """One response and the reward of each of its tokens."""

    tokens: Sequence[str]
    """The text of each token."""
    values: Sequence[float]
    """The reward of each token; as many values as tokens."""
    title: str = ""
    """A line above the response, e.g. its prompt or ``original``."""


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Returns the text of each token; a special token gives its name.

    Without special tokens, the joined texts are the text of the response, with one exception: of several tokens that
    encode one character together, the last one gets the character and the others ``·``.

    Args:
        ids: token ids of a response.
        tokenizer: tokenizer of the ids.
    """
    special = set(tokenizer.hf.all_special_ids)
    texts: list[str] = []
    start, shown = 0, ""  # start of the current run of ordinary tokens, and the text of that run so far
    for position, token in enumerate(map(int, ids)):
        if token in special:
            texts.append(str(tokenizer.hf.convert_ids_to_tokens(token)))
            start, shown = position + 1, ""
            continue
        text = tokenizer.decode([int(t) for t in ids[start : position + 1]])
        # The decoder returns the replacement character for a character whose bytes are incomplete.
        whole = not text.endswith("\ufffd")
        texts.append(text[len(shown) :] if whole else "·")
        shown = text if whole else shown
    return texts


def color_scale(rows: Sequence[HeatRow]) -> float:
    """Returns the absolute value that gets the strongest colour.

    It is the 98th percentile of the absolute values, so that a single outlier does not make all others pale.

    Args:
        rows: rows to draw.

    Raises:
        InputError: if there are no rows, a row has another number of values than tokens, or a value is not finite.
    """
    if not rows:
        raise InputError("a heat map needs at least one row of tokens")
    for number, row in enumerate(rows):
        if len(row.tokens) != len(row.values):
            raise InputError(f"row {number} of the heat map has {len(row.tokens)} tokens and {len(row.values)} values")
        if not np.isfinite(np.asarray(row.values, np.float64)).all():
            raise InputError(f"row {number} of the heat map has values that are not finite")
    values = np.abs(np.concatenate([np.asarray(row.values, np.float64) for row in rows]))
    return float(np.percentile(values, 98)) or 1.0 if len(values) else 1.0


def color(value: float, limit: float) -> tuple[str, str]:
    """Returns background and text colour, as ``#rrggbb``, of a value on a map from -``limit`` to ``limit``."""
    from matplotlib.colors import to_hex, to_rgb

    share = float(np.clip(value / limit, -1.0, 1.0))
    middle, end = (np.array(to_rgb(name)) for name in (MIDDLE, HIGH if share > 0 else LOW))
    mixed = middle + abs(share) * (end - middle)
    # Relative luminance (WCAG 2): white text on a dark background.
    linear = np.where(mixed <= 0.04045, mixed / 12.92, ((mixed + 0.055) / 1.055) ** 2.4)
    dark = float(linear @ [0.2126, 0.7152, 0.0722]) < 0.18
    return to_hex(mixed), "#ffffff" if dark else "#1a1a1a"


def write_html(rows: Sequence[HeatRow], path: str | Path) -> Path:
    """Writes a self-contained HTML page; the reward of a token appears as a tooltip.

    Args:
        rows: responses to show.
        path: HTML file to write.

    Returns:
        The path.

    Raises:
        InputError: for rows that :func:`color_scale` rejects.
    """
    limit = color_scale(rows)
    body = "\n".join(_html_row(row, limit) for row in rows)
    page = PAGE.format(title=TITLE, low=LOW, middle=MIDDLE, high=HIGH, limit=f"{limit:.3g}", body=body)
    Path(path).write_text(page, "utf-8")
    return Path(path)


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2rem auto; }}
h1 {{ font-size: 1.3rem; }}
section {{ margin: 1.2rem 0; }}
h2 {{ font-size: 0.9rem; font-weight: 600; color: #555; margin: 0 0 0.3rem; white-space: pre-wrap; }}
p {{ font-family: ui-monospace, "DejaVu Sans Mono", monospace; line-height: 1.75; margin: 0; white-space: pre-wrap; }}
span {{ border-radius: 3px; padding: 0.1em 0; box-shadow: inset 0 0 0 1px rgba(0, 0, 0, 0.08); }}
.legend {{ display: flex; align-items: center; gap: 0.6rem; font-size: 0.85rem; color: #555; }}
.legend i {{ width: 14rem; height: 0.9rem; border-radius: 3px;
  background: linear-gradient(to right, {low}, {middle}, {high}); }}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="legend">&minus;{limit} <i></i> +{limit} <span style="box-shadow: none">reward of a token</span></div>
{body}
</body>
</html>
"""


def _html_row(row: HeatRow, limit: float) -> str:
    """Returns the HTML of one response."""
    spans = []
    for token, value in zip(row.tokens, row.values, strict=True):
        background, foreground = color(value, limit)
        text = html.escape(_visible(token)) + ("\n" if token.endswith("\n") else "")
        spans.append(f'<span style="background:{background};color:{foreground}" title="{value:+.3f}">{text}</span>')
    heading = f"<h2>{html.escape(row.title)}</h2>" if row.title else ""
    return f"<section>{heading}<p>{''.join(spans)}</p></section>"


def _visible(token: str) -> str:
    """Returns the token with visible signs for line ends, tabs and control characters, so that they can be coloured."""
    text = token.replace("\r", "").replace("\n", "⏎").replace("\t", "→")
    return "".join(c if unicodedata.category(c) != "Cc" else "·" for c in text)


def plot_heat_map(rows: Sequence[HeatRow], path: str | Path) -> Path:
    """Draws tokens in a fixed-width font on coloured boxes, 96 columns per line, with a colour bar.

    Characters that DejaVu Sans Mono lacks, such as Chinese ones, are drawn as empty boxes; :func:`write_html` shows
    them.

    Args:
        rows: responses to draw.
        path: PNG file to write.

    Returns:
        The path.

    Raises:
        InputError: for rows that :func:`color_scale` rejects, and for more than 400 lines.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    limit = color_scale(rows)
    boxes, height = _layout(rows)
    if height > LONGEST:
        raise InputError(f"this heat map has {height} lines, {LONGEST} at most: draw fewer rows, or write HTML")
    size, step, margin = 9.0, 0.21, 0.25  # points, inches per line, inches
    character = 0.602 * size / 72  # advance width of DejaVu Sans Mono, in inches
    across, down = WIDTH * character, height * step
    width, tall = across + 2 * margin, down + 2 * margin + 0.4
    figure = Figure(figsize=(width, tall), facecolor="white")
    axis = figure.add_axes((margin / width, margin / tall, across / width, down / tall))
    axis.set(xlim=(0, WIDTH), ylim=(height, 0))
    axis.axis("off")
    shared: dict[str, Any] = {"va": "center", "parse_math": False}
    for line, column, text, value in boxes:
        if value is None:
            axis.text(column, line + 0.62, text, fontsize=size - 1, color="#555555", **shared)
            continue
        background, foreground = color(value, limit)
        corner, columns = (column, line + 0.06), cell_len(text)
        axis.add_patch(Rectangle(corner, columns, 0.88, facecolor=background, edgecolor="#00000022", linewidth=0.5))
        axis.text(column, line + 0.53, text, fontsize=size, family="DejaVu Sans Mono", color=foreground, **shared)
    bar = figure.add_axes((margin / width + 0.62 * across / width, 1 - 0.4 / tall, 0.38 * across / width, 0.12 / tall))
    scale = LinearSegmentedColormap.from_list("reward", [LOW, MIDDLE, HIGH])
    figure.colorbar(ScalarMappable(Normalize(-limit, limit), scale), cax=bar, orientation="horizontal")
    bar.set_xticks([-limit, 0, limit], [f"−{limit:.2g}", "0", f"+{limit:.2g}"], fontsize=7)
    bar.set_title("reward of a token", fontsize=7, color="#555555", pad=3)
    bar.tick_params(length=2)
    bar.spines[:].set_visible(False)
    figure.text(margin / width, 1 - 0.34 / tall, TITLE, fontsize=12, fontweight="bold", **shared)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # drawn as empty boxes, as documented above
        figure.savefig(path, dpi=150)
    return Path(path)


def _layout(rows: Sequence[HeatRow]) -> tuple[list[tuple[float, int, str, float | None]], float]:
    """Returns line, column, text and value (None for a title) of each piece of text, and the number of lines."""
    boxes: list[tuple[float, int, str, float | None]] = []
    line = 0.0
    for row in rows:
        if row.title:
            title = " ".join(row.title.split())
            boxes.append((line, 0, title if len(title) <= WIDTH else title[: WIDTH - 1] + "…", None))
            line += 1
        column = 0
        for token, value in zip(row.tokens, row.values, strict=True):
            # A token that is longer than a line is split.
            text = _visible(token)
            for piece in chop_cells(text, WIDTH) or [text]:  # none for a combining mark alone
                if column and column + cell_len(piece) > WIDTH:
                    line, column = line + 1, 0
                boxes.append((line, column, piece, value))
                column += cell_len(piece)
            if token.endswith("\n"):
                line, column = line + 1, 0
        line += 1.5 if column else 0.5
    return boxes, line - 0.5
