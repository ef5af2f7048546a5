"""Whether a run does well and when it stops: signals and limits, losses that go astray, stalls, slow ranks.

Here belongs what watches a training and may end it. What it writes down about itself is `tracking`.
"""
