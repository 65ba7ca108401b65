"""Where episodes come from: seed instructions, operations on them, and the order in which examples are drawn."""
