"""Holds token-level PPO, GRPO and RLOO.

Read ``ppo`` for the algorithm, then ``on_policy`` for the loop that all of them share.
"""
