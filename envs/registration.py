"""The ids that importing instructgym adds to Gymnasium's registry."""

from __future__ import annotations

import gymnasium as gym

IDS = {
    "instructgym/EditPrompt-v0": (
        "instructgym.envs.edit_prompt:EditPromptEnv",
        "instructgym.envs.edit_prompt:EditPromptVectorEnv",
    ),
    "instructgym/EvolveInstruction-v0": (
        "instructgym.envs.evolve_instruction:evolve_instruction",
        "instructgym.envs.evolve_instruction:evolve_instruction_vector",
    ),
    "instructgym/GenerateInstance-v0": (
        "instructgym.envs.generate_instance:generate_instance",
        "instructgym.envs.generate_instance:generate_instance_vector",
    ),
    "instructgym/GenerateLabel-v0": (
        "instructgym.envs.generate_label:generate_label",
        "instructgym.envs.generate_label:generate_label_vector",
    ),
    "instructgym/GeneratePrompt-v0": (
        "instructgym.envs.generate_prompt:generate_prompt",
        "instructgym.envs.generate_prompt:generate_prompt_vector",
    ),
    "instructgym/GenerateResponse-v0": (
        "instructgym.envs.generate_response:generate_response",
        "instructgym.envs.generate_response:generate_response_vector",
    ),
}
"""Id to entry points of the single and of the vector env. Strings, so that nothing heavy is imported."""


def register_envs() -> None:
    """Registers every id; a second call changes nothing."""
    for env_id, (entry_point, vector_entry_point) in IDS.items():
        if env_id not in gym.registry:
            gym.register(env_id, entry_point=entry_point, vector_entry_point=vector_entry_point)
