"""Programs that benchmarks run in their own processes, each for one side of a comparison; the environment of TRL."""
