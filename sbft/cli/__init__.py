"""The `sbft` command: one short file a verb, heavy imports inside the functions."""

from sbft.cli.shared.starting import end_at_once_on_ctrl_c

__all__ = ["main"]


def main() -> None:
    """Run the `sbft` command."""
    end_at_once_on_ctrl_c()
    from sbft.cli.app import main as run_command

    run_command()
