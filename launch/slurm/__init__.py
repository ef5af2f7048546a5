"""Runs as jobs of a queue: submitted, requeued, resumed and cancelled, on which nodes and from which code.

Here belongs what a cluster makes necessary. `executor` alone imports submitit.
"""
