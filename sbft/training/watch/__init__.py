"""Watches a run for what goes wrong without an error."""
