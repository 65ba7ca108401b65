"""Judges measured on pairs with known answers."""
