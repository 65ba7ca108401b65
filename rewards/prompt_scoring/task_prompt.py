"""Prompts for a frozen model on a labelled task, and the examples that they are scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ...llm_backends.errors import InputError
from ...llm_backends.prompting import fill

TEMPLATE = "{instruction}\n\n{demonstrations}{input}"
BLOCK = "Input: {text}\nAnswer:"


@dataclass(frozen=True)
class LabelledExample:
    """One input of a task with its right answer."""

    id: str
    """Stable over runs."""
    text: str
    """The filled input, e.g. a sentence, or premise and hypothesis with their names."""
    label: int
    """Index of the right label."""


@dataclass(frozen=True)
class Demonstration:
    """One solved input in a prompt."""

    text: str
    label: int
    """Index of its label, by which the prompt's verbalizer is chosen."""


@dataclass(frozen=True)
class TaskPrompt:
    """What a frozen model reads around an input: an instruction, solved inputs, and the words that stand for labels.

    Raises:
        InputError: on construction, for a template or block without its places.
    """

    instruction: str
    demonstrations: tuple[Demonstration, ...] = ()
    verbalizers: tuple[str, ...] = ()
    """One word (or text) per label, without surrounding blanks."""
    template: str = TEMPLATE
    """Where instruction, demonstrations and input stand; must have ``{instruction}`` and ``{input}``."""
    block: str = BLOCK
    """One input, open for its answer; must have ``{text}``. Solved inputs are written in the same form."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "demonstrations", tuple(self.demonstrations))
        object.__setattr__(self, "verbalizers", tuple(self.verbalizers))
        for part, places in (("template", ("instruction", "input")), ("block", ("text",))):
            for place in places:
                if getattr(self, part).count(f"{{{place}}}") != 1:
                    raise InputError(f"a prompt's {part} must have {{{place}}} once, got {getattr(self, part)!r}")

    def render(self, text: str) -> tuple[str, str]:
        """The prompt for one input, to which a blank and a verbalizer are the continuation.

        Args:
            text: the input.

        Returns:
            Two parts to be joined without a gap: what comes before the input, which all inputs share, and the rest.
            Where the template puts the input before the instruction, the first part ends before the instruction
            instead: what all prompts share for one input.
        """
        before, between, after = self._pieces
        return (before, f"{text}{between}") if after is None else (f"{before}{text}{between}", after)

    @property
    def text(self) -> str:
        """The whole prompt, for observations: the input's place left open, the verbalizers behind it."""
        return "".join(self.render("{text}")) + " " + " | ".join(self.verbalizers)

    @cached_property
    def _pieces(self) -> tuple[str, str, str | None]:
        """What stands before the input's text, and behind it; the rest from the instruction on, where it comes last."""
        words = self.verbalizers
        opening, closing = self.block.split("{text}")
        solved = "".join(f"{opening}{d.text}{closing} {words[d.label]}\n\n" for d in self.demonstrations)
        values = {"instruction": self.instruction, "demonstrations": solved}
        head, tail = self.template.split("{input}")
        before, split = fill(head, values), tail.find("{instruction}")
        if not self.instruction.strip():  # no gap where it would stand
            before = before.lstrip()
        if split < 0:
            return before + opening, closing + fill(tail, values), None
        return before + opening, closing + fill(tail[:split], values), fill(tail[split:], values)


def longest(examples: Sequence[LabelledExample]) -> list[LabelledExample]:
    """The examples that decide whether a prompt fits, for which alone tokens are counted.

    The longest in UTF-8 bytes, and the one with most bytes beyond ASCII, where a character can take several tokens.
    """
    sizes = [(len(one.text.encode()), len(one.text)) for one in examples]
    beyond = [(size - letters, size) for size, letters in sizes]
    return [examples[i] for i in dict.fromkeys((sizes.index(max(sizes)), beyond.index(max(beyond))))]


def encodable(text: str) -> bool:
    """Whether UTF-8 can say a text: half an emoji, which some servers send, it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_prompt(prompt: TaskPrompt, where: str = "the prompt") -> None:
    """Refuses a prompt that no model could be asked with, by its texts alone.

    Args:
        prompt: the prompt.
        where: what to call it in errors.

    Raises:
        InputError: for a prompt without instruction and demonstrations, text that UTF-8 cannot say, demonstrations
            without a place in the template or with a label outside the verbalizers, fewer than two verbalizers, and
            verbalizers that are empty, in blanks, equal, or continued by another one.
    """
    words = prompt.verbalizers
    if not prompt.instruction.strip() and not prompt.demonstrations:
        raise InputError(f"{where} is empty: give it an instruction or demonstrations")
    if prompt.demonstrations and "{demonstrations}" not in prompt.template:
        raise InputError(f"the template of {where} has no {{demonstrations}}, but there are some: add the place")
    if len(words) < 2:
        raise InputError(f"{where} has {len(words)} verbalizers: a task needs a word for each of at least 2 labels")
    for number, word in enumerate(words):
        if not word.strip():
            raise InputError(f"verbalizer {number} of {where} is empty: use a word that the model can say")
        if word != word.strip():
            raise InputError(f"verbalizer {number} of {where} has blanks around it: use {word.strip()!r}, not {word!r}")
    check_distinct([word.split() for word in words], words, where)
    for number, shown in enumerate(prompt.demonstrations):
        if not 0 <= shown.label < len(words):
            raise InputError(
                f"demonstration {number} of {where} has the label {shown.label}: use 0 to {len(words) - 1}"
            )
    if not encodable(prompt.text):
        raise InputError(f"{where} has characters that UTF-8 cannot say: {prompt.text!r}")


def check_distinct(tokens: Sequence[Sequence[object]], words: Sequence[str], where: str) -> None:
    """Refuses verbalizers of equal tokens, and those that begin with all tokens of another one.

    The probability of a text is at least that of every continuation, so the longer one could never be predicted.

    Raises:
        InputError: naming the two.
    """
    for i, first in enumerate(tokens):
        for j, second in enumerate(tokens):
            if i != j and list(first) == list(second[: len(first)]):
                how = "are the same tokens" if len(first) == len(second) else "cannot be told apart: the second goes on"
                raise InputError(f"the verbalizers {words[i]!r} and {words[j]!r} of {where} {how}; use other words")
