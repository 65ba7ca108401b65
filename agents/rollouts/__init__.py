"""Episodes that a policy writes: the batch, the engines, the agents that learn from their own."""
