"""Runs other projects' trainer tests with sbft's trainer in place of theirs; see scripts/conformance.sh."""
