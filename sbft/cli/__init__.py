"""The `sbft` command: one file per verb, with heavy imports inside its functions."""

from sbft.cli.shared.starting import end_at_once_on_ctrl_c

__all__ = ["main"]


def main() -> None:
    """Run the `sbft` command."""
    end_at_once_on_ctrl_c()
    from sbft.cli.app import main as run_command

    run_command()
