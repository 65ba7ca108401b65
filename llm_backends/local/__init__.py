"""Models in this process: loading, tokenizers, sampling, prefix cache, sentence embeddings.

``backend.py`` holds the backends, ``causal_lm.py`` the model that they share, ``sampling.py`` its decode loop.
"""
