"""A run's life: its folder, what it starts from, its attempts, and what is read back from it.

Here belongs what knows a whole run. What one step needs is `trainer`, what judges it `judging`, what
starts ranks `launch`.
"""
