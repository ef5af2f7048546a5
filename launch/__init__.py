"""Runs, on this machine or a cluster: the command line and what starts ranks."""
