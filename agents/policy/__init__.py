"""The language-model policy, its optimiser, its checkpoints, and several processes."""
