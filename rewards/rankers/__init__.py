"""Rankers order candidate responses; the reward ``rank`` gives a sample its place."""
