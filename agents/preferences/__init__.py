"""Learning from ranked responses: losses, an offline trainer, an agent that ranks samples. Read ``losses`` first."""
