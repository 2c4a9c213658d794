"""The command line: one command a file. Nothing heavy is imported before a command has its work to do."""

from .app import main

__all__ = ["main"]
