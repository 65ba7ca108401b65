"""Holds the language-model policy, its optimiser, its checkpoints, and training in several processes.

Read ``language_model`` first.
"""
