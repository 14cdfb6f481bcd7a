"""Checkpoints: what is in a run's folder, how it is written, and what can keep it from being written."""
