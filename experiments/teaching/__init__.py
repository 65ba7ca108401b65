"""Experiments on generated data: fine-tuning, evaluation on held-out tasks, membership inference."""
