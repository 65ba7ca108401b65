"""The environment ids that importing instructgym registers in Gymnasium, and the spaces of their default envs."""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym

# The vocabulary of the embedded model, and the envs' default context length of 1024 tokens.
_TOKENS = "Discrete(49152)"
_TOKEN_IDS = "Dict('ids': Box(0, 49151, (1024,), int32), 'mask': Box(0, 1, (1024,), int8))"


@dataclass(frozen=True)
class EnvEntry:
    """A declaration of an environment as ``gymnasium.make`` creates it without further arguments.

    Spaces are stored as text, so that listing the environments imports nothing heavy.
    """

    entry_point: str
    """``"module:factory"`` of the single env."""
    vector_entry_point: str
    """``"module:factory"`` of the vector env."""
    action_space: str
    """Action space of the single env, as Gymnasium prints it."""
    observation_space: str
    """Observation space of the single env, as Gymnasium prints it."""
    episode: str
    """Longest episode, as text for a table."""


def _token_entry(name: str, tokens: int) -> EnvEntry:
    """Returns the entry of the token env of a file that is called as its functions are."""
    entry_point = f"instructgym.envs.{name}:{name}"
    return EnvEntry(entry_point, f"{entry_point}_vector", _TOKENS, _TOKEN_IDS, f"at most {tokens} tokens")


IDS = {
    "instructgym/EditPrompt-v0": EnvEntry(
        "instructgym.envs.edit_prompt:EditPromptEnv",
        "instructgym.envs.edit_prompt:EditPromptVectorEnv",
        "Discrete(8)",
        "Box(0.0, 1.0, (8,), float32)",
        "at most 6 edits",
    ),
    "instructgym/EvolveInstruction-v0": EnvEntry(
        "instructgym.envs.evolve_instruction:evolve_instruction",
        "instructgym.envs.evolve_instruction:evolve_instruction_vector",
        "Discrete(6)",
        "Box(0.0, 1.0, (6,), float32)",
        "at most 6 edits",
    ),
    "instructgym/GenerateInstance-v0": _token_entry("generate_instance", 96),
    "instructgym/GenerateLabel-v0": _token_entry("generate_label", 12),
    "instructgym/GeneratePrompt-v0": _token_entry("generate_prompt", 16),
    "instructgym/GenerateResponse-v0": _token_entry("generate_response", 48),
}
"""Entry of each environment id; ``tests/test_command_line.py`` compares the declared spaces with those of the envs."""


def register_envs() -> None:
    """Registers every id with Gymnasium; a second call changes nothing."""
    for env_id, entry in IDS.items():
        if env_id not in gym.registry:
            gym.register(env_id, entry_point=entry.entry_point, vector_entry_point=entry.vector_entry_point)
