"""Ranks as processes: one of them, many on this machine, and what they print.

Here belongs what holds on any machine. What only a queue knows is `slurm`.
"""
