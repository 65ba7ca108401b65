"""Labelled tasks for which prompts are sought."""
