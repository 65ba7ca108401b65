"""Prompts for a frozen model: one search, several compared."""
