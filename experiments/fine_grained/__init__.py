"""Fine-grained supervision: minimal edits give a reward per token, which drives token-level PPO."""
