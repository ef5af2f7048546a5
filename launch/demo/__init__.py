"""The whole of keel in a few minutes: what is trained, what is found in it, what is drawn.

Here belongs what `keel demo` alone does.
"""
