"""TeaMs-RL: an agent picks edit operations that evolve instructions."""
