"""Learning from ranked responses: losses, an offline trainer, an agent that ranks its own samples."""
