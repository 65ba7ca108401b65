"""What studies share: options, run folders, clocks, checkpoints, trackers, figures."""
