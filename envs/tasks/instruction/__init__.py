"""Instruction data: seed instructions, filters, task pools, instances, held-out tasks."""
