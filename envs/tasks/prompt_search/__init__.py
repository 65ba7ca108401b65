"""Labelled tasks for prompt search, and examples whose response is a prompt."""
