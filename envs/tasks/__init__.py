"""Data of the environments: tasks, prompts and examples from the package, from local files or from the hub."""
