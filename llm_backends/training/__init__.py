"""Training of a causal language model: LoRA adapters, passes over given responses, the output layer."""
