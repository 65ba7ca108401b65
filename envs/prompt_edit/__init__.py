"""Holds the edit MDP on prompts of a frozen model: edits of instruction, demonstrations and verbalizers."""
