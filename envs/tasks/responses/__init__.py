"""Free responses: what they answer, candidates for ranking, and minimal edits of them."""
