"""`python -m modelglue` is the command `modelglue`."""

from modelglue.cli import main

main()
