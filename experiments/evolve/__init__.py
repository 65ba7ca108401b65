"""The experiments of TeaMs-RL: an agent chooses the edit operations that evolve seed instructions."""
