"""Replies that are kept: the journal of a run, and the cache that runs share."""
