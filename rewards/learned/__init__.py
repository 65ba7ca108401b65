"""Reward models that are trained here, per token or per response, and the edits they learn from."""
