"""Rewards from a judge LLM, which scores one text, compares a pair or ranks a group."""
