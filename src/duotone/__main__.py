"""`python -m duotone` is the command `duotone`."""

from duotone.cli import main

main()
