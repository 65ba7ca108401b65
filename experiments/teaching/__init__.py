"""Fine-tuning on made data, evaluation on held-out tasks, membership inference."""
