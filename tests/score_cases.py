"""Words, examples and scripted likelihoods that tests of task scores and of rewards on them share."""

from instructgym.llm_backends.scripted import ScriptedBackend
from instructgym.rewards import LabelledExample

WORDS = ("good", "bad")
EXAMPLES = [
    LabelledExample("a", "a warm film", 0),
    LabelledExample("b", "dull", 1),
    LabelledExample("c", "write a short poem about the sea and three things", 0),
]


def scripted(table):
    """A model whose likelihood of a word is that of the first piece of the table in the prompt's last line but one."""

    def score(prompt, word):
        asked = prompt.rsplit("Input: ", 1)[1]
        return next(values[word.strip()] for piece, values in table.items() if piece in asked)

    return ScriptedBackend(score=score)
