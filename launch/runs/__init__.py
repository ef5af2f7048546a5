"""Many runs, looked at from outside: their files, how each stands, what the queue says of their jobs.

Here belongs what reads; nothing here starts, stops or submits a run.
"""
