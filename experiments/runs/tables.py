"""Tables for reports: rows of cells, the titles first, in Markdown and in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def rich_table(rows: Sequence[Sequence[str]]) -> Table:
    """The rows as a table for the terminal; brackets in a cell are text, not markup."""
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table
