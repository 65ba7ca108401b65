"""Instruction data: seeds, filters, pools, instances, held-out tasks."""
