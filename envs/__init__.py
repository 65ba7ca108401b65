"""The environments: instructions, prompts, labels and responses as episodes, made by ``gymnasium.make``.

A file at this level is one environment id. ``edit`` and ``tokens`` are the two MDPs, ``prompt_edit`` the edit MDP on
prompts, ``process`` what the MDPs share, ``tasks`` where episodes come from. The tables below give the ids that
``operator=`` and ``editor=`` take.
"""

from .. import rewards  # noqa: F401 - for its tables of parts; nothing heavy is imported
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
