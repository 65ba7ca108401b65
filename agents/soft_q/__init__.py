"""Soft Q-learning on a language model."""
