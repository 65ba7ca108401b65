"""``python -m instructgym``: the same as the command ``instructgym``."""

from .experiments.cli import main

main()
