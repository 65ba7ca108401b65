"""Holds the edit MDP: the state is a text, an action edits it."""
