"""Experiments on language understanding by reinforcement learning."""
