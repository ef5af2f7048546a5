"""Shards to batches. Knows nothing of objectives: it is asked for views."""
