"""Rewards that read the text alone: overlap, diversity, sentiment."""
