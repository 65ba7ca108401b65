"""Building prompts: data fenced off from instructions, few-shot completion prompts, prompt files of the package."""

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
    """Returns the content of a package's prompt file, ``prompts/NAME.toml``.

    Args:
        package: the package, usually the caller's ``__package__``.
        name: file name without ``.toml``, e.g. ``"equality"``.
    """
    return tomllib.loads(files(package).joinpath("prompts", f"{name}.toml").read_text("utf-8"))


def one_line(text: str) -> str:
    """Returns the text with each run of whitespace as one blank, since a few-shot prompt has one line per value."""
    return " ".join(text.split())


def fill(template: str, values: Mapping[str, str]) -> str:
    """Returns the template with each ``{name}`` replaced by its value; names without a value stay as they are.

    A template fences its values off as data with tags, e.g. ``<text>``. The same tags inside a value are broken up, so
    that no value can close its fence. Braces in values are not replaced.
    """
    tags = "|".join(map(re.escape, dict.fromkeys(re.findall(r"</(\w+)>", template))))

    def value(match: re.Match[str]) -> str:
        text = values.get(match[1], match[0])
        # In any case and spacing: a judge may also read </TEXT > as the end of the fence.
        fence = rf"<\s*(/?)\s*({tags})\s*>"
        return re.sub(fence, r"< \1\2>", text, flags=re.IGNORECASE) if tags and match[1] in values else text

    return re.sub(r"\{(\w+)\}", value, template)


def few_shot(header: str, labels: Sequence[str], shots: Sequence[Sequence[str]], query: Sequence[str]) -> str:
    """Returns a completion prompt: header, one paragraph per shot, and a last one that ends at the label to fill in.

    Args:
        header: one line that describes what the paragraphs have in common.
        labels: names of the lines of a paragraph, e.g. ``("Instruction", "New instruction")``.
        shots: demonstrations, each with one value per label.
        query: values for all labels but the last.
    """
    paragraphs = [
        "\n".join(f"{label}: {one_line(value)}" for label, value in zip(labels, shot, strict=True)) for shot in shots
    ]
    query_lines = [f"{label}: {one_line(value)}" for label, value in zip(labels[:-1], query, strict=True)]
    return "\n\n".join([header, *paragraphs, "\n".join([*query_lines, f"{labels[-1]}:"])])


def build_prompt(style: PromptStyle, chat: str, completion: str) -> Prompt:
    """Returns the prompt in the form that a backend needs.

    Args:
        style: ``prompt_style`` of the backend.
        chat: content of the one user message for ``"chat"``.
        completion: few-shot text for ``"completion"``.
    """
    return [{"role": "user", "content": chat}] if style == "chat" else completion
