"""Benchmarks that measure this library and a baseline side by side in one run."""
