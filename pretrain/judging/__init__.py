"""How a frozen model is judged: as evaluations see it, its features, when they come due, what is drawn.

Here belongs what several evaluations use, or what calls them. A kind of evaluation is a file of `evaluators`.
"""
