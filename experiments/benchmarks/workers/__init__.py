"""The processes that benchmarks start, one side of a comparison each."""
