"""Holds token-level PPO, GRPO and RLOO.

Read ``ppo`` for the algorithm, then ``on_policy`` for the training that all of them share.
"""
