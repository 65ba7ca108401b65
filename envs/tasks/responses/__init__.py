"""Free-text responses: their prompts, candidates for ranking, and minimal edits."""
