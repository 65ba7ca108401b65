"""Fine-grained experiments: a reward per token, learned from minimal edits, trains a policy by token-level PPO."""
