"""Tuna experiments: candidate responses are ranked, and a policy learns from the rankings."""
