"""Gymnasium environments whose episodes write or edit instructions, prompts, labels and responses.

Read ``process.py`` first, which holds what all environments share, then one of the two MDPs: ``edit``, whose actions
edit a text (``prompt_edit`` applies it to prompts), or ``tokens``, whose actions append a token. ``tasks`` holds the
data. Each of the other files defines one environment id of ``registration.py``. The tables below hold the ids that
``operator=`` and ``editor=`` take.
"""

from .. import rewards  # noqa: F401 - registers the ids of rewards and rankers; imports nothing heavy
from ..llm_backends.parts import register_kind, register_parts

register_kind("operator", "instructgym.envs.edit.operators:Operator")

register_kind("prompt-operator", "instructgym.envs.prompt_edit.operators:PromptOperator")
register_parts(
    "prompt-operator",
    {
        "edits": "instructgym.envs.prompt_edit.operators:PromptEdits",
        "phrases": "instructgym.envs.prompt_edit.operators:PhraseEdits",
        "free-text": "instructgym.envs.prompt_edit.operators:FreeText",
    },
)

register_kind(
    "editor",
    "instructgym.envs.tasks.responses.editors:Editor",
    "instructgym.envs.tasks.responses.editors:FunctionEditor",
)
register_parts(
    "editor",
    {
        "llm": "instructgym.envs.tasks.responses.editors:LLMEditor",
        "sentiment-swaps": "instructgym.envs.tasks.responses.sentiment_editor:SentimentEditor",
    },
)
