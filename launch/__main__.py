"""`python -m launch` is `keel`."""

from launch.cli.main import main

main()
