"""Code that all experiments share: options, run folders, training with checkpoints, statistics, tables, figures."""
