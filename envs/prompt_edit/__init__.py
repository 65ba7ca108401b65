"""The edit MDP on prompts of a frozen model: instruction, demonstrations, verbalizers."""
