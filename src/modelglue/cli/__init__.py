"""Floor 8: the command line. One file per command group; each parses, calls, prints."""

from modelglue.cli.app import app, main

__all__ = ["app", "main"]
