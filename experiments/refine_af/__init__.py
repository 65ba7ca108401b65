"""The experiments of REFINE-AF: a small model bootstraps instructions and learns from automated feedback."""
