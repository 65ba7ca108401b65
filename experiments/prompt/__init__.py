"""Experiments that search for a prompt for a frozen model: a single search, and a comparison of methods."""
