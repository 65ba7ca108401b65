"""Experiment that measures judges on pairs with known answers."""
