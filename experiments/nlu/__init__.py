"""RL for language understanding."""
