"""`python -m launch` is `keel`."""

from launch.cli import main

main()
