"""Rewards for the quality of an instruction with its instance: scorers, and a linear rule over them."""
