"""Models in this process: loading, tokenising, sampling, caches, sentence embeddings."""
