"""Adapters of the foreign training engines: nothing outside this folder knows DeepSpeed or accelerate."""
