"""Rankers, which order candidate responses; the reward ``rank`` scores a sample by its place in its group."""
