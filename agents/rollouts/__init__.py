"""Holds rollouts: batches of episodes, engines that generate them, and the base class of agents that learn from them.

Read ``agent`` first, then ``batch``.
"""
