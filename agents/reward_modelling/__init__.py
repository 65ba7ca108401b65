"""Training of reward models on edited pairs."""
