"""The `sbft` command: one short file a verb, heavy imports inside the functions."""

from sbft.cli.starting import ctrl_c_ends_at_once

__all__ = ["main"]


def main() -> None:
    """Run the `sbft` command."""
    with ctrl_c_ends_at_once():
        from sbft.cli.app import main as run_command
    run_command()
