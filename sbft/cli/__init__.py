"""The `sbft` command: one short file a verb, heavy imports inside the functions."""

from sbft.cli.app import main

__all__ = ["main"]
