"""Rewards computed from the text alone: overlap, diversity and sentiment."""
