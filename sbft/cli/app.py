"""The typer application."""

from __future__ import annotations

import typer

app = typer.Typer(name="sbft", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Fine-tune all weights of a language model at batch size 1."""


def main() -> None:
    """Run the `sbft` command."""
    app()
