"""Experiments: one command per question, each with a run folder; the CLI; tracking; figures; benchmarks."""
