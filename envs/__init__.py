"""Environments: the edit MDP and its vector forms. Made through ``gymnasium.make("instructgym/...")``."""
