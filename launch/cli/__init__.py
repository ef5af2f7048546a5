"""The command line, a module for each command or family of commands; `main` is where `keel` enters.

Here belongs what reads options and prints. What a command does lies in the rooms below.
"""
