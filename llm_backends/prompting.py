"""Building prompts: data fenced off from instructions, few-shot completion forms, prompt files of the package."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from .base import Prompt, PromptStyle


@cache
def load_prompts(package: str, name: str) -> dict[str, Any]:
    """The prompt file ``prompts/NAME.toml`` beside the caller: ``load_prompts(__package__, "equality")``."""
    return tomllib.loads(files(package).joinpath("prompts", f"{name}.toml").read_text("utf-8"))


def one_line(text: str) -> str:
    """The text with every run of white space, line ends included, as one blank: few-shot forms are line by line."""
    return " ".join(text.split())


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with each ``{name}`` replaced by its value.

    A template fences its values off as data with tags, e.g. ``<text>``; the same tags inside a value are broken, so
    that no text can close its fence. Braces in values are left alone.
    """
    tags = "|".join(map(re.escape, dict.fromkeys(re.findall(r"</(\w+)>", template))))

    def value(match: re.Match[str]) -> str:
        text = values.get(match[1], match[0])
        # In any case and spacing: a judge may take </TEXT > for the end of the fence as well.
        fence = rf"<\s*(/?)\s*({tags})\s*>"
        return re.sub(fence, r"< \1\2>", text, flags=re.IGNORECASE) if tags and match[1] in values else text

    return re.sub(r"\{(\w+)\}", value, template)


def few_shot(header: str, labels: Sequence[str], shots: Sequence[Sequence[str]], query: Sequence[str]) -> str:
    """A completion prompt: header, one paragraph per shot, and a last paragraph that ends at the label to fill.

    Args:
        header: one line that says what the paragraphs have in common.
        labels: names of the lines of a paragraph, e.g. ``("Instruction", "New instruction")``.
        shots: for each demonstration one value per label.
        query: values for all labels but the last.
    """
    paragraphs = [
        "\n".join(f"{label}: {one_line(value)}" for label, value in zip(labels, shot, strict=True)) for shot in shots
    ]
    asked = [f"{label}: {one_line(value)}" for label, value in zip(labels[:-1], query, strict=True)]
    return "\n\n".join([header, *paragraphs, "\n".join([*asked, f"{labels[-1]}:"])])


def build_prompt(style: PromptStyle, chat: str, completion: str) -> Prompt:
    """The form a backend asks for: one user message, or the few-shot text."""
    return [{"role": "user", "content": chat}] if style == "chat" else completion
