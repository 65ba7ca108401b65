"""Token-level PPO, GRPO and RLOO. Read ``on_policy`` first, then ``ppo``."""
