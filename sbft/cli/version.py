"""`sbft version`: what to put into a bug report."""

from __future__ import annotations

from typing import Annotated

import typer

from sbft.cli.shared.starting import starting


def version(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="All that a bug report needs: device, compiler, kernels, memory.")
    ] = False,
) -> None:
    """Show versions; with --verbose all that a bug report needs."""
    if verbose:
        with starting():
            from sbft.cli.installation import installation
        facts = installation()
        width = max(map(len, facts)) + 2
        for name, text in facts.items():
            print(f"{name:<{width}}{text}")
        return
    from sbft.runs.record import git_commit, versions

    for name, number in versions().items():
        print(f"{name} {number}")
    if commit := git_commit():
        print(f"commit {commit}")
