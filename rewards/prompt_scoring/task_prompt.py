"""Prompts for a frozen model on a labelled task, the examples they are scored on, and checks of both."""

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
    """One input of a task with its right label."""

    id: str
    """Id of the example, stable over runs."""
    text: str
    """Input text, e.g. a sentence, or premise and hypothesis with their field names."""
    label: int
    """Index of the right label."""


@dataclass(frozen=True)
class Demonstration:
    """One input with its answer, shown in a prompt."""

    text: str
    label: int
    """Index of the label, and of its word among the prompt's verbalizers."""


@dataclass(frozen=True)
class TaskPrompt:
    """A prompt without its input: an instruction, demonstrations, and verbalizers (the words for the labels).

    Raises:
        InputError: on construction, if a placeholder of ``template`` or ``block`` does not occur exactly once.
    """

    instruction: str
    demonstrations: tuple[Demonstration, ...] = ()
    verbalizers: tuple[str, ...] = ()
    """One word (or text) per label, without surrounding white space."""
    template: str = TEMPLATE
    """Layout of instruction, demonstrations and input; must have ``{instruction}`` and ``{input}`` once each."""
    block: str = BLOCK
    """Layout of one input up to its answer; must have ``{text}`` once. Demonstrations have the same layout."""

    def __post_init__(self) -> None:
        # Lists become tuples, which keeps prompts hashable; a frozen dataclass allows this only in this way.
        object.__setattr__(self, "demonstrations", tuple(self.demonstrations))
        object.__setattr__(self, "verbalizers", tuple(self.verbalizers))
        for part, places in (("template", ("instruction", "input")), ("block", ("text",))):
            for place in places:
                if getattr(self, part).count(f"{{{place}}}") != 1:
                    raise InputError(f"a prompt's {part} must have {{{place}}} once, got {getattr(self, part)!r}")

    def render(self, text: str) -> tuple[str, str]:
        """Returns the prompt for one input; a blank and a verbalizer continue it.

        Args:
            text: the input.

        Returns:
            Two parts, to be joined without a separator: the text before the input, which all inputs share, and the
            rest. If the template puts the input before the instruction, the first part ends before the instruction
            instead: all prompts share it for one input.
        """
        before, between, after = self._pieces
        return (before, f"{text}{between}") if after is None else (f"{before}{text}{between}", after)

    @property
    def text(self) -> str:
        """The whole prompt for observations: ``{text}`` in place of the input, followed by the verbalizers."""
        return "".join(self.render("{text}")) + " " + " | ".join(self.verbalizers)

    @cached_property
    def _pieces(self) -> tuple[str, str, str | None]:
        """Texts before and after the input's text; third, the text from the instruction on if the input precedes it."""
        words = self.verbalizers
        opening, closing = self.block.split("{text}")
        solved = "".join(f"{opening}{d.text}{closing} {words[d.label]}\n\n" for d in self.demonstrations)
        values = {"instruction": self.instruction, "demonstrations": solved}
        head, tail = self.template.split("{input}")
        before, split = fill(head, values), tail.find("{instruction}")
        if not self.instruction.strip():  # an empty instruction leaves no blank lines at the start
            before = before.lstrip()
        if split < 0:
            return before + opening, closing + fill(tail, values), None
        return before + opening, closing + fill(tail[:split], values), fill(tail[split:], values)


def longest_examples(examples: Sequence[LabelledExample]) -> list[LabelledExample]:
    """Returns the examples whose tokens are counted to check whether a prompt fits the context.

    These are the longest in UTF-8 bytes, and the one with the most bytes beyond one per character: outside ASCII a
    character can take several tokens.
    """
    sizes = [(len(example.text.encode()), len(example.text)) for example in examples]
    extra_bytes = [(size - letters, size) for size, letters in sizes]
    return [examples[i] for i in dict.fromkeys((sizes.index(max(sizes)), extra_bytes.index(max(extra_bytes))))]


def encodable(text: str) -> bool:
    """Returns whether UTF-8 can encode a text; it cannot encode lone surrogates, which some servers send."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_prompt(prompt: TaskPrompt, where: str = "the prompt") -> None:
    """Checks the texts of a prompt; needs no model.

    Args:
        prompt: the prompt.
        where: name of the prompt in error messages.

    Raises:
        InputError: for a prompt without instruction and demonstrations, text that UTF-8 cannot encode, demonstrations
            for which the template has no place or whose label has no verbalizer, fewer than two verbalizers, and
            verbalizers that are empty, have white space around them, are equal, or begin another verbalizer.
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
    # Split at white space here; the scorer repeats the check on the model's tokens.
    check_prefix_free([word.split() for word in words], words, where)
    for number, demonstration in enumerate(prompt.demonstrations):
        if not 0 <= demonstration.label < len(words):
            raise InputError(
                f"demonstration {number} of {where} has the label {demonstration.label}: use 0 to {len(words) - 1}"
            )
    if not encodable(prompt.text):
        raise InputError(f"{where} has characters that UTF-8 cannot encode: {prompt.text!r}")


def check_prefix_free(tokens: Sequence[Sequence[object]], words: Sequence[str], where: str) -> None:
    """Checks that no verbalizer has the same tokens as another one or begins with all tokens of another one.

    A text is at least as probable as each of its continuations, so the longer verbalizer could never be predicted.

    Args:
        tokens: tokens of each verbalizer.
        words: the verbalizers, for the error message.
        where: name of the prompt or task in the error message.

    Raises:
        InputError: naming the two verbalizers.
    """
    for i, first in enumerate(tokens):
        for j, second in enumerate(tokens):
            if i != j and list(first) == list(second[: len(first)]):
                how = "are the same tokens" if len(first) == len(second) else "cannot be told apart: the second goes on"
                raise InputError(f"the verbalizers {words[i]!r} and {words[j]!r} of {where} {how}; use other words")
