"""Holds learning from ranked responses: losses, an offline trainer and an agent that ranks its samples."""
