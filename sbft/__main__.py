"""`python -m sbft` is the `sbft` command."""

from sbft.cli import main

main()
