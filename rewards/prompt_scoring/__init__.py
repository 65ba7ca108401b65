"""Rewards for prompts: how well a frozen model solves a task with them."""
