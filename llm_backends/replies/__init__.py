"""Stored replies: the request journal of a run, and the cache that runs share."""
