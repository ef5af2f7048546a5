"""Losses as pure functions of tensors, a module for each family. Each names its source, shapes and units.

Here belongs arithmetic that a formula in a paper states. What keeps state, draws at random or communicates
goes to `parts` or to the objective itself.
"""
