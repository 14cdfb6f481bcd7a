"""Runs other projects' own trainer tests with sbft's trainer in the place of theirs; see scripts/conformance.sh."""
