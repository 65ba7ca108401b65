"""Reward models that the library trains, per token or per response, and the edits they learn from."""
