"""Sweeps: which members there are, which are missing, and that a sweep is still the one it was.

Here belongs what compares many configs before they run. How runs compare afterwards is `runs`.
"""
