"""The command line: one subcommand per job, each a thin call into a room."""

from turnout.cli.main import main

__all__ = ["main"]
