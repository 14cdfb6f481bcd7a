"""`sbft version`: what to state in a bug report."""

from __future__ import annotations


def version() -> None:
    """Show the versions of sbft and of the packages under it."""
    from sbft.training.record import git_commit, versions

    for name, number in versions().items():
        print(f"{name} {number}")
    if commit := git_commit():
        print(f"commit {commit}")
