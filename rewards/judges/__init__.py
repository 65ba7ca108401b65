"""Judge models: verdicts on one text, on pairs, on groups."""
